"""Has limits of the kernels that are needed before Mosaic GPU is imported."""

# The most rows of x that "hopper_weight_only" takes.
MAX_WEIGHT_ONLY_ROWS = 64
