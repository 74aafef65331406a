"""What is mutated, what it is tried against, and the survivors somebody has explained."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .operators import Mutant, mutants


@dataclass(frozen=True)
class Target:
    """Functions of one module: those that match a pattern of ``functions``."""

    name: str
    path: Path
    functions: tuple[str, ...]

    @property
    def module(self) -> str:
        parts = self.path.with_suffix("").parts
        return ".".join(parts[1:] if parts[0] == "src" else parts)


@dataclass(frozen=True)
class Explained:
    """A mutant that may survive, and why. ``change`` is the change that was looked at: a mutant
    of the same id with another one is not explained by it."""

    change: str
    because: str


@dataclass(frozen=True)
class Settings:
    """``tests`` are files in the order they are tried; ``slow`` ones and ``seeds`` of the
    simulator follow."""

    root: Path
    tests: tuple[str, ...]
    slow: tuple[str, ...]
    seeds: range
    targets: tuple[Target, ...]
    explained: dict[str, Explained]

    def quick(self) -> Settings:
        """The same without what is slow."""
        return replace(self, slow=(), seeds=range(0))

    def mutants(self, target: Target) -> list[Mutant]:
        source = (self.root / target.path).read_text(encoding="utf-8")
        return [
            mutant
            for mutant in mutants(source, target.module)
            if any(fnmatchcase(mutant.function, pattern) for pattern in target.functions)
        ]

    def chosen(self, names: list[str]) -> list[Target]:
        """The targets called ``names``, all if there are none."""
        unknown = set(names) - {target.name for target in self.targets}
        if unknown:
            raise SystemExit(f"no such target: {', '.join(sorted(unknown))}")
        return [target for target in self.targets if not names or target.name in names]


def read_settings(path: Path, root: Path) -> Settings:
    raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    return Settings(
        root,
        tuple(raw["tests"]),
        tuple(raw.get("slow", ())),
        range(raw.get("seeds", 0)),
        tuple(
            Target(name, Path(given["path"]), tuple(given.get("functions", ["*"])))
            for name, given in raw["targets"].items()
        ),
        {name: Explained(**given) for name, given in raw.get("explained", {}).items()},
    )
