"""Which prompts go through which calls, without a model, and options that make no sense."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_jax.engine.scheduling import (
    MAX_TOKENS_PER_CALL,
    OVERHEAD_OF_CALL,
    OVERHEAD_OF_CALL_ON_CPU,
    EngineOptions,
    Stats,
    prefill_calls,
)
from llama_jax.model.kv_cache import PAGE_SIZE


@given(
    left=st.lists(st.integers(1, 3000), max_size=70),
    max_batch_size=st.integers(1, 300),
    prefill_chunk=st.sampled_from([1, 5, 512, 8192]),
    overhead=st.sampled_from([0, OVERHEAD_OF_CALL_ON_CPU, OVERHEAD_OF_CALL]),
    batch_invariant=st.booleans(),
)
def test_every_prompt_is_in_one_call_that_holds_it(
    left: list[int], max_batch_size: int, prefill_chunk: int, overhead: int, batch_invariant: bool
) -> None:
    options = EngineOptions(
        max_batch_size, prefill_chunk=prefill_chunk, batch_invariant=batch_invariant
    )
    calls = prefill_calls(left, options.call_shapes, overhead)
    assert sorted(i for members, _ in calls for i in members) == list(range(len(left)))
    for members, shape in calls:
        assert shape in options.call_shapes and len(members) <= shape[0]
        assert shape[0] * shape[1] <= max(MAX_TOKENS_PER_CALL, prefill_chunk)
        assert shape[0] == 1 or not batch_invariant


def test_few_programs_are_compiled() -> None:
    assert all(len(EngineOptions(size).call_shapes) <= 8 for size in range(1, 1025))


def cost_per_token(
    lengths: np.ndarray, max_batch_size: int, planned: int, overhead: int = 0
) -> float:
    """Tokens that calls compute for each prompt token, `max_batch_size` prompts at a time.

    planned: what a call costs besides its tokens, in the plan; overhead: in truth.
    """
    shapes, computed = EngineOptions(max_batch_size).call_shapes, 0
    for start in range(0, len(lengths), max_batch_size):
        left = lengths[start : start + max_batch_size].tolist()
        while left:
            for members, (prompts, tokens) in prefill_calls(left, shapes, planned):
                computed += prompts * tokens + overhead
                for i in members:
                    left[i] = max(0, left[i] - tokens)
            left = [count for count in left if count]
    return computed / int(lengths.sum())


@pytest.mark.parametrize("max_batch_size", [8, 64, 256])
def test_little_is_computed_for_nothing(max_batch_size: int) -> None:
    rng, count = np.random.default_rng(0), 4 * max_batch_size
    chats = np.clip(rng.lognormal(5.5, 1, count), 8, 4000).astype(int)
    cost = partial(cost_per_token, max_batch_size=max_batch_size)
    least = OVERHEAD_OF_CALL_ON_CPU
    assert cost(chats, planned=least) < 1.15  # padding to fours: 1.4
    assert cost(rng.integers(1, 513, count), planned=least) < 1.2
    assert cost(np.full(count, 128), planned=least) == 1
    assert cost(rng.integers(5, 40, count), planned=least) < 2  # 32 is the least


@pytest.mark.parametrize("max_batch_size", [8, 64, 256])
def test_few_calls_are_small_where_calls_are_dear(max_batch_size: int) -> None:
    rng, count = np.random.default_rng(0), 4 * max_batch_size
    chats = np.clip(rng.lognormal(5.5, 1, count), 8, 4000).astype(int)
    for lengths in (chats, rng.integers(1, 513, count), rng.integers(5, 140, count)):
        costs = [
            cost_per_token(lengths, max_batch_size, planned, OVERHEAD_OF_CALL)
            for planned in (OVERHEAD_OF_CALL, OVERHEAD_OF_CALL_ON_CPU)
        ]
        assert costs[0] <= costs[1]


@pytest.mark.parametrize(
    ("left", "on_cpu", "on_gpu"),
    [
        (511, (512,), (512,)),  # four calls of 128 would save one token of padding
        (33, (32, 32), (128,)),
        (130, (128, 32), (512,)),
        (600, (512, 128), (512, 128)),
        (1024, (512, 512), (512, 512)),
        (1, (32,), (32,)),
    ],
)
def test_a_prompt_is_divided_so_that_all_its_calls_cost_least(
    left: int, on_cpu: tuple[int, ...], on_gpu: tuple[int, ...]
) -> None:
    shapes = EngineOptions().call_shapes
    for overhead, expected in ((OVERHEAD_OF_CALL_ON_CPU, on_cpu), (OVERHEAD_OF_CALL, on_gpu)):
        remaining, taken = left, []
        while remaining > 0:
            ((_, (prompts, tokens)),) = prefill_calls([remaining], shapes, overhead)
            assert prompts == 1
            taken.append(tokens)
            remaining -= tokens
        assert tuple(taken) == expected


def test_what_happened_in_words_and_in_between() -> None:
    before = Stats(queried=100, drawn=10, rounds=2)
    after = Stats(queried=1100, hit=250, drawn=60, rounds=12, drafted=40, accepted=30, preempted=1)
    assert after.since(before) == Stats(
        queried=1000, hit=250, drawn=50, rounds=10, drafted=40, accepted=30, preempted=1
    )
    assert str(after.since(before)) == (
        "1,000 prompt tokens, 25% of them found in the cache · 50 tokens drawn in 10 rounds · "
        "75% of 40 draft tokens accepted · 1 preemption"
    )
    assert str(Stats()) == (
        "0 prompt tokens, 0% of them found in the cache · 0 tokens drawn in 0 rounds"
    )
    assert str(Stats(queried=1, drawn=1, rounds=1)) == (
        "1 prompt token, 0% of them found in the cache · 1 token drawn in 1 round"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size must be at least 1, got 0"),
        ({"prefill_budget": 0}, "prefill_budget must be at least 1, got 0"),
        ({"num_pages": 0}, "num_pages 0 cannot hold one sequence of max_seq_len 8192"),
        ({"max_seq_len": 256, "num_pages": 3}, f"4 pages of {PAGE_SIZE} tokens are needed"),
    ],
    ids=["no rows", "no budget", "no pages", "too few pages"],
)
def test_impossible_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineOptions(**options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_batch_size", 1.5), ("max_seq_len", "100"), ("num_pages", 200.0),
        ("prefill_budget", True), ("num_speculative_tokens", None), ("share_prefixes", "no"),
    ],
)  # fmt: skip
def test_options_of_a_wrong_type_are_named(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected"):
        EngineOptions(**{name: value})
