"""Builds Llama as a graph of OpenVINO, with the weights of `cpu_peers.py`.

The graph is like that of OpenVINO's exporters, in forms that its CPU plugin fuses: RMSNorm, rotary
embedding, attention with a cache in variables, and matrices in uint8 with a zero point and a scale
per row, as in NNCF's INT8_ASYM.
"""

from pathlib import Path
from typing import Any

import cpu_peers
import numpy as np
import openvino as ov
from openvino import opset13 as op
from openvino.op.util import Variable, VariableInfo

from llama_jax.model.rope import rope_frequencies

_C = cpu_peers.CONFIG
_MASKED = -3e38


def write(directory: Path) -> None:
    graph = _Graph()
    logits = graph.logits()
    model = ov.Model([op.result(logits)], graph.sinks, graph.inputs, "llama")
    ov.save_model(model, directory / cpu_peers.OPENVINO_FILE, compress_to_fp16=False)


def _constant(value: Any, dtype: Any = np.int64) -> Any:
    return op.constant(np.array(value, dtype))


class _Graph:
    """The graph and its inputs.

    ids, positions: int64 [batch, tokens].
    beams: int32 [batch], the row of the cache that each row continues.
    selected: int64, the tokens whose logits are computed.
    """

    def __init__(self) -> None:
        self.ids = op.parameter([-1, -1], np.int64, name="input_ids")
        self.positions = op.parameter([-1, -1], np.int64, name="position_ids")
        self.beams = op.parameter([-1], np.int32, name="beam_idx")
        self.selected = op.parameter([-1], np.int64, name="selected")
        self.inputs = [self.ids, self.positions, self.beams, self.selected]
        self.sinks: list[Any] = []
        numbers = cpu_peers.ring()
        self._scale = np.float32(np.abs(numbers).max() / 127)
        self._codes = (np.rint(numbers / self._scale) + 128).astype(np.uint8)

    def logits(self) -> Any:
        x = op.gather(self._matrix("model.embed_tokens"), self.ids, _constant(0))
        self._cos, self._sin = self._rotation()
        self._mask = self._causal()
        for layer in range(_C.num_layers):
            at = f"model.layers.{layer}"
            x = op.add(x, self._attention(_norm(x), at))
            x = op.add(x, self._mlp(_norm(x), at))
        return self._linear(op.gather(_norm(x), self.selected, _constant(1)), "model.embed_tokens")

    def _attention(self, x: Any, at: str) -> Any:
        heads, kv_heads = _C.num_heads, _C.num_kv_heads
        q = self._rotated(_by_head(self._linear(x, f"{at}.self_attn.q_proj"), heads))
        k = self._rotated(_by_head(self._linear(x, f"{at}.self_attn.k_proj"), kv_heads))
        v = _by_head(self._linear(x, f"{at}.self_attn.v_proj"), kv_heads)
        k, v = self._appended(k, f"{at}.key"), self._appended(v, f"{at}.value")
        y = op.transpose(
            op.scaled_dot_product_attention(q, k, v, self._mask), _constant([0, 2, 1, 3])
        )
        return self._linear(op.reshape(y, _constant([0, 0, -1]), True), f"{at}.self_attn.o_proj")

    def _mlp(self, x: Any, at: str) -> Any:
        gate, up = (self._linear(x, f"{at}.mlp.{name}_proj") for name in ("gate", "up"))
        return self._linear(op.multiply(op.swish(gate), up), f"{at}.mlp.down_proj")

    def _linear(self, x: Any, name: str) -> Any:
        return op.matmul(x, self._matrix(name), False, True)

    def _matrix(self, name: str) -> Any:
        shape = cpu_peers.shapes()[f"{name}.weight"]
        codes = cpu_peers.fill(np.empty(shape, np.uint8), self._codes, f"{name}.weight")
        rows = (shape[0], 1)
        zero = op.convert(op.constant(np.full(rows, 128, np.uint8)), "f16")
        centred = op.subtract(op.convert(op.constant(codes, shared_memory=True), "f16"), zero)
        scaled = op.multiply(centred, op.constant(np.full(rows, self._scale, np.float16)))
        return op.convert(scaled, "f32")

    def _rotation(self) -> tuple[Any, Any]:
        """Return cosines and sines, [batch, 1, tokens, head_dim]."""
        frequencies = op.constant(rope_frequencies(_C).reshape(1, -1, 1))
        positions = op.convert(op.unsqueeze(self.positions, _constant(1)), "f32")
        product = op.matmul(frequencies, positions, False, False)
        halves = op.transpose(product, _constant([0, 2, 1]))
        angles = op.concat([halves, halves], -1)
        return tuple(op.unsqueeze(each(angles), _constant(1)) for each in (op.cos, op.sin))

    def _rotated(self, x: Any) -> Any:
        half = _C.head_dim // 2
        first, second = op.variadic_split(x, _constant(3), _constant([half, half])).outputs()
        turned = op.concat([op.multiply(second, _constant(-1, np.float32)), first], -1)
        return op.add(op.multiply(x, self._cos), op.multiply(turned, self._sin))

    def _causal(self) -> Any:
        """Return the mask, float32 [1, 1, tokens, all tokens]: 0 for tokens that a token sees. All
        sequences have the same length."""
        positions = op.squeeze(
            op.gather(self.positions, _constant([0]), _constant(0)), _constant(0)
        )
        length = op.add(op.reduce_max(positions, _constant([0])), _constant(1))
        keys = op.range(_constant(0), length, _constant(1), "i64")
        seen = op.less_equal(
            op.unsqueeze(keys, _constant(0)), op.unsqueeze(positions, _constant(1))
        )
        mask = op.select(seen, _constant(0, np.float32), _constant(_MASKED, np.float32))
        return op.unsqueeze(mask, _constant([0, 1]))

    def _appended(self, x: Any, name: str) -> Any:
        """Append the heads of x to the cache, and repeat each for the query heads that share it."""
        info = VariableInfo()
        info.data_shape = ov.PartialShape([-1, _C.num_kv_heads, -1, _C.head_dim])
        info.data_type, info.variable_id = ov.Type.f32, name
        variable = Variable(info)
        batch = op.gather(op.shape_of(self.ids), _constant([0]), _constant(0))
        sizes = [_constant([each]) for each in (_C.num_kv_heads, 0, _C.head_dim)]
        empty = op.broadcast(_constant(0, np.float32), op.concat([batch, *sizes], 0))
        past = op.gather(op.read_value(empty, variable), self.beams, _constant(0))
        whole = op.concat([past, x], -2)
        self.sinks.append(op.assign(whole, variable))
        ones = np.ones((1, 1, _C.num_heads // _C.num_kv_heads, 1, 1), np.float32)
        repeated = op.multiply(op.unsqueeze(whole, _constant(2)), op.constant(ones))
        return op.reshape(repeated, _constant([0, _C.num_heads, -1, _C.head_dim]), True)


def _by_head(x: Any, count: int) -> Any:
    """Reshape [batch, tokens, count * head_dim] to [batch, count, tokens, head_dim]."""
    split = op.reshape(x, _constant([0, 0, count, _C.head_dim]), True)
    return op.transpose(split, _constant([0, 2, 1, 3]))


def _norm(x: Any) -> Any:
    """Compute RMSNorm with weights of 1."""
    square = op.reduce_mean(op.power(x, _constant(2, np.float32)), _constant([-1]), True)
    root = op.sqrt(op.add(square, _constant(_C.rms_norm_eps, np.float32)))
    unit = op.multiply(x, op.divide(_constant(1, np.float32), root))
    return op.multiply(unit, op.constant(np.ones(_C.hidden_size, np.float32)))
