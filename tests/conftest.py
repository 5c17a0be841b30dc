import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

SHARED = Path(__file__).parents[2] / "shared" / "data"
# The first call of anything in JAX compiles, which says nothing about the code under test.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The number of XLA's threads on a CPU. The simulator of GPU kernels blocks one for each warpgroup
# that waits at a barrier, so with one thread per core of a small machine it could hang.
os.environ.setdefault("NPROC", "8")

# XLA compiles without LLVM's optimisation, each program in one piece, and fusions by its older
# emitters rather than through MLIR: in little more than half the time, and these models run for
# milliseconds. With LLAMA_JAX_TESTS_OPTIMISED=1 programs are those that users get, as .ci/run needs
# them, see tests/README.md.
_QUICKLY = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
_flags = os.environ.setdefault("XLA_FLAGS", "")
if os.environ.get("LLAMA_JAX_TESTS_OPTIMISED") != "1" and _QUICKLY not in _flags:
    os.environ["XLA_FLAGS"] = f"{_QUICKLY} {_flags}"  # what the user has set counts more

# Workers and the commands that tests start share one cache of compiled programs. The first process
# sets it before JAX is imported; the others inherit it.
_own_cache: str | None = None
if "LLAMA_JAX_CACHE" not in os.environ:
    _own_cache = os.environ["LLAMA_JAX_CACHE"] = tempfile.mkdtemp(prefix="llama-jax-tests-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{os.environ['LLAMA_JAX_CACHE']}/xla")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_unconfigure() -> None:
    if _own_cache:
        shutil.rmtree(_own_cache, ignore_errors=True)


@pytest.fixture
def no_shared_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the processes of this test their own LLAMA_JAX_CACHE, so that they compile anew."""
    for name in (
        "JAX_COMPILATION_CACHE_DIR",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real tokenizers, golden texts and genuine tiny checkpoints, which is not
    part of the repository."""
    if not SHARED.is_dir():
        pytest.skip("the folder of shared test data is not there")
    return SHARED


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a small SentencePiece BPE model with byte fallback, like Llama 2's."""
    import sentencepiece

    path = tmp_path_factory.mktemp("sentencepiece")
    words = ["the", "capital", "of", "France", "is", "Paris", "and", "London", "hello", "world"]
    lines = [" ".join(words[i % 9 :: 1 + i % 4]) for i in range(300)]
    (path / "text").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "text"), model_prefix=str(path / "tokenizer"), vocab_size=380,
        model_type="bpe", byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        user_defined_symbols=["<|im_start|>"],
    )  # fmt: skip
    return (path / "tokenizer.model").read_bytes()
