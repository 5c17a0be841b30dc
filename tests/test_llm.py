"""`LLM` on a random tiny FP8 model with a byte-level tokenizer: every call, against the plain
forward pass where there is something to compare with."""

import base64
import copy
import dataclasses
import pickle
import re

import jax
import numpy as np
import pytest

from llama_jax.checkpoint.store import Manifest
from llama_jax.data_rows import run_rows
from llama_jax.engine.compile_cache import forbid_compile
from llama_jax.engine.scheduling import EngineOptions
from llama_jax.llm import LLM
from llama_jax.model.llama import Llama
from llama_jax.model.params import init_params
from llama_jax.results import generation_fields
from llama_jax.sampling_params import SamplingParams
from llama_jax.structured import StructuredOutput
from llama_jax.text.tokenizer import load_tokenizer
from pallas_kernels import e4m3
from tests.tiny import config, fp8_spec

BOS, EOS, EOT = 256, 257, 265
TEXTS = 512  # ids that the tokenizer has; the model's vocabulary is padded
SPEC = fp8_spec(config=config(vocab_size=576, bos_token_id=BOS, eos_token_ids=(EOS, EOT)))
GREEDY = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.model"
    lines = (b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))
    path.write_bytes(b"".join(lines))
    return load_tokenizer(path)


def make(tokenizer, spec=SPEC, generation=None, kv_dtype="bf16", max_batch_size=3, **options):
    params = init_params(spec)
    # Larger output weights make the distribution uneven enough to test sampling with. Ids without a
    # text are the likeliest nowhere.
    params["lm_head"]["weight"] = params["lm_head"]["weight"].at[TEXTS:].set(0) * 12
    params = jax.tree.map(lambda a: e4m3.as_bits(a) if a.dtype == e4m3.DTYPE else a, params)
    manifest = Manifest(
        "tests", "tests", spec.config, spec.formats, None, generation or {}, (), 0, ""
    )
    return LLM(
        params, spec, tokenizer, manifest=manifest, kv_dtype=kv_dtype,
        options=EngineOptions(max_batch_size, 128, **{"prefill_chunk": 32, **options}),
    )  # fmt: skip


def sharing_engine(llm, tokenizer):
    """Another `LLM` on the same engine."""
    other = object.__new__(LLM)
    vars(other).update(vars(llm), tokenizer=tokenizer)
    return other


@pytest.fixture(scope="module")
def llm(tokenizer):
    return make(tokenizer)


@pytest.fixture(scope="module")
def forward(llm):
    apply = jax.jit(Llama(SPEC).apply)

    def logits(ids):
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(apply({"params": llm.engine.params}, padded))[0, : len(ids)]

    return logits


def test_greedy_tokens_are_the_forward_passs(llm, forward):
    prompts = ["hello", "a", "x" * 70, "some other text", "fifth"]
    results = llm.generate(prompts, GREEDY)
    for prompt, result in zip(prompts, results, strict=True):
        ids = [BOS, *prompt.encode()]
        assert result.prompt_token_ids == tuple(ids)
        assert result.finish_reason == "length"
        assert len(result.token_ids) == 12
        likeliest = forward([*ids, *result.token_ids]).argmax(-1)
        assert tuple(likeliest[len(ids) - 1 : -1].tolist()) == result.token_ids


def test_str_in_one_out_list_in_list_out(llm):
    one = llm.generate("hello", GREEDY)
    assert llm.generate(["hello"], GREEDY)[0].token_ids == one.token_ids
    assert llm.generate([[BOS, *b"hello"]], GREEDY)[0].token_ids == one.token_ids
    assert llm.generate([], GREEDY) == []


