"""What the kernels take, for those who ask before Mosaic GPU is imported, as the kernels do."""

# Of x, that "hopper_weight_only" takes.
MAX_WEIGHT_ONLY_ROWS = 64
