"""Compiles grammars in a process of its own, which can be killed if one takes too long or crashes.

llguidance bounds most costs of a hostile grammar, but not all, and a thread in Rust cannot be
stopped. So each grammar is first compiled here. `python -P grammar_process.py` reads lines of JSON
and replies to each with a line. The first is the vocabulary, [[token in hex, ...], special ids, end
ids], and the reply is "ready". The others are [kind, text] of `structured.StructuredOutput`, and
the reply is [grammar, error]: the grammar in llguidance's own format, or an error message.

This file imports nothing of this project.
"""

import json
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

# llguidance recurses once per rule in a chain of rules, for which the usual 8 MB are too little.
STACK_BYTES = 512 * 1024 * 1024
_MEMORY_BYTES = 4 * 1024**3


class Vocabulary:
    """A tokenizer as llguidance expects it. encode: text to ids, without special tokens."""

    is_tokenizer_wrapper = True

    def __init__(
        self,
        tokens: Sequence[bytes],
        special: Sequence[int],
        ends: Sequence[int],
        encode: Callable[[str], list[int]],
    ) -> None:
        self.tokens, self.special_token_ids, self.ends = tokens, special, ends
        self.bos_token_id, self.eos_token_id = None, ends[-1]
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def new_matcher(vocabulary: Any, grammar: str) -> Any:
    """Make an `LLMatcher`. Raises ValueError for a grammar that cannot be compiled.

    vocabulary: an `LLTokenizer`. grammar: in llguidance's own format.
    """
    import llguidance

    limits = llguidance.LLParserLimits(verbose_errors=False)
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher


def in_large_stack[T](function: Callable[[], T]) -> T:
    """Call `function` in a thread with room for deep recursion; return or raise what it does."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    before = threading.stack_size(STACK_BYTES)
    try:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _own_format(kind: Any, text: str) -> str:
    """Return a grammar in llguidance's own format."""
    import llguidance

    if kind == "choice":  # in one terminal: rules have at most 2,000 alternatives
        texts = " | ".join(json.dumps(each, ensure_ascii=False) for each in json.loads(text))
        kind, text = "grammar", f"start: CHOICE\nCHOICE: {texts}"
    return str(llguidance.grammar_from("json_schema" if kind == "json_object" else kind, text))


def _answer(vocabulary: Any, kind: str, text: str) -> tuple[str, str]:
    try:
        grammar = _own_format(kind, text)
        matcher = new_matcher(vocabulary, grammar)
        is_any = any(matcher.compute_bitmask())
        matcher.compute_ff_tokens()
        if matcher.is_error():
            return "", matcher.get_error()
        return (grammar, "") if is_any else ("", "no text fits it")
    except Exception as error:
        return "", str(error) or type(error).__name__


def _read_vocabulary(line: str) -> Any:
    import llguidance

    tokens, special, ends = json.loads(line)
    pieces = [bytes.fromhex(each) for each in tokens]
    ids = {piece: i for i, piece in enumerate(pieces)}

    def encode(text: str) -> list[int]:
        """Encode bytes one by one, which is enough to learn a grammar's cost."""
        return [ids[byte] for each in text.encode() if (byte := bytes([each])) in ids]

    read: Any = Vocabulary(pieces, special, ends, encode)
    return llguidance.LLTokenizer(read, eos_token=ends)


def _main() -> None:
    with suppress(ImportError, ValueError, OSError):  # not every system has these limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    vocabulary = _read_vocabulary(sys.stdin.readline())
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(vocabulary, *json.loads(line))), flush=True)


if __name__ == "__main__":
    in_large_stack(_main)