def test_a_row_does_not_depend_on_its_neighbours(llm):
    """Five prompts through three rows, with settings of their own, as each one alone."""
    sampling = [
        SamplingParams(temperature=0.9, seed=1, max_new_tokens=9),
        SamplingParams(temperature=1.3, top_k=20, seed=1, max_new_tokens=20, logprobs=2),
        SamplingParams(temperature=0, max_new_tokens=5, repetition_penalty=1.3),
        SamplingParams(temperature=1, top_p=0.8, seed=9, max_new_tokens=30, min_new_tokens=30),
        SamplingParams(temperature=1, min_p=0.05, seed=4, max_new_tokens=14),
    ]
    prompts = ["one", "the second", "3", "y" * 50, "five"]
    together = llm.generate(prompts, sampling)
    for prompt, params, result in zip(prompts, sampling, together, strict=True):
        assert llm.generate(prompt, params).token_ids == result.token_ids


def test_stop_strings_cut_the_text(llm):
    full = llm.generate("hello", GREEDY)
    characters = full.text
    stop = characters[3:5]
    result = llm.generate("hello", dataclasses.replace(GREEDY, stop=stop))
    assert result.finish_reason == "stop"
    assert result.text == characters[: characters.index(stop)]


def test_a_special_token_is_a_stop_string_by_its_name(llm):
    token = llm.tokenizer.special_tokens["<|python_tag|>"]
    settings = dataclasses.replace(GREEDY, logit_bias={token: 1e4})
    for sampling in (settings, dataclasses.replace(settings, min_new_tokens=2)):
        sampling = dataclasses.replace(sampling, stop="<|python_tag|>")
        result = llm.generate("hello", sampling)
        assert len(result.token_ids) == 1 + sampling.min_new_tokens
        assert result.token_ids[-1] == token and token not in result.token_ids[:-1]
        assert (result.finish_reason, result.stop_reason) == ("stop", "<|python_tag|>")
        assert list(llm.stream("hello", sampling))[-1].result.token_ids == result.token_ids
    with pytest.raises(ValueError, match=r"stop: .x<\|eot_id\|>. contains the special token"):
        llm.generate("hello", dataclasses.replace(GREEDY, stop="x<|eot_id|>"))


def test_what_stopped_is_reported(llm):
    full = llm.generate("hello", GREEDY)
    assert full.finish_reason == "length" and full.stop_reason is None
    stop = full.text[3:5]
    assert llm.generate("hello", dataclasses.replace(GREEDY, stop=["~~", stop])).stop_reason == stop
    ids = dataclasses.replace(GREEDY, stop_token_ids=[full.token_ids[4]])
    assert llm.generate("hello", ids).stop_reason == full.token_ids[4]
    own = SamplingParams(temperature=0, logit_bias={EOT: 1e4})
    assert llm.generate("hello", own).finish_reason == "stop"
    assert llm.generate("hello", own).stop_reason is None
    # Ignored, it is barred all the same until the least number of tokens.
    ignored = dataclasses.replace(own, max_new_tokens=4, min_new_tokens=2, ignore_eos=True)
    assert [i == EOT for i in llm.generate("hello", ignored).token_ids] == [0, 0, 1, 1]


def test_ids_that_the_tokenizer_has_not(llm):
    """512 ids have a text, the model draws one of 64 others."""
    alone = llm.generate("hello", GREEDY).token_ids
    padded = dataclasses.replace(GREEDY, logit_bias={570: 1e4}, stop="~", logprobs=2)
    other, healthy = llm.generate(["hello", "hello"], [padded, GREEDY])
    assert other.token_ids == (570,) * 12 and other.text == "" and other.error is None
    assert healthy.token_ids == alone
    assert "".join(piece.text for piece in llm.stream("hello", padded)) == ""
    assert llm.generate("hello", GREEDY).token_ids == alone


