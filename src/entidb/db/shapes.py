"""What a class knows of the maps it is stored as, and how the rest survives a write.

A newer version of a program adds a field; an older one reads the entity, which drops what its class
does not know, changes something and writes it back. A shape says which keys the class knows, at
every depth, and ``keep`` takes over the others from what is stored. Shapes are made in ``kinds``;
here are only plain values, as canonical CBOR has them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Final, Protocol

from entidb import cbor
from entidb.errors import ValueTypeError

#: Fields that identify the members of a list, in order of trust, where all of them have one.
_NAMES_OF_IDENTITY: Final = ("id", "_id", "uuid", "uid", "key")
#: Members of a list that are compared with each other at most: their number squared.
_COMPARED_MAX: Final = 10_000


class Shape(Protocol):
    """One place in a value, with something below it that has fields."""

    def has_unknown(self, stored: Any) -> bool:
        """Whether ``stored`` contains what the class does not know."""
        ...

    def keep(self, new: Any, stored: Any) -> Any:
        """``new`` with what the class does not know of ``stored``; ``new`` is changed in place.

        Raises ``ValueTypeError`` where the class forbids fields that it does not know."""
        ...

    def fits(self, plain: Any) -> bool:
        """Whether ``plain`` can be of this shape and not of another one in the same union."""
        ...


class Fields:
    """A map with the fields of a class. ``below`` are the shapes of fields that have one; an
    ``open`` class carries unknown fields itself, a ``closed`` one cannot be read with them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.known: set[str] = set()
        self.required: set[str] = set()
        self.below: dict[str, Shape] = {}
        #: Keys with fixed values, which say that it is this class and none other of a union.
        self.tags: dict[str, frozenset[Any]] = {}
        self.open = False
        self.closed = False

    def has_unknown(self, stored: Any) -> bool:
        if type(stored) is not dict:
            return False
        if not self.open and not stored.keys() <= self.known:
            return True
        return any(name in stored and s.has_unknown(stored[name]) for name, s in self._below())

    def keep(self, new: Any, stored: Any) -> Any:
        if type(new) is not dict or type(stored) is not dict:
            return new
        if not self.open:
            for name, value in stored.items():
                if name not in self.known and name not in new:
                    if self.closed:
                        raise _forbidden(self.name, name)
                    new[name] = value
        for name, shape in self._below():
            if name in new and name in stored:
                new[name] = shape.keep(new[name], stored[name])
        return new

    def fits(self, plain: Any) -> bool:
        return (
            type(plain) is dict
            and self.required <= plain.keys()
            and all(_among(plain.get(name), values) for name, values in self.tags.items())
        )

    def _below(self) -> Iterable[tuple[str, Shape]]:
        return self.below.items()


class Items:
    """A list whose members all have one shape."""

    def __init__(self, member: Shape) -> None:
        self.member = member

    def has_unknown(self, stored: Any) -> bool:
        return type(stored) is list and any(map(self.member.has_unknown, stored))

    def keep(self, new: Any, stored: Any) -> Any:
        if type(new) is list and self.has_unknown(stored):
            for at, before in _pairs(new, stored, self.member):
                new[at] = self.member.keep(new[at], stored[before])
        return new

    def fits(self, plain: Any) -> bool:
        return type(plain) is list


class Values:
    """A map from any text to members of one shape."""

    def __init__(self, member: Shape) -> None:
        self.member = member

    def has_unknown(self, stored: Any) -> bool:
        return type(stored) is dict and any(map(self.member.has_unknown, stored.values()))

    def keep(self, new: Any, stored: Any) -> Any:
        if type(new) is dict and type(stored) is dict:
            for name in new.keys() & stored.keys():
                new[name] = self.member.keep(new[name], stored[name])
        return new

    def fits(self, plain: Any) -> bool:
        return type(plain) is dict


class Places:
    """A list whose places are fields. With ``grows``, a newer class has more of them behind."""

    def __init__(self, below: list[Shape | None], *, grows: bool = False) -> None:
        self.below = below
        self.grows = grows

    def has_unknown(self, stored: Any) -> bool:
        if type(stored) is not list:
            return False
        if self.grows and len(stored) > len(self.below):
            return True
        pairs = zip(self.below, stored, strict=False)
        return any(shape is not None and shape.has_unknown(each) for shape, each in pairs)

    def keep(self, new: Any, stored: Any) -> Any:
        if type(new) is not list or type(stored) is not list:
            return new
        for at, (shape, before) in enumerate(zip(self.below, stored, strict=False)):
            if shape is not None and at < len(new):
                new[at] = shape.keep(new[at], before)
        if self.grows and len(new) == len(self.below):
            new.extend(stored[len(self.below) :])
        return new

    def fits(self, plain: Any) -> bool:
        return type(plain) is list


class Choice:
    """A union: what is stored and what is written count as the same member only where both fit that
    one and no other."""

    def __init__(self, members: list[Shape]) -> None:
        self.members = members

    def has_unknown(self, stored: Any) -> bool:
        member = self._of(stored)
        return member is not None and member.has_unknown(stored)

    def keep(self, new: Any, stored: Any) -> Any:
        member = self._of(new)
        if member is None or member is not self._of(stored):
            return new
        return member.keep(new, stored)

    def fits(self, plain: Any) -> bool:
        return any(member.fits(plain) for member in self.members)

    def _of(self, plain: Any) -> Shape | None:
        found = [member for member in self.members if member.fits(plain)]
        return found[0] if len(found) == 1 else None


