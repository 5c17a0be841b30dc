"""Compiles grammars and computes which tokens may follow, for `structured.StructuredOutput`.

llguidance compiles a schema, expression or grammar for a vocabulary, and computes after each token
a bit mask of those that may follow, for `sampling.sample`. It comes with the extra `serve` and is
imported on first use.
"""

import json
import os
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from queue import Empty, LifoQueue
from types import ModuleType
from typing import Any

import numpy as np

from llama_jax.engine import grammar_process
from llama_jax.engine.grammar_process import Vocabulary, in_large_stack, new_matcher
from llama_jax.structured import GrammarsBusyError, StructuredOutput, StructuredOutputError
from llama_jax.text.tokenizer import Tokenizer

# Time limits for compiling a grammar, and for computing the masks of a step. Real schemas hardly
# ever take a tenth of a second.
COMPILE_SECONDS = 5.0
MASKS_SECONDS = 2.0
# Processes that compile, and compiled grammars that are kept.
_NUM_PROCESSES = 2
_KEPT_GRAMMARS = 128


def num_words(vocab_size: int) -> int:
    """Return the number of 32-bit words in a mask with a bit per token, see `sampling.sample`."""
    return -(-vocab_size // 32)


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
    """The position of one reply in its grammar.

    expected: tokens that the grammar forces after the next one, if that is the forced one: good
        draft tokens.
    """

    def __init__(self, matcher: Any, num_words: int) -> None:
        self._matcher = matcher
        self._num_words = num_words
        self._taken = 0  # tokens of the reply so far
        self._lock = threading.Lock()
        self.expected: list[int] = []

    def copy(self) -> "Matcher":
        """Return an independent matcher at the same position."""
        copy = Matcher(self._matcher.deep_copy(), self._num_words)
        copy._taken = self._taken
        return copy

    def masks(self, token_ids: Sequence[int], drafts: Sequence[int] = ()) -> np.ndarray:
        """Compute which tokens may follow the reply, and which may follow each draft token.

        token_ids: the whole reply; it may only grow between calls.
        drafts: draft tokens after it.
        Returns masks for `sampling.sample`, uint32 [1 + drafts, words]. Nothing may follow a draft
        token that the grammar refuses or that ends the reply.
        """
        with self._lock:
            for token_id in token_ids[self._taken :]:
                self._take(token_id)
                self._taken += 1
            masks = np.zeros((1 + len(drafts), self._num_words), np.uint32)
            stood = 0
            self._fill(masks[0])
            for draft in drafts:
                may_follow = masks[stood, draft // 32] >> np.uint32(draft % 32) & 1
                if not may_follow or self._matcher.is_stopped():
                    break
                self._take(draft)
                stood += 1
                self._fill(masks[stood])
            self.expected = self._matcher.compute_ff_tokens()[1:]
            self._check()
            if stood:
                self._matcher.rollback(stood)
            return masks

    def _take(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            raise StructuredOutputError(
                f"structured: the grammar refuses the drawn token {token_id}, because logit_bias "
                "rules out all that it allows, or because it is too complex: "
                f"{self._matcher.get_error()[:200]}"
            )

    def _fill(self, mask: np.ndarray) -> None:
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise StructuredOutputError(f"structured: {self._matcher.get_error()[:500]}")


class Grammars:
    """Compiles grammars for one vocabulary, and keeps the most recent ones.

    vocab_size: of the model.
    end_ids: tokens that end a reply, allowed wherever the grammar is complete.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = sorted(each for each in end_ids if each < vocab_size)
        self._vocabulary: Any = None
        self._processes = LifoQueue[_Process | None]()
        for _ in range(_NUM_PROCESSES):
            self._processes.put(None)  # started on first use
        self._kept: OrderedDict[StructuredOutput, Matcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, structured: StructuredOutput) -> Matcher:
        """Return a matcher at the beginning of a reply. May be called from any thread.

        Raises `StructuredOutputError` for a grammar that cannot be compiled within
        `COMPILE_SECONDS`, `GrammarsBusyError` if others occupy the processes for so long, and
        ModuleNotFoundError without llguidance.
        """
        with self._lock:
            if self._vocabulary is None:
                self._read_vocabulary()
            if found := self._kept.get(structured):
                self._kept.move_to_end(structured)
                return found.copy()
        grammar = self._try_out(structured)
        compiled = in_large_stack(lambda: new_matcher(self._vocabulary, grammar))
        matcher = Matcher(compiled, num_words(self._vocab_size))
        with self._lock:
            self._kept[structured] = matcher
            while len(self._kept) > _KEPT_GRAMMARS:
                self._kept.popitem(last=False)
            return matcher.copy()

    def _try_out(self, structured: StructuredOutput) -> str:
        """Compile in a separate process, and return the grammar in llguidance's own format."""
        where = f"structured.{structured.kind}"
        try:
            process = self._processes.get(timeout=COMPILE_SECONDS)
        except Empty:
            message = f"{where}: other grammars take long to compile; try again"
            raise GrammarsBusyError(message) from None
        usable = None
        try:
            process = process or _Process(self._as_read)
            grammar, error = process.ask(structured.kind, structured.text)
            usable = process
        except TimeoutError:
            grammar, error = "", f"not compiled after {COMPILE_SECONDS:g} s; make it simpler"
        except ChildProcessError:
            grammar, error = "", "compiling it takes too much memory"
        finally:
            self._processes.put(usable)
        if error:
            raise StructuredOutputError(f"{where}: {error[:500]}")
        return grammar

    def _read_vocabulary(self) -> None:
        if not self._end_ids:
            raise StructuredOutputError(
                "structured: the model has no token that ends a reply (eos_token_id)"
            )
        llguidance, known = _llguidance(), self._tokenizer
        special = set(known.special_tokens.values()) - known.visible_ids
        self._as_read = Vocabulary(
            [known.token_bytes(i) for i in range(self._vocab_size)],
            sorted(each for each in special if each < self._vocab_size),
            self._end_ids,
            known.encode_continuation,
        )
        self._vocabulary = llguidance.LLTokenizer(self._as_read, eos_token=self._end_ids)


class _Process:
    """A running `grammar_process`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", grammar_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            start_new_session=True,  # so that Ctrl-C reaches this process alone
        )
        weakref.finalize(self, _end, self._process)
        tokens = [each.hex() for each in vocabulary.tokens]
        self._write([tokens, vocabulary.special_token_ids, vocabulary.ends])
        if not self._read():
            raise RuntimeError(f"{grammar_process.__file__} does not start")

    def ask(self, kind: str, text: str) -> tuple[str, str]:
        """Compile a grammar. Returns it in llguidance's own format, and an error message.

        Raises TimeoutError after `COMPILE_SECONDS`, and ChildProcessError if the process has
        crashed. It cannot be used after either.
        """
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            self._process.kill()

        timer = threading.Timer(COMPILE_SECONDS, end)
        timer.daemon = True
        timer.start()
        try:
            self._write([kind, text])
            answer = self._read()
        except OSError:
            answer = ""
        finally:
            timer.cancel()
        if not answer:
            raise TimeoutError if is_late.is_set() else ChildProcessError
        grammar, error = json.loads(answer)
        return grammar, error

    def _write(self, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    with suppress(OSError), process:  # closes its pipes, and waits
        pass


class MaskThreads:
    """Threads that compute the masks of several replies at the same time."""

    def __init__(self) -> None:
        self._size = min(16, os.cpu_count() or 1)
        self._pool: ThreadPoolExecutor | None = None

    def masks(
        self, calls: Sequence[tuple[Matcher, Sequence[int], Sequence[int]]]
    ) -> list[np.ndarray | Exception]:
        """Call `Matcher.masks` of each matcher with its tokens and draft tokens.

        Returns for each the masks or the exception, which after `MASKS_SECONDS` says so.
        """
        late = StructuredOutputError(
            f"structured: computing the allowed tokens took more than {MASKS_SECONDS:g} s"
        )
        results: list[np.ndarray | Exception] = [late] * len(calls)
        waiting = deque(enumerate(calls))

        def work() -> None:
            while waiting:
                with suppress(IndexError):  # another thread has taken the last one
                    i, (matcher, token_ids, drafts) = waiting.popleft()
                    try:
                        results[i] = matcher.masks(token_ids, drafts)
                    except Exception as error:
                        results[i] = error

        # One task per thread: submitting a task takes longer than computing a mask.
        pool = self._pool = self._pool or ThreadPoolExecutor(self._size, "masks")
        tasks = [pool.submit(work) for _ in range(min(self._size, len(calls)))]
        if wait(tasks, timeout=MASKS_SECONDS).not_done:
            pool.shutdown(wait=False)  # its threads may be busy for long
            self._pool = None
            work()
        return list(results)