def test_an_error_in_one_text_is_that_texts_alone(llm, monkeypatch):
    alone = llm.generate("hello", GREEDY).token_ids
    bad = llm.generate("other", GREEDY).token_ids[3]
    assert bad not in alone
    token_bytes = llm.tokenizer.__class__.token_bytes

    def fail(tokenizer, token_id):
        if token_id == bad:
            raise LookupError("no text")
        return token_bytes(tokenizer, token_id)

    monkeypatch.setattr(llm.tokenizer.__class__, "token_bytes", fail)
    for sampling in (GREEDY, dataclasses.replace(GREEDY, logprobs=0)):
        broken, healthy = llm.generate(["other", "hello"], sampling)
        assert broken.finish_reason == "error" and isinstance(broken.error, LookupError)
        assert healthy.token_ids == alone and healthy.error is None
    with pytest.raises(LookupError, match="no text"):
        llm.generate("other", GREEDY)
    with pytest.raises(LookupError, match="no text"):
        list(llm.stream("other", GREEDY))
    rows = [{"prompt": "other"}, {"prompt": "hello"}]
    found = run_rows(llm.engine, rows, lambda row: llm.generate_job(row["prompt"], GREEDY),
                        generation_fields)  # fmt: skip
    first, second = (row for row, _ in found)
    assert "no text" in first["error"] and "text" not in first and "error" not in second
    assert not llm.engine.has_work


def test_stop_tokens_end_and_are_not_text(llm):
    full = llm.generate("hello", GREEDY)
    stop = full.token_ids[4]
    result = llm.generate("hello", dataclasses.replace(GREEDY, stop_token_ids=[stop]))
    first = full.token_ids.index(stop)
    assert result.token_ids == full.token_ids[: first + 1]
    assert result.finish_reason == "stop"
    later = dataclasses.replace(GREEDY, stop_token_ids=[stop], min_new_tokens=8)
    assert stop not in llm.generate("hello", later).token_ids[:8]


def test_eos_comes_from_generation_config_first(tokenizer):
    plain = make(tokenizer)
    stop = plain.generate("hello", GREEDY).token_ids[3]
    configured = make(tokenizer, generation={"eos_token_id": [stop]})
    result = configured.generate("hello", SamplingParams(temperature=0, max_new_tokens=12))
    assert result.finish_reason == "stop"
    assert result.token_ids[-1] == stop


def test_generation_config_gives_the_default_sampling(tokenizer):
    llm = make(tokenizer, generation={"do_sample": True, "temperature": 0.6, "top_p": 0.9})
    assert llm.default_sampling == SamplingParams(temperature=0.6, top_p=0.9)
    assert make(tokenizer).default_sampling.temperature == 0


def test_logprobs_are_the_forward_passs(llm, forward):
    result = llm.generate("hello", dataclasses.replace(GREEDY, logprobs=3))
    ids = list(result.prompt_token_ids)
    expected = forward([*ids, *result.token_ids])[len(ids) - 1 : -1]
    expected = expected - np.log(np.exp(expected).sum(-1, keepdims=True))
    assert result.logprobs is not None
    for token, row in zip(result.logprobs, expected, strict=True):
        assert token.logprob == pytest.approx(row[token.token_id], abs=1e-4)
        assert [i for i, _, _ in token.top] == np.argsort(-row)[:3].tolist()
    assert llm.generate("hello", GREEDY).logprobs is None


def test_the_context_ends_the_text(llm):
    result = llm.generate("z" * 120, dataclasses.replace(GREEDY, max_new_tokens=100))
    assert result.finish_reason == "length"
    assert len(result.prompt_token_ids) + len(result.token_ids) == llm.max_seq_len


def test_stream_is_generate_in_pieces(llm):
    for sampling in (
        GREEDY,
        dataclasses.replace(GREEDY, stop=llm.generate("hi", GREEDY).text[4:7]),
    ):
        pieces = list(llm.stream("hi", sampling))
        result = llm.generate("hi", sampling)
        assert "".join(piece.text for piece in pieces) == result.text
        assert pieces[-1].result is not None
        assert pieces[-1].result.token_ids == result.token_ids
        assert all(piece.result is None for piece in pieces[:-1])


def test_streams_and_generations_run_side_by_side(llm):
    alone = llm.generate(["hi", "hello"], GREEDY)
    stream = llm.stream("hi", GREEDY)
    pieces = [next(stream)]
    assert llm.generate("hello", GREEDY).token_ids == alone[1].token_ids
    pieces += list(stream)
    assert pieces[-1].result is not None
    assert pieces[-1].result.token_ids == alone[0].token_ids


