import ctypes
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from llama_jax.engine import allocator, memory
from llama_jax.engine.memory import (
    Capacity,
    DoesNotFitError,
    MemoryPlan,
    _room_in_cgroups,
    capacity,
    device_memory_bytes,
    fitting_pages,
    plan_memory,
)
from llama_jax.engine.scheduling import MAX_FORCED
from llama_jax.engine.speculation import Speculation
from llama_jax.engine.steps import (
    decode_steps,
    draw_fed_step,
    draw_step,
    prefill_step,
    score_step,
    state_builder,
)
from llama_jax.model.config import PRESETS
from llama_jax.model.forward import prefill
from llama_jax.model.fp8 import WeightFormat
from llama_jax.model.kv_cache import PAGE_SIZE, init_cache
from llama_jax.model.params import abstract_params
from llama_jax.model.spec import ModelSpec, Params
from pallas_kernels import e4m3
from tests.pairs import every_pair

CONFIG_8B = PRESETS["llama-3.1-8b"]
BF16 = jnp.dtype(jnp.bfloat16)
BYTES_PER_TOKEN = 131_072  # of 8B's cache: k and v of 32 layers, 8 heads of 128, in bfloat16


def fp8_formats(num_layers: int) -> dict[str, WeightFormat]:
    attention = [f"self_attn/{name}_proj" for name in "qkvo"]
    mlp = [f"mlp/{name}_proj" for name in ("gate", "up", "down")]
    return {
        f"layers_{layer}/{name}": WeightFormat("float8_e4m3fn", "row")
        for layer in range(num_layers)
        for name in attention + mlp
    }


def test_the_plan_of_an_8b_model_is_what_one_computes_by_hand() -> None:
    dense = plan_memory(ModelSpec(CONFIG_8B), 8, 4096, BF16, 512)
    assert dense.weights == 8_030_261_248 * 2  # the published number of parameters
    assert dense.kv_cache - 8 * 4096 * BYTES_PER_TOKEN < 10_000  # tables, scales


def test_fp8_halves_what_it_stores() -> None:
    config = replace(CONFIG_8B, num_layers=1)
    dense = plan_memory(ModelSpec(config), 8, 4096, BF16, 512)
    fp8 = plan_memory(ModelSpec(config, fp8_formats(1)), 8, 4096, jnp.dtype(e4m3.DTYPE), 512)
    matrices = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096
    scales = 4 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)
    assert dense.weights - fp8.weights == matrices - scales
    assert abs(fp8.kv_cache - dense.kv_cache / 2) < 10_000


def plan(**changes: int) -> MemoryPlan:
    sizes = {"weights": 9 * 10**9, "kv_cache": 4 * 10**9, "workspace": 10**9, "limit": 16 * 10**9}
    return MemoryPlan(**(sizes | changes), max_batch_size=8, max_seq_len=4096, prefill_chunk=512)


def test_what_does_not_fit_is_refused_with_sizes_and_advice() -> None:
    plan().check()
    plan(limit=14 * 10**9).check()
    with pytest.raises(DoesNotFitError) as error:
        plan(limit=14 * 10**9 - 1).check()
    message = str(error.value)
    for part in ("14.0 GB needed", "9.0 GB", "4.0 GB", "max_batch_size (8)", "max_seq_len (4096)"):
        assert part in message
    assert isinstance(error.value, MemoryError)
    for pages, advice in (
        (65, r"lower num_pages \(65\), or"),
        (64, r"lower max_batch_size \(8\) or"),
    ):
        with pytest.raises(DoesNotFitError, match=advice):
            plan(limit=10**10, num_pages=pages).check()
    with pytest.raises(DoesNotFitError, match=r"lower prefill_chunk \(512\)"):
        plan(workspace=10**12).check()
    with pytest.raises(DoesNotFitError, match="shard over more devices"):
        plan(weights=10**12, kv_cache=0).check()


def test_the_table_shows_every_part() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(plan())
    text = console.export_text()
    for part in ("9.0 GB", "4.0 GB", "1.0 GB", "14.0 GB", "16.0 GB", "8 x 4096 tokens"):
        assert part in text


