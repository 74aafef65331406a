"""What every shipped policy answers to every kind of conflict, as a table (R26).

``docs/conflicts.md`` shows it; a test walks both.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from msgspec import Struct

from entidb.sync.conflict import CONFLICT_KINDS, Action, ConflictPolicy
from entidb.sync.merging import Merge, merge
from entidb.sync.whole_policies import client_wins, last_write_wins, manual, server_wins

# ---------------------------------------------------------------- what each policy answers


class TruthRow(Struct, frozen=True):
    """What ``policy``, written ``name`` in a configuration, does with each kind of conflict,
    ``when`` being one of the ``WHEN_…`` below. Create/create and update/update are of maps, and
    of maps that both sides changed in the same field unless ``when`` says otherwise."""

    name: str
    policy: ConflictPolicy
    when: str
    actions: Mapping[str, Action]


WHEN_ALWAYS: Final = "always"
WHEN_LOCAL_NEWER: Final = "the device's is newer"
WHEN_REMOTE_NEWER: Final = "the server's is newer, or equal"
WHEN_SAME_FIELD: Final = "the same field changed"
WHEN_OTHER_FIELDS: Final = "different fields changed"


def _row(name: str, policy: ConflictPolicy, when: str, fields: Action, delete: Action) -> TruthRow:
    """``fields`` where there are two values, ``delete`` where there is one and a deletion."""
    actions = dict(zip(CONFLICT_KINDS, (fields, fields, delete, delete), strict=True))
    return TruthRow(name, policy, when, MappingProxyType(actions))


_A, _K, _M, _S = Action.ACCEPT_REMOTE, Action.KEEP_LOCAL, Action.MERGE, Action.SKIP
_BY_TIME: Final = Merge("last_write_wins")
_BY_HAND: Final = Merge("manual")
#: R26: what every shipped policy answers. ``docs/conflicts.md`` shows it; a test walks both.
TRUTH_TABLE: Final[tuple[TruthRow, ...]] = (
    _row("server_wins", server_wins, WHEN_ALWAYS, _A, _A),
    _row("client_wins", client_wins, WHEN_ALWAYS, _K, _K),
    _row("last_write_wins", last_write_wins, WHEN_LOCAL_NEWER, _K, _K),
    _row("last_write_wins", last_write_wins, WHEN_REMOTE_NEWER, _A, _A),
    _row("merge", merge, WHEN_ALWAYS, _M, _A),
    _row('Merge("client_wins")', Merge("client_wins"), WHEN_ALWAYS, _M, _K),
    _row('Merge("last_write_wins")', _BY_TIME, WHEN_LOCAL_NEWER, _M, _K),
    _row('Merge("last_write_wins")', _BY_TIME, WHEN_REMOTE_NEWER, _M, _A),
    _row('Merge("manual")', _BY_HAND, WHEN_OTHER_FIELDS, _M, _S),
    _row('Merge("manual")', _BY_HAND, WHEN_SAME_FIELD, _S, _S),
    _row("manual", manual, WHEN_ALWAYS, _S, _S),
)
