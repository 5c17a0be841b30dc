"""C++ kernels for CPUs, called through XLA's foreign function interface and compiled at first use.

`library` compiles, keeps and loads them. XLA calls what kernels.cpp names.
"""
