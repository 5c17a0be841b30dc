"""Tells what a program is being lowered for, as far as that is known while it is traced."""

import jax

HOPPER = "9.0"
FIRST_WITH_FP8 = 8.9
H200_MULTIPROCESSORS = 132


def not_hopper() -> str | None:
    """Say why kernels for Hopper cannot run on the device that is lowered for; None if they can.

    That device is the abstract one of the mesh in use (`pallas_kernels.dev.sm90` sets one), or else
    JAX's default device.
    """
    if (abstract := jax.sharding.get_abstract_mesh().abstract_device) is not None:
        kind = abstract.device_kind
        return None if kind.startswith(("NVIDIA H100", "NVIDIA H200")) else f"{kind} is no Hopper"
    if jax.default_backend() != "gpu":
        return f"JAX runs on {jax.default_backend()}, not on a GPU"
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "unknown")
    if capability != HOPPER:
        return f"{device.device_kind} has compute capability {capability}, not {HOPPER}"
    return None


def has_fp8_tensor_cores() -> bool:
    """Return whether the device multiplies FP8 by FP8, as GPUs do since Ada and Hopper."""
    if jax.sharding.get_abstract_mesh().abstract_device is not None:
        return not_hopper() is None
    if jax.default_backend() != "gpu":
        return False
    return float(getattr(jax.devices()[0], "compute_capability", 0)) >= FIRST_WITH_FP8


def platform() -> str:
    """Return the platform that is lowered for, such as "gpu" or "cpu"."""
    if (abstract := jax.sharding.get_abstract_mesh().abstract_device) is not None:
        return str(abstract.platform)
    return jax.default_backend()


def kind() -> str | None:
    """Return the name of the GPU that is lowered for, such as "NVIDIA H200"; None for no GPU."""
    if (abstract := jax.sharding.get_abstract_mesh().abstract_device) is not None:
        return str(abstract.device_kind)
    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else None


def is_local() -> bool:
    """Return whether arrays are whole where they are used: on one device, or inside shard_map.

    XLA cannot divide a Pallas kernel over devices; it would gather its operands first.
    """
    return jax.device_count() == 1 or bool(jax.sharding.get_abstract_mesh().manual_axes)


def not_local() -> str | None:
    """Say why kernels cannot take the arrays as they lie (see `is_local`); None if they can."""
    return None if is_local() else "arrays may be divided over devices: call it inside of shard_map"


def num_sms() -> int:
    """Return the number of SMs of the GPU that is lowered for, an H200's where none is known."""
    if (abstract := jax.sharding.get_abstract_mesh().abstract_device) is not None:
        return int(abstract.num_cores)
    if jax.default_backend() == "gpu":
        return int(jax.devices()[0].core_count)
    return H200_MULTIPROCESSORS
