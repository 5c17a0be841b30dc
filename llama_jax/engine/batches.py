"""Turns a plan into calls of the compiled programs, with arguments of a few fixed shapes.

The arguments are numpy arrays, or outputs of other programs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import batched, groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llama_jax.engine.draw_kinds import KINDS, Kind
from llama_jax.engine.plan import Admission, PrefillCall
from llama_jax.engine.request import OutputKind, Request
from llama_jax.engine.sampling import SamplingState, host_rows, is_plain
from llama_jax.engine.scheduling import EngineOptions
from llama_jax.engine.slots import RunningSequence
from llama_jax.engine.speculation import NO_SPECULATION, Speculation
from llama_jax.engine.steps import (
    admit,
    decode_steps,
    draft_step,
    draw_fed_step,
    draw_step,
    feed_step,
    logits_step,
    prefill_step,
    score_step,
)
from llama_jax.model.config import PAGE_SIZE
from llama_jax.model.sharding import default_sharding, replicated_on
from llama_jax.model.spec import ModelSpec, Params
from llama_jax.sampling_params import SamplingParams

# Requests admitted by one call, unless their settings need arrays over the vocabulary.
_ADMITTED_PER_CALL = 32


@dataclass(frozen=True, eq=False)
class Call:
    """A compiled program of `steps` and its arguments after the parameters and the state, if it
    takes one."""

    program: Any
    args: tuple[Any, ...]
    static: dict[str, Any]


@dataclass(frozen=True, eq=False)
class BatchBuilder:
    """Builds the calls of an engine.

    draft_params: of the draft model, if there is one.
    stops_early: as in `decode_steps`.
    """

    spec: ModelSpec
    options: EngineOptions
    speculation: Speculation
    draft_params: Params | None
    stops_early: bool

    @property
    def vocab_size(self) -> int:
        return self.spec.config.vocab_size

    # Admission.

    def settings(self, request: Request) -> SamplingState:
        """Return the sampler's state of a request, as a batch of one. Raises ValueError for token
        ids outside the vocabulary."""
        return host_rows(
            [request.params], [request.prompt], [request.stop_ids], self.vocab_size,
            [request.token_ids], [request.eos_ids],
            plain=is_plain(request.params, request.stop_ids, request.eos_ids),
        )  # fmt: skip

    def no_settings(self, plain: bool = True) -> SamplingState:
        """Return settings for padding."""
        return host_rows([SamplingParams(seed=0)], [()], [()], self.vocab_size, plain=plain)

    def admissions(self, admitted: Sequence[tuple[Admission, SamplingState]]) -> Iterator[Call]:
        """Yield calls that admit sequences with these settings, in order."""
        for plain, group in groupby(admitted, lambda each: not each[1].counts.size):
            for part in batched(group, self._admitted_per_call(plain)):
                yield self.admission(part, plain)

    def admission(self, admitted: Sequence[tuple[Admission, SamplingState]], plain: bool) -> Call:
        """Build one call of `admit`. plain: see `sampling.is_plain`."""
        size, options = self._admitted_per_call(plain), self.options
        padding = size - len(admitted)
        settings = [each for _, each in admitted]
        settings += [self.no_settings(plain)] * padding if padding else []
        uses_history = self.speculation.uses_history
        capacity = options.pages_per_slot * PAGE_SIZE if uses_history else 0
        history = np.zeros((size, capacity), np.int32)
        for i, (admission, _) in enumerate(admitted if uses_history else ()):
            tokens = admission.sequence.request.all_tokens
            history[i, : len(tokens)] = tokens
        nothing = (0, options.pool_size)
        copies = [admission.page_copy or nothing for admission, _ in admitted]
        sources, targets = zip(*copies, *[nothing] * padding, strict=True)
        slots = [admission.sequence.slot for admission, _ in admitted]
        cached_lens = [admission.num_cached for admission, _ in admitted]
        args = (
            _int32(slots + [options.max_batch_size] * padding),
            _int32(cached_lens + [0] * padding),
            jax.tree.map(lambda *parts: np.concatenate(parts), *settings),
            _int32(sources),
            _int32(targets),
            history,
        )
        return Call(admit, args, {})

    def _admitted_per_call(self, plain: bool) -> int:
        return min(_ADMITTED_PER_CALL, self.options.max_batch_size) if plain else 1

    # Prefill.

    def prefill(self, call: PrefillCall, page_table: np.ndarray) -> Call:
        """Build a call of the prefill program."""
        size, width = call.shape
        tokens = np.zeros((size, width), np.int32)
        num_new_tokens = np.zeros(size, np.int32)
        slots = np.full(size, self.options.max_batch_size, np.int32)
        for i, chunk in enumerate(call.chunks):
            sequence, count = chunk.sequence, chunk.stop - chunk.start
            tokens[i, :count] = sequence.tokens[chunk.start : chunk.stop]
            num_new_tokens[i], slots[i] = count, sequence.slot
        args = (page_table, tokens, num_new_tokens, slots)
        drafts = self.takes_drafts(call.output_kind)
        static = {
            "spec": self.spec,
            "speculation": self.speculation if drafts else NO_SPECULATION,
        }
        return Call(prefill_step, (*args, self.draft_params if drafts else None), static)

    def takes_drafts(self, output_kind: OutputKind) -> bool:
        """Return whether prompts for this kind of output go through the draft model, too."""
        return self.draft_params is not None and output_kind == "tokens"

    def after_prefill(self, call: PrefillCall, hidden: Array) -> Call:
        """Build the call, without a state, that computes the logprobs or the logits after tokens
        with these hidden states [prompts, tokens, d]."""
        static = {"spec": self.spec}
        if call.output_kind == "logits":
            return Call(logits_step, (hidden,), static)
        targets = np.zeros(call.shape, np.int32)
        for i, chunk in enumerate(call.chunks):
            after = chunk.sequence.request.prompt[chunk.start + 1 : chunk.stop + 1]
            targets[i, : len(after)] = after
        return Call(score_step, (hidden, targets, np.bool_(call.wants_logprobs)), static)

    def first_draws(
        self,
        hidden: Array,
        ended: Sequence[tuple[int, RunningSequence]],
        kind: Kind,
        masks: np.ndarray | None = None,
    ) -> Call:
        """Build the call that draws first tokens. ended: sequences and their rows in `hidden`."""
        slots = np.full(len(hidden), self.options.max_batch_size, np.int32)
        remaining = np.zeros(len(hidden), np.int32)
        for i, sequence in ended:
            slots[i] = sequence.slot
            remaining[i] = sequence.max_new_tokens - len(sequence.request.token_ids)
        static = {"spec": self.spec, "kind": kind}
        return Call(draw_step, (hidden, slots, remaining, masks), static)

    # Decode. Everywhere active: bool [batch], the slots that draw.

    def decode(self, page_table: np.ndarray, active: np.ndarray, steps: int, kind: Kind) -> Call:
        """Build a decode call of so many steps."""
        static = {
            "spec": self.spec,
            "max_steps": self.options.max_steps if self.stops_early else steps,
            "speculation": self.speculation,
            "kind": kind,
            "stops_early": self.stops_early,
        }
        args = (page_table, active, np.int32(steps), self.draft_params)
        return Call(decode_steps, args, static)

    def draft(
        self,
        page_table: np.ndarray,
        active: np.ndarray,
        forced: np.ndarray,
        num_forced: np.ndarray,
    ) -> Call:
        """Build the call that adds draft tokens after those that are given."""
        static = {"spec": self.spec, "speculation": self.speculation}
        args = (page_table, active, forced, num_forced, self.draft_params)
        return Call(draft_step, args, static)

    def feed(
        self,
        page_table: np.ndarray,
        active: np.ndarray,
        drafts: Array | np.ndarray,
        num_drafts: Array | np.ndarray,
    ) -> Call:
        """Build the call that feeds the newest tokens and the draft tokens after them."""
        args = (page_table, active, drafts, num_drafts)
        return Call(feed_step, args, {"spec": self.spec})

    def draw_fed(
        self,
        hidden: Array,
        active: np.ndarray,
        drafts: np.ndarray,
        num_drafts: np.ndarray,
        masks: np.ndarray,
    ) -> Call:
        """Build the call that draws, after `feed`, tokens that the masks allow."""
        args = (hidden, active, drafts, num_drafts, masks)
        return Call(draw_fed_step, args, {"spec": self.spec, "kind": KINDS[-1]})

    # Stand-ins for outputs of programs, for lowering others.

    def blank_hidden(self, *shape: int) -> Array:
        """Return hidden states of the shape that `prefill_step` or `feed_step` returns."""
        zeros = np.zeros((*shape, self.spec.config.hidden_size), jnp.dtype(self.spec.dtype))
        return self.on_device(zeros)

    def on_device(self, array: np.ndarray) -> Array:
        """Place an array where a program's outputs are."""
        whole = replicated_on(self.spec.mesh) if self.spec.mesh else default_sharding()
        return jax.device_put(array, whole)


def _int32(values: Sequence[int]) -> np.ndarray:
    return np.array(values, np.int32)
