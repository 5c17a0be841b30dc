"""Maps arrays to devices: makes a mesh, and shards logical axes over the mesh axes by rules.

This is Megatron-LM's tensor parallelism (Shoeybi et al., 2019, arXiv:1909.08053): heads, the MLP's
intermediate features and the vocabulary are split over "model", and hidden features are replicated.
Parameters are replicated over "data".
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from llama_jax.model.config import LlamaConfig
from llama_jax.model.kv_cache import KVCache

RULES: Mapping[str, str] = MappingProxyType(
    {"vocab": "model", "heads": "model", "kv_heads": "model", "mlp": "model"}
)


def make_mesh(
    model: int | None = None, data: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Make a mesh with axes ("data", "model").

    model: the size of that axis; None for all devices divided by `data`.

    Raises ValueError if there are fewer than data * model devices. Surplus devices stay idle.
    """
    devices = jax.devices() if devices is None else devices
    if model is None:
        model = len(devices) // max(data, 1)
    if data < 1 or model < 1 or data * model > len(devices):
        raise ValueError(
            f"a mesh of data={data} x model={model} needs {max(data, 1) * max(model, 1)} devices, "
            f"there are {len(devices)}"
        )
    return Mesh(np.array(devices[: data * model]).reshape(data, model), ("data", "model"))


def cache_shardings(config: LlamaConfig, mesh: Mesh | None) -> KVCache:
    """Return a `KVCache` with a Sharding for each array: pages are split over kv heads, all else is
    replicated."""
    if mesh is None:
        pages = rest = default_sharding()
    else:
        # The rule depends on the size of the kv heads' dimension alone.
        shape = (1, 1, config.num_kv_heads, config.head_dim)
        pages = sharding_of(mesh, (None, None, "kv_heads", None), shape)
        rest = replicated_on(mesh)
    layers, scales = (pages,) * config.num_layers, (rest,) * config.num_layers
    return KVCache(layers, layers, scales, scales, rest, rest)  # type: ignore[arg-type]


def replicated_on(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def default_sharding() -> Sharding:
    """Return the sharding that puts everything on JAX's default device."""
    return SingleDeviceSharding(jax.config.jax_default_device or jax.devices()[0])


def divided_over(axis: str) -> str | None:
    """Return the mesh axis over which a logical axis is split, inside shard_map.

    Returns None outside shard_map, and for a replicated dimension.
    """
    placed = RULES.get(axis)
    return placed if placed in jax.sharding.get_abstract_mesh().manual_axes else None


def sharding_of(mesh: Mesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
    """Return the sharding of an array of `shape` whose dimensions have these logical axes.

    A dimension that the mesh axis does not divide evenly is replicated.
    """
    placed = (RULES.get(axis) if axis else None for axis in axes)
    divided = (
        name if name and size % mesh.shape[name] == 0 else None
        for name, size in zip(placed, shape, strict=True)
    )
    return NamedSharding(mesh, PartitionSpec(*divided))