def test_a_cpu_device_has_a_part_of_the_memory_that_is_available() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < device_memory_bytes() <= total


def test_the_memory_of_a_device_that_is_not_here_can_be_planned_for() -> None:
    spec = ModelSpec(CONFIG_8B)
    assert plan_memory(spec, 8, 4096, BF16, 512, limit=80 * 2**30).limit == 80 * 2**30


@pytest.mark.parametrize(
    ("batch", "length", "gigabytes"), every_pair((1, 5), (300, 4096), (17.5, 20, 24))
)
def test_capacity_is_where_the_plan_stops_fitting(
    batch: int, length: int, gigabytes: float
) -> None:
    spec, limit = ModelSpec(CONFIG_8B), int(gigabytes * 10**9)

    def fits(rows: int, tokens: int) -> bool:
        plan = plan_memory(spec, rows, tokens, BF16, 512, limit=limit)
        return plan.total <= limit

    found = capacity(spec, batch, length, BF16, 512, limit)
    for rows, longest in ((1, found.longest_alone), (batch, found.longest)):
        assert longest % PAGE_SIZE == 0
        assert not fits(rows, max(longest, 512) + (PAGE_SIZE if longest else 0))
        assert longest == 0 or (longest >= 512 and fits(rows, longest))
    assert not fits(found.most + 1, length)
    assert found.most == 0 or fits(found.most, length)


def test_a_cache_has_as_many_pages_as_fit() -> None:
    spec = ModelSpec(CONFIG_8B)

    def plan(pages: int, gigabytes: float = 20) -> MemoryPlan:
        limit = int(gigabytes * 10**9)
        return plan_memory(spec, 8, 4096, BF16, 512, limit=limit, num_pages=pages)

    found = fitting_pages(plan, 64, 512)
    assert 64 < found < 512
    assert plan(found).total <= 19 * 10**9 < plan(found + 1).total
    assert fitting_pages(lambda pages: plan(pages, 80), 64, 512) == 512
    assert fitting_pages(lambda pages: plan(pages, 1), 64, 512) == 64
    assert plan(201).kv_cache - plan(200).kv_cache == PAGE_SIZE * BYTES_PER_TOKEN


def test_a_draft_has_weights_and_a_cache_of_its_own() -> None:
    spec, draft = ModelSpec(CONFIG_8B), ModelSpec(replace(CONFIG_8B, num_layers=2))
    both = plan_memory(spec, 8, 4096, BF16, 512, num_pages=100, speculation=Speculation(1, draft))
    parts = [plan_memory(each, 8, 4096, BF16, 512, num_pages=100) for each in (spec, draft)]
    assert both.weights == sum(part.weights for part in parts)
    assert both.kv_cache == sum(part.kv_cache for part in parts)


def test_capacity_ends_at_the_models_context_and_at_nothing() -> None:
    config = replace(CONFIG_8B, num_layers=1, max_position_embeddings=1000)
    spec = ModelSpec(config)
    rich = capacity(spec, 2, 1000, BF16, 512, 10**12)
    assert (rich.longest_alone, rich.longest) == (1000, 1000) and rich.most > 1000
    assert capacity(spec, 2, 1000, BF16, 512, 10**6) == Capacity(0, 0, 0)
    short = ModelSpec(replace(config, max_position_embeddings=100))
    assert capacity(short, 1, 100, BF16, 512, 10**12).longest_alone == 100


def group(directory: Path, version: int, limit: str, usage: int, cached: int) -> None:
    """The files of a control group."""
    directory.mkdir(parents=True, exist_ok=True)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    (directory / names[0]).write_text(f"{limit}\n")
    (directory / names[1]).write_text(f"{usage}\n")
    (directory / "memory.stat").write_text(f"anon 1\n{names[2]} {cached}\n")


