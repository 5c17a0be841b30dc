"""Scores, rankings and perplexities on a random tiny model, against its plain forward pass; and
jobs as a stream."""

import base64
import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.data_rows import score_rows
from llama_jax.jobs import Job, run_jobs, score_request
from llama_jax.model.llama import Llama
from llama_jax.sampling_params import SamplingParams
from llama_jax.text.tokenizer import load_tokenizer
from llama_jax.text.windows import rolling_windows
from tests.test_llm import BOS, SPEC, make

TEXT = "It was the best of times, it was the worst of times: one of 2 cities.\n" * 4
PROMPT = "The quick brown fox jumps over the lazy dog, and then it comes back for another jump"


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.model"
    lines = (b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))
    path.write_bytes(b"".join(lines))
    return make(load_tokenizer(path))


@pytest.fixture(scope="module")
def rows(llm):
    """Logprobs of all tokens after each of `ids`, by the forward pass of the whole in float64."""
    apply = jax.jit(Llama(SPEC).apply)

    def rows(ids):
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(ids)] = ids
        logits = np.asarray(apply({"params": llm.engine.params}, padded))[0].astype(np.float64)
        return (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[: len(ids)]

    return rows


@pytest.fixture(scope="module")
def logprobs(rows):
    """Of ids[first:], each after those before it."""

    def logprobs(ids, first):
        found = rows(ids)
        return np.array([found[i - 1, ids[i]] for i in range(first, len(ids))])

    return logprobs


@given(
    length=st.integers(0, 60),
    sizes=st.integers(2, 30).flatmap(lambda w: st.tuples(st.just(w), st.integers(1, w - 1))),
)
def test_windows_score_each_token_once_with_as_much_context_as_fits(length, sizes):
    window, stride = sizes
    windows = list(rolling_windows(length, window, stride))
    scored = [i for _, first, end in windows for i in range(first, end)]
    assert scored == list(range(1, length))
    for begin, first, end in windows:
        assert 0 <= begin < first < end
        assert end - begin == min(window, end)
        assert begin == 0 or end - first <= stride
    assert all(end - first == stride for _, first, end in windows[1:-1])


@pytest.mark.parametrize(("window", "stride"), [(128, 127), (128, 64), (40, 39), (17, 3), (2, 1)])
def test_perplexity_is_the_forward_passs_of_each_window(llm, logprobs, window, stride):
    ids = [BOS, *TEXT.encode()]
    expected, first = [], 1
    while first < len(ids):
        end = min(window if first == 1 else first + stride, len(ids))
        begin = max(0, end - window)
        expected.append(logprobs(ids[begin:end], first - begin))
        first = end
    result = llm.perplexity(TEXT, window=window, stride=stride)
    np.testing.assert_allclose(result.logprobs, np.concatenate(expected), atol=1e-4)
    assert result.token_ids == tuple(ids[1:])
    assert result.total == pytest.approx(np.concatenate(expected).sum(), abs=1e-2)


def test_perplexity_per_token_byte_and_word(llm):
    text = "Zwei Wörter\n und\tzwei "
    result = llm.perplexity(text)
    assert len(result.token_ids) == result.num_bytes == len(text.encode()) == 23
    assert result.num_words == 4
    assert result.perplexity == pytest.approx(math.exp(-result.total / 23))
    assert result.byte_perplexity == pytest.approx(2**result.bits_per_byte)
    assert result.word_perplexity == pytest.approx(math.exp(-result.total / 4))
    assert math.isnan(llm.perplexity(" \n").word_perplexity)


def test_perplexity_of_token_ids_leaves_the_first_out(llm, logprobs):
    ids = list(b"some bytes")
    result, again = llm.perplexity([ids, np.array(ids)])
    np.testing.assert_allclose(result.logprobs, logprobs(ids, 1), atol=1e-4)
    assert result.num_bytes == len(ids) - 1
    assert again == result


def test_by_default_hardly_a_token_is_computed_twice(llm):
    before = llm.engine.counts.prefilled
    llm.perplexity("".join(map(chr, np.random.default_rng(0).integers(97, 122, 1000))))
    # Seven windows score 127 tokens each; the eighth, for the last 111, looks back on 16.
    assert llm.engine.counts.prefilled - before == 8 * 127


def test_rank_normalises_over_the_labels(llm, logprobs):
    labels = [" yes", " no", [7, 8, 9], " perhaps"]
    result = llm.rank(PROMPT, labels)
    ids = [BOS, *PROMPT.encode()]
    wholes = [ids + (list(x.encode()) if isinstance(x, str) else x) for x in labels]
    totals = np.array([logprobs(whole, len(ids)).sum() for whole in wholes])
    np.testing.assert_allclose([s.total for s in result.scores], totals, atol=1e-3)
    expected = np.exp(totals) / np.exp(totals).sum()
    np.testing.assert_allclose(result.probabilities, expected, rtol=1e-3)
    assert result.best == totals.argmax()
    assert llm.rank([PROMPT, "a"], labels)[0].best == result.best


def test_the_likeliest_in_the_places_of_a_prompts_tokens_and_their_ranks(llm, rows):
    """Beside requests that want none, and in chunks of which some are cached."""
    prompts = [[BOS, *TEXT.encode()[:count]] for count in (100, 100, 3)]
    wanted = [(1, None), (40, 20), (1, 3)]
    asked = [score_request(ids, *each) for ids, each in zip(prompts, wanted, strict=True)]
    for _ in llm.engine.run(asked):
        pass
    assert (asked[0].prompt_top, asked[0].prompt_ranks) == ([], [])
    for request, (first, count) in zip(asked[1:], wanted[1:], strict=True):
        expected = rows(request.prompt)[first - 1 : -1]
        assert len(request.prompt_top) == len(request.prompt_ranks) == len(expected)
        for row, token_id, top, rank in zip(
            expected, request.prompt[first:], request.prompt_top, request.prompt_ranks, strict=True
        ):
            ids, values = zip(*top, strict=True)
            assert len(set(ids)) == count and list(values) == sorted(values, reverse=True)
            np.testing.assert_allclose(values, row[list(ids)], atol=1e-4)
            np.testing.assert_allclose(values, np.sort(row)[: -count - 1 : -1], atol=1e-4)
            # Of those that are nearly as likely another may come first.
            assert np.sum(row > row[token_id] + 1e-4) < rank <= np.sum(row > row[token_id] - 1e-4)


def test_rank_survives_probabilities_that_float32_cannot_hold(llm):
    result = llm.rank("a", [[3] * 100, [5] * 100])
    assert max(score.total for score in result.scores) < -300
    assert sum(result.probabilities) == pytest.approx(1)


def test_rank_computes_the_prompt_once(llm):
    prompt = "x" + PROMPT
    before = llm.engine.counts.prefilled
    llm.rank(prompt, [chr(97 + i) for i in range(8)])
    length = len(prompt) + 1
    # Prefixes are shared by whole pages of 64 tokens from the start, and by the rest of the
    # prompt once it has been computed in another row.
    assert length <= llm.engine.counts.prefilled - before < 2 * length + 8


def lines(llm, count):
    return [llm.score_job("p" * (7 * i % 40), f" {i}") for i in range(count)]


@pytest.mark.parametrize("read_ahead", [1, 5, 1000])
def test_results_come_in_order_and_do_not_depend_on_the_company(llm, read_ahead):
    alone = [llm.score("p" * (7 * i % 40), f" {i}").total for i in range(30)]
    together = [score.total for score in run_jobs(llm.engine, lines(llm, 30), read_ahead)]
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_an_endless_stream_is_read_as_needed(llm):
    read = itertools.count()
    jobs = (llm.score_job("p" * (i % 9), f" {i}") for i in read)
    stream = run_jobs(llm.engine, jobs, read_ahead=8)
    for done in range(1, 60):
        next(stream)
        # Two times what is read ahead, and as much again for what waits for its turn to be given.
        assert next(read) - done <= 40 + done
    assert llm.engine.has_work
    stream.close()
    while llm.engine.has_work:
        llm.engine.step()
    assert not llm.engine.num_running and not llm.engine.num_waiting


def test_the_engine_does_not_run_dry_between_windows(llm):
    engine = llm.engine
    busy = [
        engine.num_running + engine.num_waiting
        for _ in run_jobs(engine, iter(lines(llm, 60)), read_ahead=6)
    ]
    assert min(busy[:-12]) > 0


def test_the_longest_jobs_run_first_and_those_with_a_common_prefix_together(llm, monkeypatch):
    shared = "s" * 70
    prompts = ["a" * 20, shared + "1", "b" * 90, "c" * 30, shared + "234", "d" * 10]
    submitted, submit = [], llm.engine.submit
    monkeypatch.setattr(
        llm.engine, "submit", lambda request: submitted.append(request) or submit(request)
    )
    list(run_jobs(llm.engine, [llm.score_job(prompt, "!") for prompt in prompts]))
    asked = [bytes(request.prompt[1:-1]).decode() for request in submitted]
    assert asked == [prompts[i] for i in (2, 4, 1, 3, 0, 5)]


def test_a_job_without_requests_keeps_its_place(llm):
    jobs = lines(llm, 4)
    jobs.insert(2, Job((), lambda _: "nothing to ask"))
    assert list(run_jobs(llm.engine, jobs))[2] == "nothing to ask"
    assert list(run_jobs(llm.engine, [])) == []


def test_a_stream_of_jobs_beside_other_work(llm):
    greedy = SamplingParams(temperature=0, max_new_tokens=6, ignore_eos=True)
    expected = [score.total for score in run_jobs(llm.engine, lines(llm, 12))]
    stream = llm.stream("hi", greedy)
    pieces = [next(stream)]
    found = []
    for score in run_jobs(llm.engine, lines(llm, 12), read_ahead=3):
        found.append(score.total)
        llm.generate("hello", greedy)
    pieces += list(stream)
    assert pieces[-1].result.text == llm.generate("hi", greedy).text
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_rows_of_every_kind(llm):
    rows = [
        {"id": 1, "prompt": "2 + 2 =", "completion": " 4", "error": "of an earlier run"},
        {"prompt": "2 + 2 =", "choices": [" 4", " 5"]},
        {"text": TEXT, "source": {"page": 3}},
    ]
    (pair, n_pair), (choice, n_choice), (text, n_text) = score_rows(llm, rows, window=50)
    score = llm.score("2 + 2 =", " 4")
    assert pair == {
        "id": 1, "prompt": "2 + 2 =", "completion": " 4", "num_tokens": 2, "is_greedy": False,
        "logprob": pytest.approx(score.total, abs=1e-4),
        "perplexity": pytest.approx(score.perplexity, rel=1e-4),
    }  # fmt: skip
    ranking = llm.rank("2 + 2 =", [" 4", " 5"])
    assert choice["best"] == ranking.best
    assert choice["probabilities"] == pytest.approx(ranking.probabilities, rel=1e-3)
    assert [s["logprob"] for s in choice["scores"]] == pytest.approx(
        [s.total for s in ranking.scores], abs=1e-4
    )
    whole = llm.perplexity(TEXT, window=50)
    assert text["source"] == {"page": 3} and text["num_tokens"] == len(TEXT)
    for name in ("perplexity", "byte_perplexity", "word_perplexity"):
        assert text[name] == pytest.approx(getattr(whole, name), rel=1e-4)
    assert (n_pair, n_choice) == (10, 20) and n_text > len(TEXT)
    ((detailed, _),) = score_rows(llm, rows[1:2], tokens=True)
    assert detailed["scores"][1]["token_ids"] == tuple(b" 5")
    assert sum(detailed["scores"][1]["logprobs"]) == pytest.approx(
        ranking.scores[1].total, abs=1e-4
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, '"prompt" with "completion" or "choices", or "text", got "prompt"'),
        ({}, "got no field"),
        ({"prompt": "a", "completion": "b", "text": "c"}, 'got "completion" and "text"'),
        ({"prompt": 3, "completion": "b"}, '"prompt" must be a text, got 3'),
        ({"prompt": "a", "completion": None}, '"completion" must be a text, got None'),
        ({"completion": "b"}, '"prompt" must be a text, got None'),
        ({"prompt": "a", "completion": ""}, "the completion '' is empty"),
        ({"prompt": "a", "choices": []}, "labels must be a list of at least one"),
        ({"prompt": "a", "choices": "ab"}, "\"choices\" must be a list of texts, got 'ab'"),
        ({"prompt": "a", "choices": ["b", 2]}, '"choices" must be a list of texts'),
        ({"text": ["a"]}, "\"text\" must be a text, got ['a']"),
        ({"text": ""}, "the text '' has no token to score"),
        ({"prompt": "x" * 200, "completion": "y"}, "max_seq_len is 128"),
        (ValueError("not valid JSON"), "not valid JSON"),
    ],
)
def test_a_row_that_cannot_be_scored_says_why_and_the_rest_goes_on(llm, row, message):
    good = {"prompt": "a", "completion": "b"}
    (first, _), (bad, read), (last, _) = score_rows(llm, [good, row, good])
    assert message in bad.pop("error") and read == 0
    assert bad == ({} if isinstance(row, ValueError) else row)
    assert last == first and "logprob" in first


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.rank("a", []), "labels must be a list of at least one"),
        (lambda llm: llm.rank("a", ["b", ""]), "completion '' is empty"),
        (lambda llm: llm.perplexity(""), "no token to score"),
        (lambda llm: llm.perplexity([[5]]), "no token to score"),
        (lambda llm: llm.perplexity([5, 576]), "token id 576"),
        (lambda llm: llm.perplexity("a", window=129), "longer than max_seq_len, 128"),
        (lambda llm: llm.perplexity("a", window=1), "window must be at least 2"),
        (lambda llm: llm.perplexity("a", window=9, stride=9), r"stride must be in \[1, .* = 8\]"),
        (lambda llm: llm.perplexity("a", stride=0), "stride must be in"),
    ],
)
def test_bad_input_is_explained(llm, call, message):
    with pytest.raises(ValueError, match=message):
        call(llm)
