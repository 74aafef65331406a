"""Addresses of PostgreSQL databases, and of one store of them."""

from __future__ import annotations

import pytest

from entidb.errors import ConfigError
from entidb.storage.addresses import split_name, whole


@pytest.mark.parametrize(
    ("place", "address", "name"),
    [
        ("postgresql://db.example/shops", "postgresql://db.example/shops", None),
        ("postgresql://db.example/shops#tills", "postgresql://db.example/shops", "tills"),
        ("postgresql://db.example/shops#", "postgresql://db.example/shops", ""),
        ("postgresql://a,b/shops?x=1#tills", "postgresql://a,b/shops?x=1", "tills"),
        ("postgresql:///shops?host=/run#tills@1/2", "postgresql:///shops?host=/run", "tills@1/2"),
        ("postgresql://h#tills", "postgresql://h", "tills"),
        ("postgresql://me:a#b@h/shops", "postgresql://me:a#b@h/shops", None),
        ("postgresql://me:a#b@h/shops#tills", "postgresql://me:a#b@h/shops", "tills"),
        ("postgresql://me:#@h/shops?x=1", "postgresql://me:#@h/shops?x=1", None),
    ],
)
def test_the_name_of_a_store_comes_after_the_last_sharp_and_none_in_a_password_counts(
    place: str, address: str, name: str | None
) -> None:
    assert split_name(place) == (address, name)


def test_a_whole_database_is_not_one_store_of_it() -> None:
    address = "postgresql://me:a#b@h/shops"
    assert whole(address) == address
    with pytest.raises(ConfigError, match=r"postgresql://h/shops is wanted without #NAME"):
        whole(f"{address}#tills")
