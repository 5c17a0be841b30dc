"""Implements `llama-jax chat`: a conversation in the terminal."""

import json
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from llama_jax.cli import options
from llama_jax.cli.output import in_few_lines, note, print_json, stderr
from llama_jax.cli.speed import Speed, snapshot, speed_since
from llama_jax.plural import counted

if TYPE_CHECKING:
    from llama_jax.llm import LLM
    from llama_jax.results import Generation, Piece
    from llama_jax.sampling_params import SamplingParams

_HELP = """\
/reset        forget the conversation
/system TEXT  set the system message and start over
/tool RESULT  give the result of the model's tool call
/help         show this
/quit         end (or Ctrl-D); Ctrl-C stops a reply"""


@dataclass(frozen=True)
class _Reply:
    """A reply. If it was interrupted, result and speed are None, and text is incomplete."""

    text: str
    result: "Generation | None"
    speed: Speed | None


def chat(
    model: options.Model = None,
    message: Annotated[
        list[str] | None,
        typer.Option(
            "--message", "-m", help="Send this and exit; several are turns of one conversation."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    tools: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.json", help="Tools that the model may call: a JSON list of schemas."
        ),
    ] = None,
    as_json: options.Json = False,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    dtype: options.DType = "bfloat16",
    activations: options.Activations = "auto",
    kv_dtype: options.KVDtype = "bf16",
    max_seq_len: options.MaxSeqLen = None,
    num_speculative_tokens: options.NumSpeculativeTokens = None,
    draft: options.Draft = None,
) -> None:
    """Chat with a model. Replies appear as they are generated.

    Without -m, messages are read from the terminal, or from a pipe, one per line. Replies go to
    stdout, everything else to stderr.

    **Examples**

        llama-jax chat
        llama-jax chat -m "What is 47 + 85?"
        llama-jax chat -m "My name is Ada." -m "What is my name?" --json
        llama-jax chat meta-llama/Llama-3.1-8B-Instruct --system "Answer in French." --seed 1
        llama-jax chat ./llama-70b --draft ./llama-8b
        llama-jax chat ./llama-8b --tools weather.json -m "How warm is it in Oslo?"
    """
    asked = options.sampling_settings(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        min_p=min_p, repetition_penalty=repetition_penalty, seed=seed, stop=stop,
    )  # fmt: skip
    schemas = None if tools is None else _read_tools(tools)
    llm = options.load(
        model, show_plan=model is not None and not as_json, dtype=dtype, activations=activations,
        kv_dtype=kv_dtype, max_seq_len=max_seq_len, max_batch_size=1, draft=draft,
        num_speculative_tokens=num_speculative_tokens,
    )  # fmt: skip
    sampling = replace(llm.default_sampling, **asked)
    history: list[dict[str, Any]] = [] if system is None else [_message("system", system)]
    interactive = message is None and sys.stdin.isatty()
    if not as_json:
        stderr.print(f"[bold]{options.model_name(model)}[/bold]", highlight=False)
    if interactive:
        with stderr.status("preparing"):
            ready = llm.warmup(("tokens",))
        note(f"ready: {ready}")
        note("/help shows the commands")
    turns = iter(message) if message is not None else _typed() if interactive else _piped()
    for turn in turns:
        command, _, argument = turn.strip().partition(" ")
        if interactive and command.startswith("/"):
            if command == "/quit":
                return
            if command != "/tool" or not argument:
                _obey(command, argument, history)
                continue
            _say(llm, history, _message("tool", argument), sampling, schemas, interactive)
        elif as_json:
            print_json(_json_turn(llm, history, _message("user", turn), sampling, schemas))
        else:
            _say(llm, history, _message("user", turn), sampling, schemas, interactive)


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _typed() -> Iterator[str]:
    """Yield messages from the terminal until Ctrl-D, with line editing if Python has it."""
    with suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line.strip():
            yield line


def _piped() -> Iterator[str]:
    return (line.rstrip("\r\n") for line in sys.stdin if line.strip())


