"""The frozen base model with the weights that learn."""
