"""Reports the registers, shared memory and instructions of the compiled kernels.

    python -m pallas_kernels.dev.report                    kernels of the 8B model
    python -m pallas_kernels.dev.report --only "70B TP4"   of other cases of `dev.bench`

Kernels with the same machine code are one row. Needs the extra `aot`, but no GPU.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import jax

from pallas_kernels.dev import bench, sm90
from pallas_kernels.dev.case import Case

ONLY = (
    r"^8B TP1 (q|gate|down|qkv|gate_up)_proj|"
    r"^(8B|1B) TP1 heads .*( T=8192 | B=8 S=8192 )|"
    r"^8B TP1 heads .* (B=1 parts=11 .* rope and cache|B=1 S=1088 .* attention in one)$|"
    r"^8B TP1 (hidden|intermediate) .* m=1 "
)
ROWS = (1, 16, 64, 512, 8192)
MATRIX_OPCODES = ("QGMMA", "HGMMA")
# Of an SM (CUDA C++ programming guide, compute capability 9.0).
REGISTERS, SHARED_BYTES, SHARED_BYTES_PER_BLOCK = 65_536, 233_472, 1024
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvcc")


@dataclass(frozen=True)
class Row:
    """One kernel.

    case: the first one that it was compiled for.
    blocks: the number of blocks that fit on an SM.
    instructions: counts in the whole kernel. loop: counts in the shortest loop with a matrix
        instruction, empty if there is none. See `sm90.Kernel`.
    """

    kernel: str
    case: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    blocks: int
    instructions: Mapping[str, int]
    loop: Mapping[str, int]

    def __str__(self) -> str:
        counts = [self.instructions.get(each, 0) for each in OPCODES]
        return (
            f"{self.kernel:<24}{self.case:<60}{self.registers:>6}{self.spill_bytes:>7}"
            f"{self.shared_bytes / 1024:>8.0f}{self.blocks:>7}{sum(self.loop.values()):>6}"
            f"{sum(self.instructions.values()):>6}" + "".join(f"{each:>8}" for each in counts)
        )


OPCODES = ("QGMMA", "HGMMA", "UTMALDG", "UTMASTG", "LDS", "STS", "F2FP", "FFMA", "MUFU")
HEADER = (
    f"{'':<84}{'regs':>6}{'spills':>7}{'KiB':>8}{'blocks':>7}{'loop':>6}{'all':>6}"
    + "".join(f"{each:>8}" for each in OPCODES)
)  # fmt: skip


def rows(cases: Iterable[Case]) -> Iterator[Row]:
    """Yield a row for each kernel that differs from all earlier ones."""
    seen = set()
    for case in cases:
        arguments = jax.eval_shape(case.arguments, jax.random.key(0))
        for kernel in sm90.kernels(case.run, *arguments):
            row = row_of(kernel, case.name)
            key = row.kernel, row.registers, row.shared_bytes, *sorted(row.instructions.items())
            if key not in seen:
                seen.add(key)
                yield row


def row_of(kernel: sm90.Kernel, case: str) -> Row:
    opcode = next((each for each in MATRIX_OPCODES if kernel.count(each)), "")
    by_registers = REGISTERS // (kernel.registers * kernel.threads)
    by_memory = SHARED_BYTES // (kernel.shared_bytes + SHARED_BYTES_PER_BLOCK)
    return Row(
        kernel.name, case, kernel.registers, kernel.spill_bytes, kernel.shared_bytes,
        min(by_registers, by_memory),
        dict(sorted(kernel.instructions.items())), dict(sorted(kernel.loop(opcode).items())),
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description="Compile the kernels for sm_90a, and count.")
    options.add_argument("--only", default=ONLY, help="a regular expression for cases' names")
    options.add_argument("--rows", type=int, nargs="+", default=ROWS, help="of activations")
    options.add_argument("--json", type=Path, help="also write the rows to this file")
    chosen = options.parse_args(arguments)
    if reason := sm90.unavailable():
        options.error(f"cannot compile for sm_90a: {reason}")
    print(HEADER)
    found = []
    for row in rows(bench.cases(chosen.rows, chosen.only)):
        found.append(row)
        print(row, flush=True)
    if chosen.json:
        versions = {name: version(name) for name in PACKAGES}
        document = {"versions": versions, "kernels": [asdict(row) for row in found]}
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
