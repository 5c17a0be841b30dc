"""Structured output on a random tiny model with the shipped tokenizer: what comes out always fits,
is what drawing among the allowed tokens one by one gives, and changes nothing for others."""

import json
import random
import re
import sys
import threading
from dataclasses import replace

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

from llama_jax.abacus import SHIPPED_MODEL
from llama_jax.engine import grammars
from llama_jax.engine.compile_cache import forbid_compile
from llama_jax.engine.engine import Engine
from llama_jax.engine.grammars import Grammars, num_words
from llama_jax.engine.request import Request
from llama_jax.engine.sampling import sample
from llama_jax.engine.scheduling import EngineOptions
from llama_jax.model.llama import Llama
from llama_jax.model.params import init_params
from llama_jax.model.spec import ModelSpec
from llama_jax.sampling_params import SamplingParams
from llama_jax.structured import MAX_CHARACTERS, StructuredOutput, StructuredOutputError
from llama_jax.text.tokenizer import StreamDecoder, load_tokenizer
from tests.test_engine import finish
from tests.test_sampling import logits, state
from tests.tiny import config, tokens

TOKENIZER = load_tokenizer(SHIPPED_MODEL)
VOCAB = 1024
ENDS = frozenset(TOKENIZER.eos_ids)
SPEC = ModelSpec(
    config(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_heads=2, num_kv_heads=1),
    {},
    "float32",
)
# Few programs.
OPTIONS = EngineOptions(
    max_batch_size=4, max_seq_len=256, prefill_chunk=4, prefill_budget=4, max_steps=4
)
PARAMS = init_params(SPEC)
PARAMS["lm_head"]["weight"] = PARAMS["lm_head"]["weight"] * 20
GRAMMARS = Grammars(TOKENIZER, VOCAB, sorted(ENDS))

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CHOICES = ("yes", "yesterday", "no", 'a "quoted" \\ choice', "mäh\nö", "日本")
FORMS = (
    StructuredOutput(json_schema=PERSON),
    StructuredOutput(choice=CHOICES),
    StructuredOutput(regex=r"[A-C]{2,8}-(\d{2}|x+y)(, é)?"),
    StructuredOutput(grammar='start: "sum(" NUMBER ("," NUMBER)* ")"\nNUMBER: /[1-9][0-9]?/'),
    StructuredOutput(grammar='root ::= ("left" | "right") " " [a-d]+ "."'),
)


def make(**changes) -> Engine:
    return Engine(PARAMS, SPEC, replace(OPTIONS, **changes), jnp.dtype("float32"))


def request(structured: StructuredOutput | None, seed: int = 0, **settings) -> Request:
    settings = {"temperature": 0, "max_new_tokens": 120, "seed": seed} | settings
    params = SamplingParams(structured=structured, **settings)
    matcher = GRAMMARS.matcher(structured) if structured else None
    prompt = tokens(5 + 3 * seed, seed=seed, vocab_size=VOCAB).tolist()
    return Request(prompt, params, stop_ids=ENDS, matcher=matcher)


def mixed() -> list[Request]:
    """Structured requests, greedy and not, with others between them."""
    warm = {"temperature": 1.0, "top_p": 0.95}
    return [
        *(request(form, i, logprobs=2) for i, form in enumerate(FORMS)),
        *(request(None, i, max_new_tokens=11 + i) for i in range(2)),
        *(request(form, 5 + i, **warm) for i, form in enumerate(FORMS)),
        *(request(None, i, max_new_tokens=25, **warm) for i in range(2, 4)),
    ]


def text_of(request: Request) -> str:
    assert not request.error and request.finish_reason == "stop"
    return TOKENIZER.decode(request.token_ids)


def check(structured: StructuredOutput, text: str) -> None:
    """By other means than the engine's."""
    if structured.choice:
        assert text in structured.choice
    elif structured.regex:
        assert re.fullmatch(structured.regex, text)
    elif structured.grammar:
        sums, sides = r"sum\([1-9]\d?(,[1-9]\d?)*\)", r"(left|right) [a-d]+\."
        assert re.fullmatch(sums if "sum" in structured.grammar else sides, text)
    else:
        jsonschema.validate(json.loads(text), json.loads(structured.text))


@pytest.fixture(scope="module")
def expected() -> list[Request]:
    """Each of `mixed` on its own."""
    engine = make()
    return [finish(engine, each)[0] for each in mixed()]


def test_every_form_comes_out(expected) -> None:
    for each in expected:
        if each.params.structured:
            check(each.params.structured, text_of(each))


