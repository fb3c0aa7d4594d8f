"""Other libraries' saves, read and written."""
