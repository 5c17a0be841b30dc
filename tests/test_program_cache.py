"""Traces that are kept: what a key depends on, and what a second process does with them."""

import gc
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Jaxpr

from llama_jax.engine import compile_cache, program_cache, steps
from llama_jax.engine.engine import Engine
from llama_jax.engine.program_cache import kept_jit
from llama_jax.engine.request import Request
from llama_jax.engine.scheduling import EngineOptions
from llama_jax.engine.speculation import Speculation
from llama_jax.model.params import init_params
from llama_jax.model.sharding import make_mesh
from llama_jax.sampling_params import SamplingParams
from pallas_kernels.cpu import library
from pallas_kernels.fp8_matmul import cpu
from tests.tiny import config, fp8_spec

ROOT = Path(__file__).parents[1]

# A process that serves a request of each kind with a tiny model, and says what it did.
PROGRAM = """
import json, sys
import numpy as np
from llama_jax.engine import compile_cache
from llama_jax.model import forward
compile_cache.enable()
traced, extend = [], forward.extend
forward.extend = lambda *args, **kwargs: traced.append(kwargs["phase"]) or extend(*args, **kwargs)
from llama_jax.engine.engine import Engine
from llama_jax.model.params import init_params
from llama_jax.engine.request import Request
from llama_jax.sampling_params import SamplingParams
from llama_jax.engine.scheduling import EngineOptions
from tests.tiny import config, fp8_spec
spec = fp8_spec(config=config(num_layers=1))
options = EngineOptions(1, 64, prefill_chunk=4, prefill_budget=4)  # few programs
engine = Engine(init_params(spec), spec, options, "float32")
kinds = sys.argv[1:]
engine.warmup(kinds)
sampling = SamplingParams(max_new_tokens=6, temperature=0.7, seed=3, logprobs=2)
asked = [Request([3, 4, 5], sampling, output_kind=kind) for kind in kinds]
with compile_cache.forbid_compile():
    for _ in engine.run(asked):
        pass
names = ("token_ids", "logprobs", "prompt_logprobs", "prompt_logits")
values = [np.asarray(getattr(request, name)).tolist() for request in asked for name in names]
print(json.dumps({
    "values": values, "traced": traced, "compile": vars(compile_cache.report()),
    "has_lapack": "scipy.linalg" in sys.modules,
}))
"""


@pytest.fixture(autouse=True)
def settings():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def kept(tmp_path):
    """Programs of this process are kept there."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    return tmp_path / "traced"


def start(cache: Path, *kinds: str) -> dict:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")} | {
        "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "LLAMA_JAX_CACHE": str(cache),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *kinds], cwd=ROOT, env=environment, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    return json.loads(done.stdout)


def counting(seen: list, name: str = "double"):
    """A kept program that says when it is traced."""

    def function(x, y=None, *, factor=2):
        seen.append(factor)
        return x * factor if y is None else x * factor + y

    function.__qualname__ = function.__name__ = name
    return kept_jit(function, static_argnames="factor")


@pytest.mark.parametrize(
    "kinds",
    [("tokens",), pytest.param(("tokens", "logprobs", "logits"), marks=pytest.mark.slow)],
)
def test_a_second_process_traces_nothing_and_says_the_same(tmp_path, kinds):
    cold, warm = start(tmp_path, *kinds), start(tmp_path, *kinds)
    assert set(cold["traced"]) == {"prefill", "decode"} and warm["traced"] == []
    assert warm["values"] == cold["values"]
    assert cold["compile"]["from_cache"] == warm["compile"]["compiled"] == 0
    assert warm["compile"]["from_cache"] == cold["compile"]["compiled"] > 0
    assert not cold["has_lapack"] and not warm["has_lapack"]  # it takes long to import


def test_a_file_spares_the_trace(kept):
    seen: list = []
    x = jnp.arange(3.0)
    assert counting(seen)(x).tolist() == [0, 2, 4]
    assert len(list(kept.iterdir())) == len(seen) == 1
    assert counting(seen)(x).tolist() == [0, 2, 4]
    assert len(seen) == 1


def test_nothing_of_a_trace_stays(kept):
    """A large program's would take as much memory as the program."""

    def function(x):
        return jax.jit(lambda x: jnp.sin(x) * 2.125)(x)

    program = kept_jit(function)
    program(jnp.ones(3))
    gc.collect()
    left = [each for each in gc.get_objects() if isinstance(each, Jaxpr)]
    assert left and not [each for each in left if "2.125" in str(each)]
    assert "2.125" in program.lower(jnp.ones(3)).as_text()


def test_a_program_that_needs_lapack_gets_it(kept):
    program = kept_jit(lambda x: jnp.linalg.cholesky(x))
    assert program(jnp.eye(2)).tolist() == [[1, 0], [0, 1]]
    counting([])(jnp.arange(3.0))
    platforms = {path.name[:6]: program_cache._read(path).platforms for path in kept.iterdir()}
    assert platforms == {"<lambd": ("cpu",), "double": ()}


