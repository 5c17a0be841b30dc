"""llama-jax: Llama 3.1 with FP8 weights on JAX.

    import llama_jax
    llm = llama_jax.LLM.load()                       # the small model that ships with the project
    print(llm.chat([{"role": "user", "content": "What is 47 + 85?"}]).text)

Names are imported when first used, so that `llama-jax --help` does not wait for JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.llm import LLM
    from llama_jax.model.config import PRESETS, LlamaConfig
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
    from llama_jax.structured import StructuredOutput
    from llama_jax.text.tools import ToolCall

_HOMES = {
    "LLM": "llm", "PRESETS": "model.config", "LlamaConfig": "model.config",
    "SamplingParams": "sampling_params", "Generation": "results", "Perplexity": "results",
    "Piece": "results", "Ranking": "results", "Score": "results", "StructuredOutput": "structured",
    "Timings": "results", "TokenLogprob": "results", "ToolCall": "text.tools",
}  # fmt: skip

__all__ = [
    "LLM", "PRESETS", "Generation", "LlamaConfig", "Perplexity", "Piece", "Ranking",
    "SamplingParams", "Score", "StructuredOutput", "Timings", "TokenLogprob", "ToolCall",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
