"""Rows of a data file as batches of token ids."""
