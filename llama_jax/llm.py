"""`LLM`: a loaded model with its tokenizer. Text in, text and numbers out."""

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from jax import Array
from jax.sharding import Mesh

from llama_jax import loading
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
from llama_jax.engine.request import Request, Wanted
from llama_jax.engine.sampling import check_ids
from llama_jax.engine.scheduling import EngineOptions, Stats
from llama_jax.loading import sequence_limit
from llama_jax.model.config import token_ids
from llama_jax.model.kv_cache import KVDtype, storage_dtype
from llama_jax.model.spec import Activations, Implementation, ModelSpec, Params
from llama_jax.results import (
    Generation,
    Perplexity,
    Piece,
    Ranking,
    Score,
    Timings,
    TokenLogprob,
)
from llama_jax.sampling_params import SamplingParams
from llama_jax.scoring import (
    Question,
    answers,
    perplexity_of,
    score_of,
    score_request,
)
from llama_jax.structured import StructuredOutput
from llama_jax.text.chat import choose_template, encode_chat
from llama_jax.text.tokenizer import StreamDecoder, Tokenizer
from llama_jax.text.tool_choice import ToolChoice, Tools, calling
from llama_jax.text.tools import ToolFormat, parse_tool_calls, tool_format
from llama_jax.text.windows import rolling_windows, window_and_stride

DEFAULT_SPECULATIVE_TOKENS = 4
_log = logging.getLogger(__name__)

Message = Mapping[str, Any]
Prompt = str | Sequence[int]


class PromptTooLongError(ValueError):
    """A prompt that leaves no room in the context for what is wanted."""


