"""Which backend and schedule a call uses: its argument, else the innermost ``kernels`` context, else the fastest."""

from __future__ import annotations

import contextlib
import functools
import importlib
import threading
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from .contract import Backend

if TYPE_CHECKING:  # mypy holds every backend module to the contract
    from . import cpu, cuda, triton

    _cpu: Backend = cpu
    _cuda: Backend = cuda
    _triton: Backend = triton

# "reference" is not a module here: it is plain PyTorch, differentiated by autograd, and never passes through a
# registered operator.
KERNELS = ("cpu", "triton", "cuda")
# In order of preference on each type of device. Starting a Triton kernel takes 12 us of Python, one of csrc/cuda 2 us
# (one Zen 5 core), and a training step of BERT-large starts 240.
PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
BACKENDS = (None, "reference", *KERNELS)
SCHEDULES = (None, "fused", "staged")


@functools.cache
def load(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f"{__package__}.{name}"))


class Choice(NamedTuple):
    backend: str | None
    schedule: str | None


_FREE = Choice(None, None)
_thread = threading.local()
# What every thread that is within a context has chosen, and what compiled code may rely on: a plain global, which
# torch.compile guards. A thread's own choice cannot be guarded.
_by_thread: dict[int, Choice] = {}
_lock = threading.Lock()
_of_the_process = _FREE


@contextlib.contextmanager
def kernels(*, backend: str | None = None, schedule: str | None = None) -> Iterator[None]:
    """Chooses the backend, the schedule or both for every mixout call of this thread within the block.

    In the manner of ``torch.nn.attention.sdpa_kernel``: for whole models, whose layers pass no ``backend=``.

    .. code-block:: python

        with mk.kernels(backend="cpu", schedule="staged"):
            model(**batch).loss.backward()

    What is named never falls back: a call that cannot follow it raises and says why. An argument of the call itself
    goes before the context, an inner context before an outer one, and None leaves the outer one's choice. On exit the
    former choice is restored, also after an error. ``torch.compile`` compiles anew for another choice; since it cannot
    tell threads apart, compiling while another thread has chosen otherwise is an error.

    Args:
        backend: None, "reference", "cpu", "triton" or "cuda".
        schedule: None, "fused" (mixed inside the GEMM) or "staged" (mixed before it).

    Raises:
        ValueError: for another name.
    """
    for argument, value, names in (("backend", backend, BACKENDS), ("schedule", schedule, SCHEDULES)):
        if value not in names:
            raise ValueError(f"kernels: {argument}: expected one of {', '.join(map(repr, names))}, got {value!r}")
    outer: Choice = getattr(_thread, "choice", _FREE)
    _enter(Choice(backend or outer.backend, schedule or outer.schedule))
    try:
        yield
    finally:
        _enter(outer)


def _enter(choice: Choice) -> None:
    global _of_the_process
    _thread.choice = choice
    with _lock:
        if choice == _FREE:
            _by_thread.pop(threading.get_ident(), None)
        else:
            _by_thread[threading.get_ident()] = choice
        _of_the_process = next(iter(_by_thread.values()), _FREE)


def present() -> Choice:
    """What the ``kernels`` context of this thread says, for code that is not compiled."""
    choice: Choice = getattr(_thread, "choice", _FREE)
    return choice


def selected(backend: str | None, schedule: str | None) -> Choice:
    """What a call is to use that was given these two arguments."""
    if torch.compiler.is_compiling():
        choice = _of_the_process
        _check_the_thread_agrees()
    else:
        choice = present()
    if backend is None and schedule is None:
        return choice
    return Choice(backend or choice.backend, schedule or choice.schedule)


def _check_the_thread_agrees() -> bool:
    chosen = {getattr(_thread, "choice", _FREE), *_by_thread.values()}
    if len(chosen) > 1:
        raise RuntimeError(
            "mixout_kernels: torch.compile cannot tell threads apart: expected the same kernels(...) in every thread "
            f"while a model is compiled, got {sorted(chosen, key=str)}"
        )
    return True


def choose(
    name: str | None, schedule: str | None, device: str, weight: torch.dtype, target: torch.dtype, compute: torch.dtype
) -> str:
    """The backend to use: ``name`` if it can do this, or else an error that says why; for None the first that can."""
    if name == "reference":
        if schedule is not None:
            raise RuntimeError(f"schedule={schedule!r} was asked for, but the reference follows none")
        return name
    reasons = {}
    for candidate in PREFERENCE.get(device, ()) if name is None else (name,):
        reason = _reason_against(candidate, schedule, device, weight, target, compute)
        if reason is None:
            return candidate
        if name is not None:
            raise RuntimeError(f"backend={name!r} was asked for, but {reason}")
        reasons[candidate] = reason
    if schedule is None:
        for candidate, reason in reasons.items():
            _say_once(f"backend {candidate!r} is not used: {reason}")
    else:
        why = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items()) or f"none is for {device}"
        raise RuntimeError(f"schedule={schedule!r} was asked for, but no backend can follow it here ({why})")
    return "reference"


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo: that takes seconds.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
_check_the_thread_agrees._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _reason_against(
    name: str, schedule: str | None, device: str, weight: torch.dtype, target: torch.dtype, compute: torch.dtype
) -> str | None:
    try:
        backend = load(name)
    except ModuleNotFoundError as error:
        return f"the {name} backend could not be imported: {error}"
    if reason := backend.unavailable_reason() or backend.unsupported_reason(device, weight, target, compute):
        return reason
    schedules = backend.schedules(compute)
    if schedule is not None and schedule not in schedules:
        return f"for {compute} it has the schedules {', '.join(schedules)} here, got schedule={schedule!r}"
    return None


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(f"mixout_kernels: {message}", stacklevel=5)
