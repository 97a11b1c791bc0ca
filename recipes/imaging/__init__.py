"""What the recipes that check the claims of image tokenizers share."""
