"""The model through the kernels for Hopper, in JAX's GPU simulator and as traced for an H200."""

from collections import Counter
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from llama_jax.engine.engine import Engine
from llama_jax.engine.paths import calls, programs
from llama_jax.engine.scheduling import EngineOptions
from llama_jax.llm import LLM
from llama_jax.model.forward import activations_in, extend, last_hidden, unembed
from llama_jax.model.fp8 import WeightFormat
from llama_jax.model.fused import leave_sums
from llama_jax.model.kv_cache import init_cache
from llama_jax.model.linear import Products, Stored
from llama_jax.model.params import init_params
from llama_jax.model.spec import ModelSpec
from pallas_kernels import device, e4m3, row_fusions, tuned
from pallas_kernels.dev import sm90
from pallas_kernels.fp8_matmul import choose, hopper, hopper_weight_only
from pallas_kernels.paged_attention import hopper as hopper_attention
from pallas_kernels.rope_and_cache import hopper as hopper_rope
from pallas_kernels.row_fusions import hopper as row_fusions_hopper
from tests import tiny

CONFIG = tiny.config(hidden_size=128, intermediate_size=256, num_layers=1, num_heads=4,
                     num_kv_heads=2, head_dim=64, vocab_size=128, dtype="bfloat16")  # fmt: skip
PROMPT, ROWS = 40, 2  # tokens of each row: more than the weight-only kernel takes


def spec_of(config=CONFIG, scale="row", **settings):
    return ModelSpec(config, tiny.fp8_formats(config, scale, input_scale=False), **settings)


def mixed(config=CONFIG, **settings):
    """Scales of k_proj and up_proj per block, of the others per row: nothing takes both at once."""
    formats = tiny.fp8_formats(config, "row", input_scale=False)
    other = tiny.fp8_formats(config, "block", input_scale=False)
    chosen = {path: other[path] for path in other if path.endswith(("k_proj", "up_proj"))}
    return ModelSpec(config, formats | chosen, **settings)


@pytest.fixture
def simulated(monkeypatch):
    """Kernels run in the simulator, as if on a Hopper GPU."""
    monkeypatch.setattr(device, "not_hopper", lambda: None)
    for module, name in (
        (hopper, "fp8_matmul"), (hopper, "fp8_matmuls"), (hopper, "swiglu"),
        (hopper_weight_only, "fp8_matmuls"),
        (hopper_weight_only, "parts"), (hopper_attention, "paged_attention"),
        (row_fusions_hopper, "add_rms_norm"), (row_fusions_hopper, "silu_and_mul"),
        (hopper_rope, "rope_and_cache"),
    ):  # fmt: skip
        run = partial(getattr(module, name), interpret=plgpu.InterpretGPUParams(detect_races=True))
        monkeypatch.setattr(module, name, run)


def run(params, prefill_spec, decode_spec, cache_dtype):
    """Logits after a prompt, and after a token more; not in one program, where kernels that run in
    the simulator at the same time would wait for each other's threads."""
    cache = init_cache(decode_spec.config, ROWS, 64, cache_dtype)
    ids = tiny.tokens(ROWS, PROMPT + 1, vocab_size=CONFIG.vocab_size)
    lengths = jnp.array([PROMPT, PROMPT - 3])
    hidden, cache = extend(params, cache, ids[:, :-1], lengths, spec=prefill_spec, phase="prefill")
    first = unembed(params, last_hidden(hidden, lengths), spec=prefill_spec)
    ones = jnp.ones(ROWS, jnp.int32)
    hidden, _ = extend(params, cache, ids[:, -1:], ones, spec=decode_spec, phase="decode")
    return np.asarray(first), np.asarray(unembed(params, hidden[:, 0], spec=decode_spec))


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden_size", "most", "leaves_sums"), [(128, 0.1, False), (512, 0.2, True)]
)
@pytest.mark.parametrize("scale", ["row", "block"])
def test_no_farther_from_float32_than_through_xla(
    scale, hidden_size, most, leaves_sums, simulated, monkeypatch
):
    """FP8 activations in prefill, bfloat16 in decode. The kernels' swiglu is quantised per 128
    columns and they add the residual before they round: errors of other values, of one size. In
    decode products leave their sums to the kernels between them, or add them up themselves."""
    if not leaves_sums:
        monkeypatch.setattr(row_fusions, "why_not", lambda *_: "left to XLA in this test")
    spec = spec_of(replace(CONFIG, hidden_size=hidden_size), scale)
    params = jax.tree.map(lambda a: a * 6 if a.dtype == jnp.bfloat16 else a, init_params(spec))
    exact = replace(spec, dtype="float32", implementation="xla")
    expected = run(params, exact, exact, "float32")
    errors = {}
    for name in ("xla", "hopper"):
        named = replace(spec, implementation=name)
        found = run(params, replace(named, activations="dynamic"), named, "bfloat16")
        errors[name] = [distance(*pair) for pair in zip(found, expected, strict=True)]
    assert not gpu_callbacks.get_races().races_found
    for ours, theirs in zip(errors["hopper"], errors["xla"], strict=True):
        assert ours < 1.3 * theirs < most


