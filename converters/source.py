"""Reads the contents of a published checkpoint's directory, except for the weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from converters.pth_reader import read_bin_checkpoint, read_consolidated
from converters.safetensors_reader import StoredTensor, read_checkpoint, read_rows, shard_path
from llama_jax import json_file
from llama_jax.checkpoint.generation_config import read_settings
from llama_jax.checkpoint.store import CheckpointError
from llama_jax.model.config import PARAM_DTYPES, LlamaConfig
from llama_jax.model.config_files import GENERATION_KEYS, read_params
from llama_jax.text.chat_files import TEMPLATE_DIRECTORY
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer

# To be increased when the result of converting a source changes.
CONVERTER_VERSION = 4
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Weights: transformers' today and until 2023 (each with its index), and Meta's.
SAFETENSORS = "*.safetensors*"
BIN_FILES = "pytorch_model*.bin*"
META_FILES = "consolidated.*.pth"
META_SCALES = "fp8_scales_*.pt"
META_CONFIG = "params.json"
# modelopt's.
QUANTIZATION_FILE = "hf_quant_config.json"
# Globs of files that a conversion may read, and of weights that are not read beside safetensors.
WANTED_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    QUANTIZATION_FILE,
    *TOKENIZER_FILES,
    f"{TEMPLATE_DIRECTORY}/*.jinja",
)
OLDER_FILES = (BIN_FILES, META_FILES, META_CONFIG, META_SCALES)
# modelopt's names, and the names in config.json.
_RENAMED = {"exclude_modules": "ignore"}
# Keys of config.json for quantisation; the second is compressed-tensors' oldest.
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Source:
    """A published checkpoint.

    hf_config: the contents of config.json; {} for Meta's files.
    quantization: the description of quantised weights in config.json, or else in
        hf_quant_config.json; {} if there is none.
    tensors: by their stored names (for Meta's see `pth_reader.read_consolidated`).
    generation: the contents of generation_config.json, or else config.json's fields for it; {} if
        there are none.
    tokenizer_files: names of files in `directory`.
    tokenizer: the tokenizer in these files, or None if they have no vocabulary.
    """

    directory: Path
    config: LlamaConfig
    hf_config: Mapping[str, Any]
    quantization: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    generation: Mapping[str, Any]
    tokenizer_files: tuple[str, ...]
    tokenizer: Tokenizer | None


def read_source(directory: Path) -> Source:
    """Read the configuration, the tokenizer and the tensors' headers.

    Raises `CheckpointError` or `ConfigError` for a directory that is incomplete, damaged or not
    supported.
    """
    _refuse_gguf(directory)
    _refuse_adapter(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory; a Hugging Face checkpoint, or Meta's, is expected"
        )
    if _is_meta(directory):
        return _read_meta(directory)
    path = directory / "config.json"
    hf_config = read_object(path)
    config = LlamaConfig.from_hf(hf_config, path)
    tokenizer = read_tokenizer(directory, config)  # its errors are reported first
    return Source(
        directory=directory,
        config=config,
        hf_config=hf_config,
        quantization=_quantization(hf_config, directory),
        tensors=_read_tensors(directory),
        generation=_generation(directory, hf_config, config.vocab_size),
        tokenizer_files=_tokenizer_files(directory),
        tokenizer=tokenizer,
    )


def read_tokenizer(directory: Path, config: LlamaConfig | None) -> Tokenizer | None:
    """Read a checkpoint's tokenizer as it will be loaded with the model; None if there is none.

    Raises `CheckpointError` for one that cannot be used or is outside `directory`.
    """
    for name in _tokenizer_files(directory):
        tokenizer_path(directory, name)
    try:
        return load_tokenizer(directory, config)
    except FileNotFoundError:
        return None


def tokenizer_path(directory: Path, name: str) -> Path:
    """Return the path of one of `tokenizer_files`, and refuse one outside the directory."""
    template = name.removeprefix(f"{TEMPLATE_DIRECTORY}/")
    if template == name:
        return shard_path(directory.resolve(), name)
    folder = directory / TEMPLATE_DIRECTORY
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a link, expected a folder of the checkpoint")
    return shard_path(folder.resolve(), template)


def published_name(directory: Path) -> str:
    """Return a directory's name, or the hub id ("org/name") if it is a snapshot in its cache."""
    repository = directory.parent.parent.name
    if directory.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return directory.name


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises `CheckpointError`, which names the file, for anything else, and for a link to the outside
    of the directory.
    """
    if path.is_symlink():
        shard_path(path.parent.resolve(), path.name)
    return json_file.read_object(path)


def as_object(fields: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """Return an object inside a config; {} if it is null or absent."""
    found = fields.get(key)
    if not isinstance(found, dict | None):
        raise CheckpointError(f"{where}: {key} must be an object, got {json_file.shown(found)}")
    return found or {}


def same_bytes(a: StoredTensor, b: StoredTensor) -> bool:
    """Return whether two tensors are bit-equal; reading stops at the first difference."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    rows = (a.shape or (1,))[0]
    return all(
        np.array_equal(_bytes(a, start, stop), _bytes(b, start, stop))
        for start in range(0, rows, 1024)
        for stop in [min(start + 1024, rows)]
    )


def _bytes(tensor: StoredTensor, start: int, stop: int) -> np.ndarray:
    return read_rows(tensor, start, stop).reshape(-1).view(np.uint8)


def _is_meta(directory: Path) -> bool:
    if any(directory.glob(SAFETENSORS)) or any(directory.glob(BIN_FILES)):
        return False
    lacks_config = not (directory / "config.json").is_file()
    is_described = lacks_config and (directory / META_CONFIG).is_file()
    return is_described or any(directory.glob(META_FILES))


def _read_meta(directory: Path) -> Source:
    """Read Meta's files. Properties that params.json lacks come from the tensors and the tokenizer.

    The output matrix counts as tied to the embedding if it has the same bytes or is missing. The
    files do not tell an Instruct model from a base model, so all tokens that end a turn end a text;
    a base model writes only one of them.
    """
    path = directory / META_CONFIG
    if not path.exists():
        raise CheckpointError(f"{path} is missing. Download the rest of the checkpoint.")
    found = read_object(path)
    params = as_object(found, "model", str(path)) or found
    if "quantization_args" in params:
        raise CheckpointError(
            f"{path} has quantization_args: INT4 is not supported. Take the bfloat16 checkpoint, "
            "with --quantize row if it is to become FP8."
        )
    read_params(params, path)  # before the weights are read
    tokenizer = read_tokenizer(directory, None)
    tensors = read_consolidated(directory)
    if not tensors:
        raise CheckpointError(f"{directory} has {META_CONFIG}, but no {META_FILES} with weights")
    embedding = _split(tensors, "tok_embeddings.weight")
    output = _split(tensors, "output.weight")
    is_tied = not output or (
        len(output) == len(embedding) and all(map(same_bytes, output, embedding))
    )
    if params.get("vocab_size", -1) == -1 and output:
        params = {**params, "vocab_size": sum(math.prod(part.shape[:1]) for part in output)}
    config = replace(LlamaConfig.from_params_json(params, path), tie_word_embeddings=is_tied)
    if embedding and embedding[0].dtype.name in PARAM_DTYPES:
        config = replace(config, dtype=embedding[0].dtype.name)
    if tokenizer:
        config = replace(config, bos_token_id=tokenizer.bos_id, eos_token_ids=tokenizer.eos_ids)
    return Source(
        directory, config, {}, {}, tensors, {}, _tokenizer_files(directory), tokenizer
    )  # fmt: skip


def _split(tensors: Mapping[str, StoredTensor], name: str) -> list[StoredTensor]:
    """Return a tensor's parts, in the order of Meta's files."""
    return [tensor for key, tensor in tensors.items() if key.partition("/")[2] == name]


def _generation(
    directory: Path, hf_config: Mapping[str, Any], vocab_size: int
) -> Mapping[str, Any]:
    """Return the contents of generation_config.json, or the fields of an older config.json."""
    path = directory / "generation_config.json"
    if json_file.is_there(path):
        values: Mapping[str, Any] = read_object(path)
    else:
        path = directory / "config.json"
        values = {key: hf_config[key] for key in GENERATION_KEYS if key in hf_config}
    read_settings(values, vocab_size, path)
    return values


def _tokenizer_files(directory: Path) -> tuple[str, ...]:
    further = sorted((directory / TEMPLATE_DIRECTORY).glob("*.jinja"))
    return (
        *(name for name in TOKENIZER_FILES if json_file.is_there(directory / name)),
        *(f"{TEMPLATE_DIRECTORY}/{file.name}" for file in further),
    )


def _read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Read the tensors' headers, from safetensors or from transformers' older pickles."""
    if any(directory.glob(BIN_FILES)) and not any(directory.glob(SAFETENSORS)):
        return read_bin_checkpoint(directory)
    return read_checkpoint(directory)


def _refuse_gguf(directory: Path) -> None:
    names = [path.name for path in (directory, *directory.glob("*"))]
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf and not any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(
            f"{gguf[0]}: GGUF is not supported. Take the model's safetensors: an FP8 checkpoint, "
            "or the unquantised one, with --quantize row if it is to become FP8."
        )


def _refuse_adapter(directory: Path) -> None:
    adapters = sorted(directory.glob("adapter_model.*"))
    if adapters and not (directory / "config.json").exists():
        raise CheckpointError(
            f"{adapters[0]} is a LoRA adapter. Merge it into its base model (`merge_and_unload` of "
            "the package peft), and take the result."
        )


def _quantization(hf_config: Mapping[str, Any], directory: Path) -> Mapping[str, Any]:
    path, beside = directory / "config.json", directory / QUANTIZATION_FILE
    found = (as_object(hf_config, key, str(path)) for key in _QUANTIZATION_KEYS)
    inside = next(filter(None, found), {})
    if not json_file.is_there(beside):
        return inside
    stated = as_object(read_object(beside), "quantization", str(beside))
    renamed = {"quant_method": "modelopt"} | {_RENAMED.get(k, k): v for k, v in stated.items()}
    for key in renamed:
        if key in inside and _unordered(renamed[key]) != _unordered(inside[key]):
            raise CheckpointError(
                f"{path} has {key} = {json_file.shown(inside[key])}, but {beside} "
                f"{json_file.shown(renamed[key])}. One of the files belongs to another checkpoint: "
                "remove it."
            )
    return {**renamed, **inside}


def _unordered(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value
