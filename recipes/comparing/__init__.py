"""The parts of `recipes/bench_readme.py` and `recipes/ship.py`: what is compared on what, and README's tables of it."""
