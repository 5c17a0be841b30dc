"""Reads input and writes output of the commands: messages, tables, JSON, complete files."""

import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
)
from rich.table import Table
from rich.text import Text

from llama_jax.jsonl import json_line

stdout = Console()
stderr = Console(stderr=True)


_MESSAGE_LINES, _MESSAGE_LENGTH = 3, 1000


def note(text: str) -> None:
    """Print a remark on stderr."""
    stderr.print(in_few_lines(text), style="dim", markup=False, highlight=False, soft_wrap=True)


def in_few_lines(message: object) -> str:
    """Shorten a message to three lines and 1000 characters, and remove control characters, which a
    terminal would obey; it may quote files."""
    lines = str(message).splitlines()
    joined = ("\n" if len(lines) <= _MESSAGE_LINES else " ").join(lines)
    text = "".join(c if c == "\n" or c.isprintable() else ascii(c)[1:-1] for c in joined)
    return text if len(text) <= _MESSAGE_LENGTH else f"{text[: _MESSAGE_LENGTH - 3]}..."


class _RateColumn(ProgressColumn):
    """Shows units per second of work. A task has the name of its `unit` and, unless each step is
    one, the number of `units` so far."""

    def render(self, task: Task) -> Text:
        done, seconds = task.fields.get("units", task.completed), task.fields["clock"].seconds()
        rate = done / seconds if seconds > 0 else 0.0
        return Text(f"{rate:,.1f} {task.fields['unit']}/s", style="progress.data.speed")


class _RemainingColumn(ProgressColumn):
    """Shows how long the remaining steps will take, once enough are done to tell."""

    def render(self, task: Task) -> Text:
        done = task.completed - task.fields.get("before", 0)
        remaining = seconds_remaining(done, task.remaining, task.fields["clock"].seconds())
        shown = "-:--:--" if remaining is None else str(timedelta(seconds=round(remaining)))
        return Text(shown, style="progress.remaining")


def seconds_remaining(done: float, remaining: float | None, seconds: float) -> float | None:
    """Estimate the seconds of the remaining steps from those of `done` steps. Returns None after
    too few steps, or if the remaining number is unknown."""
    if remaining is None or done < _STEPS_TO_TELL:
        return None
    return remaining * seconds / done


_STEPS_TO_TELL = 10


def progress_bar() -> Progress:
    """Make a progress bar on stderr, shown if that is a terminal.

    Its tasks have the fields `unit`, `clock` (a `speed.Clock`) and `before` (the number of steps
    that an earlier run did).
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        _RemainingColumn(),
        console=stderr,
        disable=not stderr.is_terminal,
    )


def key_value_table(title: str, rows: Mapping[str, object]) -> Table:
    """Make a table of names and values, without a header."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    return table


def runs(numbers: Sequence[int]) -> str:
    """Format ascending numbers with runs joined: "0, 2-30"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][-1] == number - 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in found)


def print_json(value: Any) -> None:
    """Print one line of JSON on stdout."""
    print(json_line(value), flush=True)


def check_output(path: str, overwrite: bool) -> None:
    """Raise FileExistsError if the file exists, or FileNotFoundError without its directory."""
    if path == "-":
        return
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a directory; name a file to write")
    if Path(path).exists() and not overwrite:
        raise FileExistsError(f"{path} exists already. Choose another name, or give --overwrite.")
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: its directory does not exist. Make it first.")


@contextmanager
def whole_file(path: str) -> Iterator[TextIO]:
    """Open a text file that appears once the block ends without an error; "-" is stdout."""
    if path == "-":
        yield sys.stdout
        return
    target = Path(path).absolute()
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
