"""The policies by name, and the public names of this subject.

``conflict`` says what a conflict and an answer are, ``whole_policies`` and ``merging`` hold the
policies, ``truth_table`` says what each of them answers. ``docs/conflicts.md`` is the same subject
for users.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from entidb.sync.conflict import (
    CONFLICT_KINDS,
    Action,
    Conflict,
    ConflictPolicy,
    ConflictResolution,
    check_policy,
)
from entidb.sync.merging import Merge, merge
from entidb.sync.truth_table import TRUTH_TABLE, TruthRow
from entidb.sync.whole_policies import (
    WHOLE,
    client_wins,
    last_write_wins,
    manual,
    no_such_policy,
    server_wins,
)

#: The policies that a configuration can name.
POLICIES: Final[Mapping[str, ConflictPolicy]] = MappingProxyType({**WHOLE, "merge": merge})


def resolve_policy(spec: str | ConflictPolicy) -> ConflictPolicy:
    """The policy that a setting means: a name of ``POLICIES``, or a policy itself.

    Raises ``ConfigError`` for an unknown name and for an object that cannot be a policy.
    """
    if not isinstance(spec, str):
        return check_policy(spec)
    if spec not in POLICIES:
        raise no_such_policy(spec)
    return POLICIES[spec]


__all__ = [
    "CONFLICT_KINDS",
    "POLICIES",
    "TRUTH_TABLE",
    "Action",
    "Conflict",
    "ConflictPolicy",
    "ConflictResolution",
    "Merge",
    "TruthRow",
    "client_wins",
    "last_write_wins",
    "manual",
    "merge",
    "resolve_policy",
    "server_wins",
]
