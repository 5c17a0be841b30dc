"""Compares conversion with `cp`: python benchmarks/conversion.py [--layers N] [--directory DIR]

It writes checkpoints of Llama 3.1 8B's shapes with random numbers (bfloat16, 16 GB, and
FriendliAI's FP8, 9 GB; fewer layers make them smaller), copies and converts each in turn, and
deletes everything. `cp` is followed by a sync, like the conversion. Before each run, the source is
evicted from the page cache. Times are medians, and so is the ratio of each pair. The peak is memory
above that of the interpreter with JAX imported, including mapped files. The load is that of the
whole machine, averaged over the minute before each conversion ends.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import traverse_util
from rich.filesize import decimal

from converters.dialects.layout import LazyArray, constant, is_linear, source_name
from converters.pipeline import convert
from converters.safetensors_writer import write_checkpoint
from converters.writing import byte_progress, check_space
from llama_jax.bench import environment
from llama_jax.model.config import PRESETS, LlamaConfig
from llama_jax.model.params import abstract_params
from llama_jax.model.spec import ModelSpec

FRIENDLI = {"fmo_version": "0.3", "use_fp8_e4m3": True}
# name: (codes in the decoder's matrices, `quantize`)
CASES: Mapping[str, tuple[bool, str | None]] = {
    "bfloat16": (False, None),
    "FP8": (True, None),
    "bfloat16 to FP8, rows": (False, "row"),
}


@dataclass(frozen=True)
class Result:
    """The seconds of each run in order, and the most memory of any."""

    source_bytes: int
    cp_seconds: list[float]
    convert_seconds: list[float]
    peak_bytes: int
    load: float

    @property
    def ratio(self) -> float:
        return statistics.median(
            ours / theirs
            for ours, theirs in zip(self.convert_seconds, self.cp_seconds, strict=True)
        )


def tensors(config: LlamaConfig, fp8: bool) -> dict[str, LazyArray]:
    """Make random finite tensors with Hugging Face's names; fp8: layers' matrices as FP8 codes."""
    pool = np.random.default_rng(0).integers(0, 256, 64 << 20, np.uint8)
    pool[1::2] &= 0xBF  # a bit of the exponent, of bfloat16's upper byte and of every second code
    codes = pool & 0xBF
    found = {}
    shapes = traverse_util.flatten_dict(abstract_params(ModelSpec(config)), sep="/")
    for path, leaf in shapes.items():
        module = path.removesuffix("/weight")
        name = source_name(module)
        if fp8 and is_linear(module) and module != "lm_head":
            found[f"{name}.weight"] = _slices(codes, np.dtype(np.int8), leaf.shape)
            for scale in ("weight_scale", "in_scale"):
                found[f"{name}.{scale}"] = constant(np.array(0.01, np.float32))
        else:
            found[f"{name}.weight"] = _slices(pool, np.dtype(ml_dtypes.bfloat16), leaf.shape)
    return found


def _slices(pool: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> LazyArray:
    row_bytes = int(np.prod(shape[1:], dtype=int)) * dtype.itemsize

    def rows(start: int, stop: int) -> np.ndarray:
        length = (stop - start) * row_bytes
        first = start * row_bytes % (pool.size - length) // 4 * 4
        return pool[first : first + length].view(dtype).reshape(stop - start, *shape[1:])

    return LazyArray(dtype, shape, rows)


@contextmanager
def generated(parent: Path, config: LlamaConfig, fp8: bool) -> Iterator[Path]:
    """Write a checkpoint directory, and delete it afterwards. Needs three times its size."""
    arrays = tensors(config, fp8)
    total = sum(array.nbytes for array in arrays.values())
    check_space(parent / "source", 3 * total)
    with tempfile.TemporaryDirectory(prefix="conversion-", dir=parent) as directory:
        source = Path(directory) / "source"
        source.mkdir()
        settings = config.to_hf() | (FRIENDLI if fp8 else {})
        (source / "config.json").write_text(json.dumps(settings))
        with byte_progress("generating", total, shown=True) as written:
            write_checkpoint(source, arrays, written)
        os.sync()
        yield source


def copy(source: Path, target: Path) -> float:
    """Return the seconds of `cp`, until the data are on the disk."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", "--reflink=never", source, target], check=True)
    subprocess.run(["sync", "-f", target], check=True)
    return time.perf_counter() - began


def converted(source: Path, target: Path, quantize: Any) -> tuple[float, int]:
    """Convert. Returns the seconds, and the bytes by which this process grew meanwhile."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    began = time.perf_counter()
    convert(source, target, quantize=quantize, progress=False)
    return time.perf_counter() - began, _resident("VmHWM") - before


def _resident(what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def evict(directory: Path) -> None:
    """Evict the files of a directory from the page cache."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(source: Path, quantize: str | None, repeats: int) -> Result:
    """Measure interleaved runs, each conversion in a process of its own."""
    target = source.with_name("target")
    copies, conversions, peaks, loads = [], [], [], []
    for _ in range(repeats):
        evict(source)
        copies.append(copy(source, target))
        shutil.rmtree(target)
        evict(source)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, peak = pool.apply(converted, (source, target, quantize))
        conversions.append(seconds)
        peaks.append(peak)
        loads.append(os.getloadavg()[0])
        shutil.rmtree(target)
    return Result(
        source_bytes=sum(path.stat().st_size for path in source.iterdir()),
        cp_seconds=copies,
        convert_seconds=conversions,
        peak_bytes=max(peaks),
        load=statistics.median(loads),
    )


def table(results: Mapping[str, Result]) -> str:
    """Format the results in Markdown."""
    lines = [
        "| source | size | `cp` | convert | rate | ratio | peak memory | load |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        seconds = statistics.median(found.convert_seconds)
        cells = (
            name,
            decimal(found.source_bytes),
            f"{statistics.median(found.cp_seconds):.1f} s",
            f"{seconds:.1f} s",
            f"{decimal(int(found.source_bytes / seconds))}/s",
            f"{found.ratio:.2f}",
            decimal(found.peak_bytes),
            f"{found.load:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32, help="of the decoder (default: 32)")
    parser.add_argument("--directory", type=Path, default=Path("."), help="the disk to measure")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=CASES, action="append", help="may be repeated")
    parser.add_argument("--save", type=Path, help="a directory for conversion.json and .md")
    options = parser.parse_args()
    config = replace(PRESETS["llama-3.1-8b"], num_layers=options.layers)
    results = {}
    for name in options.only or CASES:
        fp8, quantize = CASES[name]
        with generated(options.directory.resolve(), config, fp8) as source:
            results[name] = measure(source, quantize, options.repeats)
    machine = environment()
    text = (
        f"{machine.device}, {machine.cpu_count} cores; Python {machine.python}, numpy "
        f"{np.__version__}; runs of both in turn.\n\n"
        f"{table(results)}\n"
    )
    print(text)
    if options.save:
        command = (
            f"python benchmarks/conversion.py --layers {options.layers} --repeats {options.repeats}"
        )
        record = {
            "command": command,
            "layers": options.layers,
            "environment": vars(machine),
            "results": {name: asdict(found) for name, found in results.items()},
        }
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / "conversion.json").write_text(json.dumps(record, indent=1) + "\n")
        (options.save / "conversion.md").write_text(
            f"# Conversion against `cp`\n\n`{command}`\n\n{text}"
        )


if __name__ == "__main__":
    main()