def launches(spec, **options):
    """Of layer 0 by phase: the matrices that each kernel reads, and its name."""
    sizes = {"max_batch_size": 2, "max_seq_len": 256, "prefill_chunk": 128} | options
    options = EngineOptions(**sizes)
    with jax.sharding.use_abstract_mesh(sm90.H200):
        return {
            each.phase: Counter(
                ("+".join(path.rpartition("/")[2] for path in call.matrices), call.path)
                for call in calls(each)
                if call.module.startswith("layers_0")
            )
            for each in programs(spec, options, "bf16")
        }


ROW_FUSIONS = "add_rms_norm", "silu_and_mul"
DECODE = Counter([
    ("q_proj+k_proj+v_proj", "fp8_matmul_weight_only"), ("", "rope_and_cache"),
    ("", "paged_attention_decode"), ("", "paged_attention_combine"),
    ("o_proj", "fp8_matmul_weight_only"),
    ("gate_proj+up_proj", "fp8_matmul_weight_only"), ("down_proj", "fp8_matmul_weight_only"),
    ("", "add_rms_norm"), ("", "add_rms_norm"), ("", "silu_and_mul"),
])  # fmt: skip
UNFUSED = Counter({call: n for call, n in DECODE.items() if call[1] not in ROW_FUSIONS})
PREFILL = Counter([
    ("q_proj+k_proj+v_proj", "fp8_matmul"),
    ("", "rope_and_cache"), ("", "paged_attention_prefill"), ("o_proj", "fp8_matmul"),
    ("gate_proj+up_proj", "fp8_swiglu"), ("down_proj", "fp8_matmul"),
])  # fmt: skip


FP8_DECODE = PREFILL - Counter([("", "paged_attention_prefill")]) + Counter([
    ("", "paged_attention_decode"), ("", "paged_attention_combine"),
])  # fmt: skip


@pytest.mark.parametrize(("activations", "decode"), [("auto", DECODE), ("dynamic", UNFUSED)])
def test_launches_on_an_h200(activations, decode):
    """Where activations are not in FP8, decode has nothing but kernels between its products."""
    found = launches(spec_of(activations=activations))
    assert found == {"prefill": PREFILL, "decode": decode}


@pytest.mark.parametrize(("in_cluster", "count"), [(False, 9), (True, 8)])
def test_fewer_launches_where_tuning_found_them_faster(in_cluster, count, tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned, "read", cache(tuned.read.__wrapped__))
    problem = "heads=4/1x128 bfloat16 tokens=1 batch<=2 capacity<=256"
    config = {"splits": 4, "keys_per_split": None, "stages": 2, "in_cluster": in_cluster}
    for kernel, entry in (
        ("rope_and_attention", {"in_one": True}),
        ("paged_attention_decode", config),
    ):
        tuned.write("NVIDIA H200", kernel, problem, {"config": entry})
    spec = spec_of(replace(CONFIG, num_kv_heads=1, head_dim=128), activations="auto")
    expected = DECODE + Counter([("", "rope_and_attention")])
    expected -= Counter([("", "rope_and_cache"), ("", "paged_attention_decode")])
    expected -= Counter([("", "paged_attention_combine")]) if in_cluster else Counter()
    assert launches(spec)["decode"] == expected and expected.total() == count
    invariant = launches(replace(spec, is_batch_invariant=True))["decode"]
    assert ("", "rope_and_cache") in invariant


