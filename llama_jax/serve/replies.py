"""This module has the shapes of answers: OpenAI's, with vLLM's `stop_reason` and our own scores.

Pieces of streams are written as plain dictionaries where they are made (`chat`, `completions`):
there are many of them, and pydantic would take longer than the rest of the work for one.
"""

from typing import Literal
from uuid import uuid4

from pydantic import BaseModel

ChatFinish = Literal["stop", "length", "tool_calls"]
# JSON has no minus infinity: what vLLM writes for it.
LEAST_LOGPROB = -9999.0


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid4().hex}"


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    error: ErrorBody


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """Tokens; a prompt counts once, however many continuations it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class FunctionCall(BaseModel):
    name: str
    arguments: str


class ToolCallReply(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCallReply] | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class PromptLogprob(BaseModel):
    """Has vLLM's fields. rank: of the token among all tokens in its place, from 1 on."""

    logprob: float
    rank: int
    decoded_token: str


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish
    stop_reason: int | str | None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None


class CompletionLogprobs(BaseModel):
    """One entry for each token; None for the first of an echoed prompt, which follows nothing."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llama-jax"
    root: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class TokenizerInfo(BaseModel):
    """Names of tokens with a role, and the chat template."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None


class Text(BaseModel):
    prompt: str


class ScoreItem(BaseModel):
    """The score of one completion.

    logprob: the sum over its tokens, natural log.
    is_greedy: whether each token is the model's likeliest.
    probability: of this completion, given that it is one of the request's.
    """

    index: int
    logprob: float
    num_tokens: int
    perplexity: float
    is_greedy: bool
    probability: float
    tokens: list[str]
    token_logprobs: list[float]


class ScoreReply(BaseModel):
    id: str
    object: Literal["score"] = "score"
    created: int
    model: str
    best: int
    data: list[ScoreItem]
    usage: Usage


class Health(BaseModel):
    status: str
