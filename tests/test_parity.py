"""Logits against Hugging Face transformers, stored and, with the extra `parity`, live.

Tolerance: both sides compute in float32 and differ in the order of sums; over these cases that
amounts to 1e-5 at logits up to 7. The bound of 1e-4 is a tenth of what one wrong rounding to
bfloat16 anywhere would show.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.model.config import PRESETS
from llama_jax.model.forward import decode, prefill
from llama_jax.model.kv_cache import init_cache
from llama_jax.model.rope import rope_frequencies
from tests.hf_cases import (
    CASES,
    REFERENCES,
    Case,
    case_params,
    case_spec,
    case_tokens,
    our_logits,
    transformers_logits,
)

by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    with np.load(REFERENCES) as file:
        return dict(file)


@by_name
def test_logits_equal_the_stored_reference(case: Case, stored: dict[str, np.ndarray]) -> None:
    chunk = 512 if case.length > 512 else 5
    ours, theirs = our_logits(case, chunk), stored[case.name]
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


@pytest.mark.parity
@by_name
def test_logits_equal_transformers(case: Case, stored: dict[str, np.ndarray]) -> None:
    theirs = transformers_logits(case)
    np.testing.assert_allclose(theirs, stored[case.name], atol=1e-5)
    np.testing.assert_allclose(
        our_logits(case, 7 if case.length < 100 else 2048), theirs, atol=1e-4
    )


@pytest.mark.parity
@pytest.mark.parametrize("preset", [*PRESETS, "deepseek-coder"])
def test_rotary_frequencies_are_bit_equal_to_transformers(preset: str) -> None:
    from transformers import LlamaConfig as HFConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    if preset == "deepseek-coder":
        config = replace(PRESETS["llama-2-7b"], rope_theta=100000.0, rope_linear_factor=4.0)
    else:
        config = PRESETS[preset]
    rope = config.to_hf()["rope_scaling"] or {"rope_type": "default"}
    theirs = LlamaRotaryEmbedding(
        HFConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters={**rope, "rope_theta": config.rope_theta},
        )
    )
    np.testing.assert_array_equal(rope_frequencies(config), theirs.inv_freq.numpy())


def greedy(case: Case, count: int) -> list[int]:
    """`count` greedy tokens after the case's prompt, by prefill and decode."""
    spec, params, ids = case_spec(case), case_params(case), case_tokens(case)
    cache = init_cache(case.config, 1, case.length + count, "float32")
    logits, cache = prefill(params, cache, ids, jnp.array([case.length]), spec=spec)
    out = [int(logits[0].argmax())]
    while len(out) < count:
        logits, cache = decode(params, cache, jnp.array([out[-1]]), spec=spec)
        out.append(int(logits[0].argmax()))
    return out


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES[:8], ids=lambda case: case.name)
def test_greedy_tokens_equal_transformers(case: Case) -> None:
    ours = greedy(case, 16)
    ids = np.concatenate([case_tokens(case), [ours[:-1]]], axis=1)
    # Teacher forcing: the tokens agree if each is transformers' likeliest after those before it.
    longer = replace(case, length=ids.shape[1], kept=16)
    theirs = transformers_logits(longer, ids).argmax(-1)
    assert theirs.tolist() == ours
