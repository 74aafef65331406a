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
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final
from unittest import mock

from entidb import cbor
from entidb.db.notebook import payload_text
from entidb.errors import ConfigError
from entidb.server.hooks import Refusal, ValidateContext, ValidateHook, ValidateTransaction
from entidb.sync import Action, Conflict, ConflictPolicy, ConflictResolution, resolve_policy
from entidb.testing.invariants import Violation
from entidb.testing.simulator import Options, simulate
from entidb.testing.workload import FIELDS

#: How far clocks are moved for the second question, in seconds: a blink, a day, ten years back.
SHIFTS_S: Final = (0.037, 86_400.0 + 1, -315_576_000.0)
SEEDS: Final = range(20)


def assert_converges(
    policy: str | ConflictPolicy | None = None,
    *,
    validate: ValidateHook | None = None,
    seeds: Iterable[int] = SEEDS,
    values: Iterable[Mapping[str, Any]] = (),
) -> None:
    """Run ``seeds`` with ``policy`` deciding all conflicts, or with ``validate`` as the server's
    hook, or both. ``values`` are entities as your application writes them: what the simulated
    devices write has the fields of one of these, and some of its own.

    Raises ``AssertionError`` with the seed and the reason if the policy or the hook answers the
    same question differently when clocks or randomness have moved, if the policy answers what is no
    ``ConflictResolution``, has decided nothing because it raised each time or was never asked, or
    if any invariant fails: devices that end up with different data, lost transactions, conflicts
    that never come to rest. A policy that raises sometimes, which holds the transaction, makes a
    ``UserWarning``; a hook may not raise. Raises ``ConfigError`` without a policy and a hook, and
    for ``values`` that cannot be.
    """
    if policy is None and validate is None:
        raise ConfigError("assert_converges needs a policy or a validate hook to prove")
    asked = None if policy is None else _Asked(resolve_policy(policy))
    options = Options(
        policy=asked,
        validate=None if validate is None else _hook_twice(validate),
        values=_checked(values),
    )
    for seed in seeds:
        run = simulate(seed, options)
        if run.invariant is not None:
            raise AssertionError(
                f"seed {seed}: {run.invariant}: {run.message}\nTo see this again, call "
                f"assert_converges with seeds=[{seed}]"
            )
    if asked is not None:
        asked.judge()


def _checked(values: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    given = list(values)
    for value in given:
        if not isinstance(value, Mapping):
            raise ConfigError(f"values are maps of fields, not {value!r:.80}")
        cbor.encode(dict(value))
        if taken := sorted(FIELDS & value.keys()):
            raise ConfigError(
                f"the simulator writes a field {taken[0]!r} of its own into each entity: give "
                "that of your values another name"
            )
    return given


class _Asked:
    """A policy, each of whose answers is looked at."""

    def __init__(self, policy: ConflictPolicy) -> None:
        self._policy = policy
        self._count = 0
        self._raised = 0
        #: What it raised first, and to what question.
        self._first: tuple[str, str] | None = None
        fallback = getattr(policy, "fallback", None)
        if fallback is not None:
            # What decides whole is asked where nothing can be merged (R28).
            self.fallback = _Asked(fallback)

    def __call__(self, conflict: Conflict, /) -> ConflictResolution:
        policy = self._policy
        self._count += 1
        first = _Outcome(lambda: policy(conflict))
        for shift in SHIFTS_S:
            with moved(shift, policy):
                again = _Outcome(lambda: policy(conflict))
            if not again.same_as(first):
                raise Violation(
                    "CONVERGE",
                    f"the policy is not a pure function of the conflict: it {first}, and {again} "
                    f"when clocks and randomness had moved.\n{_about(conflict)}",
                )
        try:
            answer: object = policy(conflict)
        except Exception:
            self._raised += 1
            self._first = self._first or (str(first), _about(conflict))
            raise
        if not isinstance(answer, ConflictResolution):
            raise Violation(
                "CONVERGE",
                f"the policy {first}, which is no ConflictResolution: return one, such as "
                f"ConflictResolution.keep_local().\n{_about(conflict)}",
            )
        return answer

    def judge(self) -> None:
        """Whether it has decided something."""
        if not self._count:
            raise AssertionError("the policy was never asked: give more seeds")
        if self._first is None:
            return
        said, question = self._first
        if self._raised == self._count:
            raise AssertionError(
                f"the policy raised in each of {self._count} conflicts, so nothing is proved; "
                f"first it {said}. If it needs fields that your application has, give values= "
                f"like those that it writes.\n{question}"
            )
        warnings.warn(
            f"the policy raised in {self._raised} of {self._count} conflicts, which holds their "
            f"transactions until a person decides; first it {said}.\n{question}",
            UserWarning,
            stacklevel=3,
        )


def _about(conflict: Conflict) -> str:
    """The conflict, without what a person may choose."""
    return conflict.explain().partition("\nChoices:")[0]


def _hook_twice(hook: ValidateHook) -> ValidateHook:
    def ask(context: ValidateContext, transaction: ValidateTransaction) -> Refusal | None:
        first = _Outcome(lambda: hook(context, transaction))
        if first.raised:
            raise Violation("NO-POISON", f"the validate hook {first}")
        for shift in SHIFTS_S:
            with moved(shift, hook):
                again = _Outcome(lambda: hook(context, transaction))
            if not again.same_as(first):
                raise Violation(
                    "CONVERGE",
                    f"the validate hook {first}, and {again} when clocks and randomness "
                    f"had moved, to transaction {transaction.transaction_id}",
                )
        return hook(context, transaction)

    return ask


class _Outcome:
    """What came of a question."""

    def __init__(self, ask: Callable[[], object]) -> None:
        self.raised = False
        try:
            answer = ask()
        except Exception as error:
            self.raised = True
            self._whole = self._said = f"raised {type(error).__name__}: {error}"
            return
        self._whole, self._said = repr(answer), f"answered {answer!r:.200}"
        if isinstance(answer, ConflictResolution):
            merged = answer.action is Action.MERGE
            value = f"({payload_text(answer.payload, 'None')})" if merged else ""
            self._said = f"answered {answer.action.value}{value}"

    def same_as(self, other: _Outcome) -> bool:
        return self._whole == other._whole

    def __str__(self) -> str:
        """The end of a sentence."""
        return self._said


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
