"""Describes the target device: the one for which a program is being lowered."""

import jax

HOPPER = "9.0"
FIRST_WITH_FP8 = 8.9
H200_MULTIPROCESSORS = 132


def not_hopper() -> str | None:
    """Return why kernels for Hopper cannot run on the target device; None if they can.

    The target is the abstract device of the mesh in use (`pallas_kernels.dev.sm90` sets one), or
    else JAX's default device.
    """
    if (abstract := jax.sharding.get_abstract_mesh().abstract_device) is not None:
        kind = abstract.device_kind
        return (
            None
            if kind.startswith(("NVIDIA H100", "NVIDIA H200"))
            else f"{kind} is not a Hopper GPU"
        )
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
    """Return the target platform, such as "gpu" or "cpu"."""
    if (abstract := jax.sharding.get_abstract_mesh().abstract_device) is not None:
        return str(abstract.platform)
    return jax.default_backend()


def kind() -> str | None:
    """Return the name of the target GPU, such as "NVIDIA H200"; None for another target."""
    if (abstract := jax.sharding.get_abstract_mesh().abstract_device) is not None:
        return str(abstract.device_kind)
    return jax.devices()[0].device_kind if jax.default_backend() == "gpu" else None


def is_local() -> bool:
    """Return whether arrays are not divided over devices: on a single one, or inside shard_map.

    XLA cannot divide a Pallas kernel over devices; it would gather the operands first.
    """
    return jax.device_count() == 1 or bool(jax.sharding.get_abstract_mesh().manual_axes)


def not_local() -> str | None:
    """Return why kernels cannot take arrays that may be divided; None if `is_local()`."""
    return None if is_local() else "arrays may be divided over devices: call it inside of shard_map"


def num_sms() -> int:
    """Return the number of SMs of the target GPU, or of an H200 if it is unknown."""
    if (abstract := jax.sharding.get_abstract_mesh().abstract_device) is not None:
        return int(abstract.num_cores)
    if jax.default_backend() == "gpu":
        return int(jax.devices()[0].core_count)
    return H200_MULTIPROCESSORS
