"""One place of a class that values are stored from, as far as a class tells: what it can be stored
as, and whether that identifies the members of a union. ``kinds`` and ``models`` walk through
classes and make them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from entidb.db.shapes import Choice, Fields, Shape
from entidb.errors import ValueTypeError


@dataclass(frozen=True)
class SeenForm:
    """One place of a class. ``forms`` are what it can be stored as; it is ``clear`` when a stored
    form is the value itself, and needs no class to come back. ``values``, where they are known,
    are all it can be."""

    forms: frozenset[str]
    clear: bool = False
    shape: Shape | None = None
    label: str = ""
    values: frozenset[Any] | None = None


def seen(*forms: str, clear: bool = False, shape: Shape | None = None, label: str = "") -> SeenForm:
    return SeenForm(frozenset(forms), clear, shape, label)


def refused(field: str, reason: str, way_out: str) -> ValueTypeError:
    """The error for a class that cannot make a collection."""
    return ValueTypeError(f"{field}: {reason}; {way_out}", field=field, reason=reason)


def is_model(kind: object) -> bool:
    """Whether ``kind`` is a pydantic model, found by its methods."""
    return isinstance(kind, type) and hasattr(kind, "model_dump") and hasattr(kind, "model_fields")


def is_typed_dict(kind: object) -> bool:
    """Whether ``kind`` is a TypedDict, of typing or of typing_extensions."""
    return isinstance(kind, type) and hasattr(kind, "__required_keys__")


def label_of(kind: object) -> str:
    return getattr(kind, "__name__", None) or str(kind).replace("typing.", "")


def has_own_eq(kind: Any) -> bool:
    """Whether two values of ``kind`` can be equal although a field differs."""
    if dataclasses.is_dataclass(kind) and not all(f.compare for f in dataclasses.fields(kind)):
        return True
    if not all(each.eq for each in getattr(kind, "__attrs_attrs__", ())):
        return True
    code = getattr(kind.__eq__, "__code__", None)
    if code is None or str(kind.__eq__.__module__).startswith(("pydantic.", "typing")):
        return False
    # Written by dataclasses or attrs, it has no file.
    return not code.co_filename.startswith(("<string>", "<attrs generated"))


def form_of(plain: Any) -> str:
    """What a plain value is stored as."""
    if plain is None:
        return "null"
    for kind, form in ((bool, "bool"), (int, "int"), (float, "float"), (str, "text")):
        if isinstance(plain, kind):
            return form
    return "bytes" if isinstance(plain, bytes) else "list" if isinstance(plain, list) else "map"


# ---------------------------------------------------------------- unions


def union(members: Iterable[SeenForm], path: str, *, decided: bool = False) -> SeenForm:
    """The place of one of ``members``. Raises ``ValueTypeError`` if what is stored does not say
    which of two it was; not for maps that are ``decided`` by a tag of their own."""
    found = list(members)
    for number, first in enumerate(found):
        for second in found[number + 1 :]:
            _told_apart(first, second, path, decided)
    shapes = [each.shape for each in found if each.shape is not None]
    shape = shapes[0] if len(shapes) == 1 else Choice(shapes) if shapes else None
    forms = frozenset().union(*(each.forms for each in found))
    return SeenForm(forms, all(each.clear for each in found), shape, "union")


def _told_apart(first: SeenForm, second: SeenForm, path: str, decided: bool) -> None:
    shared = first.forms & second.forms
    if "any" in first.forms | second.forms:
        shared = shared | {"any"} if not (first.clear and second.clear) else frozenset()
    if not shared or (first.clear and second.clear):
        return
    if first.values is not None and second.values is not None:
        if not first.values & second.values:
            return
    if shared == {"map"} and (decided or _maps_told_apart(first.shape, second.shape)):
        return
    names = [each.label or "/".join(sorted(each.forms)) for each in (first, second)]
    form = {"any": "anything"}.get(min(shared), min(shared))
    raise refused(
        path,
        f"{' | '.join(names)} is ambiguous: both can be stored as {form}, and which one it was "
        "cannot be told when it is read",
        "give it one type, or classes with a tag: a Literal field with another value in each",
    )


def _maps_told_apart(first: Shape | None, second: Shape | None) -> bool:
    if not isinstance(first, Fields) or not isinstance(second, Fields):
        return False
    for name in first.tags.keys() & second.tags.keys():
        if not first.tags[name] & second.tags[name]:
            return True
    if first.open or second.open:
        return False
    return bool(first.required - second.known) and bool(second.required - first.known)


__all__ = [
    "SeenForm",
    "form_of",
    "has_own_eq",
    "is_model",
    "is_typed_dict",
    "label_of",
    "refused",
    "seen",
    "union",
]
