"""Kernels for FP8 inference in JAX, usable without the rest of llama-jax.

Each operation is a package: its `__init__` is the call and its contract, `reference.py` the
semantics in plain float32 JAX, `xla.py` the formulation XLA is fast at. Kernels for one kind of
hardware stand beside them under its name.
"""

import os

# With the extra `aot` JAX finds NVIDIA's plugin, which checks drivers and libraries that a machine
# without a GPU does not have, and prints a traceback. These are the devices by which JAX itself
# decides whether to start the plugin; that it can compile for a GPU does not hang on the check.
if not any(os.path.exists(f"/dev/{name}") for name in ("nvidia0", "nvidiactl", "dxg")):
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
