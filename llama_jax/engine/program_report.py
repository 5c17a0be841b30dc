"""Reports what a program compiled for a GPU launches, by reading XLA's list of thunks.

A thunk is a launch of XLA: a kernel, a copy, a graph of several, a loop. XLA writes the list, and
the HLO instruction of each thunk, beside its other dumps (`--xla_dump_to`). No GPU is needed:
`pallas_kernels.dev.sm90` compiles for an H200 on any machine.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax

from llama_jax.engine.draw_kinds import Kind
from llama_jax.engine.paths import Program, programs
from llama_jax.engine.scheduling import EngineOptions
from llama_jax.engine.steps import prefill_step
from llama_jax.model.kv_cache import KVDtype
from llama_jax.model.spec import ModelSpec
from pallas_kernels.dev import sm90

Phase = Literal["prefill", "decode"]

_THUNK = re.compile(r"( *)(\d+): (k\w+)")
_LOOP = re.compile(
    r'profile_annotation: "([^"]+)"\s+(?:thunk_id: (\d+)\s+)?\}\s+thunk_kind: "kWhile"'
)
_KNOWN_TRIPS = re.compile(r'%?([\w.\-]+) = .* while\(.*"known_trip_count":\{"n":"\d+"\}')
_COPIES = ("kCopy", "kMemzero", "kMemset32BitValue")
_FUSIONS = ("kKernel", "kCustomKernel")
_HOLDERS = ("kCommandBuffer", "kWhile", "kConditional", "kSequential")
# Copies to the host and from it, callbacks.
_OF_HOST = re.compile("Host|Infeed|Outfeed|Callback")


@dataclass(frozen=True)
class Thunk:
    """One line of the list.

    within: the kinds of the thunks that contain it, outermost first; a graph of kernels is a
        "kCommandBuffer".
    """

    number: int
    kind: str
    within: tuple[str, ...]


@dataclass(frozen=True)
class Launches:
    """Counts of launches: Pallas kernels and library calls, XLA's fusions, and copies or fills of
    memory."""

    kernels: int
    fusions: int
    copies: int


@dataclass(frozen=True)
class ProgramReport:
    """The launches and memory of a compiled program.

    host_round_trips: places where the device waits for a decision of the host.
    layer, outside: launches of one layer, and of the rest; a loop's body counts once.
    graphs: the number of CUDA graphs.
    temporary_bytes: device memory besides arguments and results.
    cache_aliased: whether the state is updated in place.
    """

    host_round_trips: int
    layer: Launches
    outside: Launches
    graphs: int
    temporary_bytes: int
    cache_aliased: bool


def report(
    spec: ModelSpec, options: EngineOptions, kv_dtype: KVDtype, phase: Phase, kind: Kind = "greedy"
) -> ProgramReport:
    """Compile the engine's program for an H200 and report on it.

    It is compiled with the first layer and with the first two. The others are like the second, and
    only the number of launches grows with them.

    kind: of the draws in decode steps. Raises RuntimeError if `sm90.unavailable()`.
    """
    found = []
    for num_layers in (1, 2):
        program = _program(_first_layers(spec, num_layers), options, kv_dtype, phase, kind)
        found.append((program, *compiled(program)))
    (_, _, few, _), (program, executable, more, trips) = found
    counts = [Counter(thunk.kind for thunk in thunks) for thunks in (few, more)]
    in_layer = counts[1] - counts[0]
    memory, state = executable.memory_analysis(), program.arguments[1]
    assert memory is not None  # XLA has it for GPUs
    donated = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    table = state.cache.page_table  # an argument of each call
    return ProgramReport(
        host_round_trips=trips,
        layer=_launches(in_layer),
        outside=_launches(counts[0] - in_layer),
        graphs=counts[1]["kCommandBuffer"],
        temporary_bytes=int(memory.temp_size_in_bytes),
        cache_aliased=bool(memory.alias_size_in_bytes >= donated - table.size * 4),
    )


def compiled(program: Program) -> tuple[jax.stages.Compiled, list[Thunk], int]:
    """Compile a program for an H200. Returns it, its thunks, and the number of host round trips."""
    with tempfile.TemporaryDirectory() as folder:
        executable = sm90.compile(
            program.function, *program.arguments, donate_argnums=1,
            compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True},
        )  # fmt: skip
        listing, metadata = (
            "".join(path.read_text() for path in Path(folder).glob(f"*{name}.txt"))
            for name in ("thunk_sequence_after_thunk_passes", "thunk_metadata")
        )
    if not listing:
        raise RuntimeError("XLA has written no list of thunks; is this another version of jaxlib?")
    listed = list(thunks(listing))
    return executable, listed, host_round_trips(listed, metadata, executable.as_text() or "")


def thunks(listing: str) -> Iterator[Thunk]:
    """Parse a list, `*.thunk_sequence_after_thunk_passes.txt`, in which indents mean nesting."""
    around: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if found := _THUNK.match(line):
            indent, kind = len(found[1]), found[3]
            while around and around[-1][0] >= indent:
                around.pop()
            yield Thunk(int(found[2]), kind, tuple(outer for _, outer in around))
            around.append((indent, kind))


def host_round_trips(listed: list[Thunk], metadata: str, hlo: str) -> int:
    """Count loops and conditions that the host decides, and transfers to and from the host.

    Those inside a graph are decided by the device, and a loop with a trip count that XLA knows
    needs no decision.

    metadata: `*.thunk_metadata.txt`, which has the names of instructions.
    hlo: the text of the compiled program.
    """
    names = {int(number or 0): name for name, number in _LOOP.findall(metadata)}
    known = set(_KNOWN_TRIPS.findall(hlo))
    count = 0
    for thunk in listed:
        if thunk.kind == "kWhile" and names.get(thunk.number) in known:
            continue
        is_decided = thunk.kind in ("kWhile", "kConditional") and (
            "kCommandBuffer" not in thunk.within
        )
        count += is_decided or bool(_OF_HOST.search(thunk.kind))
    return count + hlo.count("S(5)")  # arrays in the host's memory


def _launches(counts: Counter[str]) -> Launches:
    copies = sum(counts[kind] for kind in _COPIES)
    fusions = sum(counts[kind] for kind in _FUSIONS)
    others = counts.total() - sum(counts[kind] for kind in _HOLDERS)
    return Launches(kernels=others - copies - fusions, fusions=fusions, copies=copies)


def _program(
    spec: ModelSpec, options: EngineOptions, kv_dtype: KVDtype, phase: Phase, kind: Kind
) -> Program:
    with jax.sharding.use_abstract_mesh(sm90.H200):
        prefill, decode = programs(spec, options, kv_dtype, kind=kind)
    if phase == "decode":
        return decode
    # Without the draw that follows the end of a prompt.
    function: Any = partial(prefill_step, spec=spec)
    return replace(prefill, function=function, arguments=prefill.arguments[:-1])


def _first_layers(spec: ModelSpec, count: int) -> ModelSpec:
    kept = {
        path: stored
        for path, stored in spec.formats.items()
        if not (layer := re.match(r"layers_(\d+)/", path)) or int(layer[1]) < count
    }
    return replace(spec, config=replace(spec.config, num_layers=count), formats=kept)
