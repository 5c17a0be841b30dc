"""Which kernel takes an operation, and what it takes to add one."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.cli.paths import show_paths
from llama_jax.engine.paths import calls, programs
from llama_jax.engine.scheduling import EngineOptions
from llama_jax.model.fp8 import quantize
from llama_jax.model.linear import Linear
from llama_jax.model.spec import ModelSpec
from pallas_kernels import choice, device
from pallas_kernels.choice import Choice, Kernel, choice_in, never
from pallas_kernels.fp8_matmul import choose, fp8_matmul, fp8_matmuls, kernels
from tests import tiny

OPTIONS = EngineOptions(max_batch_size=2, max_seq_len=128, prefill_chunk=128)


def kernel(name: str, reason: str | None = None, **fields: Any) -> Kernel:
    return Kernel(name=name, run=lambda x: x, refusal=lambda x: reason, **fields)


FIRST = kernel("a_one", "x is too small", family="a", launches={"a_one": "cheap"})
SECOND = kernel("a_two", family="a", launches={"a_two": "dear"}, not_here=lambda: "no such GPU")
LAST = kernel("xla", unasked=never)
ALL = (FIRST, SECOND, LAST)


def test_the_first_that_does_not_refuse_is_taken() -> None:
    found = choice.choose("op", ALL, (1,))
    assert found == Choice(SECOND, (("a_one", "x is too small"),))
    assert choice.choose("op", ALL, (1,), "a") == replace(found, asked="a")
    assert choice.choose("op", ALL, (1,), "xla") == Choice(LAST, (), "xla")
    with pytest.raises(ValueError, match="op: implementation 'a_one' cannot run: x is too small"):
        choice.choose("op", ALL, (1,), "a_one")
    with pytest.raises(ValueError, match="op has no implementation 'b': take one of a, a_one, "):
        choice.choose("op", ALL, (1,), "b")


def test_arrays_that_may_be_divided_are_left_to_xla_unless_a_kernel_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "not_local", lambda: "divided")
    found = choice.choose("op", ALL, (1,))
    assert found.kernel is LAST and found.why_no_kernel == "x is too small; divided"
    assert choice.choose("op", ALL, (1,), "a").kernel is SECOND


def test_why_a_name_runs_nowhere_here() -> None:
    assert choice.not_here(ALL, "a_two") == "no such GPU"
    assert choice.not_here(ALL, "a") is None  # its first kernel would
    assert choice.not_here(ALL, None) is None


def test_a_traced_program_holds_the_choice_itself() -> None:
    made = Choice(LAST, (("a_one", "too small"), ("a_two", "too small")))

    def function(x: jax.Array) -> jax.Array:
        with jax.named_scope("outer"), made.scope():
            return x + 1

    (eqn,) = jax.make_jaxpr(jax.jit(function))(1.0).eqns[0].params["jaxpr"].eqns
    scopes = [scope.name for scope in eqn.source_info.name_stack.stack]
    assert choice_in(scopes) is made
    assert "xla: too small" in scopes  # what a profile shows
    assert choice_in(["xla: too small"]) is None


@pytest.fixture
def acme(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernel that the page adds, by its block and one entry."""
    text = (Path(__file__).parents[1] / "pallas_kernels/fp8_matmul/README.md").read_text()
    (module,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    added: dict[str, Any] = {}
    exec(module, added)
    monkeypatch.setattr(kernels, "KERNELS", (added["ACME"], *kernels.KERNELS))
    return SimpleNamespace(**added)


def test_the_kernel_that_its_page_adds_multiplies(acme: Any) -> None:
    weight, scale = quantize(jax.random.normal(jax.random.key(0), (64, 128)), "row")
    x = jax.random.normal(jax.random.key(1), (5, 128))
    residual, float32 = jax.random.normal(jax.random.key(2), (5, 64)), jnp.dtype(jnp.float32)
    y = fp8_matmul(x, weight, scale, residual=residual)
    expected = fp8_matmul(x, weight, scale, residual=residual, implementation="reference")
    # float32 sums of 128 products of size 1, in another order.
    np.testing.assert_allclose(y, expected, atol=1e-4)
    assert choose(x, weight, scale, float32, implementation="acme").kernel is acme.ACME
    for each in fp8_matmuls(x, (weight, weight[:32]), (scale, scale[:32])):
        np.testing.assert_allclose(each, (expected - residual)[:, : each.shape[1]], atol=1e-4)
    by_block = jnp.ones((1, 1))
    assert choose(x, weight, by_block, float32).refusals[0] == (
        "acme", "weight_scale must be one per row",
    )  # fmt: skip
    with pytest.raises(ValueError, match="'acme' cannot run: weight_scale must be one per row"):
        fp8_matmul(x, weight, by_block, implementation="acme")


def test_the_model_takes_it_by_the_one_choice_that_inspect_prints(
    acme: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(tiny.CONFIG, num_layers=1)
    formats = tiny.fp8_formats(config, input_scale=False)
    down = "layers_0/mlp/down_proj"
    formats[down] = replace(formats[down], scale="block")
    spec = ModelSpec(config, formats, "float32")
    made: list[Choice[kernels.Kernel] | None] = []
    ask = Linear.choose

    def asked(*operands: Any) -> Choice[kernels.Kernel] | None:
        made.append(ask(*operands))
        return made[-1]

    monkeypatch.setattr(Linear, "choose", asked)
    found = calls(programs(spec, OPTIONS, "bf16")[1])
    of_matrices = {call.matrices: call for call in found if call.module.startswith("layers_0")}
    q_proj = of_matrices["layers_0/self_attn/q_proj",]
    assert (q_proj.path, q_proj.cost) == ("acme_matmul", "upcasts each code")
    assert q_proj.choice is not None and any(q_proj.choice is each for each in made)
    of_down = of_matrices[down,].choice
    assert of_down is not None and any(of_down is each for each in made)
    assert of_down.refusals[0] == ("acme", "weight_scale must be one per row")
    assert len([each for each in made if each]) == 7  # one for each of the layer's matrices
    show_paths("a model", spec, OPTIONS, "bf16", None, as_json=False)
    out = " ".join(capsys.readouterr().out.split())
    assert "acme_matmul" in out and "not acme: weight_scale must be one per row" in out
