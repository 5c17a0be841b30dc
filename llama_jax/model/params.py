"""The parameter tree: its shapes, its axes' names, where it lies, and random values for it."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
from flax import linen as nn

from llama_jax.model.llama import Llama
from llama_jax.model.sharding import default_sharding, sharding_of
from llama_jax.model.spec import ModelSpec, Params


def abstract_params(spec: ModelSpec) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s, nested by module name."""
    return nn.unbox(_boxed_params(_declaring(spec)))


def logical_axes(spec: ModelSpec) -> Params:
    """The parameter tree with a `PartitionSpec` of logical axis names in place of each array."""
    return nn.get_partition_spec(_boxed_params(_declaring(spec)))


def init_params(spec: ModelSpec, seed: int = 0) -> Params:
    """Random parameters in the formats of `spec`, for tests, benchmarks and training."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = jax.jit(Llama(_declaring(spec)).init)
    return nn.unbox(init(jax.random.key(seed), tokens)["params"])


def _declaring(spec: ModelSpec) -> ModelSpec:
    """What declares the same parameters on any device, whatever runs with them."""
    return replace(spec, implementation="xla", mesh=None)


def param_shardings(spec: ModelSpec) -> Params:
    """The tree `abstract_params(spec)` with a Sharding for each array.

    Without a mesh everything lies on the default device. A dimension that the mesh axis does not
    divide (block scales of a narrow matrix, a handful of kv heads over many devices) is not split:
    every device of that axis then holds all of it, which `memory.plan_memory` counts.
    """
    mesh, abstract = spec.mesh, abstract_params(spec)
    shardings: Params
    if mesh is None:
        shardings = jax.tree.map(lambda _: default_sharding(), abstract)
    else:
        shardings = jax.tree.map(
            lambda leaf, axes: sharding_of(mesh, tuple(axes), leaf.shape),
            abstract,
            logical_axes(spec),
        )
    return shardings


@cache
def _boxed_params(spec: ModelSpec) -> Params:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Llama(spec).init, jax.random.key(0), tokens)["params"]
