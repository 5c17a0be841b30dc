"""Kernels for FP8 inference in JAX, usable without the rest of llama-jax.

Each operation is a package: `__init__.py` has the function and its contract, `reference.py` its
definition in plain float32 JAX, and `xla.py` a form that XLA runs fast. Kernels for a kind of
hardware are in modules named after it.
"""

import os

# With the extra `aot`, JAX finds NVIDIA's plugin, which prints a traceback about missing drivers
# and libraries on a machine without a GPU. It can compile for a GPU without that check. JAX itself
# decides by these devices whether to start the plugin.
HAS_NVIDIA_DRIVER = any(os.path.exists(f"/dev/{n}") for n in ("nvidia0", "nvidiactl", "dxg"))
if not HAS_NVIDIA_DRIVER:
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
