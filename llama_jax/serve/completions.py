"""This module answers /v1/completions: it continues prompts, texts or token ids, as they are."""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from llama_jax.engine.request import Request
from llama_jax.jobs import Job
from llama_jax.results import Generation
from llama_jax.serve.engine_thread import Submission, Update
from llama_jax.serve.errors import request_failed
from llama_jax.serve.prompt_logprobs import likeliest, prompt_logprobs, scoring
from llama_jax.serve.replies import (
    LEAST_LOGPROB,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    PromptTokensDetails,
    Usage,
    new_id,
)
from llama_jax.serve.schemas import CompletionRequest
from llama_jax.serve.service import Service

if TYPE_CHECKING:
    from llama_jax.text.tokenizer import Tokenizer

_DEFAULT_MAX_TOKENS = 16  # as OpenAI and vLLM have it
# Characters or ids of prompts that are read in 0.1 ms; a thread takes 0.3 ms to begin and answer.
_SHORT = 1000
_Top = Sequence[tuple[int, float]]
_Answer = tuple[list[CompletionChoice], Usage]


async def prepare(service: Service, body: CompletionRequest) -> Job[_Answer]:
    """Returns what a request asks of the engine: continuations of all its prompts in their order,
    and then, where that is asked, how likely the prompts are."""
    service.check_model(body.model)
    service.check_queue(len(body.prompts) * (body.n or 1))  # before it costs anything
    limit = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    is_short = sum(map(len, body.prompts)) * (body.n or 1) <= _SHORT
    job = await service.in_thread(lambda: _job(service, body, limit), body, is_quick=is_short)
    for request in job.requests:
        service.check_room(request, body.max_tokens)
    service.metrics.asked(job.requests)
    return job


