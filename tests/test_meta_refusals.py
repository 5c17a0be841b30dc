"""Checkpoints of Meta's whose files do not fit together, or are damaged: refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from converters.pipeline import convert
from llama_jax.checkpoint.store import CheckpointError
from llama_jax.model.config import ConfigError
from tests import tiny_meta
from tests.plans import planned
from tests.tiny_meta import META_PARAMS

E4M3 = ml_dtypes.float8_e4m3fn
Files = dict[str, Any]


def files(fp8: bool = False) -> Files:
    parts = tiny_meta.meta_parts(tiny_meta.meta(), 2)
    scales = tiny_meta.meta_fp8(parts) if fp8 else []
    return {"parts": parts, "scales": scales, "params": dict(META_PARAMS)}


def params(**changes: Any) -> Callable[[Files], None]:
    return lambda found: found["params"].update(changes)


def lost(part: int, name: str, where: str = "parts") -> Callable[[Files], None]:
    def edit(found: Files) -> None:
        del found[where][part][name]

    return edit


def changed(
    part: int, name: str, change: Callable[[np.ndarray], np.ndarray], where: str = "parts"
) -> Callable[[Files], None]:
    def edit(found: Files) -> None:
        found[where][part][name] = np.ascontiguousarray(change(found[where][part][name]))

    return edit


def added(part: int, name: str, where: str = "parts") -> Callable[[Files], None]:
    def edit(found: Files) -> None:
        found[where][part][name] = np.ones(4, np.float32)

    return edit


def fewer(found: Files) -> None:
    found["parts"].pop()


def more(found: Files) -> None:
    found["parts"].append(found["parts"][0])


def no_scales(found: Files) -> None:
    found["scales"].clear()


def more_scales(found: Files) -> None:
    found["scales"].append(found["scales"][0])


def nan_in_row_3(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[3, 1] = np.nan
    return array


W1 = "layers.1.feed_forward.w1.weight"
SCALE = "1_feed_forward.w1_1"
BAD: dict[str, tuple[str, Callable[[Files], None], str]] = {
    "a part of two": (
        "bf16", fewer,
        r"1 of the files consolidated.\*.pth, but consolidated.00/layers.0.attention.wq.weight has "
        r"1/2 of the rows .* the model has 2 files. Download the rest",
    ),
    "a part too many": ("bf16", more, r"3 of the files .* the model has 2 files"),
    "a lost tensor": (
        "bf16", lost(1, "layers.2.attention.wo.weight"),
        r"consolidated.01/layers.2.attention.wo.weight is missing",
    ),
    "a lost tensor of the first": (
        "bf16", lost(0, "tok_embeddings.weight"), r"consolidated.00/tok_embeddings.weight is mis",
    ),
    "half of the output": ("bf16", lost(0, "output.weight"), r"consolidated.00/output.weight is"),
    "another tensor": ("bf16", added(1, "layers.0.attention.bias"), r"attention.bias .* no place"),
    "another layer": (
        "bf16", added(0, "layers.4.ffn_norm.weight"), r"consolidated.00/layers.4.ffn_norm.weight",
    ),
    "another shape": (
        "bf16", changed(1, W1, lambda a: a[:-1]),
        r"consolidated.01/layers.1.feed_forward.w1.weight has shape \[79, 64\].*\[80, 64\]",
    ),
    "another dtype": (
        "bf16", changed(1, W1, lambda a: a.astype(np.float16)), r"01/.*w1.weight is float16, exp",
    ),
    "integers": (
        "bf16", changed(0, W1, lambda a: a.astype(np.int8)), r"00/.*w1.weight is int8, expected",
    ),
    "a norm of another checkpoint": (
        "bf16", changed(1, "layers.3.ffn_norm.weight", lambda a: a * 2),
        r"consolidated.01/layers.3.ffn_norm.weight differs from consolidated.00/layers.3.ffn_norm",
    ),
    "fewer layers": ("bf16", params(n_layers=3), r"layers.3.* has no place"),
    "more layers": ("bf16", params(n_layers=5), r"says 5 layers, the weights have 4"),
    "another width": ("bf16", params(dim=128), r"has shape \[48, 64\].*\[48, 128\]"),
    "more heads of keys": ("bf16", params(n_kv_heads=8), r"wk.weight has shape .*32, 64"),
    "a vocabulary that cannot be split": (
        "bf16", params(vocab_size=97), r"tok_embeddings has 97 rows .* cannot be split over 2",
    ),
    "no heads": ("bf16", params(n_heads=0), r"params.json: n_heads is 0, expected int >= 1"),
    "text for a number": ("bf16", params(norm_eps="1e-5"), r"params.json: norm_eps is '1e-5', exp"),
    "no width": ("bf16", params(dim=None), r"params.json: dim is None"),
    "INT4": (
        "bf16", params(quantization_args={"group_size": 32}), r"INT4 is not supported. Take",
    ),
    "a vision model": ("bf16", params(vision_chunk_size=560), r"vision_chunk_size is not known"),
    "no scales": (
        "fp8", no_scales,
        r"w2_0 is missing from fp8_scales_0.pt, or the file is: the float8_e4m3fn codes of consol",
    ),
    "a lost scale": (
        "fp8", lost(1, SCALE, "scales"), r"1_feed_forward.w1_1 is missing from",
    ),
    "scales of another part": (
        "fp8", more_scales, r"fp8_scales_2/1_feed_forward.w1_0 .* has no place",
    ),
    "scales without codes": (
        "bf16", lambda found: found.update(scales=tiny_meta.meta_fp8(files()["parts"])),
        r"fp8_scales_0/1_feed_forward.w1_0 .* has no place",
    ),
    "a scale per column": (
        "fp8", changed(1, SCALE, lambda a: a[:64], "scales"),
        r"fp8_scales_1/1_feed_forward.w1_1 has shape \[64\]",
    ),
    "a negative scale": (
        "fp8", changed(1, SCALE, lambda a: -a, "scales"),
        r"fp8_scales_1/1_feed_forward.w1_1 holds -.* must be finite and positive",
    ),
    "codes in attention": (
        "bf16", changed(0, "layers.1.attention.wv.weight", lambda a: a.astype(E4M3)),
        r"layers.1.attention.wv.weight is float8_e4m3fn, expected bfloat16",
    ),
    "codes in one part": (
        "bf16", changed(1, W1, lambda a: a.astype(E4M3)), r"01/.*w1.weight is float8_e4m3fn, exp",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_together_is_refused_by_name(tmp_path: Path, case: str) -> None:
    dtype, edit, match = BAD[case]
    found = files(fp8=dtype == "fp8")
    edit(found)
    directory = tiny_meta.write_meta(tmp_path, found["parts"], found["params"], found["scales"])
    with pytest.raises((CheckpointError, ConfigError), match=match):
        planned(directory)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda d: (d / "params.json").unlink(), r"params.json is missing. Download"),
        (lambda d: (d / "params.json").write_text("{"), r"params.json is not valid JSON"),
        (lambda d: (d / "params.json").write_text("[]"), r"params.json: its JSON is \[\]"),
        (lambda d: (d / "consolidated.00.pth").unlink(), r"but no file of rank 0"),
        (lambda d: [p.unlink() for p in d.glob("*.pth")], r"has params.json, but no consolidated"),
        (lambda d: (d / "consolidated.01.pth").write_bytes(b"PK\3\4"), r"01.pth is damaged"),
        (lambda d: (d / "tokenizer.model").write_bytes(b"QQ== x\n"), r"tokenizer.model: line 1"),
    ],
    ids=["no params", "no JSON", "a list", "no rank 0", "no weights", "truncated", "tokenizer"],
)
def test_a_directory_that_is_incomplete_or_damaged_is_refused(
    tmp_path: Path, spoil: Callable[[Path], Any], match: str
) -> None:
    directory = tiny_meta.write_meta(
        tmp_path, tiny_meta.meta_parts(tiny_meta.meta(), 2), tokenizer=tiny_meta.byte_tokenizer()
    )
    spoil(directory)
    with pytest.raises(CheckpointError, match=match):
        planned(directory)


def test_nan_is_refused_where_it_is_read(tmp_path: Path) -> None:
    found = files()
    changed(1, "layers.0.attention.wk.weight", nan_in_row_3)(found)
    directory = tiny_meta.write_meta(tmp_path / "s", found["parts"])
    with pytest.raises(CheckpointError, match=r"01/layers.0.attention.wk.weight has NaN .* row 3"):
        convert(directory, tmp_path / "o", progress=False)
    assert not (tmp_path / "o").exists()