def test_scales_of_two_kinds_are_a_launch_each():
    assert launches(mixed(activations="auto"))["decode"] == Counter([
        ("q_proj", "fp8_matmul_weight_only"), ("k_proj", "fp8_matmul_weight_only"),
        ("v_proj", "fp8_matmul_weight_only"), ("", "rope_and_cache"),
        ("", "paged_attention_decode"), ("", "paged_attention_combine"),
        ("o_proj", "fp8_matmul_weight_only"), ("gate_proj", "fp8_matmul_weight_only"),
        ("up_proj", "fp8_matmul_weight_only"), ("down_proj", "fp8_matmul_weight_only"),
    ])  # fmt: skip


@pytest.mark.parametrize(("axis", "expected"), [(None, True), ("model", False)])
def test_products_are_summed_over_devices_before_anything_reads_them(axis, expected):
    weight = jax.ShapeDtypeStruct((512, 512), e4m3.DTYPE)
    stored = Stored(weight, jax.ShapeDtypeStruct((512,), jnp.float32), summed_over=axis)
    linear = SimpleNamespace(
        format=WeightFormat("float8_e4m3fn", "row"), stored=lambda: stored, in_features=512
    )
    residual = jax.ShapeDtypeStruct((2, 1, 512), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((2, 512), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(sm90.H200):
        products = Products((linear,), (choose(x, *stored.quantized, x.dtype),))
        assert leave_sums(spec_of(), residual, [products]) == expected


def test_many_rows_are_decoded_in_fp8():
    assert launches(spec_of(activations="auto"), max_batch_size=65)["decode"] == FP8_DECODE


@pytest.mark.parametrize("settings", [{"activations": "dynamic"}, {"activations": "auto"}])
def test_groups_of_activations_take_the_same_kernels(settings):
    spec = spec_of(**settings)
    formats = {path: replace(each, activation_group=128) for path, each in spec.formats.items()}
    assert launches(replace(spec, formats=formats)) == launches(spec)


def test_auto_activations():
    spec = spec_of(activations="auto")
    on_cpu = [activations_in(phase, 512, spec) for phase in ("prefill", "decode")]
    assert on_cpu == ["bf16", "bf16"]
    with jax.sharding.use_abstract_mesh(sm90.H200):
        assert activations_in("prefill", 1, spec) == "dynamic"
        assert activations_in("decode", 64, spec) == "bf16"
        assert activations_in("decode", 65, spec) == "dynamic"
        assert activations_in("prefill", 512, spec_of(activations="bf16")) == "bf16"
        exact = spec_of(activations="auto", dtype="float32")
        assert activations_in("prefill", 512, exact) == "bf16"


def test_a_named_implementation_is_taken_or_refused():
    assert {path for _, path in launches(spec_of(implementation="xla"))["decode"]} == {"xla"}
    with pytest.raises(ValueError, match="'hopper' cannot run: x must have 1 to 64 rows, got 128"):
        launches(spec_of(implementation="hopper", activations="bf16"))
    with pytest.raises(ValueError, match="implementation='hopper' cannot run: JAX runs on cpu"):
        LLM.load(implementation="hopper", verbose=False)


def test_a_batch_invariant_engine_asks_the_kernels_for_it():
    """The decode kernel's splits of 1024 keys: five for 4160, where otherwise there are as many as
    keep the SMs busy."""
    options = EngineOptions(max_batch_size=1, max_seq_len=4160, batch_invariant=True)
    engine = Engine({}, spec_of(), options, jnp.dtype("bfloat16"))

    def parts(spec):
        with jax.sharding.use_abstract_mesh(sm90.H200):
            found = calls(programs(spec, options, "bf16")[1])
        return {call.operands[0] for call in found if call.path == "paged_attention_combine"}

    assert parts(engine.spec) == {"f32[5,1,2,1,64,8]"}
    assert parts(spec_of()) != parts(engine.spec)
