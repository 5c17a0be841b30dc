"""Reads converted checkpoints from disk into device memory.

A directory holds:

    manifest.json      the description of the checkpoint: `Manifest`
    params/            one Orbax PyTree checkpoint of the tree `abstract_params(spec)`
    tokenizer.json ... the tokenizer's files, as published

`params/` is plain Orbax: `orbax.checkpoint.StandardCheckpointer().restore(directory / "params")`
reads it without this project. Each array is one file of `checkpoint.array_file`, from which a
device can read just its part. That module also reads them here, because importing Orbax would take
a tenth of the time in which a small model starts.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
from flax import traverse_util
from flax.core import FrozenDict
from jax import Array
from jax.sharding import Sharding
from msgspec import Meta

from llama_jax.checkpoint import array_file
from llama_jax.checkpoint.converted import MANIFEST as MANIFEST
from llama_jax.checkpoint.converted import PARAMS as PARAMS
from llama_jax.checkpoint.converted import is_converted, not_converted
from llama_jax.checkpoint.generation_config import read_settings
from llama_jax.checkpoint.huge_pages import Room
from llama_jax.errors import CheckpointError as CheckpointError
from llama_jax.json_file import convert, read_object, shown
from llama_jax.model.config import LlamaConfig
from llama_jax.model.fp8 import WeightFormat
from llama_jax.model.kv_cache import KVScales
from llama_jax.model.params import abstract_params, param_shardings
from llama_jax.model.spec import Activations, ModelSpec, Params
from pallas_kernels import e4m3

FORMAT_VERSION = 2
# The bytes of rows that are read at once; several threads read an array.
_RUN_BYTES = 16 * 1024 * 1024

Damage = Literal["missing", "damaged", "extra"]


@dataclass(frozen=True)
class Manifest:
    """Describes a converted checkpoint: the contents of manifest.json.

    dialect: the layout from which it was converted.
    source: the name of the directory or hub repository from which it was converted.
    formats: the storage format of every module's weight, by path ("layers_0/mlp/up_proj").
    kv_scales: for an FP8 cache; None if the checkpoint has none.
    generation: the contents of generation_config.json; {} without one.
    tokenizer_files: names of the tokenizer's files, which are beside the manifest.
    total_bytes: of all parameters.
    checksums: SHA-256 in hexadecimal by path within the directory, of each array's elements in C
        order ("params/norm.weight") and of each file but the manifest.
    """

    dialect: str
    source: str
    config: LlamaConfig
    formats: Mapping[str, WeightFormat]
    kv_scales: KVScales | None
    generation: Mapping[str, Any]
    tokenizer_files: tuple[str, ...]
    total_bytes: Annotated[int, Meta(ge=0)]
    llama_jax_version: str
    checksums: Mapping[str, str] = FrozenDict()
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "formats", FrozenDict(self.formats))
        object.__setattr__(self, "checksums", FrozenDict(self.checksums))

    def spec(self, dtype: str = "bfloat16", activations: Activations = "bf16") -> ModelSpec:
        """Return the spec of the model of these parameters."""
        return ModelSpec(self.config, self.formats, dtype, activations)

    def to_json(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["config"] = self.config.to_dict()
        values["formats"] = {path: asdict(stored) for path, stored in self.formats.items()}
        values["checksums"] = dict(self.checksums)
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

    @property
    def digest(self) -> str:
        """Return a digest of the manifest, including checksums, which identifies the model."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()


def read_manifest(directory: str | Path) -> Manifest:
    """Read the manifest of a converted checkpoint.

    Raises `CheckpointError` if there is none, or if this version cannot read it.
    """
    path = Path(directory) / MANIFEST
    if not is_converted(Path(directory)):
        raise not_converted(directory)
    values = read_object(path)
    version = values.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version is {shown(version)}, this version of llama_jax reads "
            f"{FORMAT_VERSION}. Convert the checkpoint again."
        )
    try:
        manifest = convert(values, Manifest, path)
        read_settings(manifest.generation, manifest.config.vocab_size, f"{path}: generation")
        return manifest
    except CheckpointError as error:
        raise CheckpointError(f"{error}. The file is damaged: convert again.") from error


