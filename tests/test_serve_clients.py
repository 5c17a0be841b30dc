"""LangChain and LlamaIndex (extra `clients`) against a server.

They need an older version of OpenAI's own client, and pip is slow to find versions that fit, so
.ci/run leaves them out.
"""

from typing import Literal

import pydantic
import pytest

from llama_jax import LLM
from tests.served import Served, serving

pytestmark = pytest.mark.parity
QUESTION, SUM = "What is 4831 * 297?", "What is 47 + 85?"


class Answer(pydantic.BaseModel):
    """A sum, and whether it is sure."""

    sum: Literal[132, 133]
    certain: bool


def calculator(expression: str) -> str:
    """Evaluate an arithmetic expression."""
    first, second = expression.split(" * ")
    return str(int(first) * int(second))


@pytest.fixture(scope="module")
def server():
    llm = LLM.load(max_batch_size=2, max_seq_len=512, prefill_chunk=128, verbose=False)
    with serving(llm) as served:
        yield served


def test_langchain(server: Served):
    langchain = pytest.importorskip("langchain_openai")
    messages = pytest.importorskip("langchain_core.messages")
    tools = pytest.importorskip("langchain_core.tools")
    model = langchain.ChatOpenAI(
        model="abacus", base_url=f"{server.url}/v1", api_key="none", temperature=0, max_retries=0
    )
    assert model.invoke(SUM).content == "132"
    assert "".join(piece.content for piece in model.stream(SUM)) == "132"

    tool = tools.tool(calculator)
    with_tool = model.bind_tools([tool])
    said = [messages.HumanMessage(QUESTION)]
    said.append(with_tool.invoke(said))
    assert [call["args"] for call in said[-1].tool_calls] == [{"expression": "4831 * 297"}]
    said += [tool.invoke(call) for call in said[-1].tool_calls]
    assert with_tool.invoke(said).content == "1434807"
    first, *others = with_tool.stream(said[:1])
    whole = sum(others, first)
    assert [call["args"] for call in whole.tool_calls] == [{"expression": "4831 * 297"}]

    for method in ("json_schema", "function_calling"):
        answer = model.with_structured_output(Answer, method=method).invoke(SUM)
        assert isinstance(answer, Answer)


def test_llama_index(server: Served):
    like = pytest.importorskip("llama_index.llms.openai_like")
    core = pytest.importorskip("llama_index.core")
    tools = pytest.importorskip("llama_index.core.tools")
    model = like.OpenAILike(
        model="abacus", api_base=f"{server.url}/v1", api_key="none", is_chat_model=True,
        is_function_calling_model=True, temperature=0, max_retries=0,
    )  # fmt: skip
    message = core.llms.ChatMessage(role="user", content=SUM)
    assert model.chat([message]).message.content == "132"
    assert "".join(piece.delta or "" for piece in model.stream_chat([message])) == "132"
    tool = tools.FunctionTool.from_defaults(calculator)
    assert str(model.predict_and_call([tool], user_msg=QUESTION)) == "1434807"
    answer = model.structured_predict(Answer, core.PromptTemplate(SUM))
    assert isinstance(answer, Answer)
