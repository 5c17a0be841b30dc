"""Lists the shapes of Llama 3.1 models' matrices and heads, complete and sharded as by Megatron."""

from collections.abc import Iterator
from dataclasses import dataclass

VOCABULARY = 128_256
HEAD_DIM = 128


@dataclass(frozen=True)
class Model:
    """A model's sizes.

    tensor_parallel: numbers of GPUs over which its layers are commonly sharded.
    """

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
    """A product y [m, n] = x [m, k] @ weight [n, k].T on one GPU; gate and up are two of them."""

    model: str
    tensor_parallel: int
    name: str
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.model} TP{self.tensor_parallel} {self.name} {self.n}x{self.k}"


def linears() -> Iterator[Linear]:
    """Yield every matrix of every model; heads, the FFN dim and the vocabulary are divided."""
    for name, model in MODELS.items():
        for parts in model.tensor_parallel:
            queries = model.heads * HEAD_DIM // parts
            intermediate = model.intermediate // parts
            for matrix, n, k in (
                ("q_proj", queries, model.hidden),
                ("k_proj", model.kv_heads * HEAD_DIM // parts, model.hidden),
                ("o_proj", model.hidden, queries),
                ("gate_proj", intermediate, model.hidden),
                ("down_proj", model.hidden, intermediate),
                ("lm_head", VOCABULARY // parts, model.hidden),
            ):
                yield Linear(name, parts, matrix, n, k)


@dataclass(frozen=True)
class Launch:
    """A launch that multiplies one x by several weights [n_i, k]. ns: the rows of each weight."""

    name: str
    ns: tuple[int, ...]
    k: int

    def __str__(self) -> str:
        return f"{self.name} {'+'.join(map(str, self.ns))}x{self.k}"


def launches() -> Iterator[Launch]:
    """Yield the launches of every model: q, k and v are one launch, and gate and up."""
    found = {(each.model, each.tensor_parallel, each.name): each for each in linears()}
    for (model, parts, name), linear in found.items():
        prefix, n = f"{model} TP{parts}", linear.n
        if name == "q_proj":
            kv = found[model, parts, "k_proj"].n
            yield Launch(f"{prefix} qkv_proj", (n, kv, kv), linear.k)
        elif name == "gate_proj":
            yield Launch(f"{prefix} gate_up_proj", (n, n), linear.k)
        elif name != "k_proj":
            yield Launch(f"{prefix} {name}", (n,), linear.k)


@dataclass(frozen=True)
class Heads:
    """The heads of a layer on one GPU: num_heads of queries, num_kv_heads of keys and values."""

    model: str
    tensor_parallel: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        heads = f"{self.num_heads}/{self.num_kv_heads}x{self.head_dim}"
        return f"{self.model} TP{self.tensor_parallel} heads {heads}"


def heads() -> Iterator[Heads]:
    """Yield the heads of every model, and those of Llama 3.2 1B, which are half as wide."""
    for name, model in MODELS.items():
        for parts in model.tensor_parallel:
            yield Heads(name, parts, model.heads // parts, model.kv_heads // parts, HEAD_DIM)
    yield Heads("1B", 1, 32, 8, 64)
