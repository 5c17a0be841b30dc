"""Evaluates Abacus on held-out questions, with bfloat16 and with FP8 weights.

    python -m llama_jax.abacus.evaluate [--json] [--questions N]

Every question is answered by greedy decoding through `llama_jax.LLM`, each in its own chat, and
counts only if the reply is exactly the right answer. Perplexity is exp of the mean negative
log-likelihood per token of the right answers, end of turn included, in the same chats.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from llama_jax import LLM
from llama_jax.abacus.data import HeldOutChat, held_out_chats
from llama_jax.model.spec import Activations
from llama_jax.sampling_params import SamplingParams
from llama_jax.text.chat import encode_chat

PACKAGE = Path(__file__).parent
EVALUATION_SEED = 2


@dataclass(frozen=True)
class Variant:
    """A checkpoint and the format of its activations (see `LLM.load`)."""

    name: str
    checkpoint: Path
    activations: Activations


VARIANTS = (
    Variant("bf16 weights", PACKAGE / "checkpoint_bf16", "bf16"),
    Variant("FP8 weights", PACKAGE / "checkpoint", "bf16"),
    Variant("FP8 weights, FP8 activations", PACKAGE / "checkpoint", "static"),
)


@dataclass(frozen=True)
class Report:
    """Shares of exactly right answers, 0 to 1, by kind and over all questions; perplexity per
    token of the right answers; and the misses as (kind, last message, right answer, reply)."""

    variant: str
    questions: int
    accuracy: float
    perplexity: float
    by_kind: dict[str, float]
    misses: tuple[tuple[str, str, str, str], ...]


def evaluate(llm: LLM, name: str, chats: Sequence[HeldOutChat]) -> Report:
    """Answer and score ``chats`` with a loaded model."""
    prompts = [
        encode_chat(llm.tokenizer, chat.messages, tools=chat.tools, date_string=chat.date)
        for chat in chats
    ]
    replies = llm.generate(prompts, SamplingParams(temperature=0.0, max_new_tokens=64))
    end = llm.tokenizer.special_tokens["<|eot_id|>"]
    answers = [[*llm.tokenizer.encode(chat.answer), end] for chat in chats]
    scores = llm.score(prompts, answers)

    verdicts: defaultdict[str, list[bool]] = defaultdict(list)
    misses = []
    for chat, reply in zip(chats, replies, strict=True):
        right = reply.text == chat.answer and reply.finish_reason == "stop"
        verdicts[chat.kind].append(right)
        if not right:
            misses.append((chat.kind, str(chat.messages[-1]["content"]), chat.answer, reply.text))
    return Report(
        variant=name,
        questions=len(chats),
        accuracy=float(np.mean([right for kind in verdicts.values() for right in kind])),
        perplexity=float(np.exp(-sum(score.total for score in scores) / sum(map(len, answers)))),
        by_kind={kind: float(np.mean(rights)) for kind, rights in verdicts.items()},
        misses=tuple(misses),
    )


def evaluate_variants(questions_per_kind: int) -> list[Report]:
    """Return a report for each of `VARIANTS` on the same held-out questions."""
    chats = held_out_chats(EVALUATION_SEED, questions_per_kind)
    reports = []
    for variant in VARIANTS:
        llm = LLM.load(
            variant.checkpoint,
            activations=variant.activations,
            max_seq_len=512,
            max_batch_size=32,
            verbose=False,
        )
        reports.append(evaluate(llm, variant.name, chats))
    return reports


def table(reports: Sequence[Report]) -> str:
    """Format the reports side by side as text."""
    rows = [
        ["", *(report.variant for report in reports)],
        *(
            [kind, *(f"{100 * report.by_kind[kind]:.1f} %" for report in reports)]
            for kind in reports[0].by_kind
        ),
        ["all questions", *(f"{100 * report.accuracy:.2f} %" for report in reports)],
        ["perplexity", *(f"{report.perplexity:.4f}" for report in reports)],
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m llama_jax.abacus.evaluate",
        description="Accuracy and perplexity of the shipped model, bfloat16 and FP8 weights.",
    )
    parser.add_argument(
        "--questions", type=int, default=40, help="held-out questions per kind (40)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the reports as JSON, with the misses"
    )
    options = parser.parse_args(arguments)
    reports = evaluate_variants(options.questions)
    if options.json:
        print(json.dumps([asdict(report) for report in reports], indent=2))
    else:
        print(f"{reports[0].questions} held-out questions, exact match in greedy decoding\n")
        print(table(reports))


if __name__ == "__main__":
    main()
