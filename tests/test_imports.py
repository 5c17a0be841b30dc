"""Imports point one way: pallas_kernels <- llama_jax <- converters, cli, integrations."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.dev import sm90

ROOT = Path(__file__).parents[1]


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(
    ("package", "above", "exceptions"),
    [
        ("pallas_kernels", ("llama_jax", "converters"), set()),
        (
            "llama_jax",
            ("converters", "llama_jax.cli", "llama_jax.integrations"),
            {"llama_jax/checkpoint/store.py"},
        ),
        ("converters", ("llama_jax.cli", "llama_jax.integrations"), set()),
    ],
)
def test_nothing_imports_what_stands_above_it(package, above, exceptions):
    for path in sorted((ROOT / package).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name in exceptions or name.startswith(("llama_jax/cli/", "llama_jax/integrations/")):
            continue
        wrong = {
            each
            for each in imports(path)
            if each in above or each.startswith(tuple(f"{a}." for a in above))
        }
        assert not wrong, f"{name} imports {sorted(wrong)}"


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
