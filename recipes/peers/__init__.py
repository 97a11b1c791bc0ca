"""Random networks of other packages' classes, and what `mmtok check` finds of them."""
