"""The names of a package, each loaded from its home when it is first used (PEP 562).

Importing such a package costs next to nothing until a program uses one of its names, and a name
that needs packages which are not installed raises only when it is used. Type checkers do not see
such names: a package lists them for these below ``TYPE_CHECKING``, and a test compares the two
lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Final

#: What an extra brings, by the name that Python imports, and how pip calls it.
SERVER_EXTRA: Final = {
    "cryptography": "cryptography",
    "httptools": "httptools",
    "jwt": "PyJWT",
    "prometheus_client": "prometheus-client",
    "starlette": "starlette",
    "uvicorn": "uvicorn",
    "uvloop": "uvloop",
}

#: The same of the extra ``postgres``.
POSTGRES_EXTRA: Final = {"psycopg": "psycopg"}


def lazy_names(
    package: str, homes: Mapping[str, Sequence[str]], names: dict[str, Any]
) -> tuple[dict[str, str], Callable[[str], Any], Callable[[], list[str]]]:
    """Where each name lives, and the ``__getattr__`` and ``__dir__`` of ``package``.

    ``homes`` has the public names by the full name of the module that they come from; ``names``
    is the package's ``globals()``, where a name is an ordinary attribute once it was used.
    Asking for a name raises ``AttributeError`` if there is none, and ``ImportError`` with the
    command that installs what is missing.
    """
    home_of = {name: home for home, listed in homes.items() for name in listed}

    def load(name: str) -> Any:
        home = home_of.get(name)
        if home is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(home), name)
        except ModuleNotFoundError as error:
            imported = (error.name or "").partition(".")[0]
            extra = "postgres" if imported in POSTGRES_EXTRA else "server"
            missing = (SERVER_EXTRA | POSTGRES_EXTRA).get(imported)
            if missing is None:
                raise
            raise ImportError(
                f"{package}.{name} needs a package that is not installed ({missing}): "
                f'pip install "entidb[{extra}]"',
                name=error.name,
            ) from error
        names[name] = value
        return value

    def listed() -> list[str]:
        return sorted({*names, *home_of})

    return home_of, load, listed


__all__ = ["POSTGRES_EXTRA", "SERVER_EXTRA", "lazy_names"]