def test_an_abandoned_stream_leaves_nothing_behind(llm):
    stream = llm.stream("hi", GREEDY)
    next(stream)
    stream.close()
    assert not llm.engine.num_running
    assert llm.generate("hello", GREEDY).token_ids == llm.generate("hello", GREEDY).token_ids
    assert not llm.engine.has_work


def test_a_failed_step_does_not_spoil_the_next(llm, monkeypatch):
    expected = llm.generate("hello", GREEDY)

    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("llama_jax.engine.batches.decode_steps", fail)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("hello", GREEDY)
    assert llm.generate("hello", GREEDY).token_ids == expected.token_ids


def test_score_against_the_forward_pass(llm, forward):
    pairs = [("hello", " world"), ("", "abc"), ("q" * 60, "r" * 40), ("1", "2")]
    scores = llm.score([p for p, _ in pairs], [c for _, c in pairs])
    for (prompt, completion), score in zip(pairs, scores, strict=True):
        ids = [BOS, *(prompt + completion).encode()]
        logits = forward(ids)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        first = 1 + len(prompt)
        expected = [logprobs[i - 1, ids[i]] for i in range(first, len(ids))]
        np.testing.assert_allclose(score.logprobs, expected, atol=1e-4)
        assert score.total == pytest.approx(sum(expected), abs=1e-3)
        assert score.is_greedy == all(
            logits[i - 1].argmax() == ids[i] for i in range(first, len(ids))
        )
        assert score.perplexity == pytest.approx(np.exp(-np.mean(expected)), rel=1e-3)
    greedy = llm.generate("hello", GREEDY)
    assert llm.score(greedy.prompt_token_ids, greedy.token_ids).is_greedy


def test_logits_are_the_forward_passs(llm, forward):
    ids = np.random.default_rng(0).integers(0, 512, (5, 70))
    logits = llm.logits(ids)
    assert logits.shape == (5, 70, 576)
    assert logits.dtype == np.float32
    for row, expected in zip(logits, ids, strict=True):
        np.testing.assert_allclose(row, forward(expected), atol=1e-4)


def test_chat_uses_the_template_and_parses_calls(llm, monkeypatch):
    messages = [{"role": "user", "content": "hi"}]
    result = llm.chat(messages, GREEDY)
    text = llm.tokenizer.decode(result.prompt_token_ids, skip_special=False)
    assert text.count("<|begin_of_text|>") == 1
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert [r.token_ids for r in llm.chat([messages, messages], GREEDY)] == [result.token_ids] * 2
    reply = '{"name": "f", "parameters": {"a": {"b": [1]}}}'
    monkeypatch.setattr(llm.tokenizer.__class__, "decode", lambda *_, **__: reply)
    (call,) = llm.chat(messages, GREEDY).tool_calls
    assert (call.name, call.arguments) == ("f", {"a": {"b": [1]}})


def test_fp8_cache_stays_close(llm, tokenizer, caplog):
    ids = np.random.default_rng(0).integers(0, 512, (1, 70))
    exact = llm.logits(ids)
    assert not caplog.records
    rounded = make(tokenizer, kv_dtype="fp8").logits(ids)
    assert "has no scales for an FP8 cache: keys and values are stored as they are" in caplog.text
    error = np.abs(rounded - exact).max() / np.abs(exact).max()
    assert 0 < error < 0.1


def test_structured_output_of_samples_streams_and_beside_others(llm):
    params = SamplingParams(
        n=3, seed=1, max_new_tokens=20, structured=StructuredOutput(regex=r"\d{4}-\d\d(-\d\d)?")
    )
    alone = llm.generate("hello", GREEDY).token_ids
    result, other = llm.generate(["hello", "hello"], [params, GREEDY])
    texts = [each.text for each in result.samples]
    assert len(set(texts)) == 3
    assert all(re.fullmatch(params.structured.regex, text) for text in texts)
    assert {each.finish_reason for each in result.samples} == {"stop"}
    assert other.token_ids == alone
    pieces = list(llm.stream("hello", dataclasses.replace(params, n=1)))
    assert "".join(piece.text for piece in pieces) == texts[0] and len(pieces) > 3
    wrong = dataclasses.replace(params, structured=StructuredOutput(regex="("))
    with pytest.raises(ValueError, match=r"structured\.regex"):
        llm.generate(["hello", "hello"], [GREEDY, wrong])
    assert not llm.engine.num_running and not llm.engine.num_waiting


