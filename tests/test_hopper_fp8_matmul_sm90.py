"""The Hopper FP8 x FP8 kernels as the compiler makes them, for the linears of Llama 3.1 models."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import e4m3
from pallas_kernels.dev import sm90
from pallas_kernels.dev.shapes import linears
from pallas_kernels.fp8_matmul import (
    fp8_matmul,
    hopper,
    hopper_config,
    hopper_weight_only_config,
    swiglu,
)
from pallas_kernels.fp8_matmul.limits import MAX_WEIGHT_ONLY_ROWS
from pallas_kernels.hopper import SHARED_MEMORY_BYTES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sm90.unavailable() is not None, reason=str(sm90.unavailable())),
]

BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
ROWS = 1, 64, 512, 2048, 8192


def specialisations():
    """Of all shapes of all models, one for each kernel that differs in more than its loops' trip
    counts: (linear, m, whether scales change along K), named by what they share, the configuration
    and how many columns divide into stores."""
    seen = {}
    for promote in (False, True):
        for linear in linears():
            for m in ROWS:
                config = hopper_config.heuristic(m, (linear.n,), promote=promote)
                width = math.gcd(linear.n, 64)
                seen.setdefault((config, width, promote), (linear, m))
    return [
        pytest.param(
            linear, m, promote,
            id=f"{config.tile_m}x{config.tile_n}x{config.stages}-cluster{config.cluster}"
            f"-store{width}-{'block' if promote else 'row'}",
        )
        for (config, width, promote), (linear, m) in seen.items()
    ]  # fmt: skip


def arguments(m, n, k, *, weight_layout="row", x_layout="row"):
    """x, weight, weight_scale, x_scale."""
    struct = jax.ShapeDtypeStruct
    weight_scale = (n,) if weight_layout == "row" else (-(-n // 128), k // 128)
    x_scale = (m, 1) if x_layout == "row" else (m, k // 128)
    codes = struct((m, k), e4m3.DTYPE), struct((n, k), e4m3.DTYPE)
    return *codes, struct(weight_scale, F32), struct(x_scale, F32)


def check(function, *structs):
    (kernel,) = sm90.kernels(function, *structs)
    assert kernel.count("QGMMA") and kernel.count("UTMALDG") and kernel.count("UTMASTG")
    assert not kernel.count("HMMA") + kernel.count("HGMMA")
    assert kernel.spill_bytes == kernel.count("LDL") == kernel.count("STL") == 0
    # 65,536 registers an SM, allotted by 8: what three warpgroups can share out.
    assert kernel.registers <= 65_536 // 384 // 8 * 8
    assert kernel.shared_bytes <= SHARED_MEMORY_BYTES
    assert not kernel.losses


@pytest.mark.parametrize(("linear", "m", "promote"), specialisations())
def test_every_linear_on_fp8_tensor_cores_without_spills(linear, m, promote):
    layout = "block" if promote else "row"
    structs = arguments(m, linear.n, linear.k, weight_layout=layout)
    check(lambda *a: hopper.fp8_matmul(*a, BF16), *structs)


@pytest.mark.parametrize("weight_layout", ["row", "block"])
@pytest.mark.parametrize("m", [1, 2048])
def test_down_proj_after_swiglu(m, weight_layout):
    structs = arguments(m, 4096, 14_336, weight_layout=weight_layout, x_layout="grouped")
    check(lambda *a: hopper.fp8_matmul(*a, BF16), *structs)


@pytest.mark.parametrize("m", [1, 2048])
def test_logits_in_float32(m):
    check(lambda *a: hopper.fp8_matmul(*a, F32), *arguments(m, 128_256, 4096))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_residual(dtype):
    residual = jax.ShapeDtypeStruct((2048, 4096), dtype)
    check(lambda *a: hopper.fp8_matmul(*a[:4], dtype, a[4]), *arguments(2048, 4096, 4096), residual)


@pytest.mark.parametrize("is_added", [False, True])
def test_float32_beside_a_long_ring_and_scales_of_x(is_added):
    structs = arguments(512, 1024, 3584, x_layout="grouped")
    assert hopper_config.heuristic(512, (1024,), promote=True).stages == hopper_config.MAX_STAGES
    residual = [jax.ShapeDtypeStruct((512, 1024), F32)] if is_added else []
    check(lambda *a: hopper.fp8_matmul(*a[:4], F32, *a[4:]), *structs, *residual)


def test_promoted_by_choice():
    config = hopper_config.Config(tile_m=128, tile_n=128, stages=4, cluster=2, promote=True)
    structs = arguments(2048, 4096, 4096)
    check(lambda *a: hopper.fp8_matmul(*a, BF16, config=config), *structs)


@pytest.mark.parametrize("weight_layout", ["row", "block"])
@pytest.mark.parametrize("x_layout", ["row", "grouped"])
@pytest.mark.parametrize("m", [1, 2048])
def test_swiglu(m, x_layout, weight_layout):
    """One kernel for all models: tiles do not depend on n and k."""
    structs = arguments(m, 14_336, 4096, weight_layout=weight_layout, x_layout=x_layout)
    check(lambda x, w, s, x_s: hopper.swiglu(x, w, s, w, s, x_s), *structs)


def test_every_shape_has_a_kernel():
    for linear in linears():
        x, weight, weight_scale, _ = arguments(2048, linear.n, linear.k)
        assert hopper.refusal(x, weight, weight_scale, BF16) is None, str(linear)


@pytest.mark.parametrize("m", [16, 2048])
def test_block_scales_without_a_kernel_are_multiplied_in_bfloat16(m):
    """Of a weight whose columns are no multiple of 128; a float32 product has no tensor cores."""
    struct = jax.ShapeDtypeStruct
    x, weight = struct((m, 4000), e4m3.DTYPE), struct((14_336, 4000), e4m3.DTYPE)
    scales = struct((112, 32), F32), struct((m, 1), F32)
    text = sm90.compile(
        lambda x, w, s, x_s: fp8_matmul(x, w, s, x_scale=x_s, out_dtype=BF16), x, weight, *scales
    ).as_text()
    # Rows of the weight that a step of the loop upcasts; XLA may add columns of zeros.
    upcast = re.findall(r"= (\w+)\[4096,40\d\d\]\S+ fusion\(", text)
    assert set(upcast) == {"bf16"}


@pytest.mark.parametrize(
    ("m", "passes"),
    [
        pytest.param(2048, 1, id="prefill"),  # x_scale is reshaped, before the kernels
        pytest.param(8, 5, id="decode"),  # codes upcast; parts added, scaled, quantised; added
    ],
)
def test_an_mlp_reads_its_weights_in_place(m, passes):
    """swiglu, and down with the residual: two kernels, no copy of a weight."""
    hidden, inner = 4096, 14_336
    x, gate, scale, x_scale = arguments(m, inner, hidden)
    _, down, down_scale, _ = arguments(m, hidden, inner)
    residual = jax.ShapeDtypeStruct((m, hidden), BF16)

    def mlp(x, x_scale, gate, gate_scale, up, up_scale, down, down_scale, residual):
        codes, scale = swiglu(x, gate, gate_scale, up, up_scale, x_scale=x_scale)
        return fp8_matmul(codes, down, down_scale, x_scale=scale, residual=residual, out_dtype=BF16)

    compiled = sm90.compile(mlp, x, x_scale, gate, scale, gate, scale, down, down_scale, residual)
    text = compiled.as_text()
    entry = text[text.index("ENTRY") :]
    found = re.findall(r"= \S+ (?:fusion|copy)\(", entry)
    print(f"\nm={m}: {len(found)} launches beside the two kernels")
    assert len(found) <= passes
    assert text.count('custom_call_target="mosaic_gpu') == 2
    codes, scales = m * inner, m * inner // 128 * 4
    bound = codes + 2 * scales
    if m <= MAX_WEIGHT_ONLY_ROWS:  # float32: parts of both products along K, their sum
        splits = hopper_weight_only_config.configure(m, (inner, inner), hidden).splits
        bound += (splits * 2 + 1) * m * inner * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * bound
    for shape in ((inner, hidden), (hidden, inner)):
        assert f"copy(f8e4m3fn[{shape[0]},{shape[1]}]" not in text
        assert f"bf16[{shape[0]},{shape[1]}]" not in text


def test_an_mlp_over_several_gpus_runs_the_kernels_on_its_shards():
    """Megatron's division, inside of shard_map: features of gate and up, columns of down."""
    m, hidden, inner, count = 512, 8192, 28_672, 8
    mesh = Mesh(np.array(sm90.devices(count)), ("model",))
    whole, features, columns = PartitionSpec(), PartitionSpec("model"), PartitionSpec(None, "model")

    def mlp(x, x_scale, gate, gate_scale, up, up_scale, down, down_scale):
        codes, scale = swiglu(x, gate, gate_scale, up, up_scale, x_scale=x_scale)
        y = fp8_matmul(codes, down, down_scale, x_scale=scale, implementation="hopper_fp8")
        return jax.lax.psum(y, "model")

    x, gate, gate_scale, x_scale = arguments(m, inner, hidden)
    _, down, down_scale, _ = arguments(m, hidden, inner)
    placed = (
        (x, whole), (x_scale, whole), (gate, features), (gate_scale, features),
        (gate, features), (gate_scale, features), (down, columns), (down_scale, whole),
    )  # fmt: skip
    structs = [
        jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=NamedSharding(mesh, spec))
        for each, spec in placed
    ]
    sharded = jax.shard_map(
        mlp, mesh=mesh, in_specs=tuple(spec for _, spec in placed), out_specs=whole
    )
    text = sm90.compile(sharded, *structs).as_text()
    assert text.count('custom_call_target="mosaic_gpu') == 2
    assert f"f8e4m3fn[{inner // count},{hidden}]" in text
    assert f"f8e4m3fn[{inner},{hidden}]" not in text
    assert "all-reduce" in text and "all-gather" not in text