def _job(service: Service, body: CompletionRequest, limit: int) -> Job[_Answer]:
    llm = service.llm
    sampling = service.sampling(body, max(1, limit), body.logprobs)
    if limit:
        parts = [
            llm.generate_job(prompt, sampling, is_streamed=bool(body.stream))
            for prompt in body.prompts
        ]
        prompts = [part.requests[0].prompt for part in parts]
    else:  # nothing is drawn, so a prompt may fill the context
        parts, prompts = [], [llm.prompt_ids(prompt, room=0) for prompt in body.prompts]
    drawn = [request for part in parts for request in part.requests]
    scored = scoring(prompts, body.num_prompt_top, body.prompt_logprobs is not None)

    def combine(requests: Sequence[Request]) -> _Answer:
        if not drawn:
            choices = [
                _choice(service, body, index, ids, each, None)
                for index, (ids, each) in enumerate(zip(prompts, scored, strict=True))
            ]
            return choices, _usage_of_prompts(prompts, scored)
        samples = [sample for part in parts for sample in part.result().samples]
        choices = [
            _choice(service, body, i, prompts[i // sampling.n], scored[i // sampling.n], sample)
            for i, sample in enumerate(samples)
        ]
        return choices, service.usage(drawn, len(prompts))

    return Job((*drawn, *filter(None, scored)), combine)


async def whole(service: Service, body: CompletionRequest, began: float) -> Completion:
    """Returns all continuations at once. began: when the request came."""
    job = await prepare(service, body)
    choices, usage = await service.run(job, began)
    return Completion(
        id=new_id("cmpl"),
        created=int(time.time()),
        model=service.name,
        choices=choices,
        usage=usage,
    )


def _usage_of_prompts(prompts: Sequence[Sequence[int]], scored: Sequence[Request | None]) -> Usage:
    """Counts the tokens of prompts that are only echoed, and scored or not."""
    tokens = sum(map(len, prompts))
    cached = sum(request.num_cached for request in scored if request)
    return Usage(
        prompt_tokens=tokens,
        completion_tokens=0,
        total_tokens=tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )


def _drawn(requests: Sequence[Request]) -> list[Request]:
    """Returns the requests that continue prompts, without those that score them."""
    return [request for request in requests if request.output_kind == "tokens"]


def _choice(
    service: Service,
    body: CompletionRequest,
    index: int,
    prompt: Sequence[int],
    scored: Request | None,
    sample: Generation | None,
) -> CompletionChoice:
    """Makes a choice. scored: of the prompt, where logprobs of it are wanted. sample: its
    continuation, if any."""
    tokenizer = service.llm.tokenizer
    before = _echoed_logprobs(tokenizer, body, prompt, scored)
    text, logprobs = _echoed(service, body, index), before
    if sample is not None:
        offset = sum(map(len, before.tokens)) if before else 0
        logprobs = _joined(before, _sample_logprobs(tokenizer, sample, offset))
        text += sample.text
    return CompletionChoice(
        index=index,
        text=text,
        logprobs=logprobs,
        finish_reason=_finish(sample) if sample else "length",
        stop_reason=sample.stop_reason if sample else None,
        prompt_logprobs=(
            None
            if body.prompt_logprobs is None
            else prompt_logprobs(tokenizer, scored, body.prompt_logprobs)
        ),
    )


def pieces(service: Service, body: CompletionRequest, submission: Submission) -> "CompletionPieces":
    """Returns what writes the chunks of a reply."""
    return CompletionPieces(service, body, submission)


class CompletionPieces:
    """Writes the chunks of all continuations, as they come (`events.Pieces`)."""

    def __init__(self, service: Service, body: CompletionRequest, submission: Submission) -> None:
        self._service, self._body = service, body
        self._drawn = _drawn(submission.requests)
        self._head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
        }
        self._offsets: dict[int, int] = {}  # by continuation: where its next token begins
        # Requests that score prompts; what is held until all of them have ended.
        self._scored = {
            tuple(each.prompt): each
            for each in submission.requests
            if each.output_kind == "logprobs"
        }
        self._num_unscored = len(submission.requests) - len(self._drawn)
        self._held: list[Update] = []

    def of(self, update: Update) -> Iterator[dict[str, Any]]:
        for each in self._once_scored(update):
            if chunk := self._chunk(each):
                yield chunk

    def end(self) -> Iterator[dict[str, Any]]:
        if self._body.usage_asked:
            yield {**self._head, "choices": [], "usage": self._usage()}

    def _once_scored(self, update: Update) -> list[Update]:
        """Takes an update, and returns those of continuations once all prompts are scored that are
        to be."""
        if update.request.output_kind == "tokens":
            if not self._num_unscored:
                return [update]
            self._held.append(update)
        elif update.is_last:
            self._num_unscored -= 1
            if update.request.error:
                raise request_failed(update.request.error)
        if self._num_unscored:
            return []
        held, self._held = self._held, []
        return held

    def _chunk(self, update: Update) -> dict[str, Any] | None:
        """Returns the chunk that an update of a continuation brings, if there is something new.

        The first one always is: clients measure the time to it, and its token may have no text.
        """
        body, text = self._body, update.text
        is_first = update.index not in self._offsets
        if is_first:
            text = _echoed(self._service, body, update.index) + text
        logprobs = self._new_logprobs(update)
        finish: dict[str, Any] = {"finish_reason": None, "stop_reason": None}
        if update.is_last:
            sample = self._service.llm.result(update.request)
            if sample.error:
                raise request_failed(sample.error)
            finish = {"finish_reason": _finish(sample), "stop_reason": sample.stop_reason}
        if not (text or logprobs or is_first or update.is_last):
            return None
        choice = {"index": update.index, "text": text, "logprobs": logprobs, **finish}
        chunk = {**self._head, "choices": [choice]}
        if body.usage_always_asked:
            chunk["usage"] = self._usage()
        elif body.usage_asked:
            chunk["usage"] = None
        return chunk

    def _new_logprobs(self, update: Update) -> dict[str, Any] | None:
        """Returns logprobs of new tokens, and before the first those of an echoed prompt."""
        tokenizer, index = self._service.llm.tokenizer, update.index
        made: CompletionLogprobs | None = None
        if index not in self._offsets:
            prompt = update.request.prompt
            scored = self._scored.get(tuple(prompt))
            made = _echoed_logprobs(tokenizer, self._body, prompt, scored)
            self._offsets[index] = sum(map(len, made.tokens)) if made else 0
        if self._body.logprobs is not None and update.token_ids:
            tokens = zip(update.token_ids, update.logprobs, update.top, strict=True)
            new = completion_logprobs(tokenizer, tokens, self._offsets[index])
            self._offsets[index] += sum(map(len, new.tokens))
            made = _joined(made, new)
        return made.model_dump() if made else None

    def _usage(self) -> dict[str, Any]:
        return self._service.usage(self._drawn, len(self._body.prompts)).model_dump()


def _finish(sample: Generation) -> Literal["stop", "length"]:
    return "length" if sample.finish_reason == "length" else "stop"


def _echoed(service: Service, body: CompletionRequest, index: int) -> str:
    """Returns the prompt of a choice as text, if it is to stand before the continuation."""
    if not body.echo:
        return ""
    prompt = body.prompts[index // (body.n or 1)]
    return prompt if isinstance(prompt, str) else service.llm.tokenizer.decode(prompt)


def _echoed_logprobs(
    tokenizer: "Tokenizer", body: CompletionRequest, ids: Sequence[int], scored: Request | None
) -> CompletionLogprobs | None:
    """Returns logprobs of an echoed prompt's tokens, if they were asked for.

    scored: how likely they are, unless there is a single one.
    """
    if not body.echo or body.logprobs is None:
        return None
    first = _token_name(tokenizer, ids[0])
    made = CompletionLogprobs(
        tokens=[first], token_logprobs=[None], top_logprobs=[None], text_offset=[0]
    )
    if scored is None:
        return made
    top = likeliest(scored, body.logprobs)
    tokens = zip(ids[1:], scored.prompt_logprobs.tolist(), top, strict=True)
    return _joined(made, completion_logprobs(tokenizer, tokens, len(first)))


def _joined(
    before: CompletionLogprobs | None, after: CompletionLogprobs | None
) -> CompletionLogprobs | None:
    if before is None or after is None:
        return before or after
    return CompletionLogprobs(
        tokens=before.tokens + after.tokens,
        token_logprobs=before.token_logprobs + after.token_logprobs,
        top_logprobs=before.top_logprobs + after.top_logprobs,
        text_offset=before.text_offset + after.text_offset,
    )


def _sample_logprobs(
    tokenizer: "Tokenizer", sample: Generation, offset: int
) -> CompletionLogprobs | None:
    if sample.logprobs is None:
        return None
    tokens = [
        (each.token_id, each.logprob, [(i, value) for i, _, value in each.top])
        for each in sample.logprobs
    ]
    return completion_logprobs(tokenizer, tokens, offset)


def completion_logprobs(
    tokenizer: "Tokenizer", tokens: Iterable[tuple[int, float, _Top]], offset: int
) -> CompletionLogprobs:
    """Writes logprobs as OpenAI has them.

    tokens: id, logprob, and the likeliest in its place. offset: of the first, in characters.
    """
    made = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for token_id, logprob, top in tokens:
        text = _token_name(tokenizer, token_id)
        made.tokens.append(text)
        made.token_logprobs.append(max(logprob, LEAST_LOGPROB))
        likeliest = {_token_name(tokenizer, i): max(value, LEAST_LOGPROB) for i, value in top}
        made.top_logprobs.append(likeliest | {text: max(logprob, LEAST_LOGPROB)})
        made.text_offset.append(offset)
        offset += len(text)
    return made


def _token_name(tokenizer: "Tokenizer", token_id: int) -> str:
    """Returns a token's text, or its bytes where these are no text: names must differ."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