@pytest.mark.parametrize(
    ("version", "membership", "top"),
    [(2, "0::/a/b\n", "."), (1, "9:cpu,cpuacct:/c\n4:hugetlb,memory:/a/b\n0::/\n", "memory")],
)
def test_a_container_has_what_its_groups_leave(
    tmp_path: Path, version: int, membership: str, top: str
) -> None:
    root, process = tmp_path / "cgroup", tmp_path / "process"
    process.write_text(membership)
    assert _room_in_cgroups(root, process) == []  # as in a container that sees none of its groups
    group(root / top / "a" / "b", version, "5000", usage=1000, cached=300)
    group(root / top / "a", version, "3000", usage=3500, cached=100)
    assert _room_in_cgroups(root, process) == [4300, 0]


def test_a_group_without_a_limit_leaves_everything(tmp_path: Path) -> None:
    (tmp_path / "process").write_text("0::/\n")
    group(tmp_path / "cgroup", 2, "max", 1000, 0)
    assert _room_in_cgroups(tmp_path / "cgroup", tmp_path / "process") == []
    assert _room_in_cgroups(tmp_path / "cgroup", tmp_path / "absent") == []


def test_the_device_of_a_container_is_no_larger_than_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_room_in_cgroups", lambda: [10**6, 5 * 10**6])
    assert device_memory_bytes() == 10**6 // len(jax.local_devices())


def small_8b(is_fp8: bool) -> ModelSpec:
    config = replace(
        CONFIG_8B, num_layers=6, hidden_size=1024, intermediate_size=3584, num_heads=8,
        num_kv_heads=2, vocab_size=16384, bos_token_id=1, eos_token_ids=(2,),
    )  # fmt: skip
    return ModelSpec(config, fp8_formats(config.num_layers) if is_fp8 else {})


def stored(spec: ModelSpec) -> Params:
    """The parameters as they lie on a CPU."""
    return jax.tree.map(
        lambda leaf: ints(leaf.shape, jnp.int8) if leaf.dtype == e4m3.DTYPE else leaf,
        abstract_params(spec),
    )


@pytest.mark.parametrize("is_fp8", [True, False])
def test_the_workspace_holds_what_compiled_prefill_needs(is_fp8: bool) -> None:
    """With XLA's products, which need more than the CPU's kernel."""
    spec, batch, chunk, length = small_8b(is_fp8), 4, 256, 1024
    cache = jax.eval_shape(lambda: init_cache(spec.config, batch, length))

    def needed(spec: ModelSpec) -> int:
        step = prefill.lower(stored(spec), cache, ints((batch, chunk)), ints((batch,)), spec=spec)
        size: int = step.compile().memory_analysis().temp_size_in_bytes
        return size

    estimate = plan_memory(spec, batch, length, BF16, chunk).workspace
    by_xla = needed(replace(spec, implementation="xla"))
    assert needed(spec) <= by_xla <= estimate <= 5 * by_xla


@pytest.mark.slow
def test_the_workspace_holds_the_logits_of_draft_tokens() -> None:
    spec, batch, speculation = small_8b(False), 16, Speculation(8)
    state = jax.eval_shape(state_builder(spec, batch, 64, BF16, speculation=speculation))
    flags, table = ints((batch,), jnp.bool_), state.cache.page_table

    step = decode_steps.lower(
        stored(spec), state, table, flags, ints(()), spec=spec, max_steps=8, speculation=speculation
    )
    needed = step.compile().memory_analysis().temp_size_in_bytes
    needed += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.sampling))
    plan = plan_memory(spec, batch, 64, BF16, 1, speculation=speculation)
    assert needed <= plan.workspace <= 3 * needed


@pytest.mark.slow
def test_the_workspace_holds_the_logits_of_tokens_that_a_grammar_forces() -> None:
    spec, batch, width = small_8b(False), 16, MAX_FORCED
    state = jax.eval_shape(state_builder(spec, batch, 64, BF16))
    hidden = ints((batch, 1 + width, spec.config.hidden_size), BF16)
    flags, counts = ints((batch,), jnp.bool_), ints((batch,))
    masks = ints((batch, 1 + width, spec.config.vocab_size // 32), jnp.uint32)
    step = draw_fed_step.lower(
        stored(spec), state, hidden, flags, ints((batch, width)), counts, masks, spec=spec
    )
    needed = step.compile().memory_analysis().temp_size_in_bytes
    needed += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.sampling))
    assert needed <= plan_memory(spec, batch, 64, BF16, 1).workspace <= 3 * needed


