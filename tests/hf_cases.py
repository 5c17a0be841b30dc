"""Random tiny Llamas that the parity tests run here and in Hugging Face transformers.

Weights come from a seed, so a stored reference contains only logits. `make_references.py` runs
transformers on `CASES` and stores them; `test_parity.py` compares with the stored file, and with
transformers itself where the extra `parity` is installed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.model.config import LlamaConfig
from llama_jax.model.kv_cache import init_cache
from llama_jax.model.llama import Llama
from llama_jax.model.params import abstract_params
from llama_jax.model.spec import ModelSpec
from tests.tiny import CONFIG, LLAMA3_ROPE, tokens

REFERENCES = Path(__file__).parent / "references" / "hf_logits.npz"


@dataclass(frozen=True)
class Case:
    """A model and the positions of its tokens. kept: the number of last positions to compare."""

    name: str
    config: LlamaConfig
    first_position: int = 0
    length: int = 12
    kept: int = 12


_BASE = replace(CONFIG, num_layers=2)
_HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
CASES = (
    *(
        Case(
            f"{heads}-{'tied' if tied else 'untied'}-d{head_dim}-{'scaled' if scaled else 'plain'}",
            replace(
                _BASE,
                num_heads=_HEADS[heads][0],
                num_kv_heads=_HEADS[heads][1],
                head_dim=head_dim,
                tie_word_embeddings=tied,
                rope_scaling=LLAMA3_ROPE if scaled else None,
            ),
        )
        for heads, tied, head_dim, scaled in (
            ("mha", False, 16, True), ("mha", True, 16, False), ("gqa", False, 16, True),
            ("gqa", True, 32, True), ("gqa", False, 64, False), ("gqa", True, 128, True),
            ("mqa", True, 16, True), ("mqa", False, 8, False),
        )
    ),
    *(
        Case(f"at-{position}", replace(_BASE, head_dim=head_dim), position - 6)
        for position, head_dim in ((8191, 16), (8192, 64), (32768, 64), (131066, 64))
    ),
    Case("factor-32", replace(_BASE, rope_scaling=replace(LLAMA3_ROPE, factor=32.0)), 20000),
    Case("theta-10000", replace(_BASE, rope_theta=10000.0, rope_scaling=None), 4000),
    Case("linear-4", replace(_BASE, rope_linear_factor=4.0, rope_scaling=None), 4000),
    Case("other-eps", replace(_BASE, rms_norm_eps=1e-2)),
    Case(
        "really-8200-long",
        replace(_BASE, num_layers=1, num_heads=2, num_kv_heads=1, hidden_size=32),
        length=8200,
        kept=16,
    ),
)  # fmt: skip


def case_tokens(case: Case) -> np.ndarray:
    return tokens(1, case.length, seed=len(case.name))


def case_params(case: Case) -> dict:
    """Return float32 parameters in this project's tree, scaled so that logits are of order 1."""
    rng = np.random.default_rng(sum(map(ord, case.name)))

    def draw(spec: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.standard_normal(spec.shape, np.float32)
        if len(spec.shape) == 1:
            return 1 + 0.1 * values
        return values * np.float32(1.5 / np.sqrt(spec.shape[1]))

    return jax.tree.map(draw, abstract_params(case_spec(case)))


def case_spec(case: Case) -> ModelSpec:
    return ModelSpec(case.config, dtype="float32")


def hf_names(params: dict, prefix: str = "") -> dict[str, np.ndarray]:
    """Return the parameters under Hugging Face's names."""
    flat: dict[str, np.ndarray] = {}
    for key, value in params.items():
        name = f"{prefix}{key.replace('layers_', 'layers.')}"
        if isinstance(value, dict):
            flat |= hf_names(value, name + ".")
        else:
            flat[name if name.startswith("lm_head") else f"model.{name}"] = value
    return flat


@cache
def apply(spec: ModelSpec, method: str) -> Callable[..., Any]:
    """Return a method of the model, compiled once for all cases of a configuration."""
    return jax.jit(partial(Llama(spec).apply, method=method))


def our_logits(case: Case, chunk: int) -> np.ndarray:
    """Return logits of the kept positions, computed `chunk` tokens at a time through the cache."""
    spec, params = case_spec(case), case_params(case)
    ids = case_tokens(case)
    cache = init_cache(case.config, 1, case.length, "float32")
    extend, unembed = (partial(apply(spec, m), {"params": params}) for m in ("extend", "unembed"))
    hidden = []
    for start in range(0, case.length, chunk):
        part = ids[:, start : start + chunk]
        size = part.shape[1]
        padded = np.pad(part, ((0, 0), (0, chunk - size)))
        positions = case.first_position + start + np.arange(chunk)[None]
        states, cache = extend(padded, positions, cache, jnp.arange(1), jnp.array([size]))
        hidden.append(states[:, :size])
    kept = jnp.concatenate(hidden, axis=1)[:, -case.kept :]
    return np.asarray(unembed(kept))[0]


def transformers_logits(case: Case, ids: np.ndarray | None = None) -> np.ndarray:
    """Return the same logits from transformers, in float32 and with the whole sequence at once.

    ids: used in place of the case's tokens.
    """
    import torch
    from transformers import LlamaConfig as HFConfig
    from transformers import LlamaForCausalLM

    config = case.config
    rope = config.to_hf()["rope_scaling"] or {"rope_type": "default"}
    model = LlamaForCausalLM(
        HFConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            tie_word_embeddings=config.tie_word_embeddings,
            rope_parameters={**rope, "rope_theta": config.rope_theta},
            attn_implementation="sdpa",
        )
    ).float()
    state = {name: torch.from_numpy(array) for name, array in hf_names(case_params(case)).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    allowed = ["lm_head.weight"] if config.tie_word_embeddings else []
    assert (missing, unexpected) == (allowed, [])
    ids = torch.from_numpy(case_tokens(case) if ids is None else ids).long()
    positions = case.first_position + torch.arange(case.length)[None]
    with torch.no_grad():
        out = model(input_ids=ids, position_ids=positions, logits_to_keep=case.kept)
    return out.logits[0].numpy()
