"""Which tokens may be drawn next where a reply has to have a form (`structured.StructuredOutput`).

llguidance compiles a schema, expression or grammar for a vocabulary, and says after each token
which may follow, as bits for `sampling.sample`. It comes with the extra `serve` and is imported
when it is first needed.
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

# How long a grammar may take to compile, and what may follow a few tokens to be found. Hardly any
# of real schemas' takes a tenth of a second.
COMPILE_SECONDS = 5.0
MASKS_SECONDS = 2.0
# How many are tried out at the same time, and how many compiled ones are kept.
_NUM_PROCESSES = 2
_KEPT_GRAMMARS = 128


def num_words(vocab_size: int) -> int:
    """Return how many words of 32 bits hold one for each token, as `sampling.sample` takes them."""
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
        """Return what may follow a reply so far, and what may follow it with one guess, two, ...:
        uint32 [1 + guesses, words], as `sampling.sample` takes them. After a guess that the grammar
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
            self._check()
            if stood:
                self._matcher.rollback(stood)
            return masks

    def _take(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            raise StructuredOutputError(
                f"structured: token {token_id} was drawn, which the grammar refuses: logit_bias "
                "leaves none that it allows, or it is too complex: "
                f"{self._matcher.get_error()[:200]}"
            )

    def _fill(self, mask: np.ndarray) -> None:
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._check()

    def _check(self) -> None:
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
        self._processes = LifoQueue[_Process | None]()
        for _ in range(_NUM_PROCESSES):
            self._processes.put(None)  # to be started
        self._kept: OrderedDict[StructuredOutput, Matcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, structured: StructuredOutput) -> Matcher:
        """For a reply that has yet to begin; from any thread.

        Raises `StructuredOutputError` for what cannot be compiled, or not within
        `COMPILE_SECONDS`; `GrammarsBusyError` where others take so long; ModuleNotFoundError
        without llguidance.
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
        """The grammar in llguidance's own form, from a process that has compiled it."""
        where = f"structured.{structured.kind}"
        try:
            process = self._processes.get(timeout=COMPILE_SECONDS)
        except Empty:
            raise GrammarsBusyError(f"{where}: others take long to compile; try again") from None
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
            start_new_session=True,  # an interrupt from the keyboard is for this process
        )
        weakref.finalize(self, _end, self._process)
        tokens = [each.hex() for each in vocabulary.tokens]
        self._write([tokens, vocabulary.special_token_ids, vocabulary.ends])
        if not self._read():
            raise RuntimeError(f"{grammar_process.__file__} does not start")

    def ask(self, kind: str, text: str) -> tuple[str, str]:
        """A grammar in llguidance's own form, and what is wrong with it, see `grammar_process`.

        Raises TimeoutError after `COMPILE_SECONDS`, and ChildProcessError if the process has
        crashed; it is of no further use then.
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
    with suppress(OSError), process:  # closes what leads to it, and waits
        pass


class MaskThreads:
    """Threads in which masks of several replies are computed at the same time."""

    def __init__(self) -> None:
        self._size = min(16, os.cpu_count() or 1)
        self._pool: ThreadPoolExecutor | None = None

    def masks(
        self, wanted: Sequence[tuple[Matcher, Sequence[int], Sequence[int]]]
    ) -> list[np.ndarray | Exception]:
        """`Matcher.masks` of each matcher with its tokens and guesses, or what that raised; also
        where it takes longer than `MASKS_SECONDS`."""
        late = StructuredOutputError(
            f"structured: what may follow was not known after {MASKS_SECONDS:g} s"
        )
        results: list[np.ndarray | Exception] = [late] * len(wanted)
        waiting = deque(enumerate(wanted))

        def work() -> None:
            while waiting:
                with suppress(IndexError):  # another thread has taken the last one
                    i, (matcher, token_ids, guesses) = waiting.popleft()
                    try:
                        results[i] = matcher.masks(token_ids, guesses)
                    except Exception as error:
                        results[i] = error

        # A job per thread: handing one over takes longer than computing a mask.
        pool = self._pool = self._pool or ThreadPoolExecutor(self._size, "masks")
        jobs = [pool.submit(work) for _ in range(min(self._size, len(wanted)))]
        if wait(jobs, timeout=MASKS_SECONDS).not_done:
            pool.shutdown(wait=False)  # its threads may be busy for long
            self._pool = None
            work()
        return list(results)
