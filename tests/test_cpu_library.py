"""How the CPU's kernels are compiled, kept and found again; a script stands for the compiler."""

import functools
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest

from pallas_kernels.cpu import compiler, library
from tests.cpu_kernel import HERE, needs_cpu_kernel

COMPILER = """#!/bin/sh
if [ "$1" = -dM ]; then
  echo '#define __VERSION__ "number 1"'
  for name in AVX2 FMA F16C; do echo "#define __${{name}}__ 1"; done
  exit
fi
echo compiled >> {log}
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


def take_as_compiler(script, monkeypatch):
    """Let a script stand for the compiler of an x86 processor, and begin without libraries."""
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(script.with_name("cache")))
    monkeypatch.setattr(compiler.platform, "machine", lambda: "x86_64")


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """The log of a compiler that works."""
    script, log = tmp_path / "c++", tmp_path / "log"
    script.write_text(COMPILER.format(log=log))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    compiler._predefined.cache_clear()
    return log


def times(log: Path) -> int:
    return len(log.read_text().splitlines())


def test_it_is_compiled_once_by_threads_that_begin_together(compiled, tmp_path):
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(compiler.build(tmp_path / "cache", "fp8_matmul", "avx2"))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert times(compiled) == 1 and len(set(found)) == 1 and found[0].read_text() == "library\n"
    assert {path.suffix for path in found[0].parent.iterdir()} == {".so", ".sha256", ".lock"}


def test_another_compiler_set_or_flag_makes_another_library(compiled, tmp_path):
    found = {
        compiler.build(tmp_path, "fp8_matmul", "avx2"),
        compiler.build(tmp_path, "fp8_matmul", "portable"),
        compiler.build(tmp_path, "between_products", "avx2"),
        compiler.build(tmp_path, "fp8_matmul", "avx2", ["-g"]),
    }  # fmt: skip
    Path(compiled.parent / "c++").write_text(COMPILER.format(log=compiled).replace("r 1", "r 2"))
    compiler._predefined.cache_clear()
    assert len(found | {compiler.build(tmp_path, "fp8_matmul", "avx2")}) == 5


@pytest.mark.parametrize("damage", [lambda path: path.write_text("x"), Path.unlink])
@pytest.mark.parametrize("suffix", [".so", ".sha256"])
def test_what_is_damaged_or_lost_is_compiled_again(compiled, tmp_path, damage, suffix):
    path = compiler.build(tmp_path, "fp8_matmul", "avx2")
    damage(path.with_suffix(suffix))
    assert (
        compiler.build(tmp_path, "fp8_matmul", "avx2") == path and path.read_text() == "library\n"
    )
    assert times(compiled) == 2


def test_a_compiler_that_fails_is_a_reason_and_leaves_nothing(tmp_path, monkeypatch, caplog):
    script = tmp_path / "c++"
    script.write_text(
        "#!/bin/sh\n[ $1 = -dM ] && exit\necho 'fp8: error: no such thing' >&2\nexit 1\n"
    )
    take_as_compiler(script, monkeypatch)
    monkeypatch.setattr(library, "_register", library._register.__wrapped__)
    reason = library._loaded.__wrapped__()
    assert isinstance(reason, str) and "failed: fp8: error: no such thing" in reason
    (record,) = caplog.records
    assert record.getMessage() == (
        f"FP8 weights and attention go through XLA, at about half the speed: {reason}"
    )
    assert {path.suffix for path in (tmp_path / "cache" / "cpu").iterdir()} == {".lock"}


@pytest.mark.parametrize("is_ending", [False, True])
def test_ctrl_c_is_no_reason_to_warn(is_ending, tmp_path, monkeypatch, caplog):
    """It ends the compiler too, or the main thread and with it the starting of others."""
    script, tried = tmp_path / "c++", tmp_path / "tried"
    # A shell could not end so, where Ctrl-C is ignored, as in a background job.
    interrupt = "signal.signal(signal.SIGINT, signal.SIG_DFL); os.kill(os.getpid(), signal.SIGINT)"
    end, reason = ("sys.exit(1)", "failed") if is_ending else (interrupt, "was interrupted")
    script.write_text(
        f"#!{sys.executable}\nimport os, signal, sys\nif sys.argv[1] != '-dM':\n"
        f"    print(file=open({str(tried)!r}, 'a'))\n    {end}\n"
    )
    take_as_compiler(script, monkeypatch)
    monkeypatch.setattr(library, "_register", library._register.__wrapped__)
    monkeypatch.setattr(threading.main_thread(), "is_alive", lambda: not is_ending)
    for _ in range(2):  # a thread that waited for the compiler does not begin again
        assert f"the C++ compiler {script} {reason}" in library._loaded.__wrapped__()
    assert not caplog.records and tried.read_text() == "\n\n"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("CXX", "no-such-compiler", r"there is no C\+\+ compiler \(no-such-compiler\)"),
        ("LLAMA_JAX_CACHE", "/dev/null", "Not a directory"),
        ("LLAMA_JAX_CACHE", "", "LLAMA_JAX_CACHE is empty"),
    ],
)
def test_what_stands_in_the_way_is_a_reason(name, value, reason, monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(compiler, "check_platform", lambda: None)
    monkeypatch.setattr(library, "_register", library._register.__wrapped__)
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(library._loaded.__wrapped__())


@needs_cpu_kernel
@pytest.mark.parametrize(
    ("flags", "most"),
    [
        ("", ("amx", "avx512_bf16", "avx512", "avx2_amd", "avx2", "portable", "neon")),
        ("--xla_cpu_max_isa=AVX2", ("avx2_amd", "avx2", "portable", "neon")),
        ("--xla_cpu_max_isa=SSE4_2", ("portable", "neon")),
    ],
)
def test_it_keeps_within_the_instructions_that_xla_may_use(flags, most, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    here = compiler.here()
    assert library.best() == next(each for each in most if each in here)


def test_code_for_amd_is_for_amd_alone(monkeypatch):
    defined = {f"__{name}__": "1" for name in ("AVX2", "FMA", "F16C")}
    monkeypatch.setattr(compiler.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(compiler, "_predefined", lambda _: defined)
    assert compiler.here() == ("portable", "avx2")
    defined["__znver3__"] = "1"
    assert compiler.here() == ("portable", "avx2", "avx2_amd")


@pytest.mark.parametrize(
    ("without", "best"),
    [
        ("AVX512BF16", "avx512"), ("AVX512VBMI", "avx512"), ("AVX512VL", "avx2"),
        ("F16C", "portable"), ("AMX_BF16", "avx512_bf16"), ("SSE", "amx"),
    ],
)  # fmt: skip
def test_the_best_set_needs_all_instructions_of_those_below(without, best, monkeypatch):
    macros = {name for names in compiler._MACROS.values() for name in names} - {without}
    defined = {f"__{name}__": "1" for name in macros}
    monkeypatch.setattr(compiler.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(compiler, "_predefined", lambda _: defined)
    monkeypatch.setattr(compiler, "_may_use_tiles", lambda: True)
    assert compiler.here()[-1] == best


def test_amx_needs_leave_of_the_system(monkeypatch):
    """Of Linux, for its registers: a machine's administrator, or an emulator, may not give it."""
    defined = {f"__{name}__": "1" for names in compiler._MACROS.values() for name in names}
    monkeypatch.setattr(compiler.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(compiler, "_predefined", lambda _: defined)
    monkeypatch.setattr(compiler, "_may_use_tiles", lambda: False)
    assert compiler.here()[-1] == "avx512_bf16"
    monkeypatch.undo()
    for name, value in (("platform", "darwin"), ("_known", lambda: compiler._ON_ARM)):
        with monkeypatch.context() as changed:
            changed.setattr(compiler.sys if name == "platform" else compiler, name, value)
            assert not compiler._may_use_tiles.__wrapped__()


@pytest.mark.skipif("amx" not in HERE, reason="no AMX")
def test_without_leave_for_tiles_there_is_no_amx():
    """A thread whose stack for signals is too small for them is a reason for Linux to refuse."""
    code = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("memory", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
stack = Stack(ctypes.addressof(memory), 0, 4096)
assert not ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None)
from pallas_kernels.cpu import compiler
assert compiler.here()[-1] == "avx512_bf16", compiler.here()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_thread_begins_to_compile_what_is_needed_later(compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    compiler.begin()
    for thread in threading.enumerate():
        if thread.name == "build":
            thread.join()
    assert times(compiled) == 2
    for kernel in compiler.KERNELS:
        compiler.build(compiler.directory(), kernel, library.best())
    assert times(compiled) == 2
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "other"))
    compiler.begin()
    assert "build" not in {each.name for each in threading.enumerate()}


