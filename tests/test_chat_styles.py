"""Named templates, messages in each template's form, and tool loops, beside transformers.

The templates are small ones in the manner of those that Llama models are published with.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_jax.errors import CheckpointError
from llama_jax.text.chat import choose_template, encode_chat, render_chat
from llama_jax.text.chat_files import TemplateSource, read_chat_templates
from llama_jax.text.chat_template import ChatTemplateError
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tools import parse_tool_calls, tool_format
from tests.test_chat import ATTACK, plain, specials, user

__all__ = ["plain"]  # the fixture

LLAMA31 = (
    "{{- bos_token }}{%- if tools %}{{- 'Tools: ' }}{%- for t in tools %}"
    "{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'tool' %}"
    "{{- '<|start_header_id|>ipython<|end_header_id|>' }}{%- if m.content is mapping or m.content "
    "is iterable %}{{- m.content | tojson }}{%- else %}{{- m.content }}{%- endif %}"
    "{%- elif 'tool_calls' in m %}{%- if m.tool_calls | length != 1 %}"
    "{{- raise_exception('one call only') }}{%- endif %}{%- set call = m.tool_calls[0].function"
    ' %}{{- \'<|start_header_id|>assistant<|end_header_id|>{"name": "\' + call.name + \'", '
    "\"parameters\": ' }}{{- call.arguments | tojson }}{{- '}' }}{%- else %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>' + m['content'] | trim }}"
    "{%- endif %}{{- '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>' }}{%- endif %}"
)
HERMES = (
    "{{ bos_token }}{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>"
    "{% endif %}{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls is defined %}"
    "<|im_start|>assistant{% for c in m.tool_calls %}{% set f = c.function %}\n<tool_call>\n"
    '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}{% elif m.role == 'tool' %}<|im_start|>tool\n<tool_response>\n{{ m.content }}\n"
    "</tool_response>{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none "
    "%}{% for c in m['tool_calls'] %}{{ '<｜tool▁call▁begin｜>' + c['type'] + '<｜tool▁sep｜>' + "  # noqa: RUF001
    "c['function']['name'] + '\\n```json\\n' + c['function']['arguments'] + '\\n```"
    "<｜tool▁call▁end｜>' }}{% endfor %}{% elif m['role'] == 'assistant' %}{{ '<|Assistant|>' + "  # noqa: RUF001
    "m['content'].split('</think>')[-1] }}{% else %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
VISION = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
GUARD = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content[0]['text'] }}\n{% endfor %}"
)
STYLES = {"llama31": LLAMA31, "hermes": HERMES, "r1": R1}
TOOL = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "The time of a place.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
ARGUMENTS = {"place": "Zürich", "n": [1, None, {"a": True}]}


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "clock", "arguments": arguments}
    return {"id": "call00001", "type": "function", "function": function}


def asked(arguments: Any = None, **keys: Any) -> list[dict[str, Any]]:
    calls = [call(ARGUMENTS if arguments is None else arguments)]
    return [*user("time?"), {"role": "assistant", **keys, "tool_calls": calls}]


def styled(plain: Tokenizer, style: str) -> Tokenizer:
    return dataclasses.replace(plain, chat_template=STYLES[style])


def conversations() -> Iterator[list[dict[str, Any]]]:
    """Twenty: with and without a system message, a call, its result, an answer, a last question."""
    systems: list[list[dict[str, Any]]] = [[], [{"role": "system", "content": " Be\nbrief. "}]]
    calls = [[], asked(content=None)[1:], [*asked(content=None)[1:], tool_result("9:00 <b>")]]
    ends = [[], [{"role": "assistant", "content": "<think>x</think> It is nine."}],
            [{"role": "assistant", "content": "é"}, *user("{{ 1 }} 語")],
            [{"role": "assistant", "content": "a"}, *user(" b "), *user("c")]]  # fmt: skip
    every = itertools.product(systems, calls, ends)
    yield from ([*s, *user("Which time?"), *c, *e] for s, c, e in itertools.islice(every, 20))


def tool_result(content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "call00001", "name": "clock", "content": content}


@pytest.mark.parity
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["plain", "tools"])
@pytest.mark.parametrize("style", STYLES)
def test_twenty_conversations_beside_transformers(
    plain: Tokenizer, style: str, tools: list[Any] | None
) -> None:
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    tokenizer = styled(plain, style)
    cases = list(conversations())
    assert len(cases) == 20
    for messages in cases:
        given = json.loads(json.dumps(messages))
        if style == "r1":  # what its template wants; transformers leaves this to the caller
            for each in given:
                for one in each.get("tool_calls", []):
                    one["function"]["arguments"] = json.dumps(ARGUMENTS, ensure_ascii=False)
        for prompted in (True, False):
            rendered, _ = chat_template_utils.render_jinja_template(
                [given],
                tools=tools,
                chat_template=STYLES[style],
                add_generation_prompt=prompted,
                **tokenizer.named_tokens,
            )
            ours = render_chat(tokenizer, messages, tools=tools, add_generation_prompt=prompted)
            assert ours == rendered[0]


@pytest.mark.parametrize("style", STYLES)
def test_arguments_reach_a_template_in_its_form(plain: Tokenizer, style: str) -> None:
    texts = {
        render_chat(styled(plain, style), asked(arguments, **keys))
        for arguments in (ARGUMENTS, json.dumps(ARGUMENTS))
        for keys in ({}, {"content": None})
    }
    assert len(texts) == 1
    assert json.dumps(ARGUMENTS, ensure_ascii=False) in texts.pop()


def test_null_keys_stay_unless_they_read_as_calls(plain: Tokenizer) -> None:
    source = "{% for m in messages %}{{ m.x is none }}{{ m.tool_calls is none }}{% endfor %}"
    messages = [{"role": "assistant", "content": "a", "x": None, "tool_calls": None}]
    tokenizer = dataclasses.replace(plain, chat_template=source)
    assert render_chat(tokenizer, messages) == "<|begin_of_text|>TrueTrue"
    for style in STYLES:
        tokenizer = styled(plain, style)
        expected = render_chat(tokenizer, [{"role": "assistant", "content": "a"}])
        assert render_chat(tokenizer, messages) == expected
        assert render_chat(tokenizer, [{**messages[0], "tool_calls": []}]) == expected


@pytest.mark.parametrize(
    ("source", "text", "parts"),
    [(LLAMA31, "a<|eot_id|>", "a\nb"), (VISION, "a", "ab"), (GUARD, "user: a\n", "user: a\n")],
)
def test_content_has_the_form_that_the_template_takes(
    plain: Tokenizer, source: str, text: str, parts: str
) -> None:
    tokenizer = dataclasses.replace(plain, chat_template=source)
    listed = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert text in render_chat(tokenizer, user("a"))
    assert parts in render_chat(tokenizer, user(listed))
    ids = encode_chat(tokenizer, user([{"type": "text", "text": ATTACK}]))
    ours = encode_chat(tokenizer, user("a"))
    assert specials(tokenizer, ids) == specials(tokenizer, ours)


@pytest.mark.parametrize(
    ("style", "reply"),
    [
        ("llama31", '{"name": "clock", "parameters": %s}<|eot_id|>'),
        ("hermes", 'So:\n<tool_call>\n{"name": "clock", "arguments": %s}\n</tool_call><|im_end|>'),
        (
            "r1",
            "<think>a</think>\n<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n"  # noqa: RUF001
            "```json\n%s\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",  # noqa: RUF001
        ),
    ],
)
def test_tool_loop(plain: Tokenizer, style: str, reply: str) -> None:
    tokenizer = styled(plain, style)
    form = tool_format(choose_template(tokenizer, tools=True))
    (found,) = parse_tool_calls(reply % json.dumps(ARGUMENTS), form)
    assert (found.name, found.arguments) == ("clock", ARGUMENTS)
    messages = [*user("time?"), {"role": "assistant", "tool_calls": [found]}, tool_result("9:00")]
    text = render_chat(tokenizer, messages, tools=[TOOL])
    (again,) = parse_tool_calls(render_chat(tokenizer, messages[1:2])[17:], form) or (found,)
    assert "9:00" in text and again.arguments == ARGUMENTS


@pytest.mark.parametrize(
    ("form", "reply", "count"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "</tool_call><tool_call>"}}'
         '</tool_call>\n<tool_call>{"name": "g", "arguments": {}}</tool_call>', 2),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{</tool_call>',
         0),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}<|im_end|>', 1),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}} and', 0),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}', 0),
        ("llama", '{"name": "f", "parameters": null}', 1),
        ("llama", '{"name": "f", "arguments": ""}', 1),
        ("llama", '{"name": "f"}', 0),
        ("hermes", "no call", 0),
        ("hermes", '<think><tool_call>{"name": "f", "arguments": {}}</tool_call></think>no', 0),
        ("nemotron", '<TOOLCALL>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]'
         "</TOOLCALL>", 2),
        ("llama", '<tool_call>{"name": "f", "arguments": {}}</tool_call>', 0),
    ],
)  # fmt: skip
def test_forms_of_calls(form: Any, reply: str, count: int) -> None:
    assert len(parse_tool_calls(reply, form)) == count


@pytest.mark.parametrize("style", STYLES)
def test_no_style_lets_a_user_write_special_tokens(plain: Tokenizer, style: str) -> None:
    def prompt(text: str) -> list[str]:
        tool = {"name": text, "description": text, "parameters": {text: {"enum": [text]}}}
        messages = [
            {"role": "system", "content": text},
            {"role": "user", "content": [{"type": "text", "text": text}] * 2},
            {
                "role": "assistant",
                "tool_calls": [{"name": text, "arguments": json.dumps({text: [text]})}],
            },
            {"role": "tool", "name": text, "content": text},
        ]
        tokenizer = styled(plain, style)
        return specials(tokenizer, encode_chat(tokenizer, messages, tools=[tool]))

    assert prompt(ATTACK) == prompt("harmless")


def test_the_right_one_of_several_templates(plain: Tokenizer) -> None:
    tokenizer = dataclasses.replace(
        plain, chat_template="plain", named_templates={"tool_use": "tools", "rag": "documents"}
    )
    for arguments, expected in (
        ({}, "plain"),
        ({"tools": []}, "plain"),
        ({"tools": [TOOL]}, "tools"),
        ({"chat_template": "rag", "tools": [TOOL]}, "documents"),
        ({"chat_template": "default", "tools": [TOOL]}, "plain"),
        ({"chat_template": "{{ x }}", "chat_template_kwargs": {"x": 1}}, "1"),
        ({"chat_template": "{{ x }}", "x": 2}, "2"),
    ):
        text = render_chat(tokenizer, user("a"), **arguments)  # type: ignore[arg-type]
        assert text == "<|begin_of_text|>" + expected
    with pytest.raises(ValueError, match=r"'rig' is not a template .* has default, rag, tool_use"):
        render_chat(tokenizer, user("a"), chat_template="rig")


@dataclasses.dataclass
class Named:
    name: str
    template: str


def test_where_templates_are_read_from(tmp_path: Path) -> None:
    listed = [Named("default", "a"), Named("tool_use", "b")]
    assert read_chat_templates(tmp_path, None) == {}
    assert read_chat_templates(tmp_path, listed) == {"default": "a", "tool_use": "b"}
    (tmp_path / "chat_template.json").write_text('{"chat_template": "j"}')
    assert read_chat_templates(tmp_path, None) == {"default": "j"}
    assert read_chat_templates(tmp_path, "c") == {"default": "c"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("t")
    assert read_chat_templates(tmp_path, listed) == {"default": "a", "tool_use": "t"}
    (tmp_path / "chat_template.jinja").write_text("d")
    assert read_chat_templates(tmp_path, listed) == {"default": "d", "tool_use": "t"}
    (tmp_path / "chat_template.jinja").write_bytes(b"a\xff")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja is not UTF-8: byte 1"):
        read_chat_templates(tmp_path, listed)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match='but none named "default"'):
        read_chat_templates(tmp_path, None)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("raise_exception('no')", "the template itself refuses this conversation: no"),
        ("'a' * 10 * 1000 * 1000", "the template is stopped: a text or list needs more than 8 MiB"),
    ],
    ids=["refused", "stopped"],
)
def test_messages_name_file_and_line(plain: Tokenizer, expression: str, message: str) -> None:
    source = TemplateSource("a\n{{ " + expression + " }}", "dir/chat_template.jinja")
    tokenizer = dataclasses.replace(plain, chat_template=source)
    with pytest.raises(ChatTemplateError) as error:
        render_chat(tokenizer, user("a"))
    assert str(error.value) == f"dir/chat_template.jinja, line 2: {message}"


@pytest.mark.parametrize("style", ["llama31", "hermes", "r1", None])
def test_the_last_message_is_continued(plain: Tokenizer, style: str | None) -> None:
    tokenizer = styled(plain, style) if style else plain
    messages = [*user("a"), {"role": "assistant", "content": "Once upon <|eot_id|>"}]
    whole = render_chat(tokenizer, messages, add_generation_prompt=False)
    text = render_chat(tokenizer, messages, continue_final_message=True)
    assert text.endswith("Once upon <|eot_id|>") and whole.startswith(text)
    parts = [{"type": "text", "text": "Once upon <|eot_id|>"}]
    messages[1] = {"role": "assistant", "content": parts}
    assert render_chat(tokenizer, messages, continue_final_message=True) == text
    with pytest.raises(ValueError, match="has no text to continue"):
        render_chat(tokenizer, asked(), continue_final_message=True)
    messages[1] = {"role": "assistant", "content": ""}
    opened = render_chat(tokenizer, messages, continue_final_message=True)
    assert opened and whole.startswith(opened)
    if style == "llama31":
        assert opened == render_chat(tokenizer, messages[:1])


@pytest.mark.parametrize(
    "refuses", ["messages[0].role != 'system'", "messages[-1].role != 'tool'", ""]
)
def test_arguments_as_text_where_a_template_is_particular(plain: Tokenizer, refuses: str) -> None:
    """A template that concatenates arguments needs text, whatever else it refuses."""
    source = (
        "{% for m in messages if m.tool_calls %}"
        "{{ m.content + m.tool_calls[0].function.arguments }}{% endfor %}"
    )
    if refuses:
        source = f"{{% if {refuses} %}}{{{{ raise_exception('no') }}}}{{% endif %}}{source}"
    tokenizer = dataclasses.replace(plain, chat_template=source)
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages = [
        {"role": "system", "content": "s"},
        *user("u"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
    ]
    assert render_chat(tokenizer, messages) == '<|begin_of_text|>{"a": 1}'
