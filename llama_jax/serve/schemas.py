"""This module has the bodies of requests, OpenAI's with vLLM's additional fields.

Fields that nobody knows are accepted and named in the log, as vLLM does it. Fields that vLLM or
OpenAI know and that are not done here are refused, unless their value asks for nothing.
"""

import logging
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from llama_jax.sampling_params import MAX_TOP_LOGPROBS
from llama_jax.serve.errors import bad_request
from llama_jax.serve.options import (
    MAX_BIASES,
    MAX_MESSAGES,
    MAX_N,
    MAX_PROMPTS,
    MAX_STOP_IDS,
    MAX_STOP_LENGTH,
    MAX_STOPS,
    MAX_TOKEN_IDS,
    MAX_TOOLS,
    MAX_UNKNOWN,
)
from llama_jax.text.tool_choice import ToolChoice

_log = logging.getLogger(__name__)

# Fields that are not done, with the values beside null that ask for nothing.
_NOT_DONE: Mapping[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "function_call": ("none",),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "output_expires_after": (),
    "prediction": (),
    "priority": (0,),
    "prompt_embeds": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "vllm_xargs": ({},),
    "web_search_options": (),
}
# Fields that change nothing in a reply: who asks, where it is kept, how it is routed.
_HARMLESS = {
    "cache_salt", "metadata", "prompt_cache_key", "prompt_cache_retention", "request_id",
    "safety_identifier", "service_tier", "spaces_between_special_tokens", "store", "user",
}  # fmt: skip

_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
_TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
# Of JSON already: looking at each value again would take longer than reading it did.
_Object = dict[str, Any]


def _check_biases(given: Any) -> Any:
    """Refuses too many unread: pydantic would make an error of each of them that is wrong."""
    if isinstance(given, dict) and len(given) > MAX_BIASES:
        raise ValueError(f"at most {MAX_BIASES} tokens are possible, got {len(given)}")
    return given


class _Body(BaseModel):
    """A strictly validated body: "1" is no number and 1 no bool, so that nothing is misread.

    Lists have `fail_fast`. Pydantic would otherwise make an error of each wrong item, and a body of
    5 MB with a million of them would keep the event loop for most of a minute.
    """

    model_config = ConfigDict(extra="allow", strict=True)


class StreamOptions(_Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchemaFormat(_Body):
    name: str
    description: str | None = None
    schema_: _Object | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_a_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and (
            self.json_schema is None or self.json_schema.schema_ is None
        ):
            raise ValueError('"json_schema" needs json_schema: {"name", "schema"}')
        return self


class StructuredOutputs(BaseModel):
    """The form of the text in vLLM's field, given in exactly one way."""

    model_config = ConfigDict(extra="forbid", strict=True)

    json_: _Object | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(fail_fast=True)] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _is_one(self) -> "StructuredOutputs":
        given = [
            name for name in type(self).model_fields if getattr(self, name) not in (None, False)
        ]
        if len(given) != 1:
            raise ValueError(f"give exactly one of json, json_object, regex, choice and grammar, "
                             f"got {len(given)}")  # fmt: skip
        return self


class NamedFunction(_Body):
    name: str


class NamedTool(_Body):
    type: Literal["function"]
    function: NamedFunction


class Function(_Body):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: _Object | None = None
    strict: bool | None = None


class Tool(_Body):
    type: Literal["function"]
    function: Function


def _check_tools(given: list[_Object]) -> list[_Object]:
    """Returns the same objects: their keys reach the template in the order in which they came."""
    for index, tool in enumerate(given):
        try:
            Tool.model_validate(tool)
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(map(str, first["loc"]))
            raise ValueError(f"tools[{index}].{path}: {first['msg']}") from None
    return given


_Tools = Annotated[
    list[_Object],
    Field(fail_fast=True, max_length=MAX_TOOLS),
    AfterValidator(_check_tools),
    WithJsonSchema({"type": "array", "maxItems": MAX_TOOLS, "items": Tool.model_json_schema()}),
]


