"""A served model asked the questions of a data file, and its answers scored. No torch, no
training.
"""
