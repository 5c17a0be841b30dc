"""This module answers /v1/chat/completions, whole or in pieces."""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llama_jax.engine.request import Request
from llama_jax.jobs import Job
from llama_jax.results import Generation, TokenLogprob
from llama_jax.serve.engine_thread import Submission, Update
from llama_jax.serve.errors import bad_request, request_failed
from llama_jax.serve.prompt_logprobs import prompt_logprobs, scoring
from llama_jax.serve.replies import (
    LEAST_LOGPROB,
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatFinish,
    ChatLogprob,
    ChatLogprobs,
    FunctionCall,
    ToolCallReply,
    TopLogprob,
    new_id,
)
from llama_jax.serve.schemas import ChatRequest
from llama_jax.serve.service import Service
from llama_jax.serve.tool_stream import Delta, ToolCallStream, arguments_text
from llama_jax.text.tools import ToolCall

if TYPE_CHECKING:
    from llama_jax.llm import LLM
    from llama_jax.text.tokenizer import Tokenizer

_TAG = "<|python_tag|>"


async def prepare(service: Service, body: ChatRequest) -> Job[Generation]:
    """Returns what a request asks of the engine. Raises `ApiError` for what is wrong with it."""
    service.check_model(body.model)
    service.check_queue(body.n or 1)  # before it costs anything
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if body.chat_template is not None and "{" in body.chat_template:
        raise bad_request(
            "chat_template: only the name of one of the checkpoint's templates is taken",
            "chat_template",
        )
    given: dict[str, Any] = {
        "chat_template": body.chat_template,
        "chat_template_kwargs": body.chat_template_kwargs,
        "continue_final_message": bool(body.continue_final_message),
        "add_generation_prompt": body.add_generation_prompt is not False,
    }
    if body.documents is not None:
        given["documents"] = body.documents

    def make() -> Job[Generation]:
        sampling = service.sampling(body, body.limit, logprobs)
        return service.llm.chat_job(
            body.messages,
            sampling,
            tools=body.tools,
            tool_choice=body.choice,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            is_streamed=bool(body.stream),
            **given,
        )

    job = await service.in_thread(make, body)
    named = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    service.check_room(job.requests[0], body.limit, named)
    service.metrics.asked(job.requests)
    return job


async def whole(service: Service, body: ChatRequest, began: float) -> ChatCompletion:
    """Returns a reply in one piece. began: when the request came."""
    job = await prepare(service, body)
    drawn = job.requests
    (scored,) = scoring([drawn[0].prompt], body.prompt_logprobs, has_ranks=True)
    if scored is not None:
        combine = job.combine
        job = Job((*drawn, scored), lambda requests: combine(requests[:-1]))
    result = await service.run(job, began)
    choices = [_choice(service.llm, body, *each) for each in enumerate(result.samples)]
    return ChatCompletion(
        id=new_id("chatcmpl"),
        created=int(time.time()),
        model=service.name,
        choices=choices,
        usage=service.usage(drawn),
        prompt_logprobs=(
            None
            if body.prompt_logprobs is None
            else prompt_logprobs(service.llm.tokenizer, scored, body.prompt_logprobs)
        ),
    )


def _choice(llm: "LLM", body: ChatRequest, index: int, sample: Generation) -> ChatChoice:
    content: str | None = sample.text
    calls = sample.tool_calls if body.may_call else ()
    if calls:
        content = _before_calls(llm, body, sample) or None
    return ChatChoice(
        index=index,
        message=AssistantMessage(
            content=content,
            tool_calls=[_call_reply(call) for call in calls] or None,
        ),
        logprobs=_logprobs(llm.tokenizer, sample.logprobs),
        finish_reason=_finish(sample, calls),
        stop_reason=sample.stop_reason,
    )


def _call_reply(call: ToolCall) -> ToolCallReply:
    function = FunctionCall(name=call.name, arguments=arguments_text(call))
    return ToolCallReply(id=call.id, function=function)


def _before_calls(llm: "LLM", body: ChatRequest, sample: Generation) -> str:
    """Returns what a reply with calls says to the user: the text before them."""
    tag = llm.tokenizer.special_tokens.get(_TAG, -1)
    if tag in sample.token_ids:
        return llm.tokenizer.decode(sample.token_ids[: sample.token_ids.index(tag)]).rstrip()
    deltas = _tool_stream(llm, body).push(sample.text)
    return "".join(delta.get("content", "") for delta in deltas)