def test_libraries_are_taken_for_granted_while_they_are_compiled(tmp_path, monkeypatch, caplog):
    script, go_on, tried = tmp_path / "c++", tmp_path / "go_on", tmp_path / "tried"
    script.write_text(
        f"#!/bin/sh\n[ $1 = -dM ] && exit\necho >> {tried}\n"
        f"while ! [ -e {go_on} ]; do sleep 0.01; done\nexit 1\n"
    )
    take_as_compiler(script, monkeypatch)
    for name in ("_begun", "_loaded"):
        monkeypatch.setattr(library, name, functools.cache(getattr(library, name).__wrapped__))
    monkeypatch.setattr(library, "_register", library._register.__wrapped__)
    with library.taken_for_granted():
        assert library.why_not() is None
        go_on.touch()
        library._begun().join()
        assert "failed: exit status 1" in (reason := library.why_not())
    assert library.why_not() == reason and len(caplog.records) == 1
    # This process does not try again.
    for kernel in compiler.KERNELS:
        with pytest.raises(RuntimeError, match="failed: exit status 1"):
            compiler.build(compiler.directory(), kernel, library.best())
    assert tried.read_text() == "\n\n"


def test_the_headers_are_found_without_jax():
    assert compiler.include_directory() == jax.ffi.include_dir()


