"""What features are worth, and features of whole scenes."""
