"""BUILD.md and the pages beside the code: what they name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for top in ("llama_jax", "pallas_kernels", "converters", "tests", "benchmarks")
    for path in (ROOT / top).rglob("*.md")
    if path.parent.name != "results"
)
BUILD = ROOT / "BUILD.md"


def find(name: str, beside: Path) -> Path | None:
    """The file that a page names, from the root, from `llama_jax` or from the page's directory."""
    return next(
        (path for top in (ROOT, ROOT / "llama_jax", beside) if (path := top / name).exists()), None
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_is_short_and_named_in_build(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) < 100
    name = page.relative_to(ROOT).as_posix().removesuffix("/README.md")
    assert f"({name}/README.md)" in BUILD.read_text() or f"({name})" in BUILD.read_text()


@pytest.mark.parametrize("page", [BUILD, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert link.startswith("http") or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", [BUILD, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_files_of_a_page_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for other in ("converters/dialects/acme.py", "fp8_matmul/acme.py", "llama.cpp"):
        text = text.replace(other, "")
    for name in re.findall(r"(?<![\w/<>*.-])[\w./]*\w\.(?:py|md|cpp|inc|sh)\b", text):
        assert find(name, page.parent) or list(ROOT.rglob(name)), name


def test_functions_of_the_walks_are_where_build_says() -> None:
    """`name` (file.py): the file defines the name, or its last part and the class before that."""
    text = BUILD.read_text(encoding="utf-8")
    walks = text[text.index("## A prompt's way") : text.index("## Ten questions")]
    found = re.findall(r"`([\w.]+)`,?\s*\(?([\w/]+\.py)\b", walks)
    assert len(found) > 25
    for name, file in found:
        paths = [path] if (path := find(file, ROOT)) else list(ROOT.rglob(file))
        code = "".join(path.read_text(encoding="utf-8") for path in paths)
        for part in name.split("."):
            assert re.search(rf"^ *(?:def|class) {part}\b", code, re.MULTILINE), (name, file)


def test_answers_of_build_are_true() -> None:
    text = BUILD.read_text(encoding="utf-8")
    rows = text[text.index("## Ten questions") : text.index("## Words")].splitlines()[4:]
    answers = [row.split("|")[2] for row in rows if row.startswith("|")]
    assert len(answers) == 10
    for answer in answers:
        for file, names in re.findall(r"([\w/]+\.py)((?:[^`/]*`[\w.]+`)+)", answer):
            code = (ROOT / file).read_text(encoding="utf-8")
            for name in re.findall(r"`([\w.]+)`", names):
                assert name.rpartition(".")[2].removesuffix(".py") in code, (file, name)
