"""Finds, plans and checks what `LLM.load` will load, before any array is read."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax
from jax.sharding import Mesh

from converters.resolve import resolve
from llama_jax.checkpoint import store
from llama_jax.engine import memory
from llama_jax.engine.scheduling import EngineOptions
from llama_jax.engine.speculation import Speculation
from llama_jax.errors import CheckpointError
from llama_jax.model.config import LlamaConfig
from llama_jax.model.kv_cache import KVDtype, storage_dtype
from llama_jax.model.spec import Activations, Implementation, ModelSpec, Params
from llama_jax.sampling_params import check_kind
from llama_jax.text.chat_files import said_to_lie_in
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer

DEFAULT_MAX_SEQ_LEN = 8192


@dataclass(frozen=True)
class Stored:
    """A converted checkpoint and the spec of its model.

    name: the path or id that the user gave.
    """

    name: str | Path
    directory: Path
    manifest: store.Manifest
    spec: ModelSpec

    def load(self) -> Params:
        """Read the parameters; on a CPU, FP8 codes are int8 bits."""
        bits = jax.default_backend() == "cpu"
        return store.load_params(self.directory, self.spec, bits=bits)

    def tokenizer(self) -> Tokenizer:
        """Read the tokenizer. Messages about its chat templates name the checkpoint by `name`."""
        try:
            tokenizer = load_tokenizer(self.directory, self.spec.config)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{self.name} has no tokenizer.json and no tokenizer.model; copy one of them from "
                "the original checkpoint"
            ) from error
        main, others = tokenizer.chat_template, tokenizer.named_templates
        named = {n: said_to_lie_in(self.name, each, self.directory) for n, each in others.items()}
        return replace(
            tokenizer,
            chat_template=main and said_to_lie_in(self.name, main, self.directory),
            named_templates=named,
        )


def find(
    path_or_id: str | Path,
    dtype: Literal["bfloat16", "float32"],
    activations: Activations,
    implementation: Implementation | None,
    mesh: Mesh | None,
) -> Stored:
    """Find a checkpoint, and convert it if needed. Arguments and errors are those of `LLM.load`."""
    directory = resolve(path_or_id)
    manifest = store.read_manifest(directory)
    spec = replace(manifest.spec(dtype, activations), implementation=implementation, mesh=mesh)
    spec.check_runs()
    return Stored(path_or_id, directory, manifest, spec)


def plan(
    model: Stored, draft: Stored | None, options: EngineOptions, kv_dtype: KVDtype
) -> tuple[EngineOptions, memory.MemoryPlan]:
    """Return the options with a number of pages that fits, and the memory plan of everything.

    Raises ValueError for a draft model that does not suit the model, and for `batch_invariant` on
    several devices.
    """
    mesh = model.spec.mesh
    if options.batch_invariant and mesh is not None and mesh.shape["model"] > 1:
        raise ValueError(
            f"batch_invariant is for one device, and the mesh shards over {mesh.shape['model']}: "
            "their sums may depend on what is in the batch"
        )
    speculation = Speculation(options.num_speculative_tokens, draft.spec if draft else None)
    speculation.check(model.spec.config, options.max_seq_len)
    stored = storage_dtype(kv_dtype, model.spec.dtype)
    return memory.fitted(model.spec, options, stored, speculation)


def sequence_limit(config: LlamaConfig, max_seq_len: int | None) -> int:
    """Check the max_seq_len of `LLM.load`, or return its default."""
    limit = config.max_position_embeddings
    if max_seq_len is None:
        return min(limit, DEFAULT_MAX_SEQ_LEN)
    check_kind("max_seq_len", max_seq_len, int)
    if not 2 <= max_seq_len <= limit:
        raise ValueError(f"max_seq_len must be in [2, {limit}], got {max_seq_len}")
    return max_seq_len
