"""A round's host work before a launch does not grow with the rows: counted in the interpreter's
instructions."""

import sys
from collections import Counter
from types import CodeType

import numpy as np

from llama_jax.engine.engine import Engine
from llama_jax.engine.request import Request
from llama_jax.engine.slots import RunningSequence, Slots
from tests.test_engine import greedy, make, prompt, sampled

# What hands tokens over, for each row that has got any.
HANDS_OVER = {"take_draws", "_extend", "alone", "tell", "step"}
FILES = tuple(
    f"engine/{name}.py"
    for name in ("engine", "scheduler", "slots", "plan", "batches", "outputs", "token_masks")
)


def instructions_of_a_round(engine: Engine) -> Counter[str]:
    """Of each function that has a part in a round of decoding."""
    counts: Counter[str] = Counter()
    monitoring = sys.monitoring
    tool = monitoring.PROFILER_ID

    def count(code: CodeType, _: int) -> object:
        if not code.co_filename.endswith(FILES):
            return monitoring.DISABLE
        counts[code.co_name] += 1
        return None

    monitoring.use_tool_id(tool, "instructions")
    try:
        monitoring.register_callback(tool, monitoring.events.INSTRUCTION, count)
        monitoring.set_events(tool, monitoring.events.INSTRUCTION)
        engine.step()
    finally:
        monitoring.set_events(tool, 0)
        monitoring.free_tool_id(tool)
    return counts


def decoding(batch_size: int) -> Engine:
    """An engine in the middle of decoding a full batch, no row of which needs a page next."""
    engine = make(max_batch_size=batch_size, max_steps=1)
    for i in range(batch_size):
        engine.submit(Request(prompt(5 + i % 3, seed=i), greedy(40) if i % 2 else sampled(i, 40)))
    while engine.num_waiting or any(
        len(row.request.token_ids) < 3 for row in engine._scheduler.running
    ):
        engine.step()
    assert engine.num_running == batch_size
    return engine


def test_the_work_before_a_launch_is_the_same_for_any_number_of_rows() -> None:
    few, many = (instructions_of_a_round(decoding(size)) for size in (3, 32))
    assert few["_decode"] > 50 and few["launch"] > 5  # it is counted
    grown = {name for name in many if many[name] > few[name]}
    assert grown <= HANDS_OVER
    more = sum(many.values()) - sum(few.values())
    assert more < 29 * 300  # for each row, 29 more than before


def test_rows_come_and_go() -> None:
    rows = Slots(3, 2, no_page=9)
    first = rows.enter(Request(prompt(70), greedy(10)), prompt(70), [4, 5], 10, 0)
    second = rows.enter(
        Request([1, 2], sampled(1, 5, logprobs=1), is_streamed=True), [1, 2], [6], 5, 0
    )
    assert rows.running == rows.prefilling == [first, second] and rows.num_streamed == 1
    np.testing.assert_array_equal(rows.page_table, [[4, 5], [6, 9], [9, 9]])
    assert not rows.min_remaining.any()
    for row in (first, second):
        rows.prefill(row, row.remaining)
        rows.begin(row)
    assert not rows.prefilling and rows.min_remaining.tolist() == [9, 4, 0]
    counts = np.minimum(rows.min_remaining, 8)
    assert rows.num_missing_pages(counts).tolist() == [0, 0, 0]  # 78 tokens in two pages, 6 in one
    assert rows.num_missing_pages(np.array([9, 63, 0])).tolist() == [0, 1, 0]
    assert rows.needs(counts) == ("everything", True)
    assert rows.needs(counts * [1, 0, 0]) == ("greedy", False)
    drawing = rows.launch(counts)
    assert rows.min_remaining.tolist() == [1, 0, 0]
    rows.leave(second)
    third = rows.enter(Request([3], greedy(2)), [3], [7], 2, 0)
    assert third.slot == second.slot and rows.num_streamed == 0
    rows.settle(drawing, np.array([5, 1, 0], np.int32))  # the second has left, the first drew five
    assert rows.min_remaining.tolist() == [4, 0, 0]
    assert drawing.sequences == [first, second, None] and isinstance(
        drawing.sequences[0], RunningSequence
    )
