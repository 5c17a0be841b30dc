"""Defines `LLM`, a loaded model with its tokenizer: text in, text and numbers out."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload

import numpy as np
from jax import Array
from jax.sharding import Mesh

from llama_jax import jobs, loading
from llama_jax.abacus import SHIPPED_MODEL
from llama_jax.checkpoint import store
from llama_jax.checkpoint.generation_config import (
    default_sampling,
    read_settings,
    warn_of_fields_without_effect,
)
from llama_jax.engine import compile_cache
from llama_jax.engine.compile_cache import CompileReport
from llama_jax.engine.engine import Engine
from llama_jax.engine.grammars import Grammars
from llama_jax.engine.request import OutputKind, Request
from llama_jax.engine.sampling import check_ids
from llama_jax.engine.scheduling import EngineOptions, Stats
from llama_jax.jobs import Job
from llama_jax.loading import sequence_limit
from llama_jax.model.config import token_ids
from llama_jax.model.kv_cache import KVDtype, storage_dtype
from llama_jax.model.spec import Activations, Implementation, ModelSpec, Params
from llama_jax.prompts import (
    Prompt,
    check_prompt,
    encode_pair,
    encode_prompt,
    is_prompt,
    listed,
    with_sampling,
)  # fmt: skip
from llama_jax.results import Generation, Perplexity, Piece, Ranking, Score, generation_of
from llama_jax.sampling_params import SamplingParams, check_kind
from llama_jax.structured import StructuredOutput
from llama_jax.text.chat import choose_template, encode_chat
from llama_jax.text.tokenizer import StreamDecoder, Tokenizer
from llama_jax.text.tool_choice import ToolChoice, Tools, calling
from llama_jax.text.tools import ToolFormat, parse_tool_calls, tool_format
from llama_jax.text.windows import window_and_stride

DEFAULT_SPECULATIVE_TOKENS = 4
_log = logging.getLogger(__name__)

Message = Mapping[str, Any]


class LLM:
    """A Llama model on its device, ready to generate and to score.

    `LLM.load` makes one:

    >>> from llama_jax import LLM
    >>> llm = LLM.load(verbose=False)  # the small model that ships with the project
    >>> llm.chat([{"role": "user", "content": "What is 47 + 85?"}]).text
    '132'
    """

    def __init__(
        self,
        params: Params,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        *,
        manifest: store.Manifest,
        kv_dtype: KVDtype,
        options: EngineOptions,
        draft: tuple[Params, ModelSpec] | None = None,
    ) -> None:
        self.spec = spec
        self.tokenizer = tokenizer
        self.manifest = manifest
        if kv_dtype == "fp8" and manifest.kv_scales is None:
            _log.warning(
                "%s has no scales for an FP8 cache: keys and values are stored as they are, with "
                "scale 1.0. `llama-jax convert --calibrate` finds scales.", manifest.source,
            )  # fmt: skip
        self.max_seq_len = options.max_seq_len
        config, generation = spec.config, manifest.generation
        settings = read_settings(generation, config.vocab_size, "generation_config.json")
        warn_of_fields_without_effect(generation, config.max_position_embeddings)
        self.default_sampling = default_sampling(settings)
        eos = token_ids(settings.eos_token_id) or config.eos_token_ids
        # As in vLLM: generation_config's ids and the tokenizer's own.
        own = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        self._stop_ids = frozenset({*(eos or tokenizer.eos_ids), *own})
        self._grammars = Grammars(tokenizer, config.vocab_size, sorted(self._stop_ids))
        self.engine = Engine(
            params,
            spec,
            options,
            storage_dtype(kv_dtype, spec.dtype),
            manifest.kv_scales,
            draft,
        )

    @classmethod
    def load(
        cls,
        path_or_id: str | Path = SHIPPED_MODEL,
        *,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        activations: Activations = "auto",
        implementation: Implementation | None = None,
        kv_dtype: KVDtype = "bf16",
        max_seq_len: int | None = None,
        max_batch_size: int = 8,
        draft: str | Path | None = None,
        mesh: Mesh | None = None,
        verbose: bool = True,
        prefill_chunk: int = EngineOptions.prefill_chunk,
        prefill_budget: int = EngineOptions.prefill_budget,
        num_pages: int | None = None,
        max_steps: int = EngineOptions.max_steps,
        num_speculative_tokens: int | None = None,
        max_waiting: int = EngineOptions.max_waiting,
        share_prefixes: bool = True,
        batch_invariant: bool = False,
        lookahead: int | None = None,
    ) -> "LLM":
        """Load a checkpoint.

        path_or_id: a converted checkpoint, a Hugging Face or Meta directory, or a hub id. The
            latter two are converted once, into a cache directory. By default the small model that
            ships with the project.
        dtype: of activations, cache and logits; "float32" means float32 throughout.
        activations: the format in which activations meet FP8 weights: "bf16" (really `dtype`),
            "dynamic" (e4m3fn with a scale per token) or "static" (e4m3fn with the checkpoint's
            input scales). "auto" is "dynamic" for prompts on a GPU that computes in FP8, and "bf16"
            otherwise.
        implementation: of attention and FP8 matmuls: "xla", "cpu", "hopper" or "reference"; a named
            one that cannot run is an error. By default the best that runs here.
        kv_dtype: of the key/value cache: "bf16" (really `dtype`) or "fp8".
        max_seq_len: the most tokens of a prompt and its output together, up to the model's context;
            by default that, but no more than 8192.
        max_batch_size: the number of sequences that are generated at the same time.
        draft: a smaller model with the same vocabulary. It draws `num_speculative_tokens` draft
            tokens (by default 4), which the model checks together; the output stays the same.
            Without it, draft tokens (by default 0) are looked up in the text so far. `lookahead` is
            the old name of `num_speculative_tokens`.
        mesh: the devices to shard over (`llama_jax.model.sharding`); by default the first device.
        verbose: print the memory plan.
        num_pages: the size of the cache in pages of 64 tokens; by default enough for all sequences
            at full length, or as many as fit in memory.
        prefill_chunk, prefill_budget, max_steps, max_waiting, share_prefixes, batch_invariant: see
            `engine.scheduling.EngineOptions`.

        Raises `store.CheckpointError` for a checkpoint that cannot be read, ValueError for bad
        settings, and `memory.DoesNotFitError` before anything is loaded.
        """
        if lookahead is not None:
            message = "LLM.load's lookahead is called num_speculative_tokens now"
            warnings.warn(message, FutureWarning, stacklevel=2)
            num_speculative_tokens = lookahead
        compile_cache.enable()
        model = loading.find(path_or_id, dtype, activations, implementation, mesh)
        drafting = None
        if draft is not None:
            drafting = loading.find(draft, dtype, "auto", implementation, mesh)
        if num_speculative_tokens is None:
            num_speculative_tokens = 0 if draft is None else DEFAULT_SPECULATIVE_TOKENS
        tokenizer, max_seq_len = model.tokenizer(), sequence_limit(model.spec.config, max_seq_len)
        options = EngineOptions(
            max_batch_size, max_seq_len, num_pages, prefill_chunk, prefill_budget, max_steps,
            num_speculative_tokens, max_waiting, share_prefixes, batch_invariant,
        )  # fmt: skip
        options, planned = loading.plan(model, drafting, options, kv_dtype)
        if verbose:
            planned.print()
        planned.check()
        return cls(
            model.load(),
            model.spec,
            tokenizer,
            manifest=model.manifest,
            kv_dtype=kv_dtype,
            options=options,
            draft=(drafting.load(), drafting.spec) if drafting else None,
        )

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str, sampling: SamplingParams | None = None
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        on_finished: Callable[[], None] | None = None,
    ) -> list[Generation]: ...
    def generate(self, prompts, sampling=None, on_finished=None):  # type: ignore[no-untyped-def]
        """Continue one prompt, or each of a list of prompts.

        prompts: a str gives one `Generation`; a list of str or of token ids gives a list. The
            tokenizer adds its special tokens to a str (usually BOS), and none to token ids.
        sampling: for all prompts, or a list with one per prompt; by default the checkpoint's
            generation_config. With `SamplingParams(n=4)` a prompt has four continuations, which
            share its pages: `Generation.samples`.
        on_finished: called each time a prompt is done.

        An error in one continuation, such as decoding its text, ends that one alone and is its
        `Generation.error`. For a single str it is raised.

        >>> greedy = SamplingParams(temperature=0, max_new_tokens=6)
        >>> [each.text for each in llm.generate(["2, 4, 6,", "1, 2, 3,"], greedy)]
        [' 4', ' 1']
        """
        single = isinstance(prompts, str)
        given = [prompts] if single else listed("prompts", prompts)
        pairs = with_sampling(given, sampling, self.default_sampling)
        each = [self.generate_job(*pair) for pair in pairs]
        results = jobs.run_together(self.engine, each, on_finished)
        return _only(results) if single else results

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        **template_kwargs: Any,
    ) -> Generation: ...
    @overload
    def chat(
        self,
        messages: Sequence[Sequence[Message]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Tools | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        **template_kwargs: Any,
    ) -> list[Generation]: ...
    def chat(self, messages, sampling=None, **settings):  # type: ignore[no-untyped-def]
        """Generate the assistant's next message in a conversation, or in each of a list of them.

        messages: {"role": "system" | "user" | "assistant" | "tool", "content": ...} in order; an
            assistant's message may have "tool_calls".
        tools: JSON schemas, or typed functions with a docstring. The reply's calls are in
            `Generation.tool_calls`.
        tool_choice: whether the reply may, must or must not call a tool, see `text.tool_choice`. A
            required call fits the tool's schema (extra `serve`), unless `max_new_tokens` cuts it.
        parallel_tool_calls: whether the reply may make several calls.
        template_kwargs: passed to the checkpoint's chat template, except for those of
            `chat.encode_chat`: `continue_final_message`, `add_generation_prompt`, `chat_template`
            and `chat_template_kwargs`.

        >>> ask = "Sort these numbers in ascending order: 5, 3, 8"
        >>> llm.chat([{"role": "user", "content": ask}]).text
        '3, 5, 8'
        """
        is_list = isinstance(messages, Sequence) and len(messages) > 0
        single = not is_list or isinstance(messages[0], Mapping)
        given = [messages] if single else messages
        pairs = with_sampling(given, sampling, self.default_sampling)
        each = [self.chat_job(*pair, **settings) for pair in pairs]
        results = jobs.run_together(self.engine, each)
        return _only(results) if single else results

    def stream(
        self,
        prompt: str | Sequence[Message],
        sampling: SamplingParams | None = None,
        **settings: Any,
    ) -> Iterator[Piece]:
        """Yield a continuation piece by piece: of a str as `generate`, of messages as `chat`.

        settings: the keyword arguments of `chat`.

        Incomplete UTF-8 and what may become a stop string are held back. The last piece carries the
        complete result.

        >>> messages = [{"role": "user", "content": "What is 47 + 85?"}]
        >>> "".join(piece.text for piece in llm.stream(messages))
        '132'
        """
        sampling = sampling or self.default_sampling
        if sampling.n > 1:
            raise ValueError(f"one continuation can be streamed, n is {sampling.n}: use generate")
        if not isinstance(prompt, str):
            job = self.chat_job(prompt, sampling, is_streamed=True, **settings)
            return jobs.stream_job(self.engine, job)
        if settings:
            raise TypeError(f"{', '.join(settings)}: only for messages, but the prompt is a str")
        return jobs.stream_job(self.engine, self.generate_job(prompt, sampling, is_streamed=True))

    @overload
    def score(  # type: ignore[overload-overlap]
        self, prompts: Prompt, completions: Prompt
    ) -> Score: ...
    @overload
    def score(self, prompts: Sequence[Prompt], completions: Sequence[Prompt]) -> list[Score]: ...
    def score(self, prompts, completions):  # type: ignore[no-untyped-def]
        """Compute how likely a completion is after its prompt: one `Score`, or a list for lists.

        Prompt and completion are tokenised together if the prompt's tokens stay the same, and
        separately otherwise, so no token straddles the two. A prompt may be empty if the model has
        a BOS token. Token ids are taken as they are.

        >>> score = llm.score("What is 47 + 85? ", "132")
        >>> len(score.logprobs) == len(score.token_ids) == 3
        True
        """
        single = is_prompt(prompts)
        if single:
            prompts, completions = [prompts], [completions]
        prompts, completions = listed("prompts", prompts), listed("completions", completions)
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions")
        results = self._results(map(self.score_job, prompts, completions))
        return results[0] if single else results

    @overload
    def rank(self, prompts: Prompt, labels: Sequence[Prompt]) -> Ranking: ...  # type: ignore[overload-overlap]
    @overload
    def rank(self, prompts: Sequence[Prompt], labels: Sequence[Prompt]) -> list[Ranking]: ...
    def rank(self, prompts, labels):  # type: ignore[no-untyped-def]
        """Compute which of `labels` is likeliest after a prompt: one `Ranking`, or a list for a
        list of prompts.

        labels: texts or token ids, the same for all prompts, tokenised as in `score`. The prompt
            and any other prefix that labels share is computed once.

        >>> ranking = llm.rank("What is 47 + 85? ", ["132", "131"])
        >>> len(ranking.scores), round(sum(ranking.probabilities), 6)
        (2, 1.0)
        """
        single = is_prompt(prompts)
        given = [prompts] if single else listed("prompts", prompts)
        labels = listed("labels", labels)
        results = self._results(self.rank_job(prompt, labels) for prompt in given)
        return results[0] if single else results

    @overload
    def perplexity(  # type: ignore[overload-overlap]
        self, texts: Prompt, *, window: int | None = None, stride: int | None = None
    ) -> Perplexity: ...
    @overload
    def perplexity(
        self, texts: Sequence[Prompt], *, window: int | None = None, stride: int | None = None
    ) -> list[Perplexity]: ...
    def perplexity(self, texts, *, window=None, stride=None):  # type: ignore[no-untyped-def]
        """Compute how well the model predicts a text of any length: one `Perplexity`, or a list for
        a list of texts.

        texts: every token of a str is scored, after a BOS token. The first of given token ids is
            only context.
        window: tokens per window, at most and by default `max_seq_len`.
        stride: tokens that each window after the first scores; its others are context. A small
            stride is slower and gives a lower perplexity. By default window - 1, as in lm-eval's
            rolling loglikelihood. See `windows.rolling_windows`.
        """
        single = is_prompt(texts)
        given = [texts] if single else listed("texts", texts)
        results = self._results(self.perplexity_job(text, window, stride) for text in given)
        return results[0] if single else results

    def generate_job(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        is_streamed: bool = False,
    ) -> Job[Generation]:
        """Make the job of `generate` for one prompt, to be run by `jobs.run_jobs`, which takes more
        prompts than fit in memory, or by stepping the engine.

        is_streamed: whether the text is read while it grows, see `Request`.
        """
        return self._continuation(self.prompt_ids(prompt), sampling, is_streamed=is_streamed)

    def chat_job(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        is_streamed: bool = False,
        **template_kwargs: Any,
    ) -> Job[Generation]:
        """Make the job of `chat`, see `generate_job`."""
        calls = calling(tools, tool_choice, parallel_tool_calls, self.tokenizer)
        sampling = sampling or self.default_sampling
        if calls.form:
            if sampling.structured:
                raise ValueError(f"tool_choice: {tool_choice!r} and structured exclude each other")
            sampling = replace(sampling, structured=calls.form)
        ids = self._checked(
            encode_chat(self.tokenizer, messages, tools=calls.offered, **template_kwargs), room=1
        )
        if tool_choice == "none":
            return self._continuation(ids, sampling, is_streamed=is_streamed)
        max_calls = None if calls.is_parallel else 1
        return self._continuation(
            ids, sampling, is_chat=True, max_calls=max_calls, is_streamed=is_streamed
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an LLM cannot be pickled or copied, because its weights and cache are on a device of "
            "this process: pass the checkpoint's path on, and call LLM.load(path) in the other "
            "process"
        )

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Find `generate_job` and so on by their old names, `generate_question` and so on."""
            kind = name.removesuffix("_question")
            if kind == name or kind not in ("generate", "chat", "score", "rank", "perplexity"):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            message = f"LLM.{name} is called {kind}_job now"
            warnings.warn(message, FutureWarning, stacklevel=2)
            return getattr(self, f"{kind}_job")

    def _continuation(
        self,
        ids: list[int],
        sampling: SamplingParams | None,
        *,
        is_chat: bool = False,
        max_calls: int | None = None,
        is_streamed: bool = False,
    ) -> Job[Generation]:
        """Make the job of one prompt. max_calls: how many of the reply's tool calls are kept."""
        sampling = self.default_sampling if sampling is None else sampling
        check_kind("sampling", sampling, SamplingParams)
        settings = sampling.of_samples()

        def sample(request: Request) -> Generation:
            result = self.result(request, is_chat)
            return replace(result, tool_calls=result.tool_calls[:max_calls])

        def combine(requests: Sequence[Request]) -> Generation:
            first, *others = map(sample, requests)
            return replace(first, others=tuple(others))

        requests = tuple(self._request(ids, each, is_streamed) for each in settings)
        return Job(requests, combine)

    def score_job(self, prompt: Prompt, completion: Prompt) -> Job[Score]:
        """Make the job of `score`, see `generate_job`."""
        return jobs.score_job(*self.pair_ids(prompt, completion))

    def rank_job(self, prompt: Prompt, labels: Sequence[Prompt]) -> Job[Ranking]:
        """Make the job of `rank`, see `generate_job`."""
        if not labels:
            raise ValueError(f"labels must be a list of at least one, got {labels!r}")
        return jobs.ranking_job([self.pair_ids(prompt, label) for label in labels])

    def perplexity_job(
        self, text: Prompt, window: int | None = None, stride: int | None = None
    ) -> Job[Perplexity]:
        """Make the job of `perplexity`, see `generate_job`."""
        window, stride = window_and_stride(window, stride, self.max_seq_len)
        vocab_size = self.spec.config.vocab_size
        if isinstance(text, str):
            ids, read = check_ids("text", self.tokenizer.encode(text, bos=True), vocab_size), text
        else:
            ids = check_ids("text", text, vocab_size)
            read = self.tokenizer.decode(ids[1:])
        if len(ids) < 2:
            raise ValueError(f"the text {text!r} has no token to score")
        return jobs.perplexity_job(ids, read, window, stride)

    def _results[T](self, each: Iterable[Job[T]]) -> list[T]:
        # All jobs are made before the first runs, so that a bad argument is reported at once.
        return list(jobs.run_jobs(self.engine, list(each)))

    def pair_ids(self, prompt: Prompt, completion: Prompt) -> tuple[list[int], int]:
        """Encode a prompt and its completion as `score` does.

        Returns the token ids of both, and the index of the completion's first.
        """
        ids, begin = encode_pair(self.tokenizer, prompt, completion)
        return self._checked(ids), begin

    def logits(self, ids: Array | np.ndarray | Sequence[Sequence[int]]) -> np.ndarray:
        """Compute next-token logits, float32 [batch, length, vocab], of ids int [batch, length].

        >>> logits = llm.logits([[1, 2, 3]])
        >>> logits.shape == (1, 3, llm.spec.config.vocab_size)
        True
        """
        try:
            array = np.asarray(ids)
        except ValueError as error:  # numpy's words for it are about arrays
            raise ValueError("ids must have rows of the same length, [batch, length]") from error
        if array.ndim != 2 or not array.size or array.dtype.kind not in "iu":
            raise ValueError(
                f"ids must be a non-empty int [batch, length], got {array.dtype} {array.shape}"
            )
        requests = [Request(self._checked(row.tolist()), output_kind="logits") for row in array]
        for _ in self.engine.run(requests):
            pass
        return np.stack([request.prompt_logits for request in requests])  # type: ignore[misc]

    def warmup(
        self,
        output_kinds: Sequence[OutputKind] = ("tokens", "logprobs", "logits"),
        structured: bool = False,
        *,
        wanted: Sequence[OutputKind] | None = None,
    ) -> CompileReport:
        """Compile programs before they are needed.

        output_kinds: "tokens" for `generate`, `chat` and `stream`; "logprobs" for `score`, `rank`
            and `perplexity`; "logits" for `logits`. `wanted` is the old name of this argument.
        structured: whether `SamplingParams.structured` will be used.
        Returns the number of programs that were compiled or fetched from the persistent cache, and
        the seconds it took.
        """
        if wanted is not None:
            message = "LLM.warmup's wanted is called output_kinds now"
            warnings.warn(message, FutureWarning, stacklevel=2)
            output_kinds = wanted
        if structured:  # starts the processes that compile grammars
            self._grammars.matcher(StructuredOutput(json_object=True))
        return self.engine.warmup(output_kinds, structured)

    @property
    def tool_format(self) -> ToolFormat:
        """Return the format in which the model writes tool calls."""
        return tool_format(choose_template(self.tokenizer, tools=True))

    def stats(self) -> Stats:
        """Return counters since the model was loaded: tokens read, shared and drawn, draft tokens
        proposed and accepted, preemptions."""
        return self.engine.stats()

    def _request(
        self, prompt: list[int], sampling: SamplingParams, is_streamed: bool = False
    ) -> Request:
        vocab_size = self.spec.config.vocab_size
        check_ids("logit_bias", sampling.logit_bias, vocab_size)
        check_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
        own = frozenset() if sampling.ignore_eos else self._stop_ids
        names = self.tokenizer.special_stops(sampling.stop)
        return Request(
            prompt,
            sampling,
            StreamDecoder(self.tokenizer, after=prompt),
            own | set(sampling.stop_token_ids) | names.keys(),
            self._stop_ids,
            names,
            self._grammars.matcher(sampling.structured) if sampling.structured else None,
            is_streamed=is_streamed,
        )

    def result(self, request: Request, is_chat: bool = False) -> Generation:
        """Return the result of one request of a job, once it has ended.

        is_chat: parse the tool calls of the reply.
        """
        generation = generation_of(request, self.tokenizer)
        return self._with_tool_calls(generation) if is_chat else generation

    def _with_tool_calls(self, result: Generation) -> Generation:
        if result.error:
            return result
        try:
            reply = self.tokenizer.decode(result.token_ids, skip_special=False)
            return replace(result, tool_calls=parse_tool_calls(reply, self.tool_format))
        except Exception as error:  # ends this continuation alone
            return replace(result, finish_reason="error", error=error)

    def prompt_ids(self, prompt: Prompt, room: int = 1) -> list[int]:
        """Encode a prompt as `generate` does.

        Raises ValueError unless the context has room for `room` more tokens.
        """
        return self._checked(encode_prompt(self.tokenizer, prompt), room)

    def _checked(self, ids: Sequence[int], room: int = 0) -> list[int]:
        return check_prompt(ids, self.spec.config.vocab_size, self.max_seq_len, room)


def _only(results: Sequence[Generation]) -> Generation:
    """Return the result of a call for one prompt, or raise its error."""
    (result,) = results
    if result.error:
        raise result.error
    return result
