"""Which tokens may be drawn next where a reply has to have a form (`structured.StructuredOutput`).

llguidance compiles a schema, expression or grammar for a vocabulary, and says after each token
which may follow, as bits for `sampling.sample`. It comes with the extra `serve` and is imported
when it is first needed.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import ModuleType
from typing import Any

import numpy as np

from llama_jax.sampling import num_words
from llama_jax.structured import StructuredOutput, StructuredOutputError
from llama_jax.tokenizer import Tokenizer

# How long it may take to compile a grammar, and to find what may follow a few tokens.
COMPILE_SECONDS = 10.0
MASKS_SECONDS = 2.0
# Compilers at the same time. One that takes longer goes on until llguidance's own limits end it.
_COMPILERS = threading.BoundedSemaphore(2)
# llguidance calls itself once per rule of a chain of rules, and the usual 8 MB are too few.
_STACK_BYTES = 512 * 1024 * 1024
_KEPT_GRAMMARS = 128
# White space as Python's json writes it, and as models do. Where any would do, hardly a token would
# be forced, and a small model might draw white space for ever.
_JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def _llguidance() -> ModuleType:
    try:
        import llguidance
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is missing, which structured output needs: pip install "
            '"llama-jax[serve]"',
            name=error.name,
        ) from error
    return llguidance


class Matcher:
    """How far one reply has come in its grammar.

    expected: tokens that the grammar forces after the next one that is drawn, if that is the one
    it has to be: good guesses.
    """

    def __init__(self, matcher: Any, num_words: int) -> None:
        self._matcher = matcher
        self._num_words = num_words
        self._taken = 0  # tokens of the reply
        self._lock = threading.Lock()
        self.expected: list[int] = []

    def copy(self) -> "Matcher":
        """Another one that has come as far."""
        copy = Matcher(self._matcher.deep_copy(), self._num_words)
        copy._taken = self._taken
        return copy

    def masks(self, token_ids: Sequence[int], guesses: Sequence[int] = ()) -> np.ndarray:
        """What may follow a reply so far, and what may follow it with one guess, two, ...: uint32
        [1 + guesses, words], as `sampling.sample` takes them. After a guess that the grammar
        refuses, or that ends the reply, nothing may follow.

        token_ids: all of the reply, at least those of the call before.
        """
        with self._lock:
            for token_id in token_ids[self._taken :]:
                self._take(token_id)
                self._taken += 1
            masks = np.zeros((1 + len(guesses), self._num_words), np.uint32)
            stood = 0
            self._fill(masks[0])
            for guess in guesses:
                may_follow = masks[stood, guess // 32] >> np.uint32(guess % 32) & 1
                if not may_follow or self._matcher.is_stopped():
                    break
                self._take(guess)
                stood += 1
                self._fill(masks[stood])
            self.expected = self._matcher.compute_ff_tokens()[1:]
            if stood:
                self._matcher.rollback(stood)
            return masks

    def _take(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            raise StructuredOutputError(
                f"structured: the grammar does not allow token {token_id}, which was drawn because "
                "the other settings (logit_bias) leave none that it allows: "
                f"{self._matcher.get_error()[:200]}"
            )

    def _fill(self, mask: np.ndarray) -> None:
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            raise StructuredOutputError(f"structured: {self._matcher.get_error()[:500]}")


class Grammars:
    """Compiles grammars for one vocabulary; those of late are kept.

    vocab_size: the model's; end_ids: tokens that end a reply, which may be drawn where the grammar
    lets it end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = sorted(each for each in end_ids if each < vocab_size)
        self._vocabulary: Any = None
        self._kept: OrderedDict[StructuredOutput, Matcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, structured: StructuredOutput) -> Matcher:
        """For a reply that has yet to begin.

        Raises `StructuredOutputError` for what cannot be compiled, or not within
        `COMPILE_SECONDS`; ModuleNotFoundError without llguidance.
        """
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary()
            if found := self._kept.get(structured):
                self._kept.move_to_end(structured)
                return found.copy()
        compiled = _in_time(f"structured.{structured.kind}", lambda: self._compile(structured))
        with self._lock:
            self._kept[structured] = compiled
            while len(self._kept) > _KEPT_GRAMMARS:
                self._kept.popitem(last=False)
            return compiled.copy()

    def _compile(self, structured: StructuredOutput) -> Matcher:
        llguidance = _llguidance()
        limits = llguidance.LLParserLimits(verbose_errors=False)
        grammar = _grammar(structured)
        compiled = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if compiled.is_error():
            raise StructuredOutputError(
                f"structured.{structured.kind}: {compiled.get_error()[:500]}"
            )
        matcher = Matcher(compiled, num_words(self._vocab_size))
        if not matcher.masks([]).any():
            raise StructuredOutputError(f"structured.{structured.kind}: no text fits it")
        return matcher

    def _read_vocabulary(self) -> Any:
        if not self._end_ids:
            raise StructuredOutputError(
                "structured: the model has no token that ends a reply (eos_token_id)"
            )
        read = _Vocabulary(self._tokenizer, self._vocab_size, self._end_ids[-1])
        return _llguidance().LLTokenizer(read, eos_token=self._end_ids)


