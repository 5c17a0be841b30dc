"""Limits of the kernels, for those who ask before Mosaic GPU is imported."""

# Rows of x that "hopper_weight_only" takes.
MAX_WEIGHT_ONLY_ROWS = 64