def test_greedy_tokens_are_the_likeliest_that_are_allowed(expected) -> None:
    """Against the plain forward pass, with a matcher of its own for every token."""
    forward = jax.jit(Llama(SPEC).apply)
    for each in expected[: len(FORMS)]:
        whole = np.zeros((1, 256), np.int32)
        count = len(each.prompt) + len(each.token_ids)
        whole[0, :count] = each.all_tokens
        found = np.asarray(forward({"params": PARAMS}, whole))[0, len(each.prompt) - 1 : count - 1]
        exact = jax.nn.log_softmax(found)
        for i, (token_id, scores) in enumerate(zip(each.token_ids, found, strict=True)):
            (mask,) = GRAMMARS.matcher(each.params.structured).masks(each.token_ids[:i])
            allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[:VOCAB] == 1
            assert token_id == np.argmax(np.where(allowed, scores, -np.inf))
            assert each.logprobs[i] == pytest.approx(float(exact[i, token_id]), abs=1e-4)


def test_masks_are_right_token_by_token() -> None:
    """Against what may follow by the texts of all tokens."""
    texts = [TOKENIZER.token_bytes(i) for i in range(VOCAB)]
    special = set(TOKENIZER.special_tokens.values())
    wanted = [each.encode() for each in CHOICES]
    for choice in CHOICES:
        matcher = GRAMMARS.matcher(StructuredOutput(choice=CHOICES))
        ids = TOKENIZER.encode(choice)
        masks = matcher.masks([], ids)
        for i in range(len(ids) + 1):
            begun = b"".join(texts[t] for t in ids[:i])
            allowed = {
                t for t, text in enumerate(texts)
                if text and t not in special and any(w.startswith(begun + text) for w in wanted)
            } | (ENDS if begun in wanted else set())  # fmt: skip
            bits = set(np.flatnonzero(np.unpackbits(masks[i].view(np.uint8), bitorder="little")))
            # Where one text alone may follow, only its usual tokens.
            assert bits == allowed or (len(bits) == 1 and bits < allowed and not bits & ENDS)
            np.testing.assert_array_equal(masks[i], matcher.masks(ids[:i])[0])


def test_draft_tokens_that_are_refused_change_no_state() -> None:
    matcher = GRAMMARS.matcher(StructuredOutput(regex="ab*"))
    (a,), (b,), end = TOKENIZER.encode("a"), TOKENIZER.encode("b"), min(ENDS)
    before = matcher.masks([])
    for drafts in ([b], [a, a], [a, end, end], [a, b, end, b], [a, b, b]):
        masks = matcher.masks([], drafts)
        assert masks.shape[0] == 1 + len(drafts)
        np.testing.assert_array_equal(masks[:1], before)
    assert not matcher.masks([], [b, a])[1:].any() and matcher.masks([], [a, b])[1:].all(0).any()
    copy = matcher.copy()
    np.testing.assert_array_equal(copy.masks([a]), matcher.masks([], [a])[1:])


@pytest.mark.parametrize("vocab", [31, pytest.param(64, marks=pytest.mark.slow)])
def test_draws_stay_inside_their_masks(vocab: int) -> None:
    params = [SamplingParams(temperature=t, top_k=k, top_p=p, seed=i) for i, (t, k, p) in enumerate(
        ((0, 0, 1), (1, 0, 1), (1, 3, 1), (2, 0, 0.5)))]  # fmt: skip
    draw = jax.jit(lambda rows, state, masks: sample(rows, state, masks=masks).tokens)
    plain = jax.jit(lambda rows, state: sample(rows, state).tokens)
    for seed in range(20):
        rows = logits(len(params), seed)[:, :vocab]
        settings = jax.tree.map(
            lambda a: a[:, :vocab] if a.ndim == 2 else a, state(*params)
        ).replace(step=jnp.full(len(params), seed))
        allowed = np.random.default_rng(seed).random(rows.shape) < 0.1
        allowed[:, seed % vocab] = True
        words = np.zeros((len(params), num_words(vocab) * 4), np.uint8)
        packed = np.packbits(allowed, axis=1, bitorder="little")
        words[:, : packed.shape[1]] = packed
        masks = words.view(np.uint32)
        drawn = draw(rows, settings, masks)
        assert allowed[np.arange(len(params)), drawn].all()
        barred = np.where(allowed, rows, -np.inf)
        np.testing.assert_array_equal(drawn, plain(barred, settings))
        whole = draw(rows, settings, np.full_like(masks, ~np.uint32(0)))
        np.testing.assert_array_equal(whole, plain(rows, settings))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {"num_speculative_tokens": 3},
                {"batch_invariant": True},
                {"num_pages": 5},
                {"max_batch_size": 16},
                {"prefill_chunk": 32, "prefill_budget": 500},
                {"share_prefixes": False, "max_steps": 1},
            )
        ),
    ],
    ids=str,
)
def test_company_changes_nothing(expected, changes: dict) -> None:
    """Of structured requests and of the others, with speculation too."""
    engine = make(**changes)
    found = finish(engine, *mixed())
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert [each.finish_reason for each in found] == [each.finish_reason for each in expected]
    assert engine.counts.accepted > 0  # forced tokens, at least


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"num_speculative_tokens": 3}, marks=pytest.mark.slow)]
)
def test_preemption_at_every_third_step_changes_nothing(expected, changes: dict) -> None:
    engine, requests = make(**changes), mixed()[:7]
    for each in requests:
        engine.submit(each)
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
        if steps % 3 == 0:
            engine._collect_all()
            if engine._scheduler.running:
                engine._scheduler.preempt(engine._scheduler.running[-1])
    for request, alone in zip(requests, expected[:7], strict=True):
        assert request.token_ids == alone.token_ids
    assert engine.counts.preempted > 5


