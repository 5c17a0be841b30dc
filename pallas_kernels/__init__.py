"""Kernels for FP8 inference in JAX, usable without the rest of llama-jax.

Each operation is a package: `__init__.py` has the call and its contract, `reference.py` the meaning
in plain float32 JAX, and `xla.py` the form that XLA runs fast. Kernels for one kind of hardware are
beside them, under its name.
"""

import os

# With the extra `aot`, JAX finds NVIDIA's plugin, which looks for drivers and libraries that a
# machine without a GPU does not have, and prints a traceback. The plugin can compile for a GPU
# without that check. JAX itself decides by these devices whether to start the plugin.
if not any(os.path.exists(f"/dev/{name}") for name in ("nvidia0", "nvidiactl", "dxg")):
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
