"""Tools for writing kernels: check, time, tune, compile without a GPU, report."""