@pytest.mark.slow
def test_a_draft_model_changes_no_token(expected) -> None:
    small = ModelSpec(replace(SPEC.config, num_layers=1), {}, "float32")
    for draft in ((PARAMS, SPEC), (init_params(small), small)):
        options = replace(OPTIONS, num_speculative_tokens=3)
        engine = Engine(PARAMS, SPEC, options, jnp.dtype("float32"), draft=draft)
        found = finish(engine, *mixed())
        assert [each.token_ids for each in found] == [each.token_ids for each in expected]


def test_forced_tokens_save_steps() -> None:
    names = [f"a_rather_long_name_{i}" for i in range(4)]
    schema = {
        "type": "object",
        "properties": {name: {"type": "boolean"} for name in names},
        "required": names,
        "additionalProperties": False,
    }
    (each,) = finish(engine := make(), request(StructuredOutput(json_schema=schema)))
    assert list(json.loads(text_of(each))) == names
    assert engine.counts.rounds < 0.6 * len(each.token_ids)


def test_samples_have_matchers_of_their_own() -> None:
    one = StructuredOutput(json_schema=PERSON)
    samples = [request(one, 3, temperature=1.0) for _ in range(6)]
    for i, each in enumerate(samples):
        each.params = replace(each.params, seed=i)
    texts = {text_of(each) for each in finish(make(), *samples)}
    for text in texts:
        check(one, text)
    assert len(texts) > 1


@pytest.mark.slow
def test_nothing_compiles_after_warm_up() -> None:
    for changes in ({}, {"num_speculative_tokens": 2}, {"batch_invariant": True}):
        engine = make(**changes)
        engine.warmup(["tokens"], structured=True)
        with forbid_compile():
            finish(engine, *mixed())


def random_schema(draw: random.Random, depth: int = 3) -> dict:
    kinds = ["string", "integer", "boolean", "null", "enum", "const", "pattern"]
    match draw.choice(kinds + ["object", "array", "anyOf"] * (depth > 0)):
        case "object":
            names = draw.sample(["a", "b-c", "d e", 'f"g', "ä", "key"], draw.randint(0, 3))
            return {
                "type": "object",
                "properties": {name: random_schema(draw, depth - 1) for name in names},
                "required": draw.sample(names, draw.randint(0, len(names))),
                "additionalProperties": False,
            }
        case "array":
            least = draw.randint(0, 2)
            most = least + draw.randint(0, 2)
            items = random_schema(draw, depth - 1)
            return {"type": "array", "items": items, "minItems": least, "maxItems": most}
        case "anyOf":
            return {"anyOf": [random_schema(draw, depth - 1) for _ in range(2)]}
        case "string":
            least = draw.randint(0, 3)
            return {"type": "string", "minLength": least, "maxLength": least + draw.randint(0, 5)}
        case "integer":
            least = draw.randint(-1000, 1000)
            return {"type": "integer", "minimum": least, "maximum": least + draw.randint(0, 99)}
        case "enum":
            return {"enum": draw.sample(["x", 1, 2.5, None, True, "y z", "\\"], 3)}
        case "const":
            return {"const": draw.choice(["x", -7, False, [1, "a"], {"k": None}])}
        case "pattern":
            return {"type": "string", "pattern": draw.choice([r"^\d{3}$", "^(ab|c){1,3}$"])}
        case kind:
            return {"type": kind}


