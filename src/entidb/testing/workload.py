"""What people and programs do in a simulated run: which entities they write, with what values,
which policies decide, and what the server's hook refuses.

Every payload carries the name of its database (the canary of TENANT) and a token that no other
transaction has. A transaction on a *group* writes all members of the group with the same bytes
(WHOLE); other writes of the transaction are free.
"""

from __future__ import annotations

import copy
import hashlib
import random
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from entidb.server.hooks import Refusal, ValidateContext, ValidateTransaction
from entidb.sync import Conflict, ConflictPolicy, ConflictResolution, Merge, resolve_policy
from entidb.testing.invariants import GROUP_COLLECTION, GROUP_SIZE, POISON
from entidb.testing.knobs import POLICY_NAMES, Knobs

NOTES: Final = "notes"
CARTS: Final = "carts"
#: Declared local by some devices for a while.
DRAFTS: Final = "drafts"
COLLECTIONS: Final = (NOTES, GROUP_COLLECTION, CARTS, DRAFTS)
REFUSED, RAISES = POISON.decode() + "-refused", POISON.decode() + "-raises"
#: What a firewall on the way dislikes, and what an older server finds invalid.
FILTERED, INVALID = POISON.decode() + "-filtered", POISON.decode() + "-invalid"

#: Which collections may have indexes.
INDEXED: Final = (NOTES, NOTES, CARTS)
#: What an index has to keep in order: integers and floats, also where a float leaves some out.
NUMBERS: Final = (1, 1.5, 2, 2**53, 2**53 + 1, float(2**53 + 2))

#: The fields of ``Workload``'s own.
FIELDS: Final = frozenset(("c", "f", "i", "n", "only", "p", "s", "t"))

#: (collection, id, value or None for delete)
Write = tuple[str, uuid.UUID, Any]


class PolicyFailure(Exception):
    """The error of the policy that raises."""


@lru_cache(maxsize=8192)
def entity_id(collection: str, key: int, member: int = 0) -> uuid.UUID:
    """The id of entity ``key``, the same on every device, so that they fight over it."""
    digest = hashlib.sha256(f"{collection} {key}".encode()).digest()
    return uuid.UUID(bytes=digest[:15] + bytes((member,)))


