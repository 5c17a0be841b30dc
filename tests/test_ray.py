"""Ray Data on this machine: actors that score and generate, and what kills do to `score --ray`."""
# ruff: noqa: F811  # fixtures of test_cli are imported by name

import os
import signal
import subprocess
import sys
import time

import pytest

from llama_jax import LLM, SamplingParams
from tests.test_cli import ROOT, SMALL, cache_directory, model, run, source  # noqa: F401
from tests.test_cli_score import read, write

pa = pytest.importorskip("pyarrow")
ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.slow

LOADING = {"dtype": "float32", "max_seq_len": 256}
ROWS = [
    {"prompt": "hello", "completion": " you"}, {"prompt": "a", "completion": ""},
    {"prompt": "2 + 2 =", "choices": [" 4", " five"]}, {"text": "words " * 60}, {"id": 7},
]  # fmt: skip
LINES = [
    {"id": i, "prompt": "p" * (37 * i % 90), "completion": f" {i}"} if i % 97 else {"id": i}
    for i in range(4000)
]


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def llm(model):
    return LLM.load(model, verbose=False, **LOADING)


def test_scorer_on_a_dataset(cluster, model, llm):
    from llama_jax.integrations.ray import Scorer

    rows = [{"place": i, **row} for i, row in enumerate(ROWS * 3)]
    blocks = [ray.data.from_arrow(pa.Table.from_pylist([row])) for row in rows]
    scored = blocks[0].union(*blocks[1:]).map_batches(
        Scorer, fn_constructor_args=[str(model)],
        fn_constructor_kwargs={"tokens": True, "window": 128, **LOADING},
        batch_format="pyarrow", compute=ray.data.ActorPoolStrategy(size=2), num_cpus=1,
    )  # fmt: skip
    found = sorted(scored.take_all(), key=lambda row: row["place"])
    assert [row["place"] for row in found] == list(range(15))
    pair = llm.score("hello", " you")
    ranking = llm.rank("2 + 2 =", [" 4", " five"])
    text = llm.perplexity("words " * 60, window=128)
    for first, empty, choices, whole, other in zip(*[iter(found)] * 5, strict=True):
        assert first["logprob"] == pytest.approx(pair.total, abs=1e-4)
        assert list(first["token_ids"]) == list(b" you") and first["error"] is None
        assert "the completion '' is empty" in empty["error"] and empty["logprob"] is None
        assert choices["best"] == ranking.best
        assert choices["probabilities"] == pytest.approx(ranking.probabilities, abs=1e-4)
        assert len(choices["scores"][1]["token_ids"]) == 5
        assert whole["perplexity"] == pytest.approx(text.perplexity, rel=1e-4)
        assert 'got "id"' in other["error"] or 'got "place"' in other["error"]


def test_generator(model, llm):
    from llama_jax.integrations.ray import Generator

    sampling = SamplingParams(temperature=0, max_new_tokens=5)
    generator = Generator(model, sampling=sampling, **LOADING)
    chat = [{"role": "user", "content": "hello"}]
    rows = [
        {"text": "old", "prompt": "one"}, {"messages": chat}, {"prompt": "x" * 300},
        {"prompt": "two", "messages": chat}, {"text": "alone"},
    ]  # fmt: skip
    made = generator(pa.Table.from_pylist(rows, schema=pa.schema({
        "text": pa.string(), "prompt": pa.string(),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string(),
                                        "tool_call_id": pa.string()})),
    })))  # fmt: skip
    found = made.to_pylist()
    assert found[0]["text"] == llm.generate("one", sampling).text
    assert found[0]["completion_tokens"] == 5 and found[0]["finish_reason"] == "length"
    assert found[1]["text"] == llm.chat(chat, sampling).text
    assert [row["error"] is None for row in found] == [True, True, False, False, False]
    assert [row["text"] for row in found[2:]] == [None] * 3
    assert "the prompt has 301 tokens" in found[2]["error"]
    assert "prompt: str, messages: list" in found[3]["error"] and "no field" in found[4]["error"]
    with pytest.raises(TypeError, match='batch_format="pyarrow"'):
        generator({"prompt": ["one"]})
    with pytest.raises(ValueError, match="n is 2"):
        Generator(model, sampling=SamplingParams(n=2))


def start(model, tmp_path, *arguments):
    environment = os.environ | {"LLAMA_JAX_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "llama_jax.cli", "score", tmp_path / "in.jsonl",
               tmp_path / "out.jsonl", "--model", model, *SMALL, *arguments]  # fmt: skip
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def actors_of(process):
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "LineScorer" in " ".join(child.cmdline())]


def wait_for_lines(process, partial, least):
    while not (partial.exists() and partial.read_bytes().count(b"\n") >= least):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_an_actor_and_then_the_command_are_killed(run, model, tmp_path):
    """What is written is whole and in order, and a run without Ray goes on from there."""
    path = write(tmp_path / "in.jsonl", LINES)
    assert run("score", path, tmp_path / "expected.jsonl", "--model", model, *SMALL)[0] == 0
    partial = tmp_path / "out.jsonl.partial"
    on_ray = ("--ray", "local", "--actors", 2)

    process = start(model, tmp_path, *on_ray)
    wait_for_lines(process, partial, 1)
    first, second = actors_of(process)
    first.kill()
    wait_for_lines(process, partial, 2000)
    processes = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for agent in psutil.wait_procs(processes, timeout=2)[1]:  # Ray's own take a minute to notice
        agent.kill()
    kept = read(partial)
    assert 2000 <= len(kept) < 4000

    process = start(model, tmp_path, *on_ray, "--json")
    wait_for_lines(process, partial, len(kept) + 1)
    first, second = actors_of(process)
    second.kill()
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert f'"resumed": {len(kept)}' in out
    found = read(tmp_path / "out.jsonl")
    assert found[: len(kept)] == kept
    for row, other in zip(found, read(tmp_path / "expected.jsonl"), strict=True):
        assert row.keys() == other.keys() and row["id"] == other["id"]
        assert row.get("error") == other.get("error")
        assert row.get("logprob") == pytest.approx(other.get("logprob"), abs=1e-4)