@pytest.mark.parametrize("count", [25, pytest.param(1000, marks=pytest.mark.slow)])
def test_outputs_of_random_schemas_validate(count: int) -> None:
    draw = random.Random(count)
    schemas = [random_schema(draw) for _ in range(count)]
    requests = [
        request(StructuredOutput(json_schema=schema), i % 5, temperature=1.5 * (i % 2))
        for i, schema in enumerate(schemas)
    ]
    complete = 0
    for schema, each in zip(schemas, finish(make(), *requests), strict=True):
        assert not each.error
        if each.finish_reason == "stop":
            jsonschema.validate(json.loads(text_of(each)), schema)
            complete += 1
    assert complete > 0.9 * count  # the others are longer than max_new_tokens


def test_a_request_that_ends_by_a_stop_string_or_the_limit() -> None:
    form = StructuredOutput(grammar='root ::= ("left" | "right") " " [a-d]+ "."')
    cut, limited = request(form, stop=" "), request(form, max_new_tokens=2)
    cut.decoder = StreamDecoder(TOKENIZER)
    finish(make(), cut, limited)
    assert cut.text in ("left", "right") and cut.finish_reason == "stop"
    assert limited.finish_reason == "length" and len(limited.token_ids) == 2


# What goes wrong.


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({}, ValueError, "exactly one"),
        ({"regex": "a", "choice": ["b"]}, ValueError, "regex and choice"),
        ({"json_schema": "{"}, StructuredOutputError, "json_schema"),
        ({"json_schema": "[]"}, TypeError, "json_schema"),
        ({"json_schema": 3}, TypeError, "json_schema"),
        ({"json_schema": {"const": float("nan")}}, StructuredOutputError, "json_schema"),
        ({"json_schema": {"const": {1, 2}}}, StructuredOutputError, "json_schema"),
        ({"json_schema": "[" * 100_000}, StructuredOutputError, "json_schema"),
        ({"choice": []}, ValueError, "choice"),
        ({"choice": ["a", ""]}, ValueError, "choice"),
        ({"choice": "a"}, TypeError, "choice"),
        ({"choice": ["a", 1]}, TypeError, "choice"),
        ({"regex": 1}, TypeError, "regex"),
        ({"grammar": b"a"}, TypeError, "grammar"),
        ({"json_object": 1}, TypeError, "json_object"),
        ({"regex": "a" * (MAX_CHARACTERS + 1)}, StructuredOutputError, "regex"),
    ],
)
def test_settings_are_checked(fields: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        StructuredOutput(**fields)


def test_settings_that_do_not_go_together() -> None:
    for other in ({"min_new_tokens": 1}, {"ignore_eos": True}):
        with pytest.raises(ValueError, match=next(iter(other))):
            SamplingParams(structured=StructuredOutput(regex="a"), **other)
    with pytest.raises(TypeError, match="structured"):
        SamplingParams(structured={"regex": "a"})  # type: ignore[arg-type]
    bare = Request([1], SamplingParams(structured=StructuredOutput(regex="a")))
    with pytest.raises(ValueError, match="matcher"):
        make().submit(bare)


def chain(name: str, count: int) -> str:
    """A grammar whose rules, or terminals, are each the next one twice."""
    rules = (f"{name}{i}: {name}{i + 1} {name}{i + 1}" for i in range(count))
    return "\n".join([f"start: {name}0", *rules, f'{name}{count}: "a"'])


LONG = 20_000
HOSTILE = {
    "10 MB": lambda: {"json_schema": {"enum": ["x" * 100] * 100_000}},
    "10 MB of text": lambda: {"json_schema": '{"const": "' + "x" * 10_000_000 + '"}'},
    "nested": lambda: {"json_schema": '{"items":' * 300 + "{}" + "}" * 300},
    "parentheses": lambda: {"regex": "(" * LONG + ")" * LONG},
    "parentheses in Lark": lambda: {"grammar": f"start: {'(' * LONG}'a'{')' * LONG}"},
    "parentheses in GBNF": lambda: {"grammar": f"root ::= {'(' * LONG}'a'{')' * LONG}"},
    "endless references": lambda: {
        "json_schema": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    },
    "all of any of": lambda: {
        "json_schema": {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}} for j in range(8)]}
                for i in range(8)
            ]
        }
    },
    "look-around": lambda: {"regex": "(?=a)b"},
    "not a regex": lambda: {"regex": "(a"},
    "not a grammar": lambda: {"grammar": "start: nothing"},
    "not a schema": lambda: {"json_schema": {"type": "nothing"}},
    "what is not implemented": lambda: {"json_schema": {"type": "array", "uniqueItems": True}},
    "no text": lambda: {"json_schema": {"type": "string", "minLength": 3, "maxLength": 2}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_ones_are_refused(name: str) -> None:
    fields = HOSTILE[name]()
    with pytest.raises(StructuredOutputError, match=f"structured.{next(iter(fields))}"):
        GRAMMARS.matcher(StructuredOutput(**fields))


@pytest.mark.slow
def test_others_are_served_while_one_compiles_for_ever(monkeypatch) -> None:
    monkeypatch.setattr(grammars, "COMPILE_SECONDS", 2.0)
    errors: list[Exception] = []

    def ask() -> None:
        try:
            GRAMMARS.matcher(StructuredOutput(grammar=chain("T", 3000)))
        except StructuredOutputError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    choice = StructuredOutput(choice=["served", "meanwhile"])
    (each,) = finish(make(), request(choice))
    check(choice, text_of(each))
    thread.join()
    assert "structured.grammar" in str(errors[0]) and "after 2 s" in str(errors[0])


def test_a_process_that_crashes_is_started_again() -> None:
    GRAMMARS.matcher(StructuredOutput(regex="before"))
    process = GRAMMARS._processes.get()
    process._process.kill()
    GRAMMARS._processes.put(process)
    with pytest.raises(StructuredOutputError, match="memory"):
        GRAMMARS.matcher(StructuredOutput(regex="during"))
    assert GRAMMARS.matcher(StructuredOutput(regex="during"))


def test_a_hostile_one_that_compiles_ends_alone(expected) -> None:
    """Its limits are reached while it draws, or it draws as it should."""
    bombs = ("((((a{1,100}){1,100}){1,100}){1,100})" + "(.*b){99}" * 99, "(a|b)*a(a|b){2000}")
    forms = [*(StructuredOutput(regex=each) for each in bombs),
             StructuredOutput(grammar=chain("r", 8000))]  # fmt: skip
    bad = [request(form, i) for i, form in enumerate(forms)]
    good = request(FORMS[1], 1, logprobs=2)
    finish(make(), *bad, good)
    for each, prefix in zip(bad, ("a.*", "[ab]*", "a*"), strict=True):
        is_right = re.fullmatch(prefix, TOKENIZER.decode(each.token_ids))
        assert is_right or isinstance(each.error, StructuredOutputError)
    assert good.token_ids == expected[1].token_ids


def test_a_late_mask_ends_its_request_alone(monkeypatch, expected) -> None:
    released = threading.Event()
    requests = [request(form, i, logprobs=2) for i, form in enumerate(FORMS[:2])]
    masks, late = grammars.Matcher.masks, requests[0].matcher

    def slow(self, token_ids, drafts=()):
        if self is late and len(token_ids) > 2:
            released.wait()
        return masks(self, token_ids, drafts)

    monkeypatch.setattr(grammars.Matcher, "masks", slow)
    monkeypatch.setattr(grammars, "MASKS_SECONDS", 1.0)
    finish(make(), *requests)
    released.set()
    assert requests[0].finish_reason == "error" and "1 s" in str(requests[0].error)
    assert requests[1].token_ids == expected[1].token_ids


def test_other_settings_that_leave_nothing_end_the_request_alone(expected) -> None:
    bias = dict.fromkeys(range(VOCAB), float("-inf"))
    bad = request(FORMS[0], logit_bias={**bias, 5: 0.0})
    good = request(FORMS[1], 1, logprobs=2)
    finish(make(), bad, good)
    assert isinstance(bad.error, StructuredOutputError) and "logit_bias" in str(bad.error)
    assert good.token_ids == expected[1].token_ids


def test_without_llguidance(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    fresh = Grammars(TOKENIZER, VOCAB, sorted(ENDS))
    with pytest.raises(ModuleNotFoundError, match=r"llama-jax\[serve\]"):
        fresh.matcher(StructuredOutput(regex="a"))


def test_a_model_without_an_end() -> None:
    with pytest.raises(StructuredOutputError, match="eos_token_id"):
        Grammars(TOKENIZER, VOCAB, []).matcher(StructuredOutput(regex="a"))
