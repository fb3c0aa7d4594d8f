"""Every figure that the project quotes, one command each."""
