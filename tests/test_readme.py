"""The Python that README shows runs, as it stands there, with the model that ships; the commands
have arguments that exist, and what can be counted is right."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from converters.dialects import DIALECTS
from llama_jax.cli import app
from tests.hf_cases import CASES

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    section = README.split("## Chat, generate, score")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) >= 4
    assert "draft tokens accepted" in capsys.readouterr().out


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TEXTS = {"README": README} | {name: command.help for name, command in COMMANDS.items()}


@pytest.mark.parametrize("where", TEXTS)
def test_commands_have_arguments_that_exist(where: str) -> None:
    """README's, and those in the help of each command."""
    joined = TEXTS[where].replace("\\\n", " ")
    found = re.findall(r"^ *(?:\w+=\S+ )?(llama-jax .*)$", joined, re.MULTILINE)
    assert found
    for part in re.split("&&|\n", "\n".join(found)):
        _, name, *arguments = shlex.split(re.split(" [|>] ", part)[0], comments=True)
        COMMANDS[name].make_context(name, arguments)


def test_layouts_and_models_are_as_many_as_it_says() -> None:
    table = README[README.index("| published as |") :].split("\n\n")[0]
    assert len(table.splitlines()) - 2 == len(DIALECTS)
    assert len(DIALECTS) - 1 == 8 and "| eight layouts," in README  # without unquantised ones
    assert f"({len(CASES)} small models, positions up" in README
