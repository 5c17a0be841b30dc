"""The questions, the tokenizer, the chat template and the files of the shipped model."""

import calendar
import datetime
import json
import random
import re
from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiktoken
from safetensors import safe_open

from llama_jax import LLM
from llama_jax.abacus import data, evaluate, number_tasks, tasks, vocabulary, words
from llama_jax.model.config import LlamaConfig
from llama_jax.text.chat import encode_chat, render_chat
from llama_jax.text.chat_template import render_template
from llama_jax.text.tokenizer import LLAMA31_SPECIAL_TOKENS, load_tokenizer

PACKAGE = Path(tasks.__file__).parent
GOLDEN = Path(__file__).parents[2] / "shared" / "data" / "golden" / "chat.json"
FP8, BF16 = PACKAGE / "checkpoint", PACKAGE / "checkpoint_bf16"


@pytest.fixture(scope="module")
def tokens() -> list[bytes]:
    return vocabulary.build()


@pytest.fixture(scope="module")
def encoding(tokens: list[bytes]) -> tiktoken.Encoding:
    return vocabulary.encoding(tokens)


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory, tokens: list[bytes]) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    template = (PACKAGE / "chat_template.jinja").read_text()
    vocabulary.write_tokenizer(directory, tokens, template)
    return directory


def draws(kind: str, count: int = 200, *, held_out: bool = False) -> list[tasks.Question]:
    rng = random.Random(f"{kind} {held_out}")
    return [tasks.draw(kind, rng, held_out=held_out) for _ in range(count)]


def numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def quoted(text: str) -> list[str]:
    return re.findall(r'"([^"]*)"', text)


def listed(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.rsplit(":", 1)[-1].rsplit(" of ", 1)[-1])


def right_sum(prompt: str) -> str:
    a, b = numbers(prompt)
    if re.search(r"Subtract", prompt) or "away from" in prompt:
        a, b = b, a
    if re.search(r"\+|plus|sum|Add", prompt):
        return str(a + b)
    if re.search(r" - |minus|Subtract|away", prompt):
        return str(a - b)
    if re.search(r"\*|times|product|Multiply| x ", prompt):
        return str(a * b)
    return str(Decimal(a) / Decimal(b))


def right_story(prompt: str) -> str:
    a, b = numbers(prompt)
    return str(a - b if re.search(r"left", prompt) else a + b)


def right_comparison(prompt: str) -> str:
    a, b = numbers(prompt)
    smaller = re.search(r"smaller|less", prompt)
    if prompt.startswith("Is"):
        return "Yes" if (a < b if smaller else a > b) else "No"
    return str(min(a, b) if smaller else max(a, b))


def right_extreme(prompt: str) -> str:
    ordered = sorted(numbers(prompt))
    return str(ordered[0] if re.search(r"smallest|minimum", prompt) else ordered[-1])


def right_order(prompt: str) -> str:
    descending = re.search(r"descending|largest to", prompt)
    ordered = sorted(numbers(prompt), key=lambda n: -n if descending else n)
    return ", ".join(map(str, ordered))


def right_case(prompt: str) -> str:
    (word,) = quoted(prompt)
    return word.swapcase()


def right_letter(prompt: str) -> str:
    places = {"first": 1, "second": 2, "third": 3, "fourth": 4, "fifth": 5, "last": 0}
    (place,) = [places[name] for name in places if f" {name} " in prompt]
    return quoted(prompt)[0][place - 1]


def right_day(prompt: str) -> str:
    (day,) = [i for i, name in enumerate(calendar.day_name) if name in prompt]
    step = numbers(prompt)[0] if numbers(prompt) else 1
    back = re.search(r"before|ago|previous|back", prompt)
    monday = datetime.date(2024, 1, 1)
    return f"{monday + datetime.timedelta(day - step if back else day + step):%A}"