def keep_unknown(shape: Shape, payload: bytes, stored: bytes) -> bytes:
    """``payload`` with everything of the payload ``stored`` that ``shape`` does not know."""
    if payload == stored:
        return payload
    before = cbor.decode_trusted(stored)
    if not shape.has_unknown(before):
        return payload
    return cbor.encode(shape.keep(cbor.decode_trusted(payload), before))


def _forbidden(name: str, field: str) -> ValueTypeError:
    return ValueTypeError(
        f"the stored entity has a field {field!r}, and {name} forbids fields it does not know: "
        "this write would erase it, or make an entity that cannot be read. Let the class ignore "
        "unknown fields, or open the collection with exact=True to erase them",
        field=field,
        reason="a field that the class forbids",
    )


def _among(value: Any, values: frozenset[Any]) -> bool:
    return isinstance(value, (str, int, bool, type(None))) and value in values


# ---------------------------------------------------------------- which member is which


def _pairs(new: list[Any], stored: list[Any], member: Shape) -> Iterator[tuple[int, int]]:
    """Which member of ``new`` is which one of ``stored``, as far as that can be decided."""
    by_identity = _by_identity(new, stored)
    if by_identity is not None:
        yield from by_identity
        return
    waiting: dict[bytes, list[int]] = {}
    for at in reversed(range(len(stored))):
        waiting.setdefault(_known_bytes(stored[at], member), []).append(at)
    changed, taken = [], set()
    for at, value in enumerate(new):
        same = waiting.get(cbor.encode_message(value))
        if same:
            taken.add(same[-1])
            yield at, same.pop()
        else:
            changed.append(at)
    left = [at for at in range(len(stored)) if at not in taken]
    if len(left) == len(changed):
        # Nothing was added or removed: what changed was changed in its place.
        yield from zip(changed, left, strict=True)
    elif len(left) * len(changed) <= _COMPARED_MAX:
        yield from _by_likeness(new, stored, changed, left)


def _by_identity(new: list[Any], stored: list[Any]) -> list[tuple[int, int]] | None:
    for name in _NAMES_OF_IDENTITY:
        places = [_places_by(name, members) for members in (new, stored)]
        now, before = places
        if now is not None and before is not None:
            return [(at, before[identity]) for identity, at in now.items() if identity in before]
    return None


def _places_by(name: str, members: list[Any]) -> dict[Any, int] | None:
    """The place of each member by its field ``name``; None if that does not identify them."""
    places: dict[Any, int] = {}
    for at, member in enumerate(members):
        identity = member.get(name) if type(member) is dict else None
        if not isinstance(identity, (str, int, bytes)) or identity in places:
            return None
        places[identity] = at
    return places


def _by_likeness(
    new: list[Any], stored: list[Any], changed: list[int], left: list[int]
) -> Iterator[tuple[int, int]]:
    """Pairs of ``changed`` and ``left`` that are more alike than either is to any other. A value
    says the more, the fewer members have it: a name more than a count of 1."""
    shared = Counter(pair for member in (*stored, *new) for pair in _fields_of(member))
    scores: dict[tuple[int, int], float] = {}
    for at in changed:
        mine = _fields_of(new[at])
        for before in left:
            score = sum(1 / shared[pair] for pair in mine & _fields_of(stored[before]))
            if score:
                scores[at, before] = score
    while scores:
        best = max(scores.values())
        pairs = [pair for pair, score in scores.items() if score == best]
        ats, befores = Counter(at for at, _ in pairs), Counter(before for _, before in pairs)
        yield from ((at, b) for at, b in pairs if ats[at] == befores[b] == 1)
        scores = {p: s for p, s in scores.items() if p[0] not in ats and p[1] not in befores}


def _fields_of(member: Any) -> set[tuple[str, bytes]]:
    if type(member) is not dict:
        return set()
    return {(name, cbor.encode_message(value)) for name, value in member.items()}


def _known_bytes(stored: Any, member: Shape) -> bytes:
    return cbor.encode_message(_known(stored, member))


def _known(stored: Any, shape: Shape | None) -> Any:
    """``stored`` without what ``shape`` does not know: what an older program has read."""
    if isinstance(shape, Fields) and type(stored) is dict:
        return {
            name: _known(value, shape.below.get(name))
            for name, value in stored.items()
            if shape.open or name in shape.known
        }
    if isinstance(shape, Values) and type(stored) is dict:
        return {name: _known(value, shape.member) for name, value in stored.items()}
    if isinstance(shape, Items) and type(stored) is list:
        return [_known(value, shape.member) for value in stored]
    if isinstance(shape, Places) and type(stored) is list:
        below = shape.below + [None] * (0 if shape.grows else len(stored))
        return [_known(value, each) for value, each in zip(stored, below, strict=False)]
    if isinstance(shape, Choice):
        member = shape._of(stored)
        return stored if member is None else _known(stored, member)
    return stored
