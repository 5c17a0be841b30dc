"""Compiles for an H200 on a machine without one, and reads the compiled kernels.

    compiled = sm90.compile(step, spec, cache)         # whole graphs: memory, aliasing, HLO text
    for kernel in sm90.kernels(fp8_matmul, x, weight): # Mosaic GPU kernels: registers, SASS
        assert kernel.spill_bytes == 0 and kernel.count("QGMMA")

Arguments are arrays or `jax.ShapeDtypeStruct`s, and nothing is run. This needs the extra `aot` (the
CUDA plugin of jax, ptxas, libdevice and nvdisasm), but no driver. `unavailable()` returns what is
missing.
"""

import collections
import contextlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

# The description of a device from which XLA compiles: the published limits of compute capability
# 9.0 (CUDA C++ programming guide, "Technical specifications per compute capability") and of the
# H200.
_H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 patch: 0 }
gpu_device_info {
  name: "NVIDIA H200"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: 150000000000
  memory_bandwidth: 4800000000000
  clock_rate_ghz: 1.98
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
"""


# The target of lowering. Under `jax.sharding.use_abstract_mesh(H200)` kernels for an H200 are
# chosen, and its number of SMs is known.
H200 = AbstractMesh(
    (), (), abstract_device=AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
)


@dataclass(frozen=True)
class Kernel:
    """One compiled Mosaic GPU kernel.

    threads: of a block.
    registers: per thread, as allotted by ptxas before warpgroups redistribute them.
    spill_bytes: of stores and loads of spilled registers together.
    shared_bytes: dynamic shared memory of a block, including barriers.
    instructions: occurrences of each SASS opcode, without suffixes, in the listing (a loop's body
        counts once). QGMMA is a warpgroup's FP8 matrix instruction, HGMMA the 16-bit one; UTMALDG
        and UTMASTG are TMA loads and stores. HMMA or FFMA in a matrix kernel mean a slow path, LDL
        and STL spills.
    losses: ptxas' remarks on performance, such as serialised matrix instructions.
    ptx, sass: the listings; sass begins with the scheduler's control codes.
    """

    name: str
    threads: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: Mapping[str, int]
    losses: tuple[str, ...]
    ptx: str
    sass: str

    def count(self, opcode: str) -> int:
        return self.instructions.get(opcode, 0)

    def loop(self, opcode: str) -> Mapping[str, int]:
        """Count the instructions of the shortest loop with `opcode`; empty if it is in none."""
        found = (_counted(loop) for loop in _loops(self.sass.splitlines()))
        return min((each for each in found if opcode in each), key=lambda c: c.total(), default={})


def unavailable() -> str | None:
    """Return why this machine cannot compile for sm_90a; None if it can."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return "the CUDA plugin of jax is missing: install the extra aot"
    for tool in ("ptxas", "nvdisasm"):
        if not (_cuda_root() / "bin" / tool).exists():
            return f"no {tool} in {_cuda_root()}/bin: install the extra aot, or set CUDA_ROOT"
    return None


@cache
def devices(count: int = 1) -> tuple[jax.Device, ...]:
    """Return descriptions of the H200s of one host, for arguments' shardings; nothing runs on them.

    Raises RuntimeError if `unavailable()`.
    """
    if reason := unavailable():
        raise RuntimeError(f"cannot compile for sm_90a: {reason}")
    jax.devices()  # registers the plugins
    topology = topologies.get_topology_desc(
        "", platform="cuda", target_config=_H200, topology=f"1x1x{count}"
    )
    return tuple(topology.devices)


def compile(function: Callable[..., Any], *args: Any, **jit_options: Any) -> jax.stages.Compiled:
    """Compile `jax.jit(function, **jit_options)` for an H200.

    args: trees of arrays or ShapeDtypeStructs. Structs without a sharding, and arrays, go to one
    H200; for several, give structs shardings over a mesh of `devices(count)`.
    """
    device = SingleDeviceSharding(devices()[0])

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        given = leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=given or device)

    with jax.sharding.use_abstract_mesh(H200):
        lowered = jax.jit(function, **jit_options).lower(*jax.tree.map(place, args))
    return lowered.compile()