def load_params(directory: str | Path, spec: ModelSpec, *, bits: bool = False) -> Params:
    """Load the parameters of a converted checkpoint, each array directly to its devices.

    bits: whether to load float8_e4m3fn arrays as int8 arrays of the same bytes, which compiled
        programs need on a CPU (see `pallas_kernels.e4m3`).
    Returns the tree `abstract_params(spec)`, sharded by `param_shardings(spec)`.
    Raises `CheckpointError`, which names a parameter that is missing or damaged, or whose shape or
    dtype does not match `spec`.
    """
    root = Path(directory).resolve() / PARAMS
    expected = abstract_params(spec)
    check_stored(root, expected)
    paths = traverse_util.flatten_dict(expected, sep=".")
    shardings = traverse_util.flatten_dict(param_shardings(spec), sep=".")
    # Other devices copy their arrays, so this memory is only needed on a CPU.
    on_cpu = jax.default_backend() == "cpu"
    room = Room(leaf.size * leaf.dtype.itemsize for leaf in paths.values() if on_cpu)
    with ThreadPoolExecutor(array_file.WORKERS) as pool:
        arrays = {
            path: _load_array(root / path, leaf, shardings[path], bits, pool, room)
            for path, leaf in paths.items()
        }
    params: Params = traverse_util.unflatten_dict(arrays, sep=".")
    return params


def _load_array(
    directory: Path,
    leaf: jax.ShapeDtypeStruct,
    sharding: Sharding,
    bits: bool,
    pool: Executor,
    room: Room,
) -> Array:
    """Load one array. The host holds no more than the parts of its own devices at a time."""
    dtype = np.dtype(leaf.dtype)
    seen_as = np.dtype(np.int8) if bits and dtype == e4m3.DTYPE else dtype

    def part(index: tuple[slice, ...]) -> np.ndarray:
        rows, columns = (*index, slice(None), slice(None))[:2]
        start, stop, _ = rows.indices((*leaf.shape, 1)[0])
        shape = sharding.shard_shape(leaf.shape)
        whole = room.empty((stop - start, math.prod(shape) // (stop - start)), dtype)
        step = max(1, _RUN_BYTES // (whole.shape[1] * dtype.itemsize))

        def read(first: int) -> None:
            run = slice(first, min(first + step, stop))
            found = array_file.read_part(directory, dtype, leaf.shape, (run, columns))
            whole[run.start - start : run.stop - start] = found

        for _ in pool.map(read, range(start, stop, step)):
            pass
        return whole.view(seen_as).reshape(shape)

    # A part that several devices hold is read once.
    return jax.make_array_from_callback(leaf.shape, sharding, cache(part))


def check_stored(root: Path, expected: Params) -> None:
    """Compare the arrays in `root` with the expected tree, without reading their elements.

    Raises `CheckpointError`, which names a parameter that is missing, superfluous or damaged, or
    has another shape or dtype.
    """
    needed = traverse_util.flatten_dict(expected, sep=".")
    found = {path.name for path in root.glob("*") if path.is_dir()}
    for name in sorted(needed.keys() - found):
        raise CheckpointError(f"{root} lacks {name}, which the model needs")
    for name in sorted(found - needed.keys()):
        raise CheckpointError(f"{root} holds {name}, which the model does not have")
    for name, leaf in needed.items():
        try:
            array_file.check_layout(root / name, np.dtype(leaf.dtype), leaf.shape)
        except ValueError as error:
            raise CheckpointError(f"{root}: {error}. Convert the checkpoint again.") from error


def verify(
    directory: str | Path, advance: array_file.Advance = lambda count: None
) -> dict[str, Damage]:
    """Check a converted checkpoint. Returns what is wrong, by path within it; {} if nothing is.

    All bytes are read and compared with the manifest's checksums, several arrays at a time. The
    manifest has no checksum of its own; only its form is checked.

    advance: called by any thread with the number of bytes that were read, in total
        `Manifest.total_bytes`.

    Raises `CheckpointError` if the manifest cannot be read.
    """
    root = Path(directory).resolve()
    manifest = read_manifest(root)
    tree = traverse_util.flatten_dict(abstract_params(manifest.spec()), sep=".")
    arrays = {f"{PARAMS}/{name}": leaf for name, leaf in tree.items()}

    def damage(path: str) -> Damage | None:
        if not (root / path).exists():
            return "missing"
        checksum = manifest.checksums.get(path, "")
        if path in arrays:
            dtype, shape = np.dtype(arrays[path].dtype), arrays[path].shape
            sound = array_file.holds(root / path, dtype, shape, checksum, advance)
        else:
            sound = file_sha256(root / path) == checksum
        return None if sound else "damaged"

    expected = sorted(arrays.keys() | manifest.checksums.keys())
    with ThreadPoolExecutor(array_file.WORKERS) as pool:
        damages = dict(zip(expected, pool.map(damage, expected), strict=True))
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    ours = {MANIFEST, *expected}.union(
        *(array_file.file_names(path, leaf.shape) for path, leaf in arrays.items())
    )
    found: dict[str, Damage] = {path: kind for path, kind in damages.items() if kind}
    return found | dict.fromkeys(sorted(files - ours), "extra")


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
