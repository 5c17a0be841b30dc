"""The layouts that can be read. A new one is a module here and an entry in `DIALECTS`."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from converters.dialects.dense import DENSE
from converters.dialects.friendli import FRIENDLI
from converters.dialects.layout import Dialect, Tensors
from llama_jax.checkpoint import CheckpointError

DIALECTS: tuple[Dialect, ...] = (DENSE, FRIENDLI)


def detect(hf_config: Mapping[str, Any], tensors: Tensors) -> Dialect:
    """The one dialect that a checkpoint's config.json and tensors belong to.

    Raises `CheckpointError` with what was found and what is supported.
    """
    fitting = [dialect for dialect in DIALECTS if dialect.applies(hf_config, tensors)]
    if len(fitting) == 1:
        return fitting[0]
    supported = "\n".join(f"  {dialect.name}: {dialect.description}" for dialect in DIALECTS)
    raise CheckpointError(
        f"this checkpoint's layout is not supported. Found: {_found(hf_config, tensors)}.\n"
        f"Supported:\n{supported}"
    )


def _found(hf_config: Mapping[str, Any], tensors: Tensors) -> str:
    key = "quantization_config" if "quantization_config" in hf_config else "compression_config"
    plain = {k: v for k, v in (hf_config.get(key) or {}).items() if isinstance(v, str | int)}
    dtypes = Counter(
        tensor.dtype.name for name, tensor in tensors.items() if name.endswith("weight")
    )
    leaves = Counter(
        name.rpartition(".")[2] for name in tensors if not name.endswith((".weight", "inv_freq"))
    )
    return "; ".join(
        [
            f"{key} {plain}" if plain else "no quantization_config",
            "weights " + (", ".join(f"{n} x {dtype}" for dtype, n in dtypes.items()) or "none"),
            "beside them " + (", ".join(sorted(leaves)) or "nothing"),
        ]
    )
