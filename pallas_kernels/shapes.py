"""The matrix shapes of Llama 3.1 models, whole and as Megatron sharding cuts them."""

from collections.abc import Iterator
from dataclasses import dataclass

VOCABULARY = 128_256
HEAD_DIM = 128


@dataclass(frozen=True)
class Model:
    """tensor_parallel: over how many GPUs its layers are commonly spread."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    tensor_parallel: tuple[int, ...]


MODELS = {
    "8B": Model(4096, 14_336, 32, 8, (1, 2, 4, 8)),
    "70B": Model(8192, 28_672, 64, 8, (1, 2, 4, 8)),
    "405B": Model(16_384, 53_248, 128, 8, (8,)),
}


@dataclass(frozen=True)
class Linear:
    """y [m, n] = x [m, k] @ weight [n, k].T on one GPU; gate and up are two such weights."""

    model: str
    tensor_parallel: int
    name: str
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.model} TP{self.tensor_parallel} {self.name} {self.n}x{self.k}"


def linears() -> Iterator[Linear]:
    """Every matrix of every model: heads, inner features and vocabulary are what is divided."""
    for name, model in MODELS.items():
        for parts in model.tensor_parallel:
            queries = model.heads * HEAD_DIM // parts
            inner = model.intermediate // parts
            for matrix, n, k in (
                ("q_proj", queries, model.hidden),
                ("k_proj", model.kv_heads * HEAD_DIM // parts, model.hidden),
                ("o_proj", model.hidden, queries),
                ("gate_proj", inner, model.hidden),
                ("down_proj", model.hidden, inner),
                ("lm_head", VOCABULARY // parts, model.hidden),
            ):
                yield Linear(name, parts, matrix, n, k)
