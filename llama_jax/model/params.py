"""Describes the parameter tree (shapes, logical axes, shardings) and makes random parameters."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
from flax import linen as nn

from llama_jax.model.llama import Llama
from llama_jax.model.sharding import default_sharding, sharding_of
from llama_jax.model.spec import ModelSpec, Params


def abstract_params(spec: ModelSpec) -> Params:
    """Return the parameter tree as `jax.ShapeDtypeStruct`s, nested by module name."""
    return nn.unbox(_boxed_params(_declaring(spec)))


def logical_axes(spec: ModelSpec) -> Params:
    """Return the parameter tree with a `PartitionSpec` of logical axis names for each array."""
    return nn.get_partition_spec(_boxed_params(_declaring(spec)))


def init_params(spec: ModelSpec, seed: int = 0) -> Params:
    """Draw random parameters in the formats of `spec`, for tests, benchmarks and training."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    init = jax.jit(Llama(_declaring(spec)).init)
    return nn.unbox(init(jax.random.key(seed), tokens)["params"])


def _declaring(spec: ModelSpec) -> ModelSpec:
    """Return a spec that declares the same parameters and does not depend on device or kernels."""
    return replace(spec, implementation="xla", mesh=None)


def param_shardings(spec: ModelSpec) -> Params:
    """Return a tree like `abstract_params(spec)` with a Sharding for each array.

    Without a mesh everything is on the default device. A dimension that the mesh axis does not
    divide evenly (block scales of a narrow matrix, few kv heads over many devices) is replicated;
    `memory.plan_memory` takes that into account.
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
