"""Imports point one way: pallas_kernels <- llama_jax <- converters, cli, integrations."""

import ast
from pathlib import Path

import pytest

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
            {"llama_jax/checkpoint.py"},
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