class Workload:
    """Draws transactions. ``canary`` names the database they are for. Each map that it writes has
    the fields of one of ``values`` too."""

    def __init__(
        self,
        rng: random.Random,
        knobs: Knobs,
        canary: str,
        values: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._rng = rng
        self._knobs = knobs
        self._canary = canary
        self._values = values
        self._made = 0

    def transaction(self) -> list[Write]:
        rng, knobs = self._rng, self._knobs
        self._made += 1
        token = f"{self._canary}{self._made}"
        poison = self._poison()
        if knobs.singles and rng.random() * 1000 < knobs.singles:
            name = rng.choice((NOTES, NOTES, CARTS, DRAFTS))
            key = entity_id(name, rng.randrange(knobs.keys))
            return [(name, key, self._value(token, poison))]
        writes: dict[tuple[str, uuid.UUID], Any] = {}
        count = rng.randint(0, knobs.operations)
        if knobs.bulk and rng.random() * 1000 < knobs.bulk:
            count = 60
        for _ in range(count):
            name = rng.choice((NOTES, NOTES, CARTS, DRAFTS))
            writes[name, entity_id(name, rng.randrange(knobs.keys))] = self._value(token, poison)
        if not writes or rng.random() < 0.6:
            group = rng.randrange(max(1, knobs.keys // 2))
            value = self._value(token, poison)
            for member in range(GROUP_SIZE):
                writes[GROUP_COLLECTION, entity_id(GROUP_COLLECTION, group, member)] = value
        return [(name, key, value) for (name, key), value in writes.items()]

    def value(self) -> Any:
        """A value a person decides on."""
        self._made += 1
        return self._map(f"{self._canary}{self._made}", "")

    def _value(self, token: str, poison: str) -> Any:
        rng = self._rng
        if rng.random() * 1000 < self._knobs.deletes:
            return None
        if rng.random() < 0.05:
            # Two devices that write the same bytes: no conflict, but a settled one (R24).
            given = self._values[0] if self._values else {}
            return {**copy.deepcopy(given), "c": self._canary, "t": "same"}
        return self._map(token, poison)

    def _map(self, token: str, poison: str) -> dict[str, Any]:
        rng = self._rng
        value: dict[str, Any] = {"c": self._canary, "n": rng.randrange(5), "f": {}}
        if self._values:
            # Its own fields last: the checkers read them.
            value = {**copy.deepcopy(rng.choice(self._values)), **value}
        value["f"][rng.choice("abc")] = token
        if rng.random() < 0.5:
            value["t"] = token
        if self._knobs.unique and rng.random() < 0.7:
            value["only"] = rng.randrange(self._knobs.unique)
        if self._knobs.indexes:
            value["i"] = NUMBERS[self._made % len(NUMBERS)]
        if rng.random() < 0.2:
            value["s"] = sorted({rng.randrange(9) for _ in range(3)})
        if poison:
            value["p"] = poison
        return value

    def _poison(self) -> str:
        chance, knobs = self._rng.random() * 1000, self._knobs
        for mark, rate in (
            (REFUSED, knobs.refuse),
            (RAISES, knobs.refuse_raises),
            (FILTERED, knobs.firewall),
            (INVALID, knobs.invalid),
        ):
            if chance < rate:
                return mark
            chance -= rate
        return ""


# ---------------------------------------------------------------- policies


def make_policy(name: str) -> ConflictPolicy:
    """A policy of ``POLICY_NAMES``."""
    if name == "merge_counters":
        return Merge("last_write_wins", counters=["n"], sets=["s"])
    if name in ("merge_client", "merge_manual"):
        return Merge("client_wins" if name == "merge_client" else "manual")
    if name == "callable":
        return longest_wins
    return raises_sometimes if name == "raises" else resolve_policy(name)


def combined_fields(knobs: Knobs) -> dict[str, frozenset[str]]:
    """Fields that the policy of a collection adds up or joins."""
    named = {
        NOTES: knobs.policy_notes,
        GROUP_COLLECTION: knobs.policy_pairs,
        CARTS: knobs.policy_carts,
    }
    return {
        name: frozenset("ns")
        for name, index in named.items()
        if POLICY_NAMES[index] == "merge_counters"
    }


def longest_wins(conflict: Conflict) -> ConflictResolution:
    """A policy as a user might write one: the longer value, deletions lose."""
    if len(conflict.local_payload or b"") > len(conflict.remote_payload or b""):
        return ConflictResolution.keep_local()
    return ConflictResolution.accept_remote()


def raises_sometimes(conflict: Conflict) -> ConflictResolution:
    """A policy with a bug: it cannot deal with deletions."""
    if conflict.remote_payload is None or conflict.local_payload is None:
        raise PolicyFailure("this policy forgot about deletions")
    return ConflictResolution.keep_local()


def policies(
    knobs: Knobs,
    watch: Callable[[Conflict, ConflictResolution | None], None],
    given: ConflictPolicy | None = None,
) -> dict[str, ConflictPolicy]:
    """The policy of each collection; ``watch`` is called with what each is asked and answers."""
    chosen = {
        NOTES: make_policy(POLICY_NAMES[knobs.policy_notes]),
        GROUP_COLLECTION: make_policy(POLICY_NAMES[knobs.policy_pairs]),
        CARTS: make_policy(POLICY_NAMES[knobs.policy_carts]),
        DRAFTS: resolve_policy("server_wins"),
    }
    if given is not None:
        chosen = dict.fromkeys(chosen, given)
    return {name: _watched(policy, watch) for name, policy in chosen.items()}


def _watched(
    policy: ConflictPolicy, watch: Callable[[Conflict, ConflictResolution | None], None]
) -> ConflictPolicy:
    def ask(conflict: Conflict, /) -> ConflictResolution:
        try:
            answer = policy(conflict)
        except Exception:
            watch(conflict, None)
            raise
        watch(conflict, answer)
        return answer

    fallback = getattr(policy, "fallback", None)
    if fallback is not None:
        # What decides whole is asked where nothing can be merged (R28).
        ask.fallback = _watched(fallback, watch)  # type: ignore[attr-defined]
    return ask


# ---------------------------------------------------------------- the server's hook


def validate(context: ValidateContext, transaction: ValidateTransaction) -> Refusal | None:
    """The hook of runs with poison: a pure function of the transaction."""
    marks = [
        operation.value["p"]
        for operation in transaction.operations
        if isinstance(operation.value, dict) and "p" in operation.value
    ]
    if RAISES in marks:
        raise PolicyFailure("this hook has a bug")
    if REFUSED in marks:
        return Refusal("refused", f"{context.db_id} does not take this")
    return None
