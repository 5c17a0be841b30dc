"""What XLA made of the model: no copied cache, no upcast weight, no growth with the pool."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from llama_jax.model.forward import decode, prefill
from llama_jax.model.kv_cache import init_cache
from llama_jax.model.params import abstract_params
from llama_jax.model.spec import ModelSpec
from tests.tiny import config, fp8_formats

# Wide enough that a weight outweighs every activation.
WIDE = config(hidden_size=1024, intermediate_size=4096, num_layers=1, num_heads=16,
              num_kv_heads=4, head_dim=64, vocab_size=1536, tie_word_embeddings=True)  # fmt: skip
FORMATS = fp8_formats(WIDE, input_scale=False)
SPEC = ModelSpec(WIDE, FORMATS | {"embed_tokens": FORMATS["layers_0/mlp/up_proj"]})


def compiled(program, max_seq_len=1024, cache_dtype="bfloat16", spec=SPEC):
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, jnp.int8 if s.dtype.itemsize == 1 else s.dtype),
        abstract_params(spec),
    )
    cache = jax.eval_shape(lambda: init_cache(spec.config, 2, max_seq_len, cache_dtype))
    rows = jax.ShapeDtypeStruct((2,), jnp.int32)
    if program == "decode":
        return decode.lower(params, cache, rows, spec=spec).compile(), cache
    chunk = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    return prefill.lower(params, cache, chunk, rows, spec=spec).compile(), cache


@pytest.mark.parametrize(
    "cache_dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow), "int8"]
)
@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_the_cache_is_aliased_and_never_copied(program, cache_dtype):
    small, _ = compiled(program, 1024, cache_dtype)
    large, cache = compiled(program, 65536, cache_dtype)
    pool = sum(a.size * a.dtype.itemsize for a in (*cache.k, *cache.v))
    memory = large.memory_analysis()
    assert memory.alias_size_in_bytes >= pool
    assert memory.temp_size_in_bytes < pool / 4
    # The page table aside, nothing in the program grows with the pool.
    assert memory.temp_size_in_bytes - small.memory_analysis().temp_size_in_bytes < pool / 1000


@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_fp8_weights_are_not_upcast_as_a_whole(program):
    executable, _ = compiled(program)
    columns, text = WIDE.hidden_size, executable.as_text()
    for out in (WIDE.intermediate_size, WIDE.vocab_size):  # the embedding is one of them
        assert f"s8[{out},{columns}]" in text
        assert not re.search(rf"(f16|bf16|f32|s16|s32)\[{out},{columns}\]", text)
        assert not re.search(rf"(f16|bf16|f32|s16|s32)\[{columns},{out}\]", text)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["prefill", "decode"])
def test_temporaries_do_not_grow_with_depth(program):
    def temporaries(num_layers):
        deep = replace(WIDE, num_layers=num_layers)
        spec = ModelSpec(deep, fp8_formats(deep, input_scale=False))
        return compiled(program, spec=spec)[0].memory_analysis().temp_size_in_bytes

    upcast_block = 512 * WIDE.hidden_size * 4
    assert temporaries(6) - temporaries(2) < upcast_block
