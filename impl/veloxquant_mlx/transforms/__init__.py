"""What is done to vectors before they are coded, drawn from a seed: rotations.

The transform itself, as a matrix and as kernels compute it, is ``veloxquant_kernels.rotation``; here stands which one a
seed means. Another draw for the same seed would make saved caches unreadable.
"""
