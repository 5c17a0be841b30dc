"""Quantising as torch and compressed-tensors do it: the same codes and scales, bit for bit."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from converters.quantize import Layout
from llama_jax.model.fp8 import quantize_per_group
from tests.test_quantize import quantized

pytestmark = pytest.mark.parity

STRATEGY = {"row": "channel", "tensor": "tensor", "block": "block"}


def compressed_tensors(weight: np.ndarray, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Codes as bytes and scales, expanded to the shapes of ours; in float32 throughout."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    block: Any = {"block_structure": [128, 128]} if layout == "block" else {}
    args = QuantizationArgs(num_bits=8, type="float", strategy=STRATEGY[layout], **block)
    x = torch.from_numpy(weight.astype(np.float32))
    if layout == "row":
        low, high = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
    elif layout == "tensor":
        low, high = x.amin(), x.amax()
    else:
        low, high = (
            torch.stack([torch.stack([f(b) for b in row.split(128, 1)]) for row in x.split(128, 0)])
            for f in (torch.amin, torch.amax)
        )
    scale, zero = calculate_qparams(low, high, args)
    codes = quantize(x, scale, zero, args, dtype=torch.float8_e4m3fn)
    stored = np.broadcast_to(scale.numpy(), len(x)) if layout == "tensor" else scale.numpy()
    return codes.view(torch.uint8).numpy(), stored[:, 0] if layout == "row" else stored


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("layout", ["row", "tensor", "block"])
def test_codes_and_scales(layout: Layout, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    weight = (rng.normal(0, 0.1, (256, 384)) * np.geomspace(1, 1e-3, 256)[:, None]).astype(dtype)
    weight += dtype(0)  # no negative zeros: theirs lose their sign to a zero point that is added
    codes, scale = quantized(weight, layout)
    expected_codes, expected_scale = compressed_tensors(weight, layout)
    np.testing.assert_array_equal(scale, expected_scale)
    np.testing.assert_array_equal(codes.view(np.uint8), expected_codes)


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e4])
def test_activations_by_groups(magnitude: float) -> None:
    """What `forward_quantize` of the scheme FP8_BLOCK makes of inputs: the same values exactly.

    A group of zeros has another scale there, the dtype's epsilon, and the same zeros.
    """
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    args = QuantizationArgs(
        num_bits=8, type="float", strategy="group", group_size=128, dynamic=True
    )
    module: Any = torch.nn.Linear(384, 1)
    module.quantization_status = QuantizationStatus.FROZEN
    rng = np.random.default_rng(0)
    x = (rng.normal(0, magnitude, (2, 33, 384)) * np.geomspace(1, 1e3, 384)).astype(np.float32)
    x[0, 5], x[1, 7, 128:256] = 0, 0
    theirs = forward_quantize(module, torch.from_numpy(x), "input", args).numpy()
    codes, scale = quantize_per_group(jnp.asarray(x))
    ours = np.asarray(codes, np.float32) * np.repeat(scale, 128, axis=-1)
    np.testing.assert_array_equal(ours, theirs)


def test_casts_round_as_torch_does() -> None:
    """All bfloat16 numbers that e4m3 holds without saturating, ties and subnormals among them."""
    import torch

    from pallas_kernels import e4m3

    x = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    x = x[np.abs(x) <= 448]
    ours = np.asarray(e4m3.cast(x)).view(np.uint8)
    theirs = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(ours, theirs)
