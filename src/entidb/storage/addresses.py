"""Addresses of PostgreSQL databases, for code that decides where a database is. Nothing is imported
for that.
"""

from __future__ import annotations

from typing import Final

from entidb.errors import ConfigError

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
    names none. A ``#`` in a password begins none: an ``@`` comes after it, and no ``/`` before."""
    plain, mark, name = address.rpartition("#")
    in_password = "@" in name and "/" not in plain.partition("://")[2]
    return (address, None) if not mark or in_password or "?" in name else (plain, name)


def shown(place: str) -> str:
    """A directory or an address for messages, without a password."""
    if not is_address(place):
        return place
    address, name = split_name(place)
    return without_secrets(address) + ("" if name is None else f"#{name}")


def whole(address: str) -> str:
    """``address``, which is to be that of a whole PostgreSQL database. Raises ``ConfigError`` where
    it names one store of it."""
    plain, name = split_name(address)
    if name is not None:
        raise ConfigError(
            f"{without_secrets(plain)} is wanted without #NAME, because all databases there are "
            "meant; a # that is part of a password or an option is written %23"
        )
    return address


__all__ = ["ADDRESSES", "is_address", "shown", "split_name", "whole", "without_secrets"]
