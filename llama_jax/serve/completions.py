"""This module answers /v1/completions: it continues prompts, texts or token ids, as they are."""

import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from llama_jax.engine.request import Request
from llama_jax.results import Generation
from llama_jax.scoring import Question, score_request
from llama_jax.serve.chat import LEAST_LOGPROB
from llama_jax.serve.engine_thread import Job
from llama_jax.serve.errors import request_failed
from llama_jax.serve.replies import Completion, CompletionChoice, CompletionLogprobs
from llama_jax.serve.schemas import CompletionRequest
from llama_jax.serve.service import Service, new_id

if TYPE_CHECKING:
    from llama_jax.text.tokenizer import Tokenizer

_DEFAULT_MAX_TOKENS = 16  # as OpenAI and vLLM have it
_Top = Sequence[tuple[int, float]]


async def prepare(service: Service, body: CompletionRequest) -> Question[list[CompletionChoice]]:
    """Returns what a request asks of the engine: continuations of all its prompts in their order,
    and then, where they are echoed with logprobs, how likely the prompts are."""
    service.check_model(body.model)
    service.check_queue(len(body.prompts) * (body.n or 1))  # before it costs anything
    limit = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    question = await service.in_thread(lambda: _question(service, body, limit), body)
    for request in question.requests:
        service.check_room(request, body.max_tokens)
    service.metrics.asked(question.requests)
    return question


def _question(
    service: Service, body: CompletionRequest, limit: int
) -> Question[list[CompletionChoice]]:
    llm = service.llm
    sampling = service.sampling(body, max(1, limit), body.logprobs)
    parts = [
        llm.generate_question(prompt, sampling, is_streamed=bool(body.stream))
        for prompt in body.prompts
    ]
    prompts = [part.requests[0].prompt for part in parts]
    drawn = [request for part in parts for request in part.requests] if body.max_tokens != 0 else []
    scored: list[Request] = []
    if body.echo and body.logprobs is not None:
        # Of a single token, which follows nothing, nothing is asked.
        scored = [score_request(ids, 1) for ids in prompts if len(ids) > 1]

    def conclude(requests: Sequence[Request]) -> list[CompletionChoice]:
        left = iter(scored)
        before = [_echoed_logprobs(llm.tokenizer, body, ids, left) for ids in prompts]
        if not drawn:
            return [
                _choice(service, body, index, before[index], None) for index in range(len(prompts))
            ]
        samples = [sample for part in parts for sample in part.answer().samples]
        return [
            _choice(service, body, index, before[index // sampling.n], sample)
            for index, sample in enumerate(samples)
        ]

    return Question((*drawn, *scored), conclude)


async def whole(service: Service, body: CompletionRequest, began: float) -> Completion:
    """Returns all continuations at once. began: when the request came."""
    question = await prepare(service, body)
    choices = await service.answer(question, began)
    drawn = [request for request in question.requests if request.wanted == "tokens"]
    return Completion(
        id=new_id("cmpl"),
        created=int(time.time()),
        model=service.name,
        choices=choices,
        usage=service.usage(drawn or question.requests, len(body.prompts)),
    )


def _choice(
    service: Service,
    body: CompletionRequest,
    index: int,
    before: CompletionLogprobs | None,
    sample: Generation | None,
) -> CompletionChoice:
    """Makes a choice. before: logprobs of an echoed prompt. sample: its continuation, if any."""
    text, logprobs = _echoed(service, body, index), before
    if sample is not None:
        tokenizer = service.llm.tokenizer
        offset = sum(map(len, before.tokens)) if before else 0
        logprobs = _joined(before, _sample_logprobs(tokenizer, sample, offset))
        text += sample.text
    return CompletionChoice(
        index=index,
        text=text,
        logprobs=logprobs,
        finish_reason=_finish(sample) if sample else "length",
        stop_reason=sample.stop_reason if sample else None,
    )


async def pieces(
    service: Service, body: CompletionRequest, job: Job, began: float
) -> AsyncIterator[dict[str, Any]]:
    """Yields the chunks of all continuations, as they come."""
    tokenizer = service.llm.tokenizer
    head = {
        "id": new_id("cmpl"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": service.name,
    }
    offsets: dict[int, int] = {}
    num_prompts = len(body.prompts)
    async for update in service.updates(job, began):
        index, text = update.index, update.text
        if index not in offsets:
            text = _echoed(service, body, index) + text
            offsets[index] = 0
        logprobs = None
        if body.logprobs is not None and update.token_ids:
            tokens = zip(update.token_ids, update.logprobs, update.top, strict=True)
            made = completion_logprobs(tokenizer, tokens, offsets[index])
            offsets[index] += sum(map(len, made.tokens))
            logprobs = made.model_dump()
        finish: dict[str, Any] = {"finish_reason": None, "stop_reason": None}
        if update.is_last:
            sample = service.llm.result(update.request)
            if sample.error:
                raise request_failed(sample.error)
            finish = {"finish_reason": _finish(sample), "stop_reason": sample.stop_reason}
        if not (text or logprobs or update.is_last):
            continue
        chunk = {
            **head,
            "choices": [{"index": index, "text": text, "logprobs": logprobs, **finish}],
        }
        if body.usage_always_asked:
            chunk["usage"] = service.usage(job.requests, num_prompts).model_dump()
        elif body.usage_asked:
            chunk["usage"] = None
        yield chunk
    if body.usage_asked:
        usage = service.usage(job.requests, num_prompts).model_dump()
        yield {**head, "choices": [], "usage": usage}


def _finish(sample: Generation) -> Literal["stop", "length"]:
    return "length" if sample.finish_reason == "length" else "stop"


def _echoed(service: Service, body: CompletionRequest, index: int) -> str:
    """Returns the prompt of a choice as text, if it is to stand before the continuation."""
    if not body.echo:
        return ""
    prompt = body.prompts[index // (body.n or 1)]
    return prompt if isinstance(prompt, str) else service.llm.tokenizer.decode(prompt)


def _echoed_logprobs(
    tokenizer: "Tokenizer", body: CompletionRequest, ids: Sequence[int], scored: Iterator[Request]
) -> CompletionLogprobs | None:
    """Returns logprobs of a prompt's tokens, if they were asked for.

    scored: the next one is this prompt's, unless that has a single token.
    """
    if not body.echo or body.logprobs is None:
        return None
    first = _token_name(tokenizer, ids[0])
    made = CompletionLogprobs(
        tokens=[first], token_logprobs=[None], top_logprobs=[None], text_offset=[0]
    )
    if len(ids) == 1:
        return made
    request = next(scored)
    top: list[_Top] = [[]] * (len(ids) - 1)
    if body.logprobs:
        best = zip(request.prompt_likeliest.tolist(), request.prompt_most.tolist(), strict=True)
        top = [[each] for each in best]
    tokens = zip(ids[1:], request.prompt_logprobs.tolist(), top, strict=True)
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
