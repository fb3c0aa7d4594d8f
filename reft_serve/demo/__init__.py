"""A small base model, a few adapters trained on it, and a demonstration that serves them in one
batch.
"""
