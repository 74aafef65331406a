"""Values of a class that come back equal for certain, so that reading one back would prove nothing.

Only text, numbers, bytes, None, and lists of these, in the fields of a dataclass or a Struct that
does nothing of its own when it is made. In doubt the answer is no, and the value is read back.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from inspect import getattr_static
from operator import attrgetter, contains
from typing import Any, Final

import msgspec
from msgspec import inspect as described

from entidb.db.forms import has_own_eq

#: A type without constraints, and the only class of which its values are certain.
_SCALARS: Final = (
    (described.StrType(), str),
    (described.IntType(), int),
    (described.FloatType(), float),
    (described.BoolType(), bool),
    (described.BytesType(), bytes),
    (described.NoneType(), types.NoneType),
)
#: What a class does itself when it is made, or when a field is set or read.
_HOOKS: Final = ("__post_init__", "__new__", "__getattr__", "__getattribute__")
_LIBRARY: Final = msgspec.Struct.__mro__

Certain = Callable[[Any], bool]


def certain(kind: Any) -> Certain | None:
    """Answers for a value whether it comes back equal for certain; None if that can be said of no
    value of ``kind``."""
    if not isinstance(kind, type) or not _does_nothing(kind):
        return None
    info: Any = described.type_info(kind)
    names = [field.name for field in info.fields]
    found = [one for field in info.fields if (one := _allowed(field.type)) is not None]
    if not names or len(found) < len(names) or set(names) != _all_fields(kind):
        return None
    if any(_is_descriptor(getattr_static(kind, name, None)) for name in names):
        return None
    if len(names) == 1:
        # What gets several attributes returns a tuple of them.
        names, found = names * 2, found * 2
    allowed = [each.classes for each in found]
    lists = [(n, each.members) for n, each in enumerate(found) if each.members]
    values_of = attrgetter(*names)

    def comes_back(value: Any) -> bool:
        if type(value) is not kind:
            return False
        try:
            values = values_of(value)
        except AttributeError:
            return False
        if not all(map(contains, allowed, map(type, values))):
            return False
        return not lists or all(
            members.issuperset(map(type, values[n] or ())) for n, members in lists
        )

    return comes_back


@dataclasses.dataclass(frozen=True)
class _Allowed:
    """Of which classes a field's values are certain, and the members of its lists."""

    classes: frozenset[type]
    members: frozenset[type]


def _allowed(info: Any) -> _Allowed | None:
    """None if no value of the field is certain."""
    parts: tuple[Any, ...] = info.types if isinstance(info, described.UnionType) else (info,)
    classes: set[type] = set()
    members: frozenset[type] = frozenset()
    for part in parts:
        scalar = next((kind for plain, kind in _SCALARS if plain == part), None)
        if scalar is not None:
            classes.add(scalar)
            continue
        below = _allowed(part.item_type) if isinstance(part, described.ListType) else None
        if below is None or below.members or part != described.ListType(part.item_type):
            return None
        classes.add(list)
        members = below.classes
    if members and classes - {list, types.NoneType}:
        return None
    return _Allowed(frozenset(classes), members)


def _does_nothing(kind: type) -> bool:
    """Whether making a value of ``kind``, setting and reading its fields and comparing it is what
    dataclasses and msgspec do, and nothing else."""
    struct = issubclass(kind, msgspec.Struct)
    if not struct and (not dataclasses.is_dataclass(kind) or hasattr(kind, "__attrs_attrs__")):
        return False
    if struct and getattr(kind, "__struct_config__").array_like:  # noqa: B009
        return False
    return not has_own_eq(kind) and all(
        _is_ordinary(each) for each in kind.__mro__ if each not in _LIBRARY
    )


def _is_ordinary(kind: type) -> bool:
    own = vars(kind)
    # What dataclasses write for a frozen class has no file.
    setter = getattr(own.get("__setattr__"), "__code__", None)
    writes = "__setattr__" in own and (setter is None or setter.co_filename != "<string>")
    return not writes and not any(name in own for name in _HOOKS)


def _is_descriptor(default: Any) -> bool:
    return hasattr(type(default), "__get__") and not isinstance(default, types.MemberDescriptorType)


def _all_fields(kind: type) -> set[str]:
    """The fields that the constructor takes."""
    if issubclass(kind, msgspec.Struct):
        return set(kind.__struct_fields__)
    return {each.name for each in dataclasses.fields(kind) if each.init}  # type: ignore[arg-type]