def _tool_stream(llm: "LLM", body: ChatRequest) -> ToolCallStream:
    tag = llm.tokenizer.special_tokens.get(_TAG)
    is_parallel = body.parallel_tool_calls is not False
    return ToolCallStream(llm.tool_format, body.tool_names, tag, is_parallel)


def _finish(sample: Generation, calls: Sequence[ToolCall]) -> ChatFinish:
    if calls:
        return "tool_calls"
    return "length" if sample.finish_reason == "length" else "stop"


def _logprobs(
    tokenizer: "Tokenizer", logprobs: Sequence[TokenLogprob] | None
) -> ChatLogprobs | None:
    if logprobs is None:
        return None
    content = [
        ChatLogprob(
            **_token(tokenizer, each.token_id, each.logprob),
            top_logprobs=[
                TopLogprob(**_token(tokenizer, token_id, value)) for token_id, _, value in each.top
            ],
        )
        for each in logprobs
    ]
    return ChatLogprobs(content=content)


def _token(tokenizer: "Tokenizer", token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": max(logprob, LEAST_LOGPROB),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


# In pieces.


def pieces(service: Service, body: ChatRequest, submission: Submission) -> "ChatPieces":
    """Returns what writes the chunks of a reply."""
    return ChatPieces(service, body, submission)


class ChatPieces:
    """Writes the chunks of a reply, of all its choices as they come (`events.Pieces`)."""

    def __init__(self, service: Service, body: ChatRequest, submission: Submission) -> None:
        self._service, self._body, self._requests = service, body, submission.requests
        self._head = {
            "id": new_id("chatcmpl"),
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": service.name,
        }
        self._streams = [
            _tool_stream(service.llm, body) if body.may_call else None for _ in self._requests
        ]
        self._has_begun = [False] * len(self._requests)

    def of(self, update: Update) -> Iterator[dict[str, Any]]:
        llm, body, index = self._service.llm, self._body, update.index
        if not self._has_begun[index]:
            self._has_begun[index] = True
            yield self._chunk(index, {"role": "assistant", "content": ""})
        deltas, last = _news(llm, body, self._streams[index], update)
        logprobs = _new_logprobs(llm.tokenizer, update) if body.logprobs else None
        if logprobs and not deltas:
            deltas = [{"content": ""}]
        for delta in deltas:
            yield self._chunk(index, delta, logprobs=logprobs)
            logprobs = None
        if last:
            yield self._chunk(index, {}, **last)

    def end(self) -> Iterator[dict[str, Any]]:
        if self._body.usage_asked:
            yield {**self._head, "choices": [], "usage": self._usage()}

    def _chunk(self, index: int, delta: Delta, **fields: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **fields}
        made = {**self._head, "choices": [choice]}
        if self._body.usage_always_asked:
            made["usage"] = self._usage()
        elif self._body.usage_asked:
            made["usage"] = None
        return made

    def _usage(self) -> dict[str, Any]:
        return self._service.usage(self._requests).model_dump()


def _news(
    llm: "LLM", body: ChatRequest, stream: ToolCallStream | None, update: Update
) -> tuple[list[Delta], dict[str, Any]]:
    """Returns the pieces of a message that an update brings, and how it ends, if it does."""
    request: Request = update.request
    if request.error:
        raise request_failed(request.error)
    if stream is None:
        deltas: list[Delta] = [{"content": update.text}] if update.text else []
    else:
        deltas = stream.push(update.text, update.token_ids)
    if not update.is_last:
        return deltas, {}
    sample = llm.result(request, is_chat=stream is not None)
    if sample.error:
        raise request_failed(sample.error)
    calls = sample.tool_calls
    if stream is not None:
        deltas += stream.end(calls)
    return deltas, {"finish_reason": _finish(sample, calls), "stop_reason": sample.stop_reason}


def _new_logprobs(tokenizer: "Tokenizer", update: Update) -> dict[str, Any] | None:
    if not update.token_ids:
        return None
    content = [
        {
            **_token(tokenizer, token_id, logprob),
            "top_logprobs": [_token(tokenizer, *each) for each in top],
        }
        for token_id, logprob, top in zip(
            update.token_ids, update.logprobs, update.top, strict=True
        )
    ]
    return {"content": content, "refusal": None}