def kernels(function: Callable[..., Any], *args: Any) -> list[Kernel]:
    """Return the Mosaic GPU kernels of `function`, in the order in which they were compiled.

    args: as in `compile`.
    """
    with tempfile.TemporaryDirectory() as folder:
        with _dumps_in(folder):
            # A cached kernel would not be compiled, and so not dumped.
            jax.clear_caches()
            compile(function, *args)
        ptx = sorted(Path(folder).glob("*.ptx"), key=lambda path: path.stat().st_mtime_ns)
        return [_read(path) for path in ptx]


def _cuda_root() -> Path:
    """Return the directory where Mosaic GPU looks for ptxas."""
    from jax.experimental.mosaic.gpu import core

    return Path(core.cuda_root)


@contextlib.contextmanager
def _dumps_in(folder: str) -> Iterator[None]:
    """Dump kernels into a folder; Mosaic GPU reads the variable at each compilation."""
    from jax.experimental.mosaic.gpu.constraints import ConstraintSystem

    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    try:
        # Nobody reads the constraints of layouts, and printing them takes a third of the time.
        with mock.patch.object(ConstraintSystem, "__str__", return_value=""):
            yield
    finally:
        del os.environ["MOSAIC_GPU_DUMP_TO"]


def _read(ptx: Path) -> Kernel:
    sass = ptx.with_suffix(".sass_ctrl").read_text()
    log = ptx.with_suffix(".ptxas").read_text()
    module = ptx.with_suffix(".before_layout_inference.txt").read_text()
    return Kernel(
        name=re.sub(r"_\d+$", "", ptx.stem),
        threads=_only(r"\.maxntid (\d+), 1, 1", ptx.read_text()),
        registers=_only(r"Used (\d+) registers", log),
        spill_bytes=sum(int(size) for size in re.findall(r"(\d+) bytes spill", log)),
        shared_bytes=_only(r"dynamic_shared_memory_size %c(\d+)_i32", module),
        instructions=_counted(sass.splitlines()),
        losses=tuple(line for line in log.splitlines() if "Performance Loss" in line),
        ptx=ptx.read_text(),
        sass=sass,
    )


def _loops(sass: list[str]) -> Iterator[list[str]]:
    """Yield the bodies of natural loops: all that reaches a jump back without passing the head."""
    blocks: list[list[str]] = [[]]
    labels = {}
    for line in sass:
        if label := re.fullmatch(r"(\.L\S+):", line.strip()):
            blocks.append([])
            labels[label.group(1)] = len(blocks) - 1
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
            blocks[-1].append(line)
            if re.search(r"\b(BRA|EXIT)\b", line):
                blocks.append([])
    before: dict[int, set[int]] = collections.defaultdict(set)
    for i, block in enumerate(blocks):
        last = block[-1] if block else ""
        if to := re.search(r"BRA\S* .*`\((\S+)\)", last):
            before[labels[to.group(1)]].add(i)
        if not re.search(r"\*/\s+(BRA `|EXIT)", last):  # it may fall through to the next block
            before[i + 1].add(i)
    for head in range(1, len(blocks)):
        for end in (each for each in before[head] if each >= head):
            body, open_ends = {head}, [end]
            while open_ends:
                if (block_index := open_ends.pop()) not in body:
                    body.add(block_index)
                    open_ends += before[block_index]
            if 0 not in body:
                yield [line for i in sorted(body) for line in blocks[i]]


def _counted(sass: list[str]) -> collections.Counter[str]:
    instruction = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)"
    return collections.Counter(re.findall(instruction, "\n".join(sass)))


def _only(pattern: str, text: str) -> int:
    (number,) = re.findall(pattern, text)
    return int(number)
