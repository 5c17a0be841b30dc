"""What lies in a checkpoint directory as somebody published it, before any weight is read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.pth_reader import read_bin_checkpoint, read_consolidated
from converters.safetensors_reader import StoredTensor, read_checkpoint
from llama_jax.checkpoint import CheckpointError
from llama_jax.config import LlamaConfig

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
META_FILES = "consolidated.*.pth"
BIN_FILES = "pytorch_model*.bin*"  # with their index
# modelopt's, and its name for what config.json calls otherwise.
QUANTIZATION_FILE = "hf_quant_config.json"
_RENAMED = {"exclude_modules": "ignore"}
# Where config.json may say how the weights are quantised; the second is compressed-tensors' oldest.
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Source:
    """A published checkpoint.

    hf_config: the contents of config.json, {} for Meta's files. quantization: what it, or else
    hf_quant_config.json, says about quantised weights, {} if nothing. tensors: by the names they
    are stored under (Meta's: see `pth_reader.read_consolidated`). generation: the contents of
    generation_config.json, {} without one. tokenizer_files: names of files in `directory`.
    """

    directory: Path
    config: LlamaConfig
    hf_config: Mapping[str, Any]
    quantization: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    generation: Mapping[str, Any]
    tokenizer_files: tuple[str, ...]


def read_source(directory: Path) -> Source:
    """Read the configuration and the tensors' headers.

    Raises `CheckpointError` or `ConfigError` for a directory that is incomplete, damaged or holds
    something that is not supported.
    """
    _refuse_gguf(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory; a Hugging Face checkpoint, or Meta's, is expected"
        )
    is_meta = any(directory.glob(META_FILES)) and not (directory / "config.json").is_file()
    hf_config = {} if is_meta else read_object(directory / "config.json")
    generation = directory / "generation_config.json"
    return Source(
        directory=directory,
        config=LlamaConfig.from_pretrained(directory),
        hf_config=hf_config,
        quantization=_quantization(hf_config, directory),
        tensors=read_consolidated(directory) if is_meta else _read_tensors(directory),
        generation=read_object(generation) if generation.is_file() else {},
        tokenizer_files=tuple(name for name in TOKENIZER_FILES if (directory / name).is_file()),
    )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises `CheckpointError` naming the file if it is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: not a Hugging Face checkpoint") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return values


def as_object(fields: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """An object inside a config, {} if it is null or absent."""
    found = fields.get(key)
    if not isinstance(found, dict | None):
        raise CheckpointError(f"{where}: {key} must be an object, got {found!r}")
    return found or {}


def _read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Of safetensors, or else of the pickles that transformers wrote before."""
    if any(directory.glob(BIN_FILES)) and not any(directory.glob("*.safetensors*")):
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


def _quantization(hf_config: Mapping[str, Any], directory: Path) -> Mapping[str, Any]:
    path, beside = directory / "config.json", directory / QUANTIZATION_FILE
    found = (as_object(hf_config, key, str(path)) for key in _QUANTIZATION_KEYS)
    inside = next(filter(None, found), {})
    if not beside.is_file():
        return inside
    stated = as_object(read_object(beside), "quantization", str(beside))
    renamed = {"quant_method": "modelopt"} | {_RENAMED.get(k, k): v for k, v in stated.items()}
    for key in renamed:
        if key in inside and _unordered(renamed[key]) != _unordered(inside[key]):
            raise CheckpointError(
                f"{path} has {key} = {inside[key]!r}, but {beside} {renamed[key]!r}. One of the "
                "files belongs to another checkpoint: remove it."
            )
    return {**renamed, **inside}


def _unordered(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value
