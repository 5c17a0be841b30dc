"""Measures the speed of prefill and decode, also as a share of the memory's bandwidth.

A decode step reads every weight and every cached key and value once, so bandwidth is its bound. The
bound is measured in the same run, by copying a large array on the same device.

Times are wall clock. The time of a decode step is the difference of two runs with outputs of
different length, divided by the difference of the lengths, so that the overlap of the first tokens
with the first steps cancels out. On a GPU the profiler measures the kernels of a step, and so how
long the device is idle.
"""

import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from llama_jax.checkpoint.huge_pages import Room
from llama_jax.engine import compile_cache
from llama_jax.engine.compile_cache import CompileReport
from llama_jax.engine.engine import Engine
from llama_jax.engine.memory import MemoryPlan, plan_memory
from llama_jax.engine.request import Request
from llama_jax.engine.scheduling import EngineOptions
from llama_jax.model.config import PAGE_SIZE, LlamaConfig
from llama_jax.model.fp8 import WeightFormat
from llama_jax.model.params import abstract_params
from llama_jax.model.spec import ModelSpec, Params
from llama_jax.sampling_params import SamplingParams
from pallas_kernels import device_trace, e4m3

_TILE = 1 << 22  # random numbers, repeated to fill larger arrays


@dataclass(frozen=True)
class Workload:
    """A batch of `batch_size` prompts of `prompt_len` tokens, continued by `new_tokens` tokens."""

    batch_size: int
    prompt_len: int
    new_tokens: int

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("prompt_len", 1), ("new_tokens", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def short_output(self) -> int:
        """Return the shorter of the two output lengths that are compared."""
        return max(1, self.new_tokens // 2)

    @property
    def measured_steps(self) -> int:
        return self.new_tokens - self.short_output

    @property
    def max_seq_len(self) -> int:
        """Return the tokens that each slot has room for: whole pages."""
        return -(-(self.prompt_len + self.new_tokens) // PAGE_SIZE) * PAGE_SIZE


@dataclass(frozen=True)
class Measurement:
    """The times of one workload, after compilation: medians of wall-clock seconds.

    prefill_seconds: the part of first_token_seconds after the sampling settings were sent to the
        device.
    first_token_seconds: from submitting the prompts until the host has the first token of each, in
        runs that draw no other token.
    decode_step_seconds: one token for each sequence, from the difference of two output lengths.
    weight_bytes, kv_bytes: what a decode step has to read, on average over the measured steps.
    device: a decode step by the device's own clock; None if it keeps no record.
    """

    workload: Workload
    prefill_seconds: float
    first_token_seconds: float
    decode_step_seconds: float
    weight_bytes: int
    kv_bytes: int
    device: "DeviceStep | None" = None

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.workload.batch_size * self.workload.prompt_len / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Return the tokens per second of all sequences together."""
        return self.workload.batch_size / self.decode_step_seconds

    @property
    def decode_bytes_per_second(self) -> float:
        return (self.weight_bytes + self.kv_bytes) / self.decode_step_seconds

    @property
    def idle_share(self) -> float | None:
        """Return the share of a decode step during which the device is idle."""
        if self.device is None:
            return None
        return max(0.0, 1 - self.device.busy_seconds / self.decode_step_seconds)


@dataclass(frozen=True)
class DeviceStep:
    """A decode step in the device's own record, from the difference of two profiled runs.

    busy_seconds: the time during which any kernel or copy runs.
    kernels: the kernels of a step, with counts and totals divided by the number of steps.
    """

    busy_seconds: float
    kernels: tuple["StepKernel", ...]


@dataclass(frozen=True)
class StepKernel:
    """One kernel's launches in a decode step: their count, and their seconds together."""

    name: str
    count: float
    seconds: float


@dataclass(frozen=True)
class PeakMemory:
    """The peak memory. kind: "device" (the allocator's peak), or "process" (peak resident set) if
    the device does not count."""

    bytes: int
    kind: str


@dataclass(frozen=True)
class Environment:
    """The hardware and software that a figure depends on."""

    device: str
    platform: str
    cpu_count: int
    python: str
    jax: str
    jaxlib: str


@dataclass(frozen=True)
class Report:
    """The result of a benchmark.

    copy_bytes_per_second: of a copy on the device, bytes read plus bytes written.
    compile: what was compiled since the process started.
    """

    environment: Environment
    measurements: tuple[Measurement, ...]
    copy_bytes_per_second: float
    compile: CompileReport
    peak_memory: PeakMemory

    def fraction_of_copy(self, measurement: Measurement) -> float:
        """Return the decode step's bytes per second divided by the copy's."""
        return measurement.decode_bytes_per_second / self.copy_bytes_per_second


def bench(
    params: Params,
    spec: ModelSpec,
    workloads: Sequence[Workload],
    *,
    kv_dtype: jnp.dtype,
    copy_bytes_per_second: float,
    prefill_chunk: int = 512,
    repeats: int = 3,
    on_finished: Callable[[Measurement], None] = lambda _: None,
) -> Report:
    """Measure each workload.

    kv_dtype: of the cache, as in `kv_cache.init_cache`.
    copy_bytes_per_second: from `copy_bandwidth`, called before the model fills the memory.
    """
    measurements = []
    for workload in workloads:
        measurement = measure(params, spec, workload, kv_dtype, prefill_chunk, repeats)
        on_finished(measurement)
        measurements.append(measurement)
    return Report(
        environment=environment(),
        measurements=tuple(measurements),
        copy_bytes_per_second=copy_bytes_per_second,
        compile=compile_cache.report(),
        peak_memory=peak_memory(),
    )


def plan(
    spec: ModelSpec, workloads: Sequence[Workload], kv_dtype: jnp.dtype, prefill_chunk: int = 512
) -> MemoryPlan:
    """Return a memory plan that covers all workloads."""
    return plan_memory(
        spec,
        max(each.batch_size for each in workloads),
        max(each.max_seq_len for each in workloads),
        kv_dtype,
        prefill_chunk,
    )


def measure(
    params: Params,
    spec: ModelSpec,
    workload: Workload,
    kv_dtype: jnp.dtype,
    prefill_chunk: int,
    repeats: int,
) -> Measurement:
    """Measure a workload in the engine that `LLM` uses.

    It runs once to compile, then `repeats` times with each of three output lengths, and on a GPU
    twice more under the profiler.
    """
    engine = make_engine(params, spec, workload, kv_dtype, prefill_chunk)
    run_once(engine, workload, workload.new_tokens)
    first, short, long = (
        [run_once(engine, workload, length) for _ in range(repeats)]
        for length in (1, workload.short_output, workload.new_tokens)
    )
    return Measurement(
        workload=workload,
        prefill_seconds=statistics.median(run.prefill_seconds for run in first),
        first_token_seconds=statistics.median(run.first_token_seconds for run in first),
        decode_step_seconds=(
            statistics.median(run.seconds for run in long)
            - statistics.median(run.seconds for run in short)
        )
        / workload.measured_steps,
        weight_bytes=decode_weight_bytes(spec, workload.batch_size),
        kv_bytes=kv_bytes(spec.config, kv_dtype, workload),
        device=device_step(engine, workload),
    )


def make_engine(
    params: Params, spec: ModelSpec, workload: Workload, kv_dtype: jnp.dtype, prefill_chunk: int
) -> Engine:
    """Make an engine of the workload's size that computes every prompt, sharing no prefixes."""
    options = EngineOptions(
        max_batch_size=workload.batch_size,
        max_seq_len=workload.max_seq_len,
        prefill_chunk=prefill_chunk,
        share_prefixes=False,
    )
    return Engine(params, spec, options, kv_dtype)


@dataclass(frozen=True)
class Run:
    """The seconds of one pass over a workload, see `Measurement`; `seconds` is the whole pass."""

    prefill_seconds: float
    first_token_seconds: float
    seconds: float


def run_once(engine: Engine, workload: Workload, new_tokens: int) -> Run:
    """Run the workload's prompts with `new_tokens` output tokens each."""
    size = (workload.batch_size, workload.prompt_len)
    prompts = np.random.default_rng(0).integers(0, engine.spec.config.vocab_size, size)
    greedy = SamplingParams(temperature=0.0, seed=0, max_new_tokens=new_tokens)
    requests = [Request(prompt, greedy) for prompt in prompts.tolist()]
    began = time.perf_counter()
    for _ in engine.run(requests):
        pass
    seconds = time.perf_counter() - began
    prefilled = max(request.first_token_at for request in requests)
    admitted = max(request.admitted_at for request in requests)
    return Run(prefilled - admitted, prefilled - began, seconds)


def device_step(engine: Engine, workload: Workload) -> DeviceStep | None:
    """Measure a decode step by the device's record: the difference of two profiled runs."""
    if not device_trace.is_kept():
        return None
    short, long = (
        device_trace.record(partial(run_once, engine, workload, length))
        for length in (workload.short_output, workload.new_tokens)
    )
    before = {kernel.name: kernel for kernel in device_trace.by_name(short)}
    kernels = []
    for kernel in device_trace.by_name(long):
        earlier = before.get(kernel.name)
        count = kernel.count - (earlier.count if earlier else 0)
        seconds = kernel.total - (earlier.total if earlier else 0.0)
        if count > 0:
            steps = workload.measured_steps
            kernels.append(StepKernel(kernel.name, count / steps, seconds / steps))
    busy = device_trace.busy_seconds(long) - device_trace.busy_seconds(short)
    kernels.sort(key=lambda kernel: -kernel.seconds)
    return DeviceStep(busy / workload.measured_steps, tuple(kernels))


def decode_weight_bytes(spec: ModelSpec, batch_size: int) -> int:
    """Return the bytes of parameters that a decode step reads.

    It reads all of them, except that only `batch_size` rows are read of an embedding which is not
    the output matrix as well.
    """
    params = abstract_params(spec)
    total: int = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    if spec.config.tie_word_embeddings:
        return total
    embedding = params["embed_tokens"]["weight"]
    unread = embedding.size - batch_size * spec.config.hidden_size
    return total - int(unread) * int(embedding.dtype.itemsize)


def kv_bytes(config: LlamaConfig, kv_dtype: jnp.dtype, workload: Workload) -> int:
    """Return the bytes of keys and values that a decode step reads, on average over the measured
    steps."""
    length = workload.prompt_len + (workload.short_output + workload.new_tokens) // 2
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return workload.batch_size * length * per_token * jnp.dtype(kv_dtype).itemsize


def copy_bandwidth(num_bytes: int | None = None, repeats: int = 10) -> float:
    """Measure the bytes per second, read plus written, of copying an array on the default device.

    num_bytes: the array's size, a multiple of 4; by default 1 GiB, or 256 MiB on a CPU, which is
        more than its caches hold.
    repeats: the fastest of so many copies counts.
    """
    if num_bytes is None:
        num_bytes = 1 << (28 if jax.default_backend() == "cpu" else 30)
    source = jnp.zeros(num_bytes // 4, jnp.int32)
    # The target is donated, because fresh memory would be paged in first. XLA would elide a mere
    # copy, hence the addition.
    copy = jax.jit(lambda x, into: x + 1, donate_argnames="into", keep_unused=True)
    target = copy(source, jnp.zeros_like(source)).block_until_ready()
    times = []
    for _ in range(repeats):
        before = time.perf_counter()
        target = copy(source, target).block_until_ready()
        times.append(time.perf_counter() - before)
    return 2 * source.nbytes / min(times)


def preset_spec(
    config: LlamaConfig, dtype: str = "bfloat16", quantize_lm_head: bool = False
) -> ModelSpec:
    """Make a spec with the layers' matrices in FP8, with a scale per row, and the rest bfloat16.

    quantize_lm_head: whether the output matrix is FP8 too, which is the embedding if they are tied.
    """
    config = replace(config, dtype="bfloat16")
    output = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(ModelSpec(config)))
    formats = {
        "/".join(key.key for key in path[:-1]): WeightFormat("float8_e4m3fn", "row")
        for path, leaf in leaves
        if (path[0].key.startswith("layers_") and len(leaf.shape) == 2)
        or (quantize_lm_head and path[0].key == output)
    }
    return ModelSpec(config, formats, dtype)


def random_params(spec: ModelSpec, seed: int = 0) -> Params:
    """Make parameters of the right shapes and formats and of plausible magnitude, quickly.

    Matrices repeat a few million random numbers, and no code is NaN. On a CPU float8_e4m3fn is
    stored as int8 bits, as by `store.load_params`.
    """
    rng = np.random.default_rng(seed)
    codes = rng.integers(-128, 128, _TILE, np.int8)
    codes[codes & 0x7F == 0x7F] = 0
    spread = float(np.std(codes.view(e4m3.DTYPE).astype(np.float32)))
    normal = (rng.standard_normal(_TILE, np.float32) * 0.02).astype(jnp.bfloat16)

    on_cpu, abstract = jax.default_backend() == "cpu", abstract_params(spec)
    sizes = (leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    room = Room(sizes if on_cpu else ())  # in huge pages, like a checkpoint's

    def repeated(numbers: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        whole = room.empty(shape, numbers.dtype)
        flat = whole.reshape(-1)
        for start in range(0, flat.size, numbers.size):
            flat[start : start + numbers.size] = numbers[: flat.size - start]
        return whole

    def make(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> Array:
        if leaf.dtype == e4m3.DTYPE:
            bits = repeated(codes, leaf.shape)
            return jax.device_put(bits if on_cpu else bits.view(e4m3.DTYPE), may_alias=True)
        if path[-1].key == "weight" and len(leaf.shape) == 2:
            return jax.device_put(repeated(normal.astype(leaf.dtype), leaf.shape), may_alias=True)
        value = 0.02 / spread if path[-1].key == "weight_scale" else 1.0
        return jnp.full(leaf.shape, value, leaf.dtype)

    params: Params = jax.tree_util.tree_map_with_path(make, abstract)
    return params


def peak_memory() -> PeakMemory:
    """Return the device's peak so far, or the process's if the device does not count."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return PeakMemory(int(stats["peak_bytes_in_use"]), "device")
    unit = 1 if sys.platform == "darwin" else 1024
    return PeakMemory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process")


def environment() -> Environment:
    device = jax.devices()[0]
    return Environment(
        device=device.device_kind if device.platform != "cpu" else _cpu_name(),
        platform=device.platform,
        cpu_count=os.cpu_count() or 1,
        python=platform.python_version(),
        jax=jax.__version__,
        jaxlib=version("jaxlib"),
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):  # not Linux, or a processor without a name
        return platform.processor() or platform.machine()
