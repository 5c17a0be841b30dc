"""Docstrings: their examples run as shown, and they begin with what a thing is or does."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

from llama_jax import LLM

ROOT = Path(__file__).parents[1]
EXAMPLES = (
    "llama_jax.llm", "llama_jax.engine.engine", "llama_jax.sampling_params", "llama_jax.structured",
    "llama_jax.text.tokenizer", "pallas_kernels.fp8_matmul", "pallas_kernels.paged_attention",
    "converters.pipeline",
)  # fmt: skip
# A clause in place of a subject or a verb; a name of an argument in place of a sentence.
NO_SENTENCE = re.compile(r"(What|Of|As|How|Whether|Where|Which|For)\b|[a-z_, ]+: ")
FILES = [
    path
    for top in ("llama_jax", "pallas_kernels", "converters", "benchmarks")
    for path in sorted((ROOT / top).rglob("*.py"))
]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(max_batch_size=4, max_seq_len=512, prefill_chunk=128, verbose=False)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, llm: LLM, monkeypatch, tmp_path) -> None:
    """Examples of methods use the `llm` that the example of the class has loaded."""
    monkeypatch.setattr(LLM, "load", lambda **_: llm)
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    failed, attempted = doctest.testmod(module, extraglobs={"llm": llm})
    assert attempted and not failed


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_are_sentences(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            assert not NO_SENTENCE.match(first), f"{path.name}:{getattr(node, 'lineno', 1)} {first}"
