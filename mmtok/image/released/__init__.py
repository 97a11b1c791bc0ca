"""Published weights of the image tokenizers: their key names -> ours, one file a family."""
