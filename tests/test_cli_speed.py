"""Rates and estimates of the commands, which compiling is no part of."""

import importlib
import io
import time

import pytest
from rich.console import Console

from llama_jax.cli import output
from llama_jax.cli.speed import Clock
from llama_jax.engine import compile_cache


@pytest.fixture
def compiled(monkeypatch):
    """What has been compiled so far: spans to add to."""
    monkeypatch.setattr(compile_cache, "_spans", [])
    return compile_cache._spans


def test_a_clock_leaves_out_what_was_compiled_meanwhile(monkeypatch, compiled):
    now = 100.0
    monkeypatch.setattr(time, "time", lambda: now)
    clock = Clock()
    compiled += [(90.0, 105.0), (110.0, 130.0)]  # the first began before the clock did
    now = 140.0
    assert clock.seconds() == 15.0


def test_what_is_left_is_told_once_there_is_something_to_tell_it_from():
    assert output.seconds_remaining(2, 4000, 1.0) is None
    assert output.seconds_remaining(10, None, 1.0) is None
    assert output.seconds_remaining(10, 4000, 1.0) == 400.0
    assert output.seconds_remaining(10, 0, 1.0) == 0.0


def test_a_note_on_progress_makes_no_promise_after_two_lines():
    module = importlib.import_module("llama_jax.cli.score")
    summary = module._Summary(resumed=3, num_read=600)
    assert module._progress(summary, 2, 4000, 1.0) == "5 of 4,000 lines · 2.0 lines/s, 600 tok/s"
    told = module._progress(summary, 20, 4000, 10.0)
    assert told == "23 of 4,000 lines · 2.0 lines/s, 60 tok/s · 1,988 s left"  # 3977 / 2
    assert module._progress(summary, 20, None, 10.0) == "20 lines · 2.0 lines/s, 60 tok/s"
    assert module._progress(summary, 1, None, 1.0).startswith("1 line · ")


def test_the_bar_counts_the_seconds_of_work_and_the_lines_of_this_run(monkeypatch, compiled):
    monkeypatch.setattr(output, "stderr", Console(force_terminal=True, file=io.StringIO()))
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    bar = output.progress_bar()
    settings = {"unit": "tokens", "clock": Clock()}
    task = bar.add_task("scoring", total=130, completed=100, before=100, units=0, **settings)
    compiled.append((1000.0, 1060.0))
    now = 1070.0
    bar.update(task, advance=10, units=500)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(bar.get_renderable())
    text = console.export_text()
    assert "50.0 tokens/s" in text and "0:00:20" in text and "110/130" in text
