"""Chooses the kernel for an operation. The `Choice` is made once and passed on; it also records why
other kernels refused.

Each operation lists its kernels in order (`KERNELS`), and `choose` takes the first that does not
refuse the operands. The `Choice` is part of the traced program, as the name of the kernel's scope,
where `llama_jax.engine.paths` finds it.
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

    name: its name in `implementation`.
    run: computes the operation, with the arguments that the operation defines.
    refusal: returns why the kernel cannot take some operands on the target device, or None.
    unasked: returns why the kernel should only be used if `implementation` names it, or None. By
        default that is if arrays may be divided over devices.
    not_here: returns why the kernel cannot run on the target device with any operands, or None.
    launches: its names in compiled programs, each with a description of its cost; none for XLA.
    family: another name that several kernels share, and that means the first one that does not
        refuse.
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
        """Describe what a launch does besides the operation."""
        return ()


@dataclass(frozen=True)
class Choice[K: Kernel]:
    """The kernel that takes an operation.

    refusals: the names of kernels that come before it, each with the reason for its refusal.
    asked: the `implementation` that was named, or None.
    """

    kernel: K
    refusals: tuple[tuple[str, str], ...] = ()
    asked: str | None = None

    @property
    def why_no_kernel(self) -> str | None:
        """Return why XLA or the reference computes it, or None if a kernel does or none exists."""
        if self.kernel.launches:
            return None
        return f"{self.asked} was asked for" if self.asked else _in_words(self.refusals) or None

    def scope(self) -> AbstractContextManager[Any, None]:
        """Return a named scope for the kernel. It tells traced programs, compiled text and profiles
        which kernel runs, and why if it is XLA."""
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
    """Choose the first kernel that does not refuse the operands.

    operation: its name, for messages.
    implementation: restricts the choice to the kernels of this name or family.

    Raises ValueError for an unknown name, and if all kernels of that name refuse.
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
    """Return why no kernel of an implementation can run on the target device with any operands, or
    None if one can."""
    reasons = [each.not_here() for each in kernels if each.is_meant_by(implementation)]
    return None if None in reasons else "; ".join(dict.fromkeys(filter(None, reasons)))


def _in_words(refusals: Iterable[tuple[str, str]]) -> str:
    return "; ".join(dict.fromkeys(reason for _, reason in refusals))
