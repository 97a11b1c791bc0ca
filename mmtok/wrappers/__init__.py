"""Other people's tokenizers behind our interface: one file a family, its package imported at use."""
