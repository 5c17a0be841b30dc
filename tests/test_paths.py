"""What `paths` reads from the traced programs, here and for an H200."""

import contextlib
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import pytest

from llama_jax.engine.paths import KernelCall, calls, programs, scoring
from llama_jax.engine.scheduling import EngineOptions
from llama_jax.model.config import LlamaConfig
from llama_jax.model.params import abstract_params
from llama_jax.model.spec import ModelSpec
from pallas_kernels.cpu import library
from pallas_kernels.dev import sm90
from tests import tiny
from tests.cpu_kernel import needs_cpu_kernel

# Shapes that the kernels take.
FITTING = tiny.config(hidden_size=256, intermediate_size=384, num_heads=4, num_kv_heads=2,
                      head_dim=64, vocab_size=512, dtype="bfloat16")  # fmt: skip
OPTIONS = EngineOptions(max_batch_size=2, max_seq_len=128, prefill_chunk=128)


@cache
def traced(
    config: LlamaConfig = FITTING, device: str = "h200", dtype: str = "bfloat16"
) -> dict[str, list[KernelCall]]:
    spec = ModelSpec(config, tiny.fp8_formats(config, input_scale=False), dtype, "dynamic")
    on_h200 = jax.sharding.use_abstract_mesh(sm90.H200)
    with on_h200 if device == "h200" else contextlib.nullcontext():
        return {each.phase: calls(each) for each in programs(spec, OPTIONS, "bf16")}


def matrices(config: LlamaConfig) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(ModelSpec(config)))
    paths = {"/".join(key.key for key in path[:-1]) for path, leaf in leaves if leaf.ndim == 2}
    return paths - {"lm_head" if config.tie_word_embeddings else "embed_tokens"}


def of_module(found: list[KernelCall], module: str) -> list[KernelCall]:
    return [call for call in found if call.module == module]


@pytest.mark.parametrize("device", ["h200", "cpu"])
def test_each_matrix_is_read_by_one_call(device: str) -> None:
    for found in traced(FITTING, device).values():
        read = [path for call in found for path in call.matrices]
        assert sorted(read) == sorted(matrices(FITTING))


def test_tied_embeddings_are_the_output_matrix() -> None:
    config = replace(FITTING, tie_word_embeddings=True, num_layers=1)
    found = [call for call in traced(config, "cpu")["decode"] if not call.module]
    assert found[-1].matrices == ("embed_tokens",)
    assert not any(call.matrices for call in found[:-1])


def test_an_output_matrix_in_fp8_goes_to_the_same_kernels_as_others() -> None:
    """For few rows, that is; the lookup is no call."""
    for tied, name in ((True, "embed_tokens"), (False, "lm_head")):
        config = replace(FITTING, tie_word_embeddings=tied, num_layers=1)
        formats = tiny.fp8_formats(config, input_scale=False)
        formats[name] = formats["layers_0/mlp/up_proj"]
        with jax.sharding.use_abstract_mesh(sm90.H200):
            for program in programs(ModelSpec(config, formats), OPTIONS, "bf16"):
                (of_output,) = (call for call in calls(program) if name in call.matrices)
                assert of_output.choice and of_output.choice.kernel.name == "hopper_weight_only"


def test_an_h200_takes_the_kernels() -> None:
    found = traced()
    attention, mlp = "layers_1/self_attn/", "layers_1/mlp/"
    q_k_v = tuple(f"{attention}{name}_proj" for name in "qkv")
    decode = {call.matrices for call in found["decode"]}
    assert {q_k_v, (f"{mlp}gate_proj", f"{mlp}up_proj")} <= decode  # one launch each
    for phase, kernels in (
        ("prefill", ["rope_and_cache", "paged_attention_prefill"]),
        ("decode", ["rope_and_cache", "paged_attention_decode", "paged_attention_combine"]),
    ):
        attention = [call for call in of_module(found[phase], "layers_1/self_attn")
                     if not call.matrices]  # fmt: skip
        assert [call.path for call in attention] == kernels
        layers = [call for call in found[phase] if call.module.startswith("layers")]
        assert all(call.path != "xla" and call.why_not is None for call in layers)
    few, many = (
        next(call.choice for call in found[phase] if f"{mlp}down_proj" in call.matrices)
        for phase in ("decode", "prefill")
    )
    assert few and few.kernel.name == "hopper_weight_only" and not few.refusals
    assert few.kernel.fuses == ("several weights", "a residual", "its sums with the next launch")
    assert many and many.kernel.name == "hopper_fp8" and "SwiGLU" in many.kernel.fuses
    assert many.refusals == (("hopper_weight_only", "x must have 1 to 64 rows, got 128"),)
    (logits,) = of_module(found["decode"], "lm_head")  # in bfloat16, for which there is no kernel
    assert logits.path == "xla" and logits.operands == ("bf16[2,256]", "bf16[512,256]")
    assert logits.why_not is None
    assert logits.cost == "bf16 tensor cores, 1/2 of FP8's rate"


