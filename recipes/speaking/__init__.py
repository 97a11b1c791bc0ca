"""A small language model that reads and writes text, pictures and speech: what recipes/lm_multimodal.py is made of."""