def test_samples_draw_with_seeds_of_their_own_and_share_the_prompt(llm):
    before, finished = llm.stats(), []
    settings = SamplingParams(max_new_tokens=6, seed=2**32 - 1, n=3)
    results = llm.generate(["~" * 99, "|" * 80], settings, lambda: finished.append(1))
    stats = llm.stats().since(before)
    assert len(finished) == 2
    # Of 100 and 81 tokens, BOS included, only the last has to be computed for each sample. (All
    # prompts begin with BOS, so that one may have been there before.)
    assert 100 + 81 + 2 * 2 - 2 <= stats.prefilled <= 100 + 81 + 2 * 2
    assert stats.prefilled + stats.hit == stats.queried == 3 * (100 + 81)
    for prompt, result in zip(("~" * 99, "|" * 80), results, strict=True):
        samples = [each.token_ids for each in result.samples]
        assert len(set(samples)) == 3
        seeds = (2**32 - 1, 0, 1)
        alone = [dataclasses.replace(settings, n=1, seed=seed) for seed in seeds]
        assert samples == [llm.generate(prompt, each).token_ids for each in alone]
    unseeded = llm.generate("p", SamplingParams(max_new_tokens=6, n=2))
    assert unseeded.token_ids != unseeded.others[0].token_ids
    with pytest.raises(ValueError, match="n is 2: use generate"):
        llm.stream("p", SamplingParams(n=2))


@pytest.mark.slow
def test_nothing_compiles_after_warm_up(tokenizer):
    """Whatever is asked for, in whatever mixture; an FP8 cache, and too few pages."""
    llm = make(tokenizer, kv_dtype="fp8", max_batch_size=2, num_pages=3, prefill_chunk=4)
    report = llm.warmup()
    assert report.compiled + report.from_cache >= 13 and report.seconds > 0
    with forbid_compile():
        llm.generate(["a", "b" * 31, "c" * 100, "d" * 64, "e" * 33], [
            SamplingParams(temperature=0, max_new_tokens=3, logprobs=20),
            SamplingParams(top_k=5, seed=1, stop="q", logit_bias={5: 1.0}),
            SamplingParams(top_p=0.5, min_p=0.1, max_new_tokens=40, stop_token_ids=[3]),
            SamplingParams(repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.1),
            SamplingParams(min_new_tokens=4, max_new_tokens=4, n=3),
        ])  # fmt: skip
        llm.generate(["long" * 15, "longer" * 10], dataclasses.replace(GREEDY, max_new_tokens=60))
        list(llm.stream("again"))
        llm.chat([{"role": "user", "content": "hi"}], GREEDY)
        llm.score(["a", "b" * 70], ["c", "d"])
        llm.logits([[1, 2, 3]])
        llm.rank("a", ["b", "c" * 40])
        llm.perplexity("d" * 300, window=100, stride=50)
    assert llm.stats().preempted > 0
    with pytest.raises(RuntimeError, match=r"jit\(<lambda>\)"), forbid_compile():
        jax.jit(lambda x: x + 1)(1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate(""), "prompt is empty"),
        (lambda llm: llm.generate([[]]), "prompt is empty"),
        (lambda llm: llm.generate("x" * 200), "201 tokens; max_seq_len is 128"),
        (lambda llm: llm.generate([[5, 576]]), r"token id 576 is not in \[0, 576\)"),
        (lambda llm: llm.generate([[-1]]), "token id -1"),
        (lambda llm: llm.generate("a", SamplingParams(stop_token_ids=[900])), "stop_token_ids"),
        (lambda llm: llm.generate("a", SamplingParams(logit_bias={576: 1.0})), "logit_bias"),
        (lambda llm: llm.generate(["a", "b"], [SamplingParams()]), "2 prompts but 1 sampling"),
        (lambda llm: llm.generate("a", SamplingParams(n=0)), "n must be at least 1, got 0"),
        (lambda llm: llm.score("a", ""), "completion '' is empty"),
        (lambda llm: llm.score(["a"], ["b", "c"]), "1 prompts but 2 completions"),
        (lambda llm: llm.score("a" * 100, "b" * 100), "max_seq_len is 128"),
        (lambda llm: llm.logits([[600]]), "token id 600"),
        (lambda llm: llm.logits([1, 2]), "ids must be"),
        (lambda llm: llm.logits([[1.5]]), "ids must be"),
        (lambda llm: llm.logits([[1, 2], [3]]), "ids must have rows of the same length"),
        (lambda llm: llm.chat([]), "messages"),
        (lambda llm: llm.chat({"role": "user", "content": "a"}), "messages: .* got dict"),
        (lambda llm: llm.warmup("tokens"), "output_kinds: expected a list of 'tokens', .* got 't'"),
    ],
)
def test_bad_input_is_explained(llm, call, message):
    with pytest.raises(ValueError, match=message):
        call(llm)


