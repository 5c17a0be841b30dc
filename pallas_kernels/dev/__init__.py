"""Tools for those who write kernels: check, time, tune, compile without a GPU, report."""
