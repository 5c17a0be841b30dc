"""benchmarks/offline_throughput.py: its arithmetic, and all of it at tiny sizes."""

import json
import sys
from itertools import islice

import pytest

from benchmarks import offline_throughput
from benchmarks.offline_throughput import Workload, operations_per_token
from llama_jax.bench import preset_spec
from llama_jax.model.config import PRESETS


def test_the_first_requests_stand_at_every_stage_of_their_output():
    requests = list(islice(Workload(100, 40).requests(512, num_rows=4), 6))
    sizes = [(len(request.prompt), request.params.max_new_tokens) for request in requests]
    assert sizes == [(130, 10), (120, 20), (110, 30), (100, 40), (100, 40), (100, 40)]
    texts = islice(Workload(100, 0).requests(512, num_rows=4), 6)
    assert {(len(request.prompt), request.output_kind) for request in texts} == {(100, "logprobs")}


def test_figures_are_published_for_both_cards_and_for_8b_alone():
    published = offline_throughput.published_for
    assert published("llama-3.1-8b", Workload(1000, 1000)) == {"H200": 17_744, "H100": 15_220}
    assert published("llama-3.1-8b", Workload(1000, 10)) == published("tiny", Workload(128, 128))
    assert all(figures.keys() == offline_throughput.PUBLISHED["H200"].keys()
               for figures in offline_throughput.PUBLISHED.values())  # fmt: skip


def test_operations_for_a_token_of_8b():
    # Per layer q and o, k and v, and the MLP's three; lm_head; 2048 / 2 keys on average, which are
    # multiplied twice, by queries and by probabilities.
    layer = 2 * 4096**2 + 2 * 1024 * 4096 + 3 * 14336 * 4096
    attention = 2 * 4096 * 2048 // 2
    expected = 2 * (32 * (layer + attention) + 128_256 * 4096)
    assert operations_per_token(preset_spec(PRESETS["llama-3.1-8b"]), 2048) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "1/2/3"], "as in 1000/1000, or IN to score texts, got '1/2/3'"),
        (["--lengths", "many"], "as in 1000/1000, or IN to score texts, got 'many'"),
        (["--lengths", "0/5"], "numbers must be at least 1, got '0/5'"),
        (["--tiny", "--lengths", "1000/25"], "1025 tokens are more than the model's context"),
        (["--seconds", "0"], "--seconds must be above 0, got 0.0"),
        (["--max-batch-size", "0"], "--max-batch-size must be above 0, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["offline_throughput.py", *arguments])
    with pytest.raises(SystemExit):
        offline_throughput.main()
    assert message in capsys.readouterr().err


def test_a_single_length_is_of_texts_to_score():
    assert offline_throughput.workload("2048") == Workload(2048, 0)
    assert offline_throughput.workload("1000/10") == Workload(1000, 10)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", ["8", "0.001"])
def test_every_workload_at_tiny_sizes(seconds, tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.json"
    arguments = ["--tiny", "--seconds", seconds, "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["offline_throughput.py", *arguments])
    offline_throughput.main()
    results = json.loads(path.read_text())["results"]
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[-4:]] == ["16/16", "100/100", "500/50", "score"]
    for result in results:
        workload = result["workload"]
        assert 0 <= result["mean_rows"] <= 8
        assert 0 <= result["padding_share"] < 1 and 0 < result["host_share"] <= 1
        assert result["input_per_second"] == result["input_tokens"] / result["seconds"]
        if seconds == "8":
            assert result["input_tokens"] > 0 and result["mean_rows"] > 0
        if workload["output_tokens"] == 0:
            assert result["output_tokens"] == 0
        elif result["is_steady"]:
            # As many prompts are read as outputs are written, but for the two ends of the window.
            ratio = workload["input_tokens"] / workload["output_tokens"]
            difference = result["input_tokens"] - ratio * result["output_tokens"]
            assert abs(difference) <= 2 * 8 * workload["input_tokens"]