SANITIZED = """
import jax, jax.numpy as jnp, numpy as np
from pallas_kernels.cpu import compiler, library
sanitized = "-O0 -g -fsanitize=address,undefined -fno-sanitize-recover"
compiler._FLAGS = (*compiler._FLAGS, *sanitized.split())
from tests import test_logit_stats as stats
from tests.test_cpu_fp8_matmul import HERE, exact, multiply, operands
from pallas_kernels.fp8_matmul import cpu
for instructions in HERE:
    for layout, dtype in (("row", "bfloat16"), ("block", "float32"), ("block", "bfloat16")):
        for n, k in ((8, 1), (129, 300)):
            x, bits, scale = operands(17, n, k, layout)
            x = x.astype(dtype)
            for m in (1, 3, 5, 8, 17):
                y = multiply(x[:m], bits, scale, instructions)
                np.testing.assert_allclose(y, exact(x[:m], bits, scale), atol=1e-4)
                stats.by_kernel(x[:m], bits, scale, stats.targets_for(m, n), instructions)
from tests import test_cpu_attention as attention
for instructions in attention.HERE:
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
        for tokens, lengths in ((1, [1, 97]), (9, [49, 9])):
            arrays = attention.case(2, tokens, 6, 2, lengths, 7, dtype, 80)
            y = attention.attend(arrays, instructions)
            np.testing.assert_allclose(y, attention.exact(*arrays), atol=2e-6)
            arrays = (arrays[0].astype(jnp.bfloat16), *arrays[1:])
            y = attention.attend(arrays, instructions)
            np.testing.assert_allclose(y, attention.exact(*arrays), rtol=2**-8, atol=1e-5)
from pallas_kernels.rms_norm import cpu as norm
from pallas_kernels.rope_and_cache import Projections
from pallas_kernels.rope_and_cache import cpu as rope
where = jnp.array([[4, 1, 6], [0, 7, 3]]), jnp.array([3, 0]), jnp.array([11, 9])
positions = where[1][:, None] + jnp.arange(9)
for instructions in HERE:
    for dtype in (jnp.float32, jnp.bfloat16):
        for d in (1, 37, 256):
            y = norm.rms_norm(jnp.ones((17, d), dtype), jnp.ones(d, dtype), 0.0, instructions)
            assert (y == 1).all()
        x, bits, scale = operands(17, 75, 130)
        y = cpu.fp8_matmuls(
            0 * x, (bits,), (scale,), out_dtype=dtype, residual=jnp.ones((17, 75), dtype),
            instructions=instructions,
        )
        assert (y[0] == 1).all()
        for pages_dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
            parts = Projections(*(jnp.ones((1, 18, heads, 20)) for heads in (6, 2, 2)))
            pages = jnp.zeros((2, 7, 4, 2, 20), pages_dtype)
            q, *pages = rope.rope_and_cache(
                parts, positions, *pages, *where, None, jnp.ones(2), jnp.ones(2),
                frequencies=np.zeros(10, np.float32), dtype=dtype, instructions=instructions,
            )
            assert (q == 1).all() and all((each != 0).sum() == 13 * 2 * 20 for each in pages)
weight = jnp.ones((75, 130), jnp.bfloat16)
assert np.array_equal(cpu.dense(jnp.ones((20, 130)), weight), np.full((20, 75), 130.0))
print("clean")
"""


@needs_cpu_kernel
@pytest.mark.slow
def test_nothing_is_read_or_written_out_of_place(tmp_path, monkeypatch):
    """The kernel under AddressSanitizer and UndefinedBehaviorSanitizer, as XLA calls it."""
    command = compiler._compiler()
    runtimes = [
        subprocess.check_output([command, f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "ubsan")
    ]
    if not all(Path(runtime).is_absolute() for runtime in runtimes):
        pytest.skip(f"{command} has no sanitizers")
    monkeypatch.setenv("LD_PRELOAD", " ".join(runtimes))
    # Python and XLA keep what they have until the end, and XLA's own code is not instrumented.
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=0:detect_odr_violation=0")
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED], capture_output=True, text=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "clean\n", done.stderr[-3000:]
