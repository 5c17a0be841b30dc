"""Imports point one way and never in a circle, and no function is too long to read at once."""

import ast
import os
import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from pallas_kernels.dev import sm90

ROOT = Path(__file__).parents[1]


# A file may import files of its own entry and of lines above; entries of one line do not import
# each other. A file belongs to the longest entry that begins its name.
LAYERS = (
    ("pallas_kernels",),
    ("pallas_kernels.dev",),
    ("pallas_kernels.fp8_matmul.cases", "pallas_kernels.fp8_matmul.weight_only_cases",
     "pallas_kernels.paged_attention.cases", "pallas_kernels.rope_and_cache.cases",
     "pallas_kernels.row_fusions.cases"),
    ("pallas_kernels.rope_and_attention.cases",),
    ("llama_jax.errors", "llama_jax.plural", "llama_jax.structured"),
    ("llama_jax.json_file", "llama_jax.sampling_params"),
    ("llama_jax.model",),
    ("llama_jax.text",),
    ("llama_jax.checkpoint",),
    ("llama_jax.engine", "converters"),
    ("llama_jax",),
    ("llama_jax.integrations", "llama_jax.serve"),
    ("llama_jax.cli",),
)  # fmt: skip


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    name_of(path): path
    for package in ("pallas_kernels", "llama_jax", "converters")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(name: str, at_once: bool = False) -> set[str]:
    """Modules that a file imports anywhere, inside functions and for types too, or only at_once."""
    found = set()
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{name} imports relatively"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = inner & FILES.keys()
            # `from package import module` reads nothing in the package itself.
            if at_once:
                found |= inner | {node.module}
            else:
                found |= modules if modules == inner else modules | {node.module}
    return found - {name}


IMPORTS = {name: imports(name) for name in FILES}

MOST_LINES = 80


def functions(code: str) -> dict[str, int]:
    """The lines of each function, without its signature and docstring: options of a command and
    their help are no code to follow."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            has_docstring = ast.get_docstring(node) is not None and len(node.body) > 1
            first, end = node.body[has_docstring].lineno, node.end_lineno
            assert end is not None
            found[node.name] = max(end - first + 1, found.get(node.name, 0))
    return found


def layer(name: str) -> tuple[int, str]:
    """The line and the entry of a module."""
    return max(
        (
            (line, entry)
            for line, entries in enumerate(LAYERS)
            for entry in entries
            if f"{name}.".startswith(f"{entry}.")
        ),
        key=lambda each: len(each[1]),
    )


def may_import(name: str, other: str) -> bool:
    (line, entry), (other_line, other_entry) = layer(name), layer(other)
    return entry == other_entry or line > other_line


def test_imports_point_one_way():
    assert "llama_jax.engine.engine" in IMPORTS["llama_jax.llm"]
    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in sorted(others & FILES.keys())
        if not may_import(name, other)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "other", "allowed"),
    [
        ("llama_jax.engine.engine", "llama_jax.model.llama", True),
        ("llama_jax.model.llama", "llama_jax.engine.engine", False),
        ("llama_jax.engine.engine", "converters.resolve", False),
        ("converters.resolve", "llama_jax.engine.engine", False),
        ("llama_jax.llm", "converters.resolve", True),
        ("llama_jax.checkpoint.store", "llama_jax.llm", False),
        ("llama_jax.llm", "llama_jax.cli.chat", False),
        ("pallas_kernels.fp8_matmul", "pallas_kernels.dev.bench", False),
    ],
)
def test_layers(name, other, allowed):
    assert may_import(name, other) == allowed


def test_no_files_import_each_other_in_a_circle():
    graph = {name: others & FILES.keys() for name, others in IMPORTS.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_no_function_is_longer_than_a_screen_or_two():
    code = 'def f(\n    x,\n):\n    """Long.\n\n    Text.\n    """\n    y = x\n    return y\n'
    assert functions(code) == {"f": 2}
    assert not [
        f"{name}.{function}"
        for name, path in FILES.items()
        for function, lines in functions(path.read_text(encoding="utf-8")).items()
        if lines > MOST_LINES
    ]


def test_no_two_classes_of_a_package_have_one_name():
    found = Counter(
        (path.parent, node.name)
        for path in FILES.values()
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    )
    assert len(found) > 100 and not [name for name, count in found.items() if count > 1]


@pytest.mark.parametrize("prefix", ["llama_jax.text.", "llama_jax.engine.scheduler"])
def test_text_and_the_scheduler_need_no_jax(prefix):
    assert "jax" in IMPORTS["llama_jax.model.llama"]
    waiting, seen = [name for name in FILES if name.startswith(prefix)], set()
    assert waiting
    while waiting:
        seen.add(name := waiting.pop())
        assert not any(each.split(".")[0] in ("jax", "flax") for each in IMPORTS[name]), name
        waiting += (IMPORTS[name] & FILES.keys()) - seen


def test_mosaic_gpu_is_imported_by_a_kernel_that_runs_alone():
    assert "jax.experimental.pallas.mosaic_gpu" in imports("pallas_kernels.fp8_matmul.hopper", True)
    waiting, seen = ["llama_jax.llm"], set()
    while waiting:
        seen.add(name := waiting.pop())
        found = imports(name, at_once=True)
        assert not any("mosaic" in each for each in found), name
        waiting += {each for each in found & FILES.keys() if each not in seen}
    assert "pallas_kernels.hopper" in seen and "pallas_kernels.fp8_matmul.kernels" in seen


@pytest.mark.slow
@pytest.mark.skipif(sm90.unavailable() is not None, reason=str(sm90.unavailable()))
@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU, which JAX starts")
def test_the_plugin_that_compiles_for_gpus_is_silent_where_there_is_none():
    program = (
        "from pallas_kernels.dev import sm90; import jax; print(jax.devices()[0].platform, "
        "sm90.devices()[0].device_kind)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu NVIDIA H200\n", "")
