"""Measures the cost of structured output: tokens per second with and without it, and of masks.

    python benchmarks/structured_output.py --save benchmarks/results/structured_output

The shipped model gets several prompts at the same time, and all replies have the same length. "any
text" is the regular expression (?s:.*), which allows everything; "schema" is an array of objects,
whose keys are forced; in "one of all" a single reply is structured, by "any text"; "one step" is
without structure at one token per launch, as for streams. The model's vocabulary has 1,024 tokens;
masks of a larger one are timed separately.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import tables

from llama_jax import LLM, SamplingParams
from llama_jax.bench import environment
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
    """Return the tokens per second of all replies from their first token on. Stop tokens are
    barred, so that no reply ends before `count` tokens."""
    barred = dict.fromkeys(llm.tokenizer.eos_ids, -1000000000.0)
    params = [
        SamplingParams(
            temperature=0, max_new_tokens=count, logit_bias=barred, structured=each, seed=0
        )
        for each in structured
    ]
    prompts = [f"What is {17 * i} + {i}?" for i in range(len(params))]
    llm.generate(prompts, params)  # compile first
    began = time.perf_counter()
    results = llm.generate(prompts, params)
    elapsed = time.perf_counter() - began
    assert all(len(each.token_ids) == count for each in results)
    return len(params) * count / elapsed


def milliseconds_of_masks(tokenizer: Tokenizer, vocab_size: int, rows: int) -> float:
    """Return the median milliseconds of computing masks for the next token of so many replies, in
    threads, over 50 tokens."""
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


def to_markdown(command: str, found: Mapping[str, Any]) -> str:
    lines = [
        f"`{command}`", "",
        f"{os.cpu_count()} cores of {found['device']}, the shipped model; the best of "
        f"{found['repeats']}; load of the machine {found['load_of_the_machine']:.1f}.", "",
        "| rows | what | tokens/s | of those without |", "|---|---|---|---|",
    ]  # fmt: skip
    for rows, figures in found["tokens_per_second"].items():
        for name, figure in figures.items():
            lines.append(f"| {rows} | {name} | {figure:,.0f} | {figure / figures['none']:.0%} |")
    lines += ["", "| masks of so many replies | ms |", "|---|---|"]
    lines += [f"| {rows} | {time:.2f} |" for rows, time in found["masks_ms"].items()]
    lines += ["", f"Masks are of {found['vocab_size']:,} tokens."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=200, help="of each reply")
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many counts")
    parser.add_argument("--tokenizer", help="a directory or file, to time its masks")
    parser.add_argument("--save", type=Path, help="write PATH.md and PATH.json")
    options = parser.parse_args()
    figures: dict[int, dict[str, float]] = {}
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
        best = figures[rows] = dict.fromkeys(cases, 0.0)
        for _ in range(options.repeats):
            for name, (model, structured) in cases.items():
                best[name] = max(best[name], tokens_per_second(model, structured, options.tokens))
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else llm.tokenizer
    size = tokenizer.vocab_size
    result = {
        "tokens_per_second": figures,
        "masks_ms": {rows: milliseconds_of_masks(tokenizer, size, rows) for rows in (1, 16, 64)},
        "vocab_size": size,
        "repeats": options.repeats,
        "load_of_the_machine": os.getloadavg()[0],
        **asdict(environment()),
    }
    text = to_markdown(" ".join(["python", *sys.argv]), result)
    print(text)
    if options.save:
        tables.save(options.save, text, result)


if __name__ == "__main__":
    main()
