"""The model that ships, through `LLM`: right answers, tool calls, and what FP8 costs it."""

import jax.numpy as jnp
import pytest

from llama_jax import LLM
from llama_jax.abacus import SHIPPED_MODEL, evaluate
from llama_jax.abacus.tasks import CALCULATOR
from llama_jax.engine import memory
from llama_jax.engine.memory import plan_memory
from llama_jax.model.kv_cache import PAGE_SIZE


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(max_batch_size=4, max_seq_len=512, prefill_chunk=128, verbose=False)


def ask(llm: LLM, question: str) -> str:
    return llm.chat([{"role": "user", "content": question}]).text


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is 47 + 85?", "132"),
        ("What is 9 * 7?", "63"),
        ("What day comes after Monday?", "Tuesday"),
        ("Is 2024 a leap year?", "Yes"),
    ],
)
def test_right_answers(llm: LLM, question: str, answer: str) -> None:
    assert ask(llm, question) == answer


def test_the_calculator_is_called_and_its_result_is_told(llm: LLM) -> None:
    messages: list[dict] = [{"role": "user", "content": "What is 4831 * 297?"}]
    (call,) = llm.chat(messages, tools=[CALCULATOR]).tool_calls
    assert (call.name, call.arguments) == ("calculator", {"expression": "4831 * 297"})
    messages += [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": str(4831 * 297)},
    ]
    assert llm.chat(messages, tools=[CALCULATOR]).text == "1434807"


def test_a_conversation_has_turns(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is 9 * 7?"}]
    messages.append({"role": "assistant", "content": llm.chat(messages).text})
    messages.append({"role": "user", "content": "What is 47 + 85?"})
    assert llm.chat(messages).text == "132"


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"draft": SHIPPED_MODEL}, {"num_speculative_tokens": 3}], ids=str)
def test_speculation_changes_no_reply(llm: LLM, how: dict) -> None:
    settings = {"max_batch_size": 4, "max_seq_len": 512, "prefill_chunk": 128, "verbose": False}
    speculating = LLM.load(**settings, **how)
    asked = [[{"role": "user", "content": f"What is {n} + 85?"}] for n in (47, 12, 33)]
    replies, expected = speculating.chat(asked), llm.chat(asked)
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in expected]
    stats = speculating.stats()
    # Draft tokens after the end of a short reply are not accepted.
    assert stats.drafted > 0 and (stats.acceptance_rate > 0.3 or "num_speculative_tokens" in how)


@pytest.mark.slow
def test_a_cache_that_does_not_fit_has_fewer_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"max_batch_size": 32, "max_seq_len": 2048}
    whole = LLM.load(**sizes, verbose=False)
    pool = whole.engine.options.pool_size
    assert pool == 32 * 2048 // PAGE_SIZE
    plan = plan_memory(whole.spec, 32, 2048, jnp.dtype(jnp.bfloat16), 512)
    monkeypatch.setattr(memory, "device_memory_bytes", lambda _: plan.total - plan.kv_cache // 2)
    llm = LLM.load(**sizes, verbose=False)
    assert 2048 // PAGE_SIZE <= llm.engine.options.pool_size < pool
    assert ask(llm, "What is 47 + 85?") == "132"


@pytest.mark.slow
def test_accuracy_and_what_fp8_costs() -> None:
    original, fp8, rounded = evaluate.evaluate_variants(questions_per_kind=40)
    assert original.accuracy >= 0.95
    assert fp8.accuracy >= 0.95
    assert fp8.accuracy >= original.accuracy - 0.01
    assert rounded.accuracy >= original.accuracy - 0.02
    assert fp8.perplexity < 1.02 * original.perplexity
