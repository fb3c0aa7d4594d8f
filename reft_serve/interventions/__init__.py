"""The maths of ReFT: kinds, position rules, the reference edit and its batched forms. Tensors and
nothing else.

Import the submodule you need: `positions` works without torch.
"""
