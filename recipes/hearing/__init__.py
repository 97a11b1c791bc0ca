"""What the audio recipes share."""
