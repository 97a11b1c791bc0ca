"""Published weights of the audio tokenizers: their key names -> ours, one file a family."""
