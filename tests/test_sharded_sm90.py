"""The model over four H200s, compiled without one: each runs the kernels on its own parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from llama_jax.model.forward import decode, prefill
from llama_jax.model.kv_cache import init_cache
from llama_jax.model.params import abstract_params, param_shardings
from llama_jax.model.sharding import cache_shardings, replicated_on
from pallas_kernels.dev import sm90
from tests import tiny

CONFIG = tiny.config(
    hidden_size=1024, intermediate_size=4096, num_layers=1, num_heads=8, num_kv_heads=4,
    head_dim=128, vocab_size=1024,
)  # fmt: skip
KERNEL = 'custom_call_target="mosaic_gpu'

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sm90.unavailable() is not None, reason=str(sm90.unavailable())),
]


def compiled(activations: str, step, tokens: tuple[int, ...]) -> str:
    mesh = Mesh(np.array(sm90.devices(4)).reshape(1, 4), ("data", "model"))
    spec = tiny.fp8_spec(config=CONFIG, dtype="bfloat16", activations=activations, mesh=mesh)
    trees = abstract_params(spec), jax.eval_shape(lambda: init_cache(CONFIG, tokens[0], 1024))
    placed = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        trees, (param_shardings(spec), cache_shardings(CONFIG, mesh)),
    )  # fmt: skip
    ints = [
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated_on(mesh))
        for shape in ([tokens, tokens[:1]] if len(tokens) == 2 else [tokens])
    ]
    return sm90.compile(
        lambda params, cache, *ints: step(params, cache, *ints, spec=spec), *placed, *ints
    ).as_text()


@pytest.mark.parametrize(
    ("activations", "step", "tokens", "kernels"),
    [("bf16", decode, (8,), 7), ("dynamic", prefill, (1, 512), 6)],
)
def test_each_gpu_runs_the_kernels_on_its_parts(activations, step, tokens, kernels):
    text = compiled(activations, step, tokens)
    assert text.count(KERNEL) == kernels
    assert "f8e4m3fn[1024,1024]{1,0} parameter" in text  # gate, up: a quarter of 4096 rows
    assert "f8e4m3fn[4096,1024]" not in text and "f8e4m3fn[1024,4096]" not in text
