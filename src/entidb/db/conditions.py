"""Conditions on the fields of an entity: what ``F.price > 3`` makes, and whether a value meets it.

A condition is about plain values (maps, lists, text, bytes, numbers, booleans, None), so that a
typed collection converts only what passes. Nothing is read here; ``query`` does that.

Values of different kinds are never compared: the text ``"4"`` does not meet ``F.price > 3``. In
which order they come is said in ``looking``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from entidb import cbor
from entidb.db.looking import (
    MISSING,
    NUMBERS,
    RANKS,
    By,
    Function,
    Path,
    field_of,
    order_key,
    plain,
    written,
)
from entidb.errors import QueryError

#: Whether a plain value meets a condition.
Test = Callable[[Any], bool]
#: Bytes of which a payload must contain one, for its value to meet a condition.
Needles = tuple[bytes, ...]


# ---------------------------------------------------------------- conditions


class Condition:
    """What an entity has to meet. Join conditions with ``&``, ``|`` and ``~``."""

    __slots__ = ()

    def test(self) -> Test:
        """A function that says of a plain value whether it meets this."""
        raise AssertionError(type(self))

    def needles(self) -> Needles | None:
        """Bytes of which every payload that meets this contains at least one; None where there are
        none."""
        return None

    def paths(self) -> set[Path]:
        """The fields that it is about."""
        raise AssertionError(type(self))

    def __and__(self, other: Condition) -> Condition:
        return Joined(True, (self, _condition(other)))

    def __or__(self, other: Condition) -> Condition:
        return Joined(False, (self, _condition(other)))

    def __invert__(self) -> Condition:
        return _Not(self)

    def __bool__(self) -> bool:
        raise QueryError(
            "a condition is neither true nor false without an entity: join "
            "conditions with & | ~ and not with and, or, not; write between() for 2 < F.x < 5"
        )


def _condition(given: object) -> Condition:
    if isinstance(given, Condition):
        return given
    raise QueryError(f"{given!r} is no condition: write one like F.price > 3")


class Joined(Condition):
    """All of ``parts``, or any of them."""

    __slots__ = ("all", "parts")

    parts: tuple[Condition, ...]

    def __init__(self, all_of: bool, parts: Iterable[Condition]) -> None:
        self.all = all_of
        flat: list[Condition] = []
        for part in parts:
            if isinstance(part, Joined) and part.all is all_of:
                flat += part.parts
            else:
                flat.append(part)
        self.parts = tuple(flat)

    def test(self) -> Test:
        tests = tuple(part.test() for part in self.parts)
        if len(tests) == 1:
            return tests[0]
        if len(tests) == 2:
            one, other = tests
            if self.all:
                return lambda value: one(value) and other(value)
            return lambda value: one(value) or other(value)
        if self.all:
            return lambda value: all(test(value) for test in tests)
        return lambda value: any(test(value) for test in tests)

    def needles(self) -> Needles | None:
        found = [part.needles() for part in self.parts]
        if self.all:
            # The part that leaves the fewest payloads: longest first, then with the fewest choices.
            known = [one for one in found if one]
            return max(known, key=lambda n: (min(map(len, n)), -len(n)), default=None)
        if not found or any(one is None for one in found):
            return None
        return tuple(needle for one in found if one is not None for needle in one)

    def paths(self) -> set[Path]:
        return set().union(*(part.paths() for part in self.parts))

    def __repr__(self) -> str:
        sign = " & " if self.all else " | "
        return sign.join(f"({p!r})" if isinstance(p, Joined) else repr(p) for p in self.parts)


class _Not(Condition):
    __slots__ = ("part",)

    def __init__(self, part: Condition) -> None:
        self.part = part

    def test(self) -> Test:
        test = self.part.test()
        return lambda value: not test(value)

    def paths(self) -> set[Path]:
        return self.part.paths()

    def __invert__(self) -> Condition:
        return self.part

    def __repr__(self) -> str:
        return f"~({self.part!r})"


ALL: Final[Condition] = Joined(True, ())


class Compared(Condition):
    """One field, compared by ``sign`` with ``other`` as an entity would hold it."""

    __slots__ = ("other", "path", "sign")

    def __init__(self, path: Path, sign: str, other: Any) -> None:
        self.path = path
        self.sign = sign
        self.other = plain(other)
        if sign in _ORDERED and RANKS[type(self.other)] < 3:
            raise QueryError(
                f"{written(path)} {sign} {other!r}: there is no order among {other!r} and others; "
                "use == or is_null()"
            )

    def test(self) -> Test:
        judge = _equals(self.other) if self.sign == "==" else _ordered(self.sign, self.other)
        return _on_field(self.path, judge)

    def needles(self) -> Needles | None:
        if self.sign != "==" or isinstance(self.path[-1], By):
            return None
        key = cbor.encode_message(self.path[-1])
        return tuple(key + encoded for encoded in _encodings(self.other)) or None

    def paths(self) -> set[Path]:
        return {self.path}

    def __repr__(self) -> str:
        return f"{written(self.path)} {self.sign} {self.other!r}"


_ORDERED: Final = ("<", "<=", ">", ">=")


def _on_field(path: Path, judge: Test) -> Test:
    if len(path) == 1:
        name = path[0]
        return lambda value: judge(value.get(name, MISSING)) if type(value) is dict else False
    return lambda value: judge(field_of(value, path))


def _equals(other: Any) -> Test:
    kind = type(other)
    if kind is bool or other is None:
        return lambda got: got is other
    if kind in NUMBERS:
        return lambda got: type(got) in NUMBERS and got == other
    if kind in (list, dict):
        key = order_key(other)
        return lambda got: type(got) is kind and order_key(got) == key
    return lambda got: type(got) is kind and got == other


def _ordered(sign: str, other: Any) -> Test:
    kinds: tuple[type, ...] = NUMBERS if type(other) in NUMBERS else (type(other),)
    if kinds[0] in (list, dict):
        key = order_key(other)
        whole = _compare(sign, key)
        return lambda got: type(got) is kinds[0] and whole(order_key(got))
    judge = _compare(sign, other)
    return lambda got: type(got) in kinds and judge(got)


def _compare(sign: str, other: Any) -> Test:
    if sign == "<":
        return lambda got: bool(got < other)
    if sign == "<=":
        return lambda got: bool(got <= other)
    if sign == ">":
        return lambda got: bool(got > other)
    return lambda got: bool(got >= other)


def _encodings(value: Any) -> list[bytes]:
    """The ways in which an equal value can be encoded in a payload. For lists and maps with numbers
    in them there are too many to look for."""
    kind = type(value)
    if kind in NUMBERS:
        found = [cbor.encode_message(value)]
        if kind is int and abs(value) <= 2**63 and float(value) == value:
            found.append(cbor.encode_message(float(value)))
        elif kind is float and value.is_integer() and -(2**64) <= value < 2**64:
            found.append(cbor.encode_message(int(value)))
        elif kind is int:
            return []
        return found
    return [] if kind in (list, dict) else [cbor.encode_message(value)]


class FieldTest(Condition):
    """One field, and a question that is no comparison."""

    __slots__ = ("_judge", "_needles", "_says", "asked", "path")

    def __init__(
        self,
        path: Path,
        says: str,
        judge: Test,
        needles: Needles | None,
        asked: tuple[str, Any],
    ) -> None:
        self.path = path
        #: What is asked, and of what: an index may know.
        self.asked = asked
        self._says = says
        self._judge = judge
        self._needles = needles

    def test(self) -> Test:
        return _on_field(self.path, self._judge)

    def needles(self) -> Needles | None:
        return self._needles

    def paths(self) -> set[Path]:
        return {self.path}

    def __repr__(self) -> str:
        return written(self.path) + self._says


class Field(Condition):
    """One field of an entity, to make conditions of. By itself it is a condition: the field is
    neither missing nor None, false, 0, or empty."""

    __slots__ = ("_path",)

    def __init__(self, path: Path) -> None:
        self._path = path

    # Fields inside fields. A name that is a method's here is written F["name"].

    def __getattr__(self, name: str) -> Field:
        if name.startswith("__"):
            raise AttributeError(name)
        return Field((*self._path, name))

    def __getitem__(self, name: str) -> Field:
        if not isinstance(name, str):
            raise QueryError(f"a field's name is text, not {name!r}")
        return Field((*self._path, name))

    # Comparisons.

    def __eq__(self, other: object) -> Condition:  # type: ignore[override]
        return Compared(self._path, "==", other)

    def __ne__(self, other: object) -> Condition:  # type: ignore[override]
        """Also true where the field is missing, as ``value.get(name) != other`` is."""
        return ~Compared(self._path, "==", other)

    def __lt__(self, other: Any) -> Condition:
        return Compared(self._path, "<", other)

    def __le__(self, other: Any) -> Condition:
        return Compared(self._path, "<=", other)

    def __gt__(self, other: Any) -> Condition:
        return Compared(self._path, ">", other)

    def __ge__(self, other: Any) -> Condition:
        return Compared(self._path, ">=", other)

    __hash__ = None  # type: ignore[assignment]

    def between(self, low: Any, high: Any) -> Condition:
        """From ``low`` to ``high``, both included."""
        parts = [Compared(self._path, ">=", low), Compared(self._path, "<=", high)]
        return Joined(True, parts)

    def in_(self, values: Iterable[Any]) -> Condition:
        """Equal to one of ``values``."""
        if isinstance(values, str | bytes):
            raise QueryError(f"in_ takes several values, not {values!r}: write in_([{values!r}])")
        return Joined(False, [self == value for value in values])

    def startswith(self, start: str) -> Condition:
        """Text that begins with ``start``."""
        text = _text(start, "startswith")
        judge: Test = lambda got: type(got) is str and got.startswith(text)  # noqa: E731
        needles = None if self._is_made else (text.encode(),)
        return FieldTest(
            self._path, f".startswith({start!r})", judge, needles, ("startswith", text)
        )

    def contains(self, part: Any) -> Condition:
        """A list with a member equal to ``part``, or text with ``part`` in it."""
        member = plain(part)
        equal = _equals(member)
        is_text = type(member) is str
        encoded = (member.encode(),) if is_text else tuple(_encodings(member))
        encoded = () if self._is_made else encoded

        def judge(got: Any) -> bool:
            if type(got) is list:
                return any(equal(item) for item in got)
            return is_text and type(got) is str and member in got

        asked = ("contains", member)
        return FieldTest(self._path, f".contains({part!r})", judge, encoded or None, asked)

    def exists(self) -> Condition:
        """The field is there, whatever its value; also when it is None."""
        return FieldTest(
            self._path, ".exists()", lambda got: got is not MISSING, None, ("exists", None)
        )

    def by(self, function: Function) -> Field:
        """What ``function`` makes of the field: ``F.name.by(str.casefold) == "ada"``. A pure
        function with a name; where it raises there is no such field. Fast with
        ``Index("name", key=str.casefold)``. Raises ``ConfigError``."""
        return Field((*self._path, By(function)))

    def is_null(self) -> Condition:
        """The field is there and None."""
        return Compared(self._path, "==", None)

    @property
    def _is_made(self) -> bool:
        """Whether a payload need not hold what the field is, because a function makes it."""
        return isinstance(self._path[-1], By)

    # The field by itself.

    def test(self) -> Test:
        return _on_field(self._path, lambda got: got is not MISSING and bool(got))

    def paths(self) -> set[Path]:
        return {self._path}

    def __repr__(self) -> str:
        return written(self._path)


def _text(given: object, method: str) -> str:
    if isinstance(given, str):
        plain(given)  # what cannot be stored, such as a lone surrogate, cannot be found
        return given
    raise QueryError(f"{method} takes text, not {given!r}")


class _Fields:
    """``F``: the fields of an entity, by attribute or by ``F["any name"]``."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Field:
        if name.startswith("__"):
            raise AttributeError(name)
        return Field((name,))

    def __getitem__(self, name: str) -> Field:
        made: Field = Field(())[name]
        return made

    def __repr__(self) -> str:
        return "F"


F: Final = _Fields()


# ---------------------------------------------------------------- conditions that come as data


def all_of(conditions: Iterable[object], equal: Mapping[str, Any]) -> Condition:
    """All of ``conditions``, and fields that are ``equal``."""
    parts = [_condition(one) for one in conditions]
    parts += [Compared((name,), "==", value) for name, value in equal.items()]
    if not parts:
        return ALL
    return parts[0] if len(parts) == 1 else Joined(True, parts)
