"""Addresses of PostgreSQL databases, for code that decides where a database is. Nothing is imported
for that.
"""

from __future__ import annotations

from typing import Final

#: How one begins.
ADDRESSES: Final = ("postgresql://", "postgres://")


def is_address(place: object) -> bool:
    """Whether ``place`` is one, and no directory."""
    return isinstance(place, str) and place.startswith(ADDRESSES)


def without_secrets(address: str) -> str:
    """``address`` to be shown. A password may be before the last ``@``, or after the first ``?``;
    where it cannot be told apart nothing is shown."""
    scheme, _, rest = address.partition("://")
    shown = rest.rpartition("@")[2].partition("?")[0]
    return f"{scheme}://" + (shown if "@" not in rest.partition("?")[2] else "…")


def split_name(address: str) -> tuple[str, str | None]:
    """Of ``postgresql://host/database#NAME`` the address, and the name of the store; None where it
    names none."""
    plain, mark, name = address.partition("#")
    return plain, name if mark else None


__all__ = ["ADDRESSES", "is_address", "split_name", "without_secrets"]