class Asked(_Body):
    """The fields that both kinds of completion share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1e6)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_BIASES),
            BeforeValidator(_check_biases),
        ]
        | None
    ) = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    stop_token_ids: (
        Annotated[list[_TokenId], Field(fail_fast=True, max_length=MAX_STOP_IDS)] | None
    ) = None
    ignore_eos: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _is_told_at_once(self) -> Self:
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs: not possible with stream")
        return self

    @property
    def usage_asked(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_always_asked(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


# The names are `sampling_params.SamplingParams`' where these are its own.
SAMPLING_FIELDS: Mapping[str, str] = {
    "n": "n",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "min_tokens": "min_new_tokens",
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
}

_MESSAGES = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_MESSAGES,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"type": "string", "examples": ["system", "user", "assistant", "tool"]},
            "content": {
                "anyOf": [
                    {"type": "string"},
                    {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["type", "text"],
                            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        },
                    },
                    {"type": "null"},
                ]
            },
            "tool_calls": {"type": "array", "items": {"type": "object"}},
            "tool_call_id": {"type": "string"},
        },
    },
}


_Messages = Annotated[
    list[_Object],
    Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES),
    WithJsonSchema(_MESSAGES),
]


class ChatRequest(Asked):
    """POST /v1/chat/completions."""

    messages: _Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: _Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: _Object | None = None
    documents: Annotated[list[_Object], Field(fail_fast=True)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    echo: Literal[False] | None = None

    @property
    def limit(self) -> int | None:
        """Return the limit of new tokens, if one was given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def tool_names(self) -> list[str]:
        return [str(tool["function"]["name"]) for tool in self.tools or ()]

    @property
    def must_call(self) -> bool:
        """Return whether the reply has to be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def may_call(self) -> bool:
        """Return whether calls in the reply are told of."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def choice(self) -> ToolChoice:
        """Return `tool_choice` in the form of `LLM.chat`."""
        if isinstance(self.tool_choice, NamedTool):
            return self.tool_choice.model_dump()
        return self.tool_choice or "auto"

    @model_validator(mode="after")
    def _agrees(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: add_generation_prompt has to be false")
        return self


_Ids = Annotated[list[_TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_TOKEN_IDS)]


class CompletionRequest(Asked):
    """POST /v1/completions."""

    prompt: (
        str
        | _Ids
        | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[_Ids], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> "CompletionRequest":
        if self.max_tokens == 0 and (not self.echo or self.stream or (self.n or 1) > 1):
            raise ValueError("max_tokens: 0 needs echo, without stream and n")
        if self.echo and not all(isinstance(ids, list) or _is_unicode(ids) for ids in self.prompts):
            raise ValueError("prompt: half of a surrogate pair is no text that could be echoed")
        return self

    @property
    def num_prompt_top(self) -> int | None:
        """Returns how many likeliest tokens to find in the place of each prompt token; None if the
        prompt needs no logprobs."""
        echoed = self.logprobs if self.echo else None
        asked = [each for each in (echoed, self.prompt_logprobs) if each is not None]
        return max(asked, default=None)

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TokenizeRequest(_Body):
    """POST /tokenize: a prompt as /v1/completions takes it, or messages as chat does."""

    model: str | None = None
    prompt: str | None = None
    messages: _Messages | None = None
    tools: _Tools | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: _Object | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _is_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either this or messages")
        return self


class DetokenizeRequest(_Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[_TokenId], Field(fail_fast=True, max_length=MAX_TOKEN_IDS)]


_Prompt = str | _Ids
_Metadata = Annotated[str, Field(max_length=512)]


class ScoreRequest(_Body):
    """POST /v1/score: how likely is each of `completions` after `prompt`? Texts or token ids."""

    model: str | None = None
    prompt: str | Annotated[list[_TokenId], Field(fail_fast=True, max_length=MAX_TOKEN_IDS)]
    completions: Annotated[
        list[_Prompt], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)
    ]


class BatchRequest(_Body):
    """POST /v1/batches."""

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: Annotated[dict[str, _Metadata], Field(max_length=16)] | None = None


def check_unknown(body: BaseModel) -> None:
    """Names unknown fields in the log. Raises `ApiError` for one that asks for what is not done."""
    unknown = body.model_extra or {}
    if len(unknown) > MAX_UNKNOWN:
        raise bad_request(f"{len(unknown)} unknown fields; at most {MAX_UNKNOWN} are possible")
    for name, value in unknown.items():
        if name in _NOT_DONE and value is not None and not _is_any(value, _NOT_DONE[name]):
            raise bad_request(f"{name}: not supported by this server; leave it out", name)
    ignored = sorted(unknown.keys() - _NOT_DONE.keys() - _HARMLESS)
    if ignored:
        names = [name if name.isidentifier() and len(name) < 64 else "..." for name in ignored[:8]]
        _log.warning("unknown fields without effect: %s", ", ".join(names))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_any(value: Any, others: tuple[Any, ...]) -> bool:
    """Says whether a value equals one of these and is of its type: True is not 1."""
    return any(type(value) is type(other) and value == other for other in others)
