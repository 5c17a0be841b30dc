"""A converted checkpoint on disk, and its way into device memory.

A directory holds:

    manifest.json      what the checkpoint is: `Manifest`
    params/            one Orbax PyTree checkpoint of the tree `abstract_params(spec)`
    tokenizer.json ... the tokenizer's files, as published

`params/` is plain Orbax: `orbax.checkpoint.StandardCheckpointer().restore(directory / "params")`
reads it without this project.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import traverse_util
from flax.core import FrozenDict
from jax import Array
from jax.sharding import Mesh

from llama_jax.config import ConfigError, LlamaConfig
from llama_jax.fp8 import WeightFormat
from llama_jax.model import Activations, ModelSpec, Params, abstract_params
from llama_jax.sharding import param_shardings
from pallas_kernels import e4m3

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PARAMS = "params"
# Host memory, in GB, that Orbax may hold while arrays are on their way to the devices.
_RESTORE_GB = 4


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete, or laid out in a way that is not supported."""


@dataclass(frozen=True)
class Manifest:
    """What a converted checkpoint is.

    dialect: the layout it was converted from. source: the name of that directory.
    formats: how every module's weight is stored, by module path ("layers_0/mlp/up_proj").
    kv_scales: float (k, v) per layer for an FP8 cache, None when the checkpoint has none.
    generation: the contents of generation_config.json, {} without one.
    tokenizer_files: names of the tokenizer's files, which lie beside the manifest.
    total_bytes: of all parameters.
    """

    dialect: str
    source: str
    config: LlamaConfig
    formats: Mapping[str, WeightFormat]
    kv_scales: tuple[tuple[float, float], ...] | None
    generation: Mapping[str, Any]
    tokenizer_files: tuple[str, ...]
    total_bytes: int
    llama_jax_version: str
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "formats", FrozenDict(self.formats))

    def spec(self, dtype: str = "bfloat16", activations: Activations = "bf16") -> ModelSpec:
        """The model that these parameters belong to."""
        return ModelSpec(self.config, self.formats, dtype, activations)

    def to_json(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["config"] = self.config.to_dict()
        values["formats"] = {path: asdict(stored) for path, stored in self.formats.items()}
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of a converted checkpoint.

    Raises `CheckpointError` if there is none, or one that this version cannot read.
    """
    path = Path(directory) / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} is not a converted checkpoint: it has no {MANIFEST}. Convert one with "
            "llama-jax convert."
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {version!r}, this version of llama_jax reads "
            f"{FORMAT_VERSION}. Convert the checkpoint again."
        )
    try:
        pairs = values["kv_scales"]
        return Manifest(
            **{
                **values,
                "config": LlamaConfig.from_dict(values["config"]),
                "formats": {k: WeightFormat(**v) for k, v in values["formats"].items()},
                "kv_scales": pairs and tuple((float(k), float(v)) for k, v in pairs),
                "tokenizer_files": tuple(values["tokenizer_files"]),
            }
        )
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}. Convert again.") from error


def resolve(path_or_id: str | Path, cache_dir: str | Path | None = None) -> Path:
    """The converted directory for a converted directory, a Hugging Face directory or a hub id.

    The latter two are converted once, see `converters.resolve.resolve`, which this calls.
    """
    path = Path(path_or_id).expanduser()
    if (path / MANIFEST).is_file():
        return path
    # The converters stand on top of this package, so they are imported only when needed.
    from converters.resolve import resolve as convert_once

    return convert_once(path_or_id, cache_dir)


def load_params(
    directory: str | Path, spec: ModelSpec, mesh: Mesh | None = None, *, bits: bool = False
) -> Params:
    """Restore the parameters of a converted checkpoint, each array straight to its devices.

    Returns the tree `abstract_params(spec)`, sharded by `param_shardings(spec, mesh)`. With `bits`
    float8_e4m3fn arrays come as int8 bit patterns of the same bytes, which is what compiled
    programs want on a CPU (see `pallas_kernels.e4m3`).
    Raises `CheckpointError` naming the parameter that is missing, damaged, or of another shape or
    dtype than `spec` says.
    """
    root = Path(directory).resolve() / PARAMS
    expected = abstract_params(spec)
    _check_stored(root, expected)
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        expected,
        param_shardings(spec, mesh),
    )
    handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=_restore_gb(expected))
    with ocp.Checkpointer(handler) as checkpointer:
        params: Params = checkpointer.restore(root, args=ocp.args.StandardRestore(target))
    return jax.tree.map(_as_bits, params) if bits else params


def _restore_gb(expected: Params) -> int:
    """`_RESTORE_GB`, or more for the largest array: Orbax refuses one that reaches its limit."""
    largest = max(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(expected))
    return max(_RESTORE_GB, largest // 10**9 + 1)


def _as_bits(array: Array) -> Array:
    """`e4m3.as_bits`, shard by shard; other dtypes are left alone."""
    if array.dtype != e4m3.DTYPE:
        return array
    shards = [e4m3.as_bits(shard.data) for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def _check_stored(root: Path, expected: Params) -> None:
    """Compare what lies in `root` with the tree that is wanted, before anything is read.

    Orbax would cast another dtype silently and read a missing chunk as zeros.
    """
    wanted = traverse_util.flatten_dict(expected, sep=".")
    found = {path.parent.name for path in root.glob("*/.zarray")}
    for name in sorted(wanted.keys() - found):
        raise CheckpointError(f"{root} lacks {name}, which the model needs")
    for name in sorted(found - wanted.keys()):
        raise CheckpointError(f"{root} holds {name}, which the model has no place for")
    for name, leaf in wanted.items():
        try:
            stored = json.loads((root / name / ".zarray").read_text())
        except ValueError as error:
            raise CheckpointError(
                f"{root / name / '.zarray'} is damaged: {error}. Convert the checkpoint again."
            ) from error
        dtype = {"<f4": "float32", "<f2": "float16"}.get(stored["dtype"], stored["dtype"])
        if tuple(stored["shape"]) != leaf.shape or dtype != leaf.dtype.name:
            raise CheckpointError(
                f"{name} is stored as {dtype} {stored['shape']}, the model needs {leaf.dtype.name} "
                f"{list(leaf.shape)}"
            )
        if stored["compressor"] is None:
            _check_chunks(root / name, stored["shape"], stored["chunks"], leaf.dtype.itemsize)


def _check_chunks(directory: Path, shape: list[int], chunks: list[int], itemsize: int) -> None:
    """Every chunk file of an uncompressed array is there, in full."""
    sizes = {path.name: path.stat().st_size for path in directory.iterdir()}
    for number in range(-(-shape[0] // chunks[0]) if shape else 1):
        name = ".".join([str(number), *("0" for _ in shape[1:])])
        if sizes.get(name) != math.prod(chunks) * itemsize:
            raise CheckpointError(
                f"{directory / name} is missing or truncated. Convert the checkpoint again."
            )
