"""Chooses the kernel that takes an operation. The `Choice` is made once and passed on; it also says
why other kernels refuse.

Each operation lists its kernels in order (`KERNELS`). `choose` takes the first that does not refuse
the operands. The `Choice` also stands in the traced program, as the scope of what the kernel does,
where `llama_jax.engine.paths` finds it again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import jax

from pallas_kernels import device


def never(*_: Any) -> None:
    """Refuse nothing."""


def _not_local(*_: Any) -> str | None:
    return device.not_local()


@dataclass(frozen=True, eq=False, kw_only=True)
class Kernel:
    """One way to compute an operation; two are equal only if they are the same object.

    name: what `implementation` calls it.
    run: computes the operation; each operation says with which arguments.
    refusal: returns why the kernel cannot take some operands where the program is lowered for, or
        None if it can. Each operation says which operands.
    unasked: returns why nothing but `implementation` may take the kernel for these operands, or
        None. By default that is where arrays may be divided over devices.
    not_here: returns why the kernel cannot run there, whatever the operands, or None if it can.
    launches: what the kernel is called in compiled programs, each name with what it costs. There
        are none in what XLA compiles.
    family: another name, for several kernels: the first of them that does not refuse is taken.
    """

    name: str
    run: Callable[..., Any]
    refusal: Callable[..., str | None]
    unasked: Callable[..., str | None] = _not_local
    not_here: Callable[[], str | None] = never
    launches: Mapping[str, str] = field(default_factory=dict)
    family: str | None = None

    def is_meant_by(self, implementation: str | None) -> bool:
        return implementation in (None, self.name, self.family)

    @property
    def fuses(self) -> tuple[str, ...]:
        """Return what a launch does beside the operation, in words."""
        return ()


@dataclass(frozen=True)
class Choice[K: Kernel]:
    """The kernel that takes an operation.

    refusals: the kernels that were asked before it, by name, each with the reason why not.
    asked: the `implementation` that was asked for; None if nothing was.
    """

    kernel: K
    refusals: tuple[tuple[str, str], ...] = ()
    asked: str | None = None

    @property
    def why_no_kernel(self) -> str | None:
        """Return why XLA's code runs, or the reference; None if a kernel does, or if there is
        none."""
        if self.kernel.launches:
            return None
        return f"{self.asked} was asked for" if self.asked else _in_words(self.refusals) or None

    def scope(self) -> AbstractContextManager[Any, None]:
        """Return the scope of what the kernel does. Traced programs, their compiled text and
        profiles then name the kernel and, if XLA's code runs, say why."""
        return jax.named_scope(_Scope(self))


class _Scope(str):
    """A scope's name that remembers its choice."""

    choice: Choice[Any]

    def __new__(cls, choice: Choice[Any]) -> "_Scope":
        reason = choice.why_no_kernel
        name = super().__new__(cls, choice.kernel.name + (f": {reason}" if reason else ""))
        name.choice = choice
        return name


def choice_in(scopes: Iterable[str]) -> Choice[Any] | None:
    """Return the choice of the innermost `Choice.scope` among names of scopes; None without any."""
    found = [each.choice for each in scopes if isinstance(each, _Scope)]
    return found[-1] if found else None


def choose[K: Kernel](
    operation: str,
    kernels: Sequence[K],
    operands: Sequence[Any],
    implementation: str | None = None,
) -> Choice[K]:
    """Choose the first kernel that an implementation stands for and that does not refuse the
    operands.

    operation: its name, for messages. implementation: a kernel's name or a family's; None stands
        for all of them.
    Raises ValueError for a name that no kernel has, and if each kernel of that name refuses.
    """
    meant = [each for each in kernels if each.is_meant_by(implementation)]
    if not meant:
        known = dict.fromkeys(name for each in kernels for name in (each.family, each.name) if name)
        raise ValueError(
            f"{operation} has no implementation {implementation!r}: take one of "
            f"{', '.join(known)}, or None"
        )
    refusals: list[tuple[str, str]] = []
    for kernel in meant:
        reason = kernel.refusal(*operands)
        if reason is None and implementation is None:
            reason = kernel.unasked(*operands)
        if reason is None:
            return Choice(kernel, tuple(refusals), implementation)
        refusals.append((kernel.name, reason))
    raise ValueError(
        f"{operation}: implementation {implementation!r} cannot run: {_in_words(refusals)}"
    )


def not_here(kernels: Iterable[Kernel], implementation: str | None) -> str | None:
    """Return why no kernel that an implementation stands for runs on what is lowered for, whatever
    the operands; None if one does."""
    reasons = [each.not_here() for each in kernels if each.is_meant_by(implementation)]
    return None if None in reasons else "; ".join(dict.fromkeys(filter(None, reasons)))


def _in_words(refusals: Iterable[tuple[str, str]]) -> str:
    return "; ".join(dict.fromkeys(reason for _, reason in refusals))