@pytest.mark.parametrize("fails", [False, True])
def test_programs_are_traced_while_the_compiler_works(kept, monkeypatch, fails):
    """If it fails after all, they are traced again, without the kernels."""
    asked, traced = [], []

    def why_not():
        asked.append(library._is_trusting.get())
        return "it failed" if fails and not asked[-1] else None

    def double(x):
        traced.append(library.why_not())
        if traced[-1]:
            return x + x
        # Stands for a kernel: only its name matters.
        with jax.named_scope(library.MATMUL):
            return 2 * x

    monkeypatch.setattr(library, "why_not", why_not)
    monkeypatch.setattr(cpu, "instructions_here", lambda: library.why_not() or "avx2")
    assert kept_jit(double)(jnp.arange(3.0)).tolist() == [0, 2, 4]
    assert traced == [None, "it failed"][: 1 + fails] and len(list(kept.iterdir())) == 1 + fails
    waits = asked.index(False)
    assert all(asked[:waits]) and waits == 2  # for the key and the trace
    asked.clear()
    counting([])(jnp.arange(3.0))
    assert all(asked)  # it calls no kernel, so it need not wait


def test_the_first_launch_compiles_all_that_is_needed_soon(kept):
    """And nothing else."""
    spec = fp8_spec(config=config(num_layers=1, vocab_size=337))
    options = EngineOptions(1, 64, prefill_chunk=4, prefill_budget=4)
    engine = Engine(init_params(spec), spec, options, "float32")
    before = len(compile_cache._compiled)
    request = engine.submit(Request([3, 4, 5], SamplingParams(max_new_tokens=1)))
    engine.step()
    names = [f"jit({name})" for name in ("admit", "build", "draw_step", "prefill_step")]
    assert sorted(compile_cache._compiled[before:]) == names
    engine = Engine(engine.params, spec, options, "float32")
    request = engine.submit(Request([3, 4, 5], SamplingParams(max_new_tokens=3)))
    engine.step()
    wait(engine._compiling[steps.decode_steps])
    with compile_cache.forbid_compile():
        while not request.finish_reason:
            engine.step()
    assert len(request.token_ids) == 3


def test_an_interrupt_ends_compiling(monkeypatch):
    compiled, go_on = [], threading.Event()

    class Program:
        def lower(self):
            go_on.wait(30)
            return SimpleNamespace(compile=lambda: compiled.append(self))

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(program_cache, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        program_cache.begin_to_compile([(Program(), (), {}), (Program(), (), {})])
    monkeypatch.undo()
    go_on.set()
    futures = program_cache.begin_to_compile([(program := Program(), (), {})])
    wait(futures[program])
    assert compiled == [program]


def test_donated_arguments_stay_donated(kept):
    def add(state, x, *, times=1):
        return {"sum": state["sum"] + x * times, "twice": state["twice"]}

    program = kept_jit(add, static_argnames="times", donate_argnames="state")
    for _ in range(2):  # traced, and read from the file
        state, x = {"sum": jnp.zeros(3), "twice": jnp.ones(3)}, jnp.ones(3)
        text = program.lower(state, x).compile().as_text()
        assert text.count("may-alias") == 2
        pointer = state["twice"].unsafe_buffer_pointer()
        after = program(state, x)
        assert state["sum"].is_deleted() and not x.is_deleted()
        assert after["twice"].unsafe_buffer_pointer() == pointer
        program = kept_jit(add, static_argnames="times", donate_argnames="state")
    assert len(list(kept.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"x" * 10_000, "cut", "flipped"])
def test_a_damaged_file_is_written_again(kept, caplog, content):
    seen: list = []
    x = jnp.arange(3.0)
    counting(seen)(x)
    (path,) = kept.iterdir()
    whole = path.read_bytes()
    flipped = whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:]
    path.write_bytes({"cut": whole[:-7], "flipped": flipped}.get(content, content))
    with caplog.at_level(logging.INFO):
        assert counting(seen)(x).tolist() == [0, 2, 4]
    assert len(seen) == 2 and "is damaged" in caplog.text
    assert path.read_bytes()[:32] == whole[:32] or program_cache._read(path) is not None
    counting(seen)(x)
    assert len(seen) == 2


def test_a_directory_that_cannot_be_written_to_is_left_alone(tmp_path, caplog):
    (tmp_path / "traced").write_text("in the way")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    with caplog.at_level(logging.INFO):
        assert counting([])(jnp.arange(3.0)).tolist() == [0, 2, 4]
    assert "is not kept" in caplog.text


