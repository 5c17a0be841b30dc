"""generation_config.json: each field is honoured, harmless, or named in a warning."""

import math
from typing import Any

import pytest

from llama_jax.checkpoint.generation_config import (
    FIELDS,
    HARMLESS,
    NOT_HONOURED,
    Settings,
    default_sampling,
    read_settings,
    without_effect,
)
from llama_jax.errors import CheckpointError
from llama_jax.sampling_params import SamplingParams


def sampling(**values: Any) -> SamplingParams:
    return default_sampling(read_settings(values, 100, "generation_config.json"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"do_sample": None}, {"temperature": 0.0}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.0, "top_p": 0.9}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 1e-30}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": None}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.6, "top_k": -1}, {"temperature": 0.6}),
        ({"do_sample": True, "top_k": 0}, {}),
        ({"do_sample": True, "top_k": 5, "top_p": None}, {"top_k": 5}),
        ({"do_sample": True, "top_p": 0.0}, {"temperature": 0.0}),
        ({"do_sample": True, "top_p": 1, "min_p": 0.0}, {}),
        ({"do_sample": True, "min_p": 0.05}, {"min_p": 0.05}),
        ({"repetition_penalty": 1.2}, {"temperature": 0.0, "repetition_penalty": 1.2}),
        ({"max_new_tokens": 7}, {"temperature": 0.0, "max_new_tokens": 7}),
        ({"min_new_tokens": 300}, {"temperature": 0.0, "min_new_tokens": 300,
                                   "max_new_tokens": 300}),
        ({"stop_strings": "END"}, {"temperature": 0.0, "stop": ("END",)}),
        ({"stop_strings": ["END", "."]}, {"temperature": 0.0, "stop": ("END", ".")}),
        ({"suppress_tokens": [3]}, {"temperature": 0.0, "logit_bias": {3: -math.inf}}),
        ({"suppress_tokens": []}, {"temperature": 0.0}),
    ],
)  # fmt: skip
def test_values_are_read_for_what_they_say(values: Any, expected: Any) -> None:
    assert sampling(**values) == SamplingParams(**expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_sample", "false"), ("do_sample", 0), ("temperature", -0.1), ("temperature", "0.6"),
        ("temperature", math.nan), ("temperature", math.inf), ("temperature", True),
        ("temperature", [0.6]), ("top_k", 2.7), ("top_k", -2), ("top_k", "50"), ("top_k", 10**21),
        ("top_p", 1.5), ("top_p", -0.1), ("min_p", 2), ("repetition_penalty", 0),
        ("repetition_penalty", math.inf), ("max_new_tokens", 0), ("max_new_tokens", 2.5),
        ("min_new_tokens", -1), ("eos_token_id", "50"), ("eos_token_id", -1),
        ("eos_token_id", 100), ("eos_token_id", [1, "2"]), ("eos_token_id", [1, 3_000_000_000]),
        ("eos_token_id", True), ("eos_token_id", 2.0), ("eos_token_id", {}), ("stop_strings", 5),
        ("stop_strings", [""]), ("stop_strings", ""), ("suppress_tokens", [-1]),
        ("suppress_tokens", [100]), ("suppress_tokens", 5),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=rf"^generation_config\.json: {key}.* is ") as error:
        sampling(**{"max_new_tokens": 9, key: value})
    assert "expected" in str(error.value) or "outside of the vocabulary" in str(error.value)


def test_bounds_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"min_new_tokens is 9, expected at most.* 8"):
        sampling(min_new_tokens=9, max_new_tokens=8)


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ({"num_beams": 4}, ["num_beams"]),
        ({"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "guidance_scale": 1.0}, []),
        ({"no_repeat_ngram_size": 3}, ["no_repeat_ngram_size"]),
        ({"num_beams": True}, ["num_beams"]),
        ({"token_healing": False, "constraints": None, "bad_words_ids": []}, []),
        ({"max_length": 4096}, []),
        ({"max_length": 20}, ["max_length"]),
        ({"use_cache": False, "early_stopping": True}, []),
        ({"chat_format": "chatml"}, ["chat_format"]),
        ({"temperature": 0.6, "top_p": 0.9}, ["temperature", "top_p"]),
        ({"do_sample": False, "temperature": 0.6}, []),
        ({"do_sample": True, "temperature": 0.6}, []),
    ],
)
def test_what_is_not_honoured_is_named(values: Any, fields: list[str]) -> None:
    assert without_effect(values, 4096) == fields


def test_a_field_has_one_verdict() -> None:
    places = [
        *Settings.__struct_fields__, *NOT_HONOURED, *(k for keys in HARMLESS.values() for k in keys)
    ]  # fmt: skip
    assert len(places) == len(set(places)) == len(FIELDS)


@pytest.mark.parity
def test_every_field_of_transformers_has_a_verdict() -> None:
    transformers = pytest.importorskip("transformers")
    defined = {key for key in vars(transformers.GenerationConfig()) if key != "_from_model_config"}
    assert defined <= FIELDS, sorted(defined - FIELDS)
