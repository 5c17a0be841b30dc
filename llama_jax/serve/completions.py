"""/v1/completions: prompts as they are, texts or token ids, to continuations."""

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from llama_jax.engine.request import Request
from llama_jax.results import Generation
from llama_jax.scoring import Question
from llama_jax.serve.chat import LEAST_LOGPROB
from llama_jax.serve.engine_thread import Job
from llama_jax.serve.errors import bad_request, internal_error
from llama_jax.serve.replies import Completion, CompletionChoice, CompletionLogprobs
from llama_jax.serve.schemas import CompletionRequest
from llama_jax.serve.service import Service, new_id

if TYPE_CHECKING:
    from llama_jax.text.tokenizer import Tokenizer

_DEFAULT_MAX_TOKENS = 16  # as OpenAI and vLLM have it
_Top = Sequence[tuple[int, float]]


async def prepare(service: Service, body: CompletionRequest) -> Question[list[Generation]]:
    """What a request asks of the engine: continuations of all its prompts, in their order."""
    service.check_model(body.model)
    if body.echo and body.logprobs is not None:
        raise bad_request("echo: not supported together with logprobs; leave one out", "echo")
    limit = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    sampling = service.sampling(body, limit, body.logprobs)

    def make() -> Question[list[Generation]]:
        parts = [
            service.llm.generate_question(prompt, sampling, is_streamed=bool(body.stream))
            for prompt in body.prompts
        ]

        def conclude(requests: Sequence[Request]) -> list[Generation]:
            return [sample for part in parts for sample in part.answer().samples]

        return Question(tuple(request for part in parts for request in part.requests), conclude)

    question = await service.in_thread(make)
    for request in question.requests:
        service.check_room(request, body.max_tokens)
    service.metrics.asked(sampling.n, sampling.max_new_tokens)
    return question


async def whole(service: Service, body: CompletionRequest, began: float) -> Completion:
    """All continuations at once. began: when the request came."""
    question = await prepare(service, body)
    samples = await service.answer(question, began)
    choices = []
    for index, sample in enumerate(samples):
        before = _echoed(service, body, index)
        choices.append(
            CompletionChoice(
                index=index,
                text=before + sample.text,
                logprobs=_sample_logprobs(service.llm.tokenizer, sample),
                finish_reason=_finish(sample),
                stop_reason=sample.stop_reason,
            )
        )
    return Completion(
        id=new_id("cmpl"),
        created=int(time.time()),
        model=service.name,
        choices=choices,
        usage=service.usage(question.requests, len(body.prompts)),
    )


async def pieces(
    service: Service, body: CompletionRequest, job: Job, began: float
) -> AsyncIterator[dict[str, Any]]:
    """The chunks of all continuations, as they come."""
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
                raise internal_error(sample.error)
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
    """The prompt of a choice as text, if it is to stand before the continuation."""
    if not body.echo:
        return ""
    prompt = body.prompts[index // (body.n or 1)]
    return prompt if isinstance(prompt, str) else service.llm.tokenizer.decode(prompt)


def _sample_logprobs(tokenizer: "Tokenizer", sample: Generation) -> CompletionLogprobs | None:
    if sample.logprobs is None:
        return None
    tokens = [
        (each.token_id, each.logprob, [(i, value) for i, _, value in each.top])
        for each in sample.logprobs
    ]
    return completion_logprobs(tokenizer, tokens, 0)


def completion_logprobs(
    tokenizer: "Tokenizer", tokens: Iterable[tuple[int, float, _Top]], offset: int
) -> CompletionLogprobs:
    """tokens: id, logprob, and the likeliest in its place; offset: of the first, in characters."""
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
    """A token's text, or its bytes where these are no text of their own: names must differ."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