def test_a_prompt_of_another_type_is_refused(llm):
    with pytest.raises(TypeError, match="a prompt must be a str or a list of token ids, got int"):
        llm.generate(["fine", 5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate([[1, 2.0]]), r"prompt: expected token ids, .* got 2\.0 \(float"),
        (lambda llm: llm.generate([[True, 2]]), "prompt: expected token ids, .* got True"),
        (lambda llm: llm.score("a", ["b"]), r"prompt: expected token ids, .* got 'b' \(str\)"),
        # The letters were once completions of the prompts.
        (lambda llm: llm.score(["a", "b"], "cd"), "completions: expected a list, got 'cd'"),
        (lambda llm: llm.rank(["a", "b"], "cd"), "labels: expected a list, got 'cd'"),
        (lambda llm: llm.generate(None), "prompts: expected a list, got None"),
        (lambda llm: llm.generate({"prompt": "a"}), "prompts: expected a list, got .*dict"),
        (
            lambda llm: llm.generate("a", {"n": 1}),
            "sampling: expected SamplingParams or a list of them, got .*dict",
        ),
        (lambda llm: llm.generate(["a"], [{"n": 1}]), "sampling: expected SamplingParams, got"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(llm, call, message):
    with pytest.raises(TypeError, match=message):
        call(llm)


def test_generators_and_arrays_are_lists_too(llm):
    expected = llm.generate(["a", "b"], GREEDY)
    prompts, settings = (each for each in "ab"), (GREEDY for _ in range(2))
    texts = [each.text for each in llm.generate(prompts, settings)]
    assert texts == [each.text for each in expected]
    ids = llm.generate([np.array(expected[0].prompt_token_ids)], GREEDY)[0].prompt_token_ids
    assert [type(i) for i in ids] == [int, int]  # so that they can be written as JSON
    # A generator was once used up by the first prompt, and the second had no labels.
    first, second = llm.rank(["a", "b"], (label for label in ["c", "d"]))
    assert len(first.scores) == len(second.scores) == 2


@pytest.fixture(scope="module")
def spoken(llm, sentencepiece_model, tmp_path_factory):
    """The same model with a SentencePiece tokenizer."""
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(sentencepiece_model)
    return sharing_engine(llm, load_tokenizer(path))


def test_a_reply_reads_on_from_its_prompt(spoken):
    """huggingface/transformers #22710 and #28776, vllm-project/vllm #48674."""
    prompt = "the capital of France is"
    ids = spoken.tokenizer.encode(f"{prompt} Paris", bos=True)
    word = ids[-1]
    assert ids[:-1] == spoken.tokenizer.encode(prompt, bos=True)
    likely = {"temperature": 0, "max_new_tokens": 2, "logit_bias": {word: 1e4}}
    reply = spoken.generate(prompt, SamplingParams(**likely, logprobs=1))
    assert reply.text == " Paris Paris"
    pieces = spoken.stream(prompt, SamplingParams(**likely))
    assert "".join(piece.text for piece in pieces) == " Paris Paris"
    assert reply.logprobs[0].token == " Paris"
    stopped = spoken.generate(prompt, SamplingParams(**likely, stop=" Paris"))
    assert (stopped.text, stopped.finish_reason) == ("", "stop")
    first = spoken.generate([[spoken.tokenizer.bos_id]], SamplingParams(**likely))[0]
    assert first.text == "Paris Paris"  # nothing comes before it


def test_a_completion_reads_on_from_its_prompt(spoken):
    """Also where its tokens are not those of both together; the same for token ids."""
    tokenizer, whole = spoken.tokenizer, "the capital of France is Paris"
    for cut in range(len(whole)):
        prompt, completion = whole[:cut], whole[cut:]
        for given in (prompt, tokenizer.encode(prompt, bos=True)):
            ids, begin = spoken.pair_ids(given, completion)
            assert tokenizer.decode(ids) == whole and begin == len(tokenizer.encode(prompt)) + 1
    assert spoken.pair_ids("a", "\n\n b")[0] == tokenizer.encode("a\n\n b", bos=True)


@pytest.mark.parametrize("copy_of", [pickle.dumps, copy.deepcopy, copy.copy])
def test_what_another_process_has_to_load_itself_says_so(llm, copy_of):
    """A process pool or Ray pickles its arguments."""
    with pytest.raises(TypeError, match=r"an LLM cannot be .*LLM\.load\(path\) in the other"):
        copy_of(llm)
    with pytest.raises(TypeError, match=r"a Tokenizer cannot be .*load_tokenizer\(path\) in"):
        copy_of(llm.tokenizer)


def test_old_names_of_jobs_and_output_kinds_are_taken(llm):
    with pytest.warns(FutureWarning, match="score_job"):
        (request,) = llm.score_question("ab", "c").requests
    assert request.output_kind == "logprobs"
    with pytest.warns(FutureWarning, match="output_kinds"):
        llm.warmup(wanted=())
    assert not hasattr(llm, "wrong_question") and not hasattr(llm, "wrong")


def test_prompts_begin_and_end_as_the_tokenizer_says(llm, tokenizer):
    """ggml-org/llama.cpp #3966 and #4040: no BOS for Yi; some files ask for EOS as well."""
    once = SamplingParams(temperature=0, max_new_tokens=1)
    other = sharing_engine(llm, tokenizer)
    for prefix, suffix in (((), ()), ((BOS,), (EOS,))):
        other.tokenizer = dataclasses.replace(tokenizer, prefix_ids=prefix, suffix_ids=suffix)
        assert other.generate("ab", once).prompt_token_ids == (*prefix, *b"ab", *suffix)
        assert other.pair_ids("ab", "c") == ([*prefix, *b"abc"], len(prefix) + 2)
    template = "{{ messages[0].content }}<|eot_id|>"
    other.tokenizer = dataclasses.replace(tokenizer, chat_template=template, prefix_ids=())
    reply = other.chat([{"role": "user", "content": "ab"}], once)
    assert reply.prompt_token_ids == (*b"ab", EOT)


def test_the_tokenizers_own_end_stops_too(tokenizer):
    """vllm-project/vllm #4180: generation_config names <|end_of_text|> alone."""
    llm = make(dataclasses.replace(tokenizer, eos_id=EOT), generation={"eos_token_id": EOS})
    for end in (EOS, EOT):
        sampling = SamplingParams(temperature=0, max_new_tokens=5, logit_bias={end: 1e4})
        reply = llm.generate("hello", sampling)
        assert (reply.token_ids, reply.finish_reason) == ((end,), "stop")
