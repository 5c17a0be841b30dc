"""Compiles arithmetic on pieces of weights for the host's CPU, even if there are other devices."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def on_host(function: Callable[..., Any], static: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Compile a function for the CPU, with NumPy arrays in and out.

    static: names of static arguments.
    """
    compiled = jax.jit(function, static_argnames=static)

    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.default_device(jax.devices("cpu")[0]):
            return jax.tree.map(np.asarray, compiled(*args, **kwargs))

    return call
