"""Prove a conflict policy, or a server's ``validate`` hook, in the simulator.

A policy has to be a pure function of the conflict (R26): a device that crashed between asking it
and storing the answer asks again, and two copies of a device ask independently. So the simulator
asks every question a second time with clocks and randomness moved, and checks all invariants around
it.
"""

from __future__ import annotations

import contextlib
import datetime as datetime_module
import random
import time
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final
from unittest import mock

from entidb.errors import ConfigError
from entidb.server.hooks import Refusal, ValidateContext, ValidateHook, ValidateTransaction
from entidb.sync import Conflict, ConflictPolicy, ConflictResolution, resolve_policy
from entidb.testing.invariants import Violation
from entidb.testing.simulator import Options, simulate

#: How far clocks are moved for the second question, in seconds: a blink, a day, ten years back.
SHIFTS_S: Final = (0.037, 86_400.0 + 1, -315_576_000.0)
SEEDS: Final = range(20)


def assert_converges(
    policy: str | ConflictPolicy | None = None,
    *,
    validate: ValidateHook | None = None,
    seeds: Iterable[int] = SEEDS,
) -> None:
    """Run ``seeds`` with ``policy`` deciding all conflicts, or with ``validate`` as the server's
    hook, or both.

    Raises ``AssertionError`` with the seed and the reason if the policy or the hook answers the
    same question differently when clocks or randomness have moved, or if any invariant fails:
    devices that end up with different data, lost transactions, conflicts that never come to rest. A
    policy may raise (that holds the transaction); a hook may not. Raises ``ConfigError`` without
    either.
    """
    if policy is None and validate is None:
        raise ConfigError("assert_converges needs a policy or a validate hook to prove")
    options = Options(
        policy=None if policy is None else _twice(resolve_policy(policy)),
        validate=None if validate is None else _hook_twice(validate),
    )
    for seed in seeds:
        run = simulate(seed, options)
        if run.invariant is not None:
            raise AssertionError(f"seed {seed}: {run.invariant}: {run.message}")


def _twice(policy: ConflictPolicy) -> ConflictPolicy:
    def ask(conflict: Conflict, /) -> ConflictResolution:
        first = _outcome(lambda: policy(conflict))
        for shift in SHIFTS_S:
            with moved(shift, policy):
                again = _outcome(lambda: policy(conflict))
            if again != first:
                raise Violation(
                    "CONVERGE",
                    f"the policy is not a pure function of the conflict: it answered {first}, and "
                    f"{again} when clocks and randomness had moved, to\n{conflict.explain()}",
                )
        return policy(conflict)

    return ask


def _hook_twice(hook: ValidateHook) -> ValidateHook:
    def ask(context: ValidateContext, transaction: ValidateTransaction) -> Refusal | None:
        first = _outcome(lambda: hook(context, transaction))
        if first[0] == "raised":
            raise Violation("NO-POISON", f"the validate hook raised {first[1]}")
        for shift in SHIFTS_S:
            with moved(shift, hook):
                again = _outcome(lambda: hook(context, transaction))
            if again != first:
                raise Violation(
                    "CONVERGE",
                    f"the validate hook answered {first}, and {again} when clocks and randomness "
                    f"had moved, to transaction {transaction.transaction_id}",
                )
        return hook(context, transaction)

    return ask


def _outcome(ask: Callable[[], object]) -> tuple[str, str]:
    try:
        return "answered", repr(ask())
    except Exception as error:
        return "raised", f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def moved(shift_s: float, function: object) -> Iterator[None]:
    """Clocks that are off by ``shift_s`` and another random state: in the ``time`` and ``random``
    modules, and wherever the module that defines ``function`` holds ``datetime``, ``date`` or a
    function of ``time`` under a name of its own."""
    state = random.getstate()
    random.seed(repr(shift_s))
    replaced = _replacements(shift_s)
    with contextlib.ExitStack() as stack:
        for name in ("time", "time_ns", "monotonic", "monotonic_ns", "perf_counter"):
            stack.enter_context(mock.patch.object(time, name, replaced[getattr(time, name)]))
        for name in ("datetime", "date"):
            was = getattr(datetime_module, name)
            stack.enter_context(mock.patch.object(datetime_module, name, replaced[was]))
        stack.enter_context(_patched_names(_globals_of(function), replaced))
        try:
            yield
        finally:
            random.setstate(state)


#: The real ones, whatever ``moved`` has put in their place.
_Datetime = datetime_module.datetime
_Date = datetime_module.date


def _replacements(shift_s: float) -> dict[Any, Any]:
    delta = datetime_module.timedelta(seconds=shift_s)
    real_time, real_monotonic, real_perf = time.time, time.monotonic, time.perf_counter
    real_time_ns, real_monotonic_ns = time.time_ns, time.monotonic_ns
    shift_ns = int(shift_s * 1e9)

    class MovedDatetime(_Datetime):
        @classmethod
        def now(cls, tz: datetime_module.tzinfo | None = None) -> Any:
            return _Datetime.now(tz) + delta

        @classmethod
        def today(cls) -> Any:
            return _Datetime.today() + delta

        @classmethod
        def utcnow(cls) -> Any:
            return _Datetime.now(datetime_module.UTC).replace(tzinfo=None) + delta

    class MovedDate(_Date):
        @classmethod
        def today(cls) -> Any:
            return (_Datetime.today() + delta).date()

    return {
        real_time: lambda: real_time() + shift_s,
        real_time_ns: lambda: real_time_ns() + shift_ns,
        real_monotonic: lambda: real_monotonic() + shift_s,
        real_monotonic_ns: lambda: real_monotonic_ns() + shift_ns,
        real_perf: lambda: real_perf() + shift_s,
        _Datetime: MovedDatetime,
        _Date: MovedDate,
    }


def _globals_of(function: object) -> dict[str, Any]:
    if isinstance(function, types.FunctionType):
        return function.__globals__
    call = vars(type(function)).get("__call__")
    return call.__globals__ if isinstance(call, types.FunctionType) else {}


@contextlib.contextmanager
def _patched_names(names: dict[str, Any], replaced: dict[Any, Any]) -> Iterator[None]:
    # By identity: the object under a name may not be hashable.
    found = {n: v for n, v in names.items() if any(v is real for real in replaced)}
    names.update({name: replaced[value] for name, value in found.items()})
    try:
        yield
    finally:
        names.update(found)


__all__ = ["SEEDS", "assert_converges", "moved"]