@needs_cpu_kernel
def test_a_cpu_takes_its_kernel_for_every_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The output matrix, too, which is in bfloat16."""
    monkeypatch.setattr(library, "best", lambda: "avx512")
    # Here and below: of a configuration that no other test has traced.
    for found in traced(replace(FITTING, rope_theta=1236.0), "cpu").values():
        assert {call.path for call in found if call.matrices} == {library.MATMUL}
        q_k_v = tuple(f"layers_1/self_attn/{name}_proj" for name in "qkv")
        assert q_k_v in {call.matrices for call in found}
        others = [
            call for call in found if not call.matrices and call.module == "layers_1/self_attn"
        ]
        assert [(call.path, call.why_not) for call in others] == [
            (name, None) for name in (library.NORM, library.ROPE, library.ATTENTION)
        ]


@needs_cpu_kernel
@pytest.mark.parametrize(
    ("best", "found_in"),
    [("avx512", [library.LOGIT_STATS, library.MATMUL]), ("neon", ["xla", "xla"])],
)
def test_scoring_needs_logits_only_where_the_kernel_does_not_run(
    best: str, found_in: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last call is for the likeliest tokens, if they are asked for: those need logits."""
    monkeypatch.setattr(library, "best", lambda: best)
    for is_tied in (False, True):
        config = replace(FITTING, rope_theta=1237.0, tie_word_embeddings=is_tied)
        found = calls(scoring(ModelSpec(config), OPTIONS))
        head = "embed_tokens" if is_tied else "lm_head"
        assert [call.matrices for call in found] == [(head,)] * len(found)
        assert [found[0].path, found[-1].path] == found_in


@needs_cpu_kernel
def test_on_arm_many_rows_are_left_to_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "best", lambda: "neon")
    found = traced(replace(FITTING, rope_theta=1235.0), "cpu")
    in_layers = {
        phase: [call for call in each if call.matrices and call.module.startswith("layers")]
        for phase, each in found.items()
    }
    assert {call.path for call in in_layers["decode"]} == {library.MATMUL}
    assert {(call.path, call.why_not) for call in in_layers["prefill"]} == {
        (
            "xla",
            "JAX runs on cpu, not on a GPU; more than 16 rows are XLA's until NEON has been timed",
        )
    }


@needs_cpu_kernel
def test_a_cpu_takes_the_same_where_its_kernels_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library, "best", lambda: "avx512")
    config = replace(FITTING, rope_theta=1237.0)
    spec = ModelSpec(config, tiny.fp8_formats(config, input_scale=False), implementation="cpu")
    by_itself = replace(spec, implementation=None)
    for asked, chosen in zip(
        *(programs(s, OPTIONS, "bf16") for s in (spec, by_itself)), strict=True
    ):
        assert [call.path for call in calls(asked)] == [call.path for call in calls(chosen)]


def test_without_its_kernel_a_cpu_leaves_everything_to_xla_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library, "why_not", lambda: "there is no C++ compiler")
    for found in traced(replace(FITTING, rope_theta=1234.0), "cpu").values():
        assert {call.path for call in found} == {"xla"}
        layers = [call for call in found if call.matrices and call.module.startswith("layers")]
        assert {call.why_not for call in layers} == {
            "JAX runs on cpu, not on a GPU; there is no C++ compiler"
        }


@pytest.mark.parametrize(("dtype", "unit"), [("bfloat16", "bf16"), ("float32", "no")])
def test_a_path_says_what_it_costs(dtype: str, unit: str) -> None:
    """Block scales that no kernel takes: 192 columns are no multiple of 128."""
    narrow = replace(FITTING, head_dim=32, hidden_size=192, num_layers=1)
    spec = ModelSpec(narrow, tiny.fp8_formats(narrow, "block", input_scale=False), dtype, "dynamic")
    with jax.sharding.use_abstract_mesh(sm90.H200):
        found = [call for each in programs(spec, OPTIONS, "bf16") for call in calls(each)]
    of_q = [call for call in found if call.matrices == ("layers_0/self_attn/q_proj",)]
    assert {call.path for call in of_q} == {"xla"}
    assert {call.cost for call in of_q} == {
        "bf16 tensor cores, 1/2 of FP8's rate; weight upcast in pieces"
    }
    (logits, _) = (call for call in found if call.module == "lm_head")
    assert logits.cost.startswith(unit)


def test_refusals_are_named() -> None:
    narrow = replace(FITTING, head_dim=32, hidden_size=192, num_layers=1)
    found = {call.matrices: call for call in traced(narrow)["prefill"]}
    assert found[()].why_not == "head_dim must be 64 or 128, got 32; JAX runs on gpu, not on a CPU"
    q_proj = found[("layers_0/self_attn/q_proj",)]
    assert q_proj.path == "xla" and "192" in str(q_proj.why_not)
    in_float32 = of_module(traced(dtype="float32")["decode"], "layers_0/self_attn")
    assert "q must be bfloat16, got float32; JAX runs on gpu, not on a CPU" in {
        call.why_not for call in in_float32
    }


def test_programs_have_the_shapes_of_the_engine() -> None:
    spec = ModelSpec(FITTING)
    prefill, decode = programs(spec, OPTIONS, "bf16", prompts=2)
    assert prefill.name == "prefill of 2 x 128 tokens" and decode.name == "decode of 2 rows"
    state, _ = jax.eval_shape(decode.function, *decode.arguments)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, decode.arguments[1])