@pytest.mark.slow
@pytest.mark.parametrize("is_fp8", [True, False])
@pytest.mark.parametrize(("batch", "chunk"), [(4, 256), (16, 1)])
def test_the_workspace_holds_what_the_steps_and_the_sampler_need(
    is_fp8: bool, batch: int, chunk: int
) -> None:
    spec, length = small_8b(is_fp8), 1024
    state = jax.eval_shape(state_builder(spec, batch, length, BF16))
    params = stored(spec)
    tokens, rows, flags = ints((batch, chunk)), ints((batch,)), ints((batch,), jnp.bool_)
    table, steps = state.cache.page_table, ints(())
    hidden = ints((batch, spec.config.hidden_size), BF16)
    lowered = (
        prefill_step.lower(params, state, table, tokens, rows, rows, spec=spec),
        draw_step.lower(params, state, hidden, rows, rows, spec=spec),
        decode_steps.lower(params, state, table, flags, steps, spec=spec, max_steps=8),
        score_step.lower(
            params,
            ints((batch, chunk, spec.config.hidden_size), BF16),
            tokens,
            ints((), jnp.bool_),
            spec=spec,
        ),
    )
    needed = max(step.compile().memory_analysis().temp_size_in_bytes for step in lowered)
    needed += batch * chunk * spec.config.hidden_size * 2  # what `prefill_step` returns
    needed += sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.sampling))
    assert plan_memory(spec, batch, length, BF16, chunk).workspace >= needed


def ints(shape: tuple[int, ...], dtype: jnp.dtype = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


THREADS = """
import ctypes, sys, threading
from llama_jax.engine.allocator import keep_little

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.fdopen.restype = ctypes.c_void_p
if sys.argv[1] == "shared":
    keep_little()
together = threading.Barrier(8)
def allocate():
    together.wait()
    libc.free(ctypes.c_void_p(libc.malloc(1000)))
    together.wait()
threads = [threading.Thread(target=allocate) for _ in range(8)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="glibc's allocator")
def test_threads_keep_little() -> None:
    def arenas(how: str) -> int:
        command = [sys.executable, "-c", THREADS, how]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        return run.stdout.count("<heap nr=")

    assert 1 <= arenas("shared") < arenas("apart")


LARGE = """
import ctypes
from pathlib import Path
from llama_jax.engine.allocator import LARGE_BLOCK, keep_little

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def resident():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def resident_of_freed():
    # A freed block makes glibc take the next ones from its heap, where others end up behind them.
    libc.free(ctypes.c_void_p(libc.malloc(LARGE_BLOCK + 1)))
    before = resident()
    block = libc.malloc(LARGE_BLOCK + 1)
    ctypes.memset(block, 1, LARGE_BLOCK + 1)
    behind = libc.malloc(1000)
    libc.free(ctypes.c_void_p(block))
    return resident() - before

keep_little()
print(resident_of_freed() / LARGE_BLOCK)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="glibc's allocator")
def test_large_blocks_go_back_when_they_are_freed() -> None:
    def kept(source: str) -> float:
        command = [sys.executable, "-c", source]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert kept(LARGE) < 0.1 < 0.9 < kept(LARGE.replace("\nkeep_little()", ""))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="glibc's allocator")
def test_what_is_free_between_what_stays_is_given_back() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

    blocks = [libc.malloc(64 * 1024) for _ in range(1000)]
    for block in blocks:
        ctypes.memset(ctypes.c_void_p(block), 1, 64 * 1024)
    for i, block in enumerate(blocks):
        if i % 10:
            libc.free(ctypes.c_void_p(block))
    before = resident()
    allocator.give_back()
    assert before - resident() > 40e6
    for block in blocks[::10]:
        libc.free(ctypes.c_void_p(block))
