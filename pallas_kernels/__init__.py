"""Kernels for FP8 inference in JAX, usable without the rest of llama-jax.

Each operation is a package: its `__init__` is the call and its contract, `reference.py` the
semantics in plain float32 JAX, `xla.py` the formulation XLA is fast at. Kernels for one kind of
hardware stand beside them under its name.
"""
