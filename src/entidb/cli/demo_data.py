"""The tables the demo works on: real ones, read from the files of the package ``vega_datasets``.

The package is not imported, because it would load pandas for files that the standard library
reads; only its directory is looked up. Ids are made from each row's natural key, so that every
device calls the same row by the same id.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from entidb.errors import ConfigError

_NAMESPACE: Final = uuid.uuid5(uuid.NAMESPACE_DNS, "demo.entidb")

#: A row: its natural key and the value that is stored.
Row = tuple[str, dict[str, Any]]


def entity_id(collection: str, key: str) -> uuid.UUID:
    return uuid.uuid5(_NAMESPACE, f"{collection}/{key}")


def data_directory() -> Path:
    """Where the package keeps its files. Raises ``ConfigError`` if it is not installed."""
    spec = importlib.util.find_spec("vega_datasets")
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        directory = Path(location) / "_data"
        if directory.is_dir():
            return directory
    raise ConfigError(
        "the demo needs the tables of the package vega-datasets, which is in this project's "
        "dev group: run `make demo`, or pip install vega-datasets",
        code="demo_data_missing",
    )


def load_table(name: str) -> list[Row]:
    """Every row of the table ``name``, in the file's order."""
    return list(_TABLES[name](data_directory()))


def _airports(directory: Path) -> Iterator[Row]:
    for row in _csv(directory / "airports.csv"):
        place = {"latitude": float(row["latitude"]), "longitude": float(row["longitude"])}
        yield row["iata"], {**row, **place, "visits": 0, "tags": []}


def _cars(directory: Path) -> Iterator[Row]:
    with (directory / "cars.json").open(encoding="utf-8") as file:
        rows: list[dict[str, Any]] = json.load(file)
    # Names come twice, so the row number is the key.
    for number, row in enumerate(rows, 1):
        yield f"no. {number}", {"no": number, **row}


def _weather(directory: Path) -> Iterator[Row]:
    measured = ("precipitation", "temp_max", "temp_min", "wind")
    for row in _csv(directory / "seattle-weather.csv"):
        yield row["date"], {**row, **{field: float(row[field]) for field in measured}}


def _stocks(directory: Path) -> Iterator[Row]:
    for row in _csv(directory / "stocks.csv"):
        yield f"{row['symbol']} {row['date']}", {**row, "price": float(row["price"])}


def _csv(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


_TABLES: Final[dict[str, Callable[[Path], Iterator[Row]]]] = {
    "airports": _airports,
    "cars": _cars,
    "weather": _weather,
    "stocks": _stocks,
}