class _Vocabulary:
    """A tokenizer as llguidance reads it."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_id: int) -> None:
        self.eos_token_id, self.bos_token_id = end_id, tokenizer.bos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        special = set(tokenizer.special_tokens.values()) - tokenizer.visible_ids
        self.special_token_ids = sorted(each for each in special if each < vocab_size)
        self._encode = tokenizer.encode_continuation

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _grammar(structured: StructuredOutput) -> str:
    """In llguidance's own form."""
    llguidance = _llguidance()
    matcher, text = llguidance.LLMatcher, structured.text
    match structured.kind:
        case "json_schema" | "json_object":
            return str(matcher.grammar_from_json_schema(text, _JSON_FORM))
        case "regex":
            return str(matcher.grammar_from_regex(text))
        case kind:
            return str(llguidance.grammar_from(kind, text))


def _in_time(where: str, compiled: Callable[[], Matcher]) -> Matcher:
    """What `compiled` returns, in a thread with a large stack; where: begins what is raised.

    Raises `StructuredOutputError` for what it raises, or after `COMPILE_SECONDS`.
    """
    future = Future[Matcher]()

    def run() -> None:
        try:
            future.set_result(compiled())
        except BaseException as error:
            future.set_exception(error)
        finally:
            _COMPILERS.release()

    if not _COMPILERS.acquire(timeout=COMPILE_SECONDS):
        raise StructuredOutputError(f"{where}: others take long to compile; try again later")
    try:
        before = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=run, name="grammar", daemon=True).start()
        finally:
            threading.stack_size(before)
    except BaseException:
        _COMPILERS.release()
        raise
    try:
        return future.result(COMPILE_SECONDS)
    except TimeoutError:
        raise StructuredOutputError(
            f"{where}: not compiled after {COMPILE_SECONDS:g} s; make it simpler"
        ) from None
    except Exception as error:
        raise StructuredOutputError(f"{where}: {error}") from error


class MaskThreads:
    """Threads in which masks of several replies are computed at the same time."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def masks(
        self, wanted: Sequence[tuple[Matcher, Sequence[int], Sequence[int]]]
    ) -> list[np.ndarray | BaseException]:
        """`Matcher.masks` of each matcher with its tokens and guesses, or what that raised; also
        where it takes longer than `MASKS_SECONDS`."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1), "masks")
        jobs = [
            self._pool.submit(matcher.masks, token_ids, guesses)
            for matcher, token_ids, guesses in wanted
        ]
        wait(jobs, timeout=MASKS_SECONDS)
        late = StructuredOutputError(
            f"structured: what may follow was not known after {MASKS_SECONDS:g} s"
        )
        return [(job.exception() or job.result()) if job.done() else late for job in jobs]