def right_length(prompt: str) -> str:
    (month,) = [i for i, name in enumerate(calendar.month_name) if name and name in prompt]
    (year,) = numbers(prompt)
    after = datetime.date(year + month // 12, month % 12 + 1, 1)
    return str((after - datetime.date(year, month, 1)).days)


def right_leap(prompt: str) -> str:
    (year,) = numbers(prompt)
    return (
        "Yes"
        if datetime.date(year, 3, 1) - datetime.timedelta(1)
        == datetime.date(year, 2, 28) + datetime.timedelta(1)
        else "No"
    )


def right_date(prompt: str) -> str:
    found = re.search(r"(\d+) ([A-Z][a-z]+)", prompt)
    assert found is not None
    day = datetime.datetime.strptime(f"{found[0]} 2025", "%d %B %Y")
    day += datetime.timedelta(-1 if "before" in prompt else 1)
    return f"{day.day} {day:%B}"


def right_rounding(prompt: str) -> str:
    unit = 100 if "hundred" in prompt else 10
    places = (Decimal(numbers(prompt)[0]) / unit).quantize(Decimal(1), ROUND_HALF_UP)
    return str(int(places) * unit)


RIGHT: dict[str, Callable[[str], str]] = {
    "add": right_sum,
    "subtract": right_sum,
    "multiply": right_sum,
    "divide": right_sum,
    "story": right_story,
    "compare": right_comparison,
    "extreme": right_extreme,
    "sort_numbers": right_order,
    "sort_words": lambda prompt: ", ".join(sorted(listed(prompt))),
    "reverse": lambda prompt: "".join(reversed(quoted(prompt)[0])),
    "case": right_case,
    "count_letters": lambda prompt: str(len(quoted(prompt)[0])),
    "count_occurrences": lambda prompt: str(quoted(prompt)[1].count(quoted(prompt)[0])),
    "letter_at": right_letter,
    "weekday": right_day,
    "weekday_after": right_day,
    "days_from": right_day,
    "days_in_month": right_length,
    "leap_year": right_leap,
    "date_step": right_date,
    "parity": lambda prompt: ("even", "odd")[numbers(prompt)[0] & 1],
    "rounding": right_rounding,
}


@pytest.mark.parametrize("kind", RIGHT)
def test_answers_agree_with_an_independent_calculation(kind: str) -> None:
    for question in draws(kind):
        assert question.answer == RIGHT[kind](question.prompt), question.prompt


@pytest.mark.parametrize(
    ("kind", "prompt", "answer"),
    [
        ("units", "Convert 5 kilometers to meters.", "5000 meters"),
        ("units", "Convert 120 minutes to hours.", "2 hours"),
        ("number_words", "Write 42 in words.", "forty-two"),
        ("number_words", 'Write "sixteen" in digits.', "16"),
        ("month", "Which month is after December?", "January"),
        ("month", "What is month number 2?", "February"),
        ("too_large", "What is 4831 * 297?", number_tasks.NEEDS_CALCULATOR),
    ],
)
def test_known_answers(kind: str, prompt: str, answer: str) -> None:
    """Facts that need a table: this very question is drawn sooner or later, and answered so."""
    rng, generate = random.Random(0), tasks.KINDS[kind][0]
    if kind == "too_large":
        assert {generate(rng, "")[2] for _ in range(100)} == {answer}
        return
    assert answer in {a for _, p, a in (generate(rng, "") for _ in range(20000)) if p == prompt}


def test_questions_depend_only_on_the_seed() -> None:
    for kind in [*tasks.KINDS, "calculator"]:
        assert draws(kind, 20) == draws(kind, 20)


@pytest.mark.parametrize(
    "kind", [*(k for k in tasks.KINDS if k not in ("chat", "today")), "calculator"]
)
def test_no_held_out_question_is_ever_trained_on(kind: str) -> None:
    trained, held_out = draws(kind, 600), draws(kind, 60, held_out=True)
    assert not {question.key for question in trained} & {question.key for question in held_out}
    assert not {q.prompt for q in trained} & {q.prompt for q in held_out}


def test_calculator_results_are_right() -> None:
    for question in draws("calculator"):
        call = json.loads(question.answer)
        assert call["name"] == "calculator"
        expected = eval(call["parameters"]["expression"], {"__builtins__": {}})  # digits only
        assert re.fullmatch(r"\d+ [-+*/] \d+", call["parameters"]["expression"])
        assert float(question.result or 0) == pytest.approx(expected, abs=1e-3)
        assert set(numbers(question.prompt)) == set(numbers(call["parameters"]["expression"]))


def test_the_vocabulary_keeps_operands_in_single_characters(
    encoding: tiktoken.Encoding,
) -> None:

    def pieces(text: str) -> list[str]:
        return [encoding.decode([token]) for token in encoding.encode_ordinary(text)]

    assert pieces("What is 48 * 97?") == ["What", " is", " ", "4", "8", " *", " ", "9", "7", "?"]
    assert pieces('Reverse the word "stone".') == ["Reverse", " the", " word", ' "', *"stone", '".']
    assert pieces(": pear, fig") == [":", " ", *"pear", ",", " ", *"fig"]
    assert pieces("STONE") == [*"STONE"]


def test_the_written_tokenizer_is_the_one_trained_with(
    tokenizer_directory: Path, encoding: tiktoken.Encoding
) -> None:
    tokenizer = load_tokenizer(tokenizer_directory)
    texts = ["", " ", "naïve 日本 🙂\n\n x", "12345 thE", json.dumps(tasks.CALCULATOR, indent=4)]
    texts += [question.prompt for kind in tasks.KINDS for question in draws(kind, 5)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == encoding.encode_ordinary(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == 1024
    assert len(LLAMA31_SPECIAL_TOKENS) == len(set(LLAMA31_SPECIAL_TOKENS)) == 256


def test_training_chats_are_what_the_chat_template_renders(
    encoding: tiktoken.Encoding,
) -> None:
    template = (PACKAGE / "chat_template.jinja").read_text()
    rng = random.Random(0)
    for kind in [*tasks.KINDS, "calculator", "calculator", "calculator"]:
        messages = [{"role": "system", "content": words.SYSTEM_MESSAGES[0]}]
        for _ in range(2):
            messages += data.exchange(tasks.draw(kind, rng, held_out=False))
        for start in (0, 1):
            tools = [data.draw_calculator(rng)] if kind == "calculator" else None
            shown = data.segments(messages[start:], date="02 Jan 2031", tools=tools)
            variables = {
                "messages": messages[start:],
                "tools": tools,
                "date_string": "02 Jan 2031",
                "bos_token": "<|begin_of_text|>",
                "add_generation_prompt": True,
            }
            text = render_template(template, variables)
            assert data.prompt_tokens(encoding, shown) == encoding.encode(
                text, allowed_special="all"
            )


def test_held_out_chats_are_what_a_user_would_send(
    tokenizer_directory: Path, encoding: tiktoken.Encoding
) -> None:
    tokenizer = load_tokenizer(tokenizer_directory)
    for chat in data.held_out_chats(seed=1, per_kind=1):
        shown = data.segments(chat.messages, date=chat.date, tools=chat.tools)
        assert data.prompt_tokens(encoding, shown) == encode_chat(
            tokenizer, chat.messages, tools=chat.tools, date_string=chat.date
        )


def test_chats_fill_their_arrays_and_mark_what_the_assistant_writes(
    encoding: tiktoken.Encoding,
) -> None:
    tokens, mask = data.draw_batch(random.Random(3), encoding, 4, 384, tool_share=1.0, stage=2)
    assert tokens.shape == (4, 385) and mask.shape == (4, 384)
    for row, wanted in zip(tokens, mask, strict=True):
        text = encoding.decode(row.tolist())
        said = encoding.decode(row[1:][wanted == 1].tolist()).split("<|eot_id|>")[:-1]
        pattern = r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?)<\|eot_id\|>"
        assert said == re.findall(pattern, text, re.DOTALL) and said


@pytest.mark.skipif(not GOLDEN.exists(), reason="golden chats are not part of the repository")
def test_the_chat_template_renders_what_the_official_one_does() -> None:
    template = (PACKAGE / "chat_template.jinja").read_text()
    cases = json.loads(GOLDEN.read_text())
    assert len(cases) == 15
    for case in cases:
        settings = {
            "add_generation_prompt": True,
            "bos_token": "<|begin_of_text|>",
            **case["kwargs"],
        }
        assert (
            render_template(template, {"messages": case["messages"], **settings}) == case["hf_text"]
        )


def test_a_tool_result_that_is_text_is_quoted_and_a_number_is_not(
    tokenizer_directory: Path,
) -> None:
    tokenizer = load_tokenizer(tokenizer_directory)
    for content, shown in (("12", '"12"'), (12, "12"), ({"result": 12}, '{"result": 12}')):
        messages = [{"role": "user", "content": "hi"}, {"role": "tool", "content": content}]
        text = render_chat(tokenizer, messages, add_generation_prompt=False)
        assert text.endswith(f"<|start_header_id|>ipython<|end_header_id|>\n\n{shown}<|eot_id|>")


def read(directory: Path) -> dict[str, np.ndarray]:
    """Tensors by name; bfloat16 is read through its bits, which numpy cannot name."""
    with (directory / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
        file.seek(0)
        content = file.read()
    types = {"BF16": ml_dtypes.bfloat16, "I8": np.int8, "F32": np.float32}
    assert header.pop("__metadata__") == {"format": "pt"}
    return {
        name: np.frombuffer(content[start + a : start + b], types[entry["dtype"]]).reshape(
            entry["shape"]
        )
        for name, entry in header.items()
        for a, b in [entry["data_offsets"]]
    }


def test_both_checkpoints_together_stay_below_10_megabytes() -> None:
    files = [path for directory in (FP8, BF16) for path in directory.iterdir()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000


def test_the_checkpoint_has_friendliais_layout() -> None:
    config = json.loads((FP8 / "config.json").read_text())
    assert config["use_fp8_e4m3"] is True and config["fmo_version"] == "0.3"
    assert "quantization_config" not in config
    tensors, original = read(FP8), read(BF16)
    layers = config["num_hidden_layers"]
    quantized = [name for name in tensors if name.endswith("_proj.weight")]
    assert len(quantized) == 7 * layers and len(tensors) == len(original) + 2 * len(quantized)
    for name in quantized:
        codes, module = tensors[name], name.removesuffix(".weight")
        scale, in_scale = tensors[f"{module}.weight_scale"], tensors[f"{module}.in_scale"]
        assert codes.dtype == np.int8 and codes.shape == original[name].shape
        for value in (scale, in_scale):
            assert value.dtype == np.float32 and value.shape == () and value > 0
        weight = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
        exact = original[name].astype(np.float32)
        # half a step of e4m3fn: 2^-4 of the value, or 2^-10 below the smallest normal number
        assert (
            np.abs(weight - exact) <= np.maximum(np.abs(exact) / 16, scale / 1024) * 1.001
        ).all()
    for name in set(original) - set(quantized):
        np.testing.assert_array_equal(tensors[name], original[name])
        assert tensors[name].dtype == ml_dtypes.bfloat16
    for layer in range(layers):
        for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            block = "self_attn" if len(parts) == 3 else "mlp"
            prefix = f"model.layers.{layer}.{block}"
            for scale_name in ("weight_scale", "in_scale"):
                assert len({float(tensors[f"{prefix}.{part}.{scale_name}"]) for part in parts}) == 1


def test_the_checkpoint_is_a_llama_3_1() -> None:
    config = LlamaConfig.from_pretrained(FP8)
    assert config == LlamaConfig.from_pretrained(BF16)
    assert config.rope_scaling is not None and config.rope_scaling.factor == 8.0
    assert config.num_kv_heads < config.num_heads
    assert config.eos_token_ids == (769, 776, 777)
    tokenizer = load_tokenizer(FP8)
    assert tokenizer.bos_id == config.bos_token_id == 768
    assert [tokenizer.special_tokens[name] for name in LLAMA31_SPECIAL_TOKENS] == [
        *range(768, 1024)
    ]
    generation = json.loads((FP8 / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 768, "do_sample": False, "eos_token_id": [769, 776, 777]}


def test_transformers_can_open_the_file() -> None:
    with safe_open(FP8 / "model.safetensors", "np") as file:
        assert "model.layers.0.self_attn.q_proj.in_scale" in file.keys()  # noqa: SIM118


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(verbose=False, max_seq_len=512, max_batch_size=16)


@pytest.mark.slow
def test_held_out_questions_are_answered_exactly(llm: LLM) -> None:
    chats = data.held_out_chats(evaluate.EVALUATION_SEED, per_kind=2)
    report = evaluate.evaluate(llm, "shipped", chats)
    assert report.questions == len(chats) == 56
    assert report.accuracy >= 0.95, report.misses
    assert 1.0 < report.perplexity < 1.1


@pytest.mark.slow
def test_a_chat_with_the_calculator_goes_all_the_way(llm: LLM) -> None:
    messages: list[data.Message] = [{"role": "user", "content": "What is 4831 * 297?"}]
    (call,) = llm.chat(messages, tools=[tasks.CALCULATOR]).tool_calls
    assert (call.name, call.arguments) == ("calculator", {"expression": "4831 * 297"})
    messages += [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": str(4831 * 297)},
    ]
    assert llm.chat(messages, tools=[tasks.CALCULATOR]).text == "1434807"