def _obey(command: str, argument: str, history: list[dict[str, Any]]) -> None:
    """Run a command that needs no model."""
    if command == "/reset":
        history[:] = [message for message in history if message["role"] == "system"]
        note("the conversation is forgotten")
    elif command == "/system" and argument:
        history[:] = [_message("system", argument)]
        note("the system message is set; the conversation is forgotten")
    else:
        note(_HELP)


def _say(
    llm: "LLM",
    history: list[dict[str, Any]],
    message: dict[str, Any],
    sampling: "SamplingParams",
    tools: list[Any] | None,
    interactive: bool,
) -> None:
    """Do one turn: stream the reply to stdout, then print remarks about it.

    In a conversation, a turn that fails is undone and explained; otherwise the error is raised.
    """
    try:
        reply = _take_turn(llm, history, message, sampling, tools, _show)
    except ValueError as error:
        if not interactive:
            raise
        stderr.print(
            in_few_lines(error), style="red", markup=False, highlight=False, soft_wrap=True
        )
        note("Your message was not added. /reset starts over.")
        return
    print()
    if reply.result is None:
        note("stopped")
        if not interactive:
            raise KeyboardInterrupt
        return
    for call in reply.result.tool_calls:
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        call_text = f"tool call: {call.name}({arguments})"
        stderr.print(call_text, style="cyan", markup=False, highlight=False, soft_wrap=True)
    if reply.result.finish_reason == "length":
        note(_why_cut(llm, reply.result))
    note(str(reply.speed))


def _json_turn(
    llm: "LLM",
    history: list[dict[str, Any]],
    message: dict[str, Any],
    sampling: "SamplingParams",
    tools: list[Any] | None,
) -> dict[str, Any]:
    reply = _take_turn(llm, history, message, sampling, tools, lambda _: None)
    if reply.result is None or reply.speed is None:
        raise KeyboardInterrupt
    return {
        "message": message["content"],
        "reply": reply.text,
        "tool_calls": [
            {"name": call.name, "arguments": call.arguments} for call in reply.result.tool_calls
        ],
        "finish_reason": reply.result.finish_reason,
        **reply.speed.to_dict(),
    }


def _take_turn(
    llm: "LLM",
    history: list[dict[str, Any]],
    message: dict[str, Any],
    sampling: "SamplingParams",
    tools: list[Any] | None,
    show: Callable[[str], None],
) -> _Reply:
    """Generate a reply. It and the message are added to the history, unless there was no reply."""
    text, result, before = "", None, snapshot(llm)
    pieces = cast("Generator[Piece]", llm.stream([*history, message], sampling, tools=tools))
    waiting = stderr.status("reading")
    try:
        waiting.start()
        for piece in pieces:
            waiting.stop()
            show(piece.text)
            text += piece.text
            result = piece.result
    except KeyboardInterrupt:
        pieces.close()  # releases the model
    finally:
        waiting.stop()
    if result is not None and result.tool_calls:
        history += [message, {"role": "assistant", "tool_calls": result.tool_calls}]
    elif text:
        history += [message, _message("assistant", text)]
    return _Reply(text, result, speed_since(before, llm, result) if result else None)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _why_cut(llm: "LLM", result: "Generation") -> str:
    total = len(result.prompt_token_ids) + len(result.token_ids)
    if total >= llm.max_seq_len:
        return (
            f"the context is full: {total} of {llm.max_seq_len} tokens. /reset starts over; "
            "--max-seq-len makes it longer, up to the model's own context"
        )
    return f"cut after {counted(len(result.token_ids), 'token')}; --max-new-tokens allows more"


def _read_tools(path: Path) -> list[dict[str, Any]]:
    from llama_jax.json_file import parse, read_bytes

    schemas = parse(read_bytes(path), path)
    if isinstance(schemas, dict):
        return [schemas]
    if not isinstance(schemas, list):
        raise ValueError(f"{path}: expected a list of tool schemas, got {type(schemas).__name__}")
    for index, schema in enumerate(schemas):
        if not isinstance(schema, dict):
            raise ValueError(
                f"{path}: expected an object at index {index}, got {type(schema).__name__}"
            )
    return schemas
