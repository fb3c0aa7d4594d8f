"""DATA AT REST: the rows of a training file, read and checked whole. Gateway and trainer ask the
same code. No torch.
"""
