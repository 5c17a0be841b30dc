"""The Python that README shows runs, as it stands there, with the model that ships."""

import re
from pathlib import Path

import pytest

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
