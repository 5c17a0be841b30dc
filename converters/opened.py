"""Opens any supported checkpoint, published or converted, in the same form."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.dialects import make_plan
from converters.dialects.layout import Plan
from converters.orbax_reader import converted_plan
from converters.source import read_source, read_tokenizer, tokenizer_path
from llama_jax.checkpoint.converted import is_converted
from llama_jax.checkpoint.store import PARAMS, read_manifest
from llama_jax.errors import CheckpointError
from llama_jax.model.config import LlamaConfig
from llama_jax.model.spec import Activations, ModelSpec
from llama_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose weights have not been read yet.

    dialect: the layout in which it was published.
    generation: the contents of generation_config.json; {} without one.
    tokenizer_files: names of files in `directory`.
    weight_files: the files from which `plan` reads.
    tokenizer: None if there is none.
    """

    directory: Path
    config: LlamaConfig
    dialect: str
    plan: Plan
    generation: Mapping[str, Any]
    tokenizer_files: tuple[str, ...]
    weight_files: frozenset[Path]
    tokenizer: Tokenizer | None = None

    def tokenizer_paths(self) -> list[Path]:
        """Return the tokenizer's files. Raises `CheckpointError` for one outside `directory`."""
        return [tokenizer_path(self.directory, name) for name in self.tokenizer_files]

    def spec(self, dtype: str = "bfloat16", activations: Activations = "bf16") -> ModelSpec:
        """Return the spec of the model of these parameters."""
        formats = {path: module.format for path, module in self.plan.modules.items()}
        return ModelSpec(self.config, formats, dtype, activations)


def open_checkpoint(directory: Path) -> Opened:
    """Open a converted checkpoint, or a published one of any dialect.

    Raises `CheckpointError` or `ConfigError` for a directory that is neither, or damaged.
    """
    if is_converted(directory):
        manifest = read_manifest(directory)
        tokenizer = read_tokenizer(directory, manifest.config)
        return Opened(
            directory, manifest.config, manifest.dialect, converted_plan(directory, manifest),
            manifest.generation, manifest.tokenizer_files,
            frozenset(path for path in (directory / PARAMS).rglob("*") if path.is_file()),
            tokenizer,
        )  # fmt: skip
    source = read_source(directory)
    try:
        plan, dialect = make_plan(source)
    except CheckpointError as error:
        if str(directory) in str(error):
            raise
        raise type(error)(f"{directory}: {error}") from error
    return Opened(
        directory, source.config, dialect, plan, source.generation, source.tokenizer_files,
        frozenset(tensor.path for tensor in source.tensors.values()),
        source.tokenizer,
    )  # fmt: skip
