"""C++ kernels for CPUs, called through XLA's foreign function interface and compiled at first use.

`compiler` compiles and keeps them, `library` loads them and gives them to XLA.
"""
