import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from llama_jax.engine import allocator, compile_cache
from llama_jax.engine.compile_cache import CompileReport

ROOT = Path(__file__).parents[1]

# A process that runs a tiny model and says what it compiled. JAX is used before the cache is on,
# as in a notebook.
PROGRAM = """
import json
import jax.numpy as jnp
jnp.arange(3) + 1
from llama_jax.engine import allocator, compile_cache
from llama_jax.model.kv_cache import init_cache
from llama_jax.model.forward import prefill
from llama_jax.model.params import init_params
from tests.tiny import fp8_spec
directory = compile_cache.enable()
spec = fp8_spec()
params = init_params(spec)
cache = init_cache(spec.config, 1, 64, "float32")
tokens, lengths = jnp.zeros((1, 8), jnp.int32), jnp.full((1,), 8, jnp.int32)
logits, _ = prefill(params, cache, tokens, lengths, spec=spec)
print(json.dumps([str(directory), vars(compile_cache.report()), float(logits.sum())]))
"""


@pytest.fixture(autouse=True)
def settings(no_shared_cache):
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
        "jax_enable_compilation_cache",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True,
        check=True,
    )  # fmt: skip


@pytest.mark.slow
def test_second_process_takes_its_programs_from_the_cache(tmp_path):
    first, second = (run(PROGRAM, LLAMA_JAX_CACHE=str(tmp_path / "cache")) for _ in range(2))
    directory, cold, total = json.loads(first.stdout)
    _, warm, same_total = json.loads(second.stdout)
    assert directory == str(tmp_path / "cache" / "xla")
    assert cold["compiled"] >= 2 and cold["from_cache"] == 0
    assert warm["compiled"] == 0
    assert warm["from_cache"] == cold["compiled"]
    assert same_total == total
    assert first.stderr == second.stderr == ""


def test_directory_is_private(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    directory = compile_cache.enable()
    assert directory == tmp_path / "cache" / "xla"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert jax.config.jax_compilation_cache_dir == str(directory)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0
    assert compile_cache.enable() == directory


def test_settings_of_the_user_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7)
    assert compile_cache.enable() == tmp_path / "own"
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 7
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    assert compile_cache.enable() is None
    assert not (tmp_path / "cache").exists()


def test_empty_variable_switches_it_off(monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", "")
    assert compile_cache.enable() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_directory_that_cannot_be_made_warns_once(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "file"))
    assert compile_cache.enable() is None
    assert compile_cache.enable() is None
    assert jax.config.jax_compilation_cache_dir is None
    (record,) = caplog.records
    assert str(tmp_path / "file") in record.getMessage()
    assert "LLAMA_JAX_CACHE" in record.getMessage()


def test_report_counts_programs_not_calls():
    @jax.jit
    def inner(x):
        return jnp.sin(x)

    @jax.jit
    def program(x):
        return inner(x) + inner(2 * x)

    x = jnp.ones(13)
    before = compile_cache.report()
    program(x)
    once = compile_cache.report().since(before)
    program(x)
    assert once.compiled + once.from_cache == 1
    assert once.seconds > 0
    assert compile_cache.report().since(before) == once


def test_nested_spans_count_once(monkeypatch):
    monkeypatch.setattr(compile_cache, "_spans", [])
    record, compiling = jax.monitoring.record_event_time_span, "/jax/core/compile/"
    before = compile_cache.report()
    record(compiling + "jaxpr_trace_duration", 1, 2, fun_name="inner")
    record(compiling + "jaxpr_trace_duration", 3, 4, fun_name="inner")
    record(compiling + "jaxpr_trace_duration", 0, 5, fun_name="outer")
    record(compiling + "jaxpr_to_mlir_module_duration", 6, 8, fun_name="jit(outer)")
    record(compiling + "jaxpr_to_mlir_module_duration", 8, 11, fun_name="jit(other)")
    record("/jax/something/else", 11, 12)
    assert compile_cache.report().since(before) == CompileReport(0, 0, 10)
    assert compile_cache.seconds_between(0, 11) == 10
    assert compile_cache.seconds_between(4, 7) == 2
    assert compile_cache.seconds_between(5, 6) == compile_cache.seconds_between(12, 13) == 0


def test_report_in_words():
    assert str(CompileReport(1, 0, 2.345)) == "compiled 1 program in 2.3 s"
    assert str(CompileReport(0, 9, 0.5)) == "fetched 9 programs from the cache in 0.5 s"
    both = "compiled 2 programs and fetched 1 program from the cache in 3.0 s"
    assert str(CompileReport(2, 1, 3)) == both
    assert str(CompileReport(0, 0, 0.1)) == "compiled nothing"


def test_memory_goes_back_after_a_long_compilation(monkeypatch):
    given: list[None] = []
    monkeypatch.setattr(allocator, "give_back", lambda: given.append(None))
    for long, times in ((3600.0, 0), (0.0, 1)):
        monkeypatch.setattr(compile_cache, "_LONG_SECONDS", long)
        jax.jit(lambda x, long=long: x * 3 + long).lower(jnp.arange(5.0)).compile()
        assert len(given) == times
