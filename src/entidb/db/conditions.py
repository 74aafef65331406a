"""Conditions on the fields of an entity: what ``F.price > 3`` makes, and whether a value meets it.

A condition is about plain values (maps, lists, text, bytes, numbers, booleans, None), so that a
typed collection converts only what passes. Nothing is read here; ``query`` does that.

Values of different kinds are never compared: the text ``"4"`` does not meet ``F.price > 3``. In
which order they come is said in ``looking``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import timedelta
from decimal import Decimal
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, Final

from entidb import cbor
from entidb.db.byte_ranges import number_pattern
from entidb.db.comparing import Test, encodings, equals, one_of, ordered
from entidb.db.looking import (
    MISSING,
    NUMBERS,
    RANKS,
    By,
    Function,
    Path,
    field_of,
    written,
)
from entidb.db.settling import plain
from entidb.db.stored_forms import stored_forms
from entidb.errors import QueryError
from entidb.types import repr_of

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

    def pattern(self) -> bytes | None:
        """A regular expression (for ``re.DOTALL``) that every payload that meets this contains a
        match of; None where there is none."""
        needles = self.needles()
        if needles is None or not all(needles):
            return None
        return b"|".join(map(re.escape, needles))

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
            "conditions with & | ~ and not with and, or, not; write between() for 2 < F.x < 5, "
            "and F.x.in_(values) for F.x in values"
        )


def _condition(given: object) -> Condition:
    if isinstance(given, Condition):
        return given
    hint = '; a field with the name of a method is F["test"]' if isinstance(given, bool) else ""
    raise QueryError(f"{repr_of(given, 80)} is no condition: write one like F.price > 3{hint}")


#: Values that are compared one after the other; more are looked up.
_FEW: Final = 8


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
        if not self.all and len(self.parts) > _FEW:
            equal = [p for p in self.parts if isinstance(p, Compared) and p.sign == "=="]
            judge = one_of([part.other for part in equal])
            if len(equal) == len(self.parts) and len({p.path for p in equal}) == 1 and judge:
                return _on_field(equal[0].path, judge)
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

    def pattern(self) -> bytes | None:
        if not self.all:
            found = [part.pattern() for part in self.parts]
            parts = [one for one in found if one is not None]
            return b"|".join(parts) if parts and len(parts) == len(found) else None
        ranges: dict[Path, list[Compared]] = {}
        for part in self.parts:
            if isinstance(part, Compared) and part.is_about_numbers:
                ranges.setdefault(part.path, []).append(part)
        # Both ends of one range leave fewer than each alone.
        for path, ends in sorted(ranges.items(), key=lambda one: -len(one[1])):
            lows = [one.other for one in ends if one.sign in (">", ">=")]
            highs = [one.other for one in ends if one.sign in ("<", "<=")]
            return _number_in(path, max(lows, default=None), min(highs, default=None))
        patterns = (part.pattern() for part in self.parts)
        return next((one for one in patterns if one is not None), None)

    def paths(self) -> set[Path]:
        return set().union(*(part.paths() for part in self.parts))

    def __repr__(self) -> str:
        if not self.parts:
            return "everything" if self.all else "nothing"
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
        if isinstance(other, Condition):
            raise QueryError(
                f"{written(path)} {sign} {repr_of(other, 80)}: a field is compared with a value, "
                "and not with another field or a condition"
            )
        self.other = plain(other)
        if sign in _ORDERED and isinstance(other, _OTHERWISE_AS_TEXT):
            kind = type(other).__name__
            raise QueryError(
                f"{written(path)} {sign} {repr_of(other, 80)}: a {kind} is stored as text, and "
                f"text has another order than {kind} has ('12' comes before '5'). Store a number, "
                "such as cents, or compare what a function makes of the text: "
                f"F.field.by(function) {sign} a number"
            )
        if sign in _ORDERED and RANKS[type(self.other)] < 3:
            raise QueryError(
                f"{written(path)} {sign} {repr_of(other, 80)}: there is no order among such "
                "values; use == or is_null()"
            )

    def test(self) -> Test:
        judge = equals(self.other) if self.sign == "==" else ordered(self.sign, self.other)
        return _on_field(self.path, judge)

    def needles(self) -> Needles | None:
        if self.sign != "==" or isinstance(self.path[-1], By):
            return None
        key = cbor.encode_message(self.path[-1])
        return tuple(key + encoded for encoded in encodings(self.other)) or None

    @property
    def is_about_numbers(self) -> bool:
        """Whether this is a range of numbers, of a field that a payload holds."""
        ordered = self.sign in _ORDERED and type(self.other) in NUMBERS
        return ordered and not isinstance(self.path[-1], By)

    def pattern(self) -> bytes | None:
        if not self.is_about_numbers:
            return super().pattern()
        if self.sign in (">", ">="):
            return _number_in(self.path, self.other, None)
        return _number_in(self.path, None, self.other)

    def paths(self) -> set[Path]:
        return {self.path}

    def __repr__(self) -> str:
        return f"{written(self.path)} {self.sign} {self.other!r}"


def equal_to(path: Path, other: Any) -> Condition:
    """The field is equal to ``other``, in whichever form collections of a class store that."""
    if isinstance(other, Condition):
        return Compared(path, "==", other)  # which says what is wrong
    parts = [Compared(path, "==", form) for form in stored_forms(other)]
    return parts[0] if len(parts) == 1 else Joined(False, parts)


_ORDERED: Final = ("<", "<=", ">", ">=")
#: What is stored as text that is in another order.
_OTHERWISE_AS_TEXT: Final = (Decimal, timedelta, IPv4Address, IPv6Address)


def _number_in(path: Path, low: Any, high: Any) -> bytes | None:
    found = number_pattern(low, high)
    return None if found is None else re.escape(cbor.encode_message(path[-1])) + found


def _on_field(path: Path, judge: Test) -> Test:
    if len(path) == 1:
        name = path[0]
        return lambda value: judge(value.get(name, MISSING)) if type(value) is dict else False
    return lambda value: judge(field_of(value, path))


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
        return self[name]

    def __getitem__(self, name: str) -> Field:
        if not isinstance(name, str):
            raise QueryError(f"a field's name is text, not {repr_of(name, 80)}")
        if self._path and self._is_made:
            raise QueryError(
                f"{self!r} is what a function makes, and has no field {name!r} inside: let the "
                "function make that"
            )
        return Field((*self._path, name))

    if not TYPE_CHECKING:
        # What a type checker refuses by itself, and what is to be written in its place.

        def __call__(self, *given: object, **named: object) -> None:
            raise QueryError(
                f"{self!r} is a field and no method. Methods of fields: between, in_, startswith, "
                "contains, exists, is_null, and by for what a function makes of one"
            )

        def __neg__(self) -> None:
            raise QueryError(f'for the largest first write order_by("-{self._path[-1]}")')

        def __contains__(self, member: object) -> None:
            raise QueryError(f"write {self!r}.contains({member!r}): `in` asks no entity")

        def __iter__(self) -> None:
            raise QueryError(f"{self!r} is a field of each entity, and nothing to iterate over")

    # Comparisons.

    def __eq__(self, other: object) -> Condition:  # type: ignore[override]
        return equal_to(self._path, other)

    def __ne__(self, other: object) -> Condition:  # type: ignore[override]
        """Also true where the field is missing, as ``value.get(name) != other`` is."""
        return ~equal_to(self._path, other)

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
        if isinstance(values, Mapping) or not isinstance(values, Iterable):
            raise QueryError(f"in_ takes a list of values, not {repr_of(values, 200)}")
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
        if isinstance(part, Condition):
            raise QueryError(f"contains takes a value, and not the field {part!r}")
        forms = stored_forms(part)
        if len(forms) > 1:
            return Joined(False, [self.contains(form) for form in forms])
        member = forms[0]
        equal = equals(member)
        is_text = type(member) is str
        encoded = (member.encode(),) if is_text else tuple(encodings(member))
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
        made = By(function)
        if self._is_made:
            raise QueryError(f"{self!r} is what a function makes already: one function, not two")
        return Field((*self._path, made))

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
    raise QueryError(f"{method} takes text, not {repr_of(given, 80)}")


class _Fields:
    """``F``: the fields of an entity, by attribute or by ``F["any name"]``."""

    __slots__ = ()

    if not TYPE_CHECKING:

        def __call__(self, *given: object) -> None:
            raise QueryError('F is not called: a field is F.price or F["price"]')

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
    parts += [equal_to((name,), value) for name, value in equal.items()]
    if not parts:
        return ALL
    return parts[0] if len(parts) == 1 else Joined(True, parts)