def test_programs_that_go_unused_make_room(kept, monkeypatch):
    x, seen = jnp.arange(3.0), []
    for age, name in ((30, "old"), (20, "older"), (10, "newer")):
        counting([], name)(x)
        (path,) = kept.glob(f"{name}-*")
        os.utime(path, ns=(0, path.stat().st_mtime_ns - age * 10**9))
    counting(seen, "old")(x)  # read, so it is the newest now
    assert not seen
    size = sum(path.stat().st_size for path in kept.iterdir())
    (kept / "tmp-of-a-killed-process").write_bytes(b"x" * 100)
    os.utime(kept / "tmp-of-a-killed-process", ns=(0, 0))
    monkeypatch.setattr(program_cache, "MAX_BYTES", size)
    counting([], "last")(x)
    assert sorted(path.name.partition("-")[0] for path in kept.iterdir()) == [
        "last",
        "newer",
        "old",
    ]
    counting(seen, "old")(x)
    assert not seen
    counting(seen, "older")(x)
    assert seen and list(kept.glob("older-*"))
    assert sum(path.stat().st_size for path in kept.iterdir()) <= size


def test_a_program_larger_than_all_room_is_not_kept(kept, monkeypatch, caplog):
    monkeypatch.setattr(program_cache, "MAX_BYTES", 10)
    assert counting([])(jnp.arange(3.0)).tolist() == [0, 2, 4]
    assert list(kept.iterdir()) == [] and "is not kept" not in caplog.text


def test_nothing_is_kept_without_a_cache_or_on_a_mesh(tmp_path):
    seen: list = []
    jax.config.update("jax_compilation_cache_dir", None)
    counting(seen)(jnp.arange(3.0))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    with jax.set_mesh(make_mesh(1)):
        counting(seen)(jnp.arange(3.0))
    with jax.disable_jit():
        counting(seen)(jnp.arange(3.0))
    assert len(seen) == 3 and list(tmp_path.iterdir()) == []


def _keep(directory: str) -> list[float]:
    jax.config.update("jax_compilation_cache_dir", directory)
    return counting([])(jnp.arange(3.0)).tolist()


@pytest.mark.slow
def test_processes_may_write_at_once(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.map(_keep, [str(tmp_path)] * 6, chunksize=1) == [[0, 2, 4]] * 6
    assert len(list((tmp_path / "traced").iterdir())) == 1


def key(function=steps.decode_steps, *, avals=None, tree=None, **static) -> str:
    avals = [jax.typeof(jnp.zeros((2, 3)))] if avals is None else avals
    return program_cache._key(function, static, avals, tree or jax.tree.structure([0]))


def test_a_key_depends_on_all_that_a_trace_does(monkeypatch):
    spec = fp8_spec()
    x = jnp.zeros((2, 3))
    keys = [
        key(spec=spec),
        key(steps.prefill_step, spec=spec),
        key(spec=spec, max_steps=4),
        key(spec=spec, max_steps=5),
        key(spec=spec, speculation=Speculation(2)),
        key(spec=spec, speculation=Speculation(2, spec)),
        *(key(spec=fp8_spec(config=config(**change))) for change in (
            {"rope_theta": 10000.0}, {"rms_norm_eps": 1e-6}, {"rope_scaling": None},
            {"num_layers": 3}, {"tie_word_embeddings": True},
        )),
        key(spec=fp8_spec("block")),
        *(key(spec=replace(spec, **change)) for change in (
            {"dtype": "bfloat16"}, {"activations": "dynamic"}, {"implementation": "reference"},
            {"is_batch_invariant": True}, {"formats": {}},
        )),
        *(key(spec=spec, avals=[jax.typeof(each)]) for each in (
            x[:1], x.astype(jnp.bfloat16), np.zeros((3, 2), np.float32),
        )),
        key(spec=spec, avals=[jax.typeof(jnp.asarray(1.0))]),
        key(spec=spec, avals=[jax.typeof(jnp.float32(1.0))]),  # not weakly typed
        key(spec=spec, tree=jax.tree.structure((0,))),
    ]  # fmt: skip
    with jax.default_matmul_precision("highest"):
        keys.append(key(spec=spec))
    with jax.enable_x64(True):
        keys.append(key(spec=spec))
    monkeypatch.setattr(program_cache, "_software", lambda: ("3.12", "another version"))
    keys.append(key(spec=spec))
    assert len(set(keys)) == len(keys)


def test_a_key_is_the_same_wherever_programs_are_kept(tmp_path):
    before = key(spec=fp8_spec())
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert key(spec=fp8_spec()) == before


@pytest.mark.parametrize("changed", ["llama_jax/model/llama.py", "pallas_kernels/device.py"])
def test_software_is_told_by_the_contents_of_its_files(changed, monkeypatch):
    software, read = program_cache._software.__wrapped__, Path.read_bytes
    before = software()
    assert software() == before
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: read(path) + b"#" * (path == ROOT / changed)
    )
    assert software() != before and software()[:-1] == before[:-1]


def test_the_cache_is_the_one_of_this_machine(tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/cache")
    assert compile_cache.directory() is None
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert compile_cache.directory() == tmp_path