class LLM:
    """A Llama model on its device, ready to generate and to score. Made by `LLM.load`."""

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
        # What stops vLLM: generation_config's ids and the tokenizer's own.
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
        """Load a checkpoint: a converted one, a Hugging Face or Meta directory, or a hub id.

        The latter two are converted once, into a cache directory. Without an argument: the small
        model that ships with the project.

        dtype: of activations, cache and logits; "float32" means float32 throughout.
        activations: what FP8 weights are multiplied with: "bf16" (activations in `dtype`),
            "dynamic" (e4m3fn per token) or "static" (e4m3fn by the checkpoint's input scales);
            "auto" is "bf16", but "dynamic" for prompts on a GPU that computes in FP8.
        implementation: of attention and FP8 matmuls, "xla", "cpu" or "hopper" (or an error), or
            "reference"; by default the best that runs here.
        kv_dtype: "bf16" (or rather `dtype`) or "fp8", of the key/value cache.
        max_seq_len: tokens that prompt and output may have together, at most the model's context;
            by default that, or 8192 if it is longer.
        max_batch_size: sequences generated at the same time.
        draft: a smaller model with the same vocabulary that draws `num_speculative_tokens` draft
            tokens (by default 4) for the model to check together; the tokens stay the same. Without
            a draft (by default 0) they are looked up in the text so far. `lookahead` is the
            option's old name.
        mesh: devices to shard over (`llama_jax.model.sharding`); by default the first device alone.
        verbose: print the memory plan.
        num_pages: of the cache; by default for all sequences at full length, or what there is
            memory for.
        prefill_chunk, prefill_budget, max_steps, max_waiting, share_prefixes, batch_invariant: see
            `engine.scheduling.EngineOptions`.

        Raises `store.CheckpointError` for what cannot be read, `memory.DoesNotFitError` before
        anything is loaded, ValueError for settings.
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
        """Continue prompts: a str gives one `Generation`, a list of str or of token ids a list.

        sampling: for all prompts, or one per prompt; the checkpoint's generation_config when None.
        on_finished: called each time one is done. A str gets what the tokenizer puts around a text,
        BOS as a rule; token ids are taken as they are. With `SamplingParams(n=4)` a prompt has four
        continuations, which share its pages: `Generation.samples`.

        What is raised in the work for one continuation, such as decoding its text, ends it alone:
        its `Generation.error` says what it was. For a str it is raised.
        """
        single = isinstance(prompts, str)
        pairs = self._with_sampling([prompts] if single else prompts, sampling)
        results = self._run([self.generate_question(*pair) for pair in pairs], on_finished)
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
        """The assistant's next message in a conversation, or in each of a list of conversations.

        messages: {"role": "system" | "user" | "assistant" | "tool", "content": ...} in order, with
        "tool_calls" in the assistant's messages where there were some. tools: JSON schemas, or
        typed functions with a docstring; calls that the reply asks for are in `tool_calls`.
        tool_choice: whether the reply may, must or must not call one, see `text.tool_choice`; a
        call that it must make fits the tool's schema (extra `serve`), unless `max_new_tokens` cuts
        it. parallel_tool_calls: whether it may make several.
        template_kwargs reach the checkpoint's chat template, but for those of `chat.encode_chat`:
        `continue_final_message`, `add_generation_prompt`, `chat_template`, `chat_template_kwargs`.
        """
        single = not messages or isinstance(messages[0], Mapping)
        pairs = self._with_sampling([messages] if single else messages, sampling)
        results = self._run([self.chat_question(*pair, **settings) for pair in pairs])
        return _only(results) if single else results

    def stream(
        self,
        prompt: str | Sequence[Message],
        sampling: SamplingParams | None = None,
        **settings: Any,
    ) -> Iterator[Piece]:
        """Like `generate` for a str and like `chat` for messages, piece by piece.

        settings: `chat`'s. Incomplete UTF-8 and possible beginnings of stop strings are held back;
        the last piece carries the whole result.
        """
        sampling = sampling or self.default_sampling
        if sampling.n > 1:
            raise ValueError(f"one continuation can be streamed, n is {sampling.n}: use generate")
        if not isinstance(prompt, str):
            return self._pieces(self.chat_question(prompt, sampling, is_streamed=True, **settings))
        if settings:
            raise TypeError(f"a prompt as text has no use for {', '.join(settings)}")
        return self._pieces(self.generate_question(prompt, sampling, is_streamed=True))

    @overload
    def score(  # type: ignore[overload-overlap]
        self, prompts: Prompt, completions: Prompt
    ) -> Score: ...
    @overload
    def score(self, prompts: Sequence[Prompt], completions: Sequence[Prompt]) -> list[Score]: ...
    def score(self, prompts, completions):  # type: ignore[no-untyped-def]
        """Return how likely each completion is after its prompt: one `Score`, or a list for lists.

        Prompt and completion are tokenised together where the prompt's tokens stay the same, and
        separately otherwise, so a completion's tokens are always whole. A prompt may be empty
        where the model has a BOS token. Token ids are taken as they are.
        """
        single = _is_prompt(prompts)
        if single:
            prompts, completions = [prompts], [completions]
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions")
        results = self._answers(map(self.score_question, prompts, completions))
        return results[0] if single else results

    @overload
    def rank(self, prompts: Prompt, labels: Sequence[Prompt]) -> Ranking: ...  # type: ignore[overload-overlap]
    @overload
    def rank(self, prompts: Sequence[Prompt], labels: Sequence[Prompt]) -> list[Ranking]: ...
    def rank(self, prompts, labels):  # type: ignore[no-untyped-def]
        """Which of `labels` is likeliest after a prompt: one `Ranking`, or a list for a list.

        labels: texts or token ids, the same for all prompts, tokenised as `score` does. What the
        labels have in common, the prompt above all, is computed once.
        """
        single = _is_prompt(prompts)
        given = [prompts] if single else prompts
        results = self._answers(self.rank_question(prompt, labels) for prompt in given)
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
        """Return how well the model predicts a text of any length: one `Perplexity`, or a list for
        a list.

        A str is scored whole, after a BOS token; of token ids the first only gives context.
        window: tokens that are looked at together, at most and by default `max_seq_len`.
        stride: how many new tokens each window but the first scores; the others are context, so a
            small one is slow and gives the lower perplexity. By default window - 1, as in lm-eval's
            rolling loglikelihood: hardly a token is computed twice. See `windows.rolling_windows`.
        """
        single = _is_prompt(texts)
        given = [texts] if single else texts
        results = self._answers(self.perplexity_question(text, window, stride) for text in given)
        return results[0] if single else results

    def generate_question(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        is_streamed: bool = False,
    ) -> Question[Generation]:
        """Return what `generate` asks, for `scoring.answers`, for more prompts than fit in memory,
        and for whoever steps the engine. is_streamed: the text is wanted as it grows, see
        `Request`."""
        return self._continuation(self._prompt_ids(prompt), sampling, is_streamed=is_streamed)

    def chat_question(
        self,
        messages: Sequence[Message],
        sampling: SamplingParams | None = None,
        *,
        tools: Tools | None = None,
        tool_choice: ToolChoice = "auto",
        parallel_tool_calls: bool = True,
        is_streamed: bool = False,
        **template_kwargs: Any,
    ) -> Question[Generation]:
        """Return what `chat` asks, see `generate_question`."""
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
        most = None if calls.is_parallel else 1
        return self._continuation(ids, sampling, is_chat=True, most=most, is_streamed=is_streamed)

    def _continuation(
        self,
        ids: list[int],
        sampling: SamplingParams | None,
        *,
        is_chat: bool = False,
        most: int | None = None,
        is_streamed: bool = False,
    ) -> Question[Generation]:
        """most: calls of tools that are told of."""
        settings = (sampling or self.default_sampling).of_samples()

        def sample(request: Request) -> Generation:
            result = self.result(request, is_chat)
            return replace(result, tool_calls=result.tool_calls[:most])

        def conclude(requests: Sequence[Request]) -> Generation:
            first, *others = map(sample, requests)
            return replace(first, others=tuple(others))

        requests = tuple(self._request(ids, each, is_streamed) for each in settings)
        return Question(requests, conclude)

    def score_question(self, prompt: Prompt, completion: Prompt) -> Question[Score]:
        """Return what `score` asks, see `generate_question`."""
        request = score_request(*self.pair_ids(prompt, completion))
        return Question((request,), lambda requests: score_of(requests[0]))

    def rank_question(self, prompt: Prompt, labels: Sequence[Prompt]) -> Question[Ranking]:
        """Return what `rank` asks, see `generate_question`."""
        if isinstance(labels, str) or not labels:
            raise ValueError(f"labels must be a list of at least one, got {labels!r}")
        requests = [score_request(*self.pair_ids(prompt, label)) for label in labels]
        return Question(tuple(requests), lambda done: Ranking(tuple(map(score_of, done))))

    def perplexity_question(
        self, text: Prompt, window: int | None = None, stride: int | None = None
    ) -> Question[Perplexity]:
        """Return what `perplexity` asks, see `generate_question`."""
        window, stride = window_and_stride(window, stride, self.max_seq_len)
        if isinstance(text, str):
            ids, read = self.tokenizer.encode(text, bos=True), text
        else:
            ids, read = list(text), self.tokenizer.decode(text[1:])
        check_ids("text", ids, self.spec.config.vocab_size)
        windows = rolling_windows(len(ids), window, stride)
        requests = [score_request(ids[begin:end], first - begin) for begin, first, end in windows]
        if not requests:
            raise ValueError(f"the text {text!r} has no token to score")
        return Question(tuple(requests), lambda done: perplexity_of(done, read))

    def _answers[T](self, questions: Iterable[Question[T]]) -> list[T]:
        # Mistakes in any question come before the first is asked.
        return list(answers(self.engine, list(questions)))

    def pair_ids(self, prompt: Prompt, completion: Prompt) -> tuple[list[int], int]:
        """Token ids of prompt and completion together, as `score` takes them, and where the
        completion begins among them."""
        encode = self.tokenizer.encode
        if isinstance(prompt, str) and isinstance(completion, str):
            before, whole = encode(prompt, bos=True), encode(prompt + completion, bos=True)
            if whole[: len(before)] != before:
                whole = before + self.tokenizer.encode_continuation(completion)
        else:
            before = encode(prompt, bos=True) if isinstance(prompt, str) else list(prompt)
            after = completion
            if isinstance(completion, str):
                goes_on = bool(self.tokenizer.decode(before))
                after = (self.tokenizer.encode_continuation if goes_on else encode)(completion)
            whole = [*before, *after]
        if len(whole) == len(before):
            raise ValueError(f"the completion {completion!r} is empty")
        if not before:
            raise ValueError("the prompt is empty: the first token has nothing to be likely after")
        return self._checked(whole), len(before)

    def logits(self, ids: Array | np.ndarray | Sequence[Sequence[int]]) -> np.ndarray:
        """Next-token logits: int [batch, length] -> float32 [batch, length, vocab]."""
        array = np.asarray(ids)
        if array.ndim != 2 or not array.size or array.dtype.kind not in "iu":
            raise ValueError(
                f"ids must be a non-empty int [batch, length], got {array.dtype} {array.shape}"
            )
        requests = [Request(self._checked(row.tolist()), wanted="logits") for row in array]
        for _ in self.engine.run(requests):
            pass
        return np.stack([request.prompt_logits for request in requests])  # type: ignore[misc]

    def warmup(
        self,
        wanted: Sequence[Wanted] = ("tokens", "logprobs", "logits"),
        structured: bool = False,
    ) -> CompileReport:
        """Compile what `generate`, `chat` and `stream` need ("tokens"), `score`, `rank` and
        `perplexity` ("logprobs"), and `logits`.

        structured: whether `SamplingParams.structured` will be asked for. Returns what was
        compiled or fetched from the persistent cache, and the seconds it took.
        """
        if structured:  # starts what compiles grammars
            self._grammars.matcher(StructuredOutput(json_object=True))
        return self.engine.warmup(wanted, structured)

    @property
    def tool_format(self) -> ToolFormat:
        """Return how the model writes calls of tools."""
        return tool_format(choose_template(self.tokenizer, tools=True))

    def stats(self) -> Stats:
        """Counters since the model was loaded: tokens read, shared and drawn, guesses and how many
        were accepted, preemptions."""
        return self.engine.stats()

    def _run(
        self,
        questions: Sequence[Question[Generation]],
        on_finished: Callable[[], None] | None = None,
    ) -> list[Generation]:
        asked_by = {request: question for question in questions for request in question.requests}
        for request in self.engine.run(list(asked_by)):
            if request.finish_reason:
                question = asked_by.pop(request)
                if on_finished and asked_by.keys().isdisjoint(question.requests):
                    on_finished()
        return [question.conclude(question.requests) for question in questions]

    def _with_sampling[T](
        self,
        prompts: Sequence[T],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[tuple[T, SamplingParams]]:
        """Each prompt with its settings, which may be the same for all."""
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or self.default_sampling] * len(prompts)
        if len(sampling) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(sampling)} sampling settings")
        return list(zip(prompts, sampling, strict=True))

    def _pieces(self, question: Question[Generation]) -> Iterator[Piece]:
        (request,) = question.requests
        shown = 0
        for _ in self.engine.run([request]):
            text = request.text[shown : request.released]
            shown = request.released
            if request.error:
                raise request.error
            if request.finish_reason:
                yield Piece(text, question.answer())
            elif text:
                yield Piece(text)

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
        """Return what has come of one request of a question, when it has ended; with the calls that
        it makes where `is_chat`."""
        logprobs, error = None, request.error
        if request.params.logprobs is not None and not error:
            try:
                logprobs = tuple(
                    map(self._token_logprob, request.token_ids, request.logprobs, request.top)
                )
            except Exception as raised:  # this continuation's alone
                error = raised
        assert request.finish_reason is not None
        first = request.first_token_at or request.finished_at
        generation = Generation(
            text=request.text,
            token_ids=tuple(request.token_ids),
            finish_reason="error" if error else request.finish_reason,
            prompt_token_ids=tuple(request.prompt),
            logprobs=logprobs,
            timings=Timings(
                prefill=first - (request.admitted_at or first),
                decode=request.finished_at - first,
            ),
            stop_reason=request.stop_reason,
            error=error,
        )
        return self._with_tool_calls(generation) if is_chat else generation

    def _with_tool_calls(self, result: Generation) -> Generation:
        if result.error:
            return result
        try:
            reply = self.tokenizer.decode(result.token_ids, skip_special=False)
            return replace(result, tool_calls=parse_tool_calls(reply, self.tool_format))
        except Exception as error:  # this continuation's alone
            return replace(result, finish_reason="error", error=error)

    def _token_logprob(
        self, token_id: int, logprob: float, top: Sequence[tuple[int, float]]
    ) -> TokenLogprob:
        likeliest = tuple((i, self.tokenizer.token_text(i), value) for i, value in top)
        return TokenLogprob(token_id, self.tokenizer.token_text(token_id), logprob, likeliest)

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            encode = self.tokenizer.encode
            ids: Sequence[int] = encode(prompt, bos=True, eos=True) if prompt else ()
        else:
            try:
                ids = list(prompt)
            except TypeError as error:
                raise TypeError(
                    f"a prompt must be a str or a list of token ids, got {type(prompt).__name__}"
                ) from error
        return self._checked(ids, room=1)

    def _checked(self, ids: Sequence[int], room: int = 0) -> list[int]:
        """`ids`, if they are in the vocabulary and leave room for as many more tokens."""
        if not ids:
            raise ValueError("the prompt is empty")
        check_ids("prompt", ids, self.spec.config.vocab_size)
        if len(ids) + room > self.max_seq_len:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens; max_seq_len is {self.max_seq_len}"
                + (", of which at least one is for the reply" if room else "")
                + ". Shorten it, or load the model with a larger max_seq_len."
            )
        return list(ids)


def _only(results: Sequence[Generation]) -> Generation:
    """The result of a call for one prompt, or its error."""
    (result,) = results
    if result.error:
        raise result.error
    return result


def _is_prompt(value: Prompt | Sequence[Prompt]) -> bool:
    """Return whether this is one prompt rather than a list of them."""
    return isinstance(value, str) or bool(len(value) and isinstance(value[0], int | np.integer))
