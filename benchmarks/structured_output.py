"""What structured output costs: tokens per second with and without, and what the host does for it.

    python benchmarks/structured_output.py

The shipped model, so many prompts at the same time, all replies of one length. "any text" is the
regular expression (?s:.*), which allows what is drawn anyway; "schema" an array of objects, whose
names are forced; "one of all" that one reply alone is structured, by "any text". "one step" is
without, at one token per launch, as where anybody streams. The model's vocabulary has 1,024 tokens;
masks of a larger one are timed by themselves.
"""

import argparse
import time
from collections.abc import Sequence

import numpy as np

from llama_jax import LLM, SamplingParams
from llama_jax.engine.grammars import Grammars, MaskThreads, Matcher
from llama_jax.structured import StructuredOutput
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer

ANY_TEXT = StructuredOutput(regex="(?s:.*)")
SCHEMA = StructuredOutput(
    json_schema={
        "type": "array",
        "minItems": 100,
        "items": {
            "type": "object",
            "properties": {
                "first_number": {"type": "integer", "minimum": 0, "maximum": 999},
                "second_number": {"type": "integer", "minimum": 0, "maximum": 999},
                "is_larger": {"type": "boolean"},
            },
            "required": ["first_number", "second_number", "is_larger"],
            "additionalProperties": False,
        },
    }
)


def tokens_per_second(llm: LLM, structured: Sequence[StructuredOutput | None], count: int) -> float:
    """All rows from their first token on. No reply ends before it has `count` tokens: what would
    end it is barred."""
    barred = dict.fromkeys(llm.tokenizer.eos_ids, -1000000000.0)
    params = [
        SamplingParams(
            temperature=0, max_new_tokens=count, logit_bias=barred, structured=each, seed=0
        )
        for each in structured
    ]
    prompts = [f"What is {17 * i} + {i}?" for i in range(len(params))]
    llm.generate(prompts, params)  # compiles
    began = time.perf_counter()
    results = llm.generate(prompts, params)
    elapsed = time.perf_counter() - began
    assert all(len(each.token_ids) == count for each in results)
    return len(params) * count / elapsed


def milliseconds_of_masks(tokenizer: Tokenizer, vocab_size: int, rows: int) -> float:
    """For the next token of so many replies, in threads; the median of 50 tokens."""
    grammars = Grammars(tokenizer, vocab_size, tokenizer.eos_ids)
    matchers: list[Matcher] = [grammars.matcher(SCHEMA) for _ in range(rows)]
    threads, ids = MaskThreads(), list[int]()
    times = []
    for _ in range(50):
        began = time.perf_counter()
        masks = threads.masks([(matcher, ids, ()) for matcher in matchers])
        times.append(time.perf_counter() - began)
        assert isinstance(masks[0], np.ndarray)
        bits = np.unpackbits(masks[0][0].view(np.uint8), bitorder="little")
        ids.append(int(np.flatnonzero(bits)[0]))
    return 1000 * float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=200, help="of each reply")
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many counts")
    parser.add_argument("--tokenizer", help="a directory or file, to time its masks")
    options = parser.parse_args()
    for rows in (8, 16):
        llm = LLM.load(max_batch_size=rows, max_seq_len=512, verbose=False)
        stepping = LLM.load(max_batch_size=rows, max_seq_len=512, max_steps=1, verbose=False)
        cases = {
            "none": (llm, [None] * rows),
            "one step": (stepping, [None] * rows),
            "any text": (llm, [ANY_TEXT] * rows),
            "schema": (llm, [SCHEMA] * rows),
            "one of all": (llm, [ANY_TEXT, *[None] * (rows - 1)]),
        }
        best = dict.fromkeys(cases, 0.0)
        for _ in range(options.repeats):
            for name, (model, structured) in cases.items():
                best[name] = max(best[name], tokens_per_second(model, structured, options.tokens))
        for name, figure in best.items():
            print(f"{rows} rows, {name:10}: {figure:8,.0f} tokens/s, {figure / best['none']:.0%}")
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else llm.tokenizer
    for rows in (1, 16, 64):
        found = milliseconds_of_masks(tokenizer, tokenizer.vocab_size, rows)
        print(f"masks of {rows} replies, {tokenizer.vocab_size:,} tokens: {found:.2f} ms")


if __name__ == "__main__":
    main()
