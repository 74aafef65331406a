"""Planted bugs: a device that changes hands (R36)."""

from __future__ import annotations

from typing import Any, Final

from msgspec.structs import replace

from entidb.db import overruled
from entidb.db.subjects import Behind
from entidb.server.front import Front
from entidb.sync import cycle
from entidb.sync.apply import applier, batch, review, signing
from tests.planted.garden import WILD, Garden, bug

_PEOPLE: Final = WILD | {"people": 400, "singles": 500, "tenants": 1}


@bug("work-of-others-is-pushed", "ATTRIBUTED", knobs=_PEOPLE)
def _work_of_others_is_pushed(garden: Garden) -> None:
    """A batch takes whatever is ready, whoever has committed it."""

    def make(choose: Any) -> Any:
        def bad(writer: Any, *args: Any, state: Any = None, **more: Any) -> Any:
            mine = replace(state or writer.sync_state, others=[])
            return choose(writer, *args, state=mine, **more)

        return bad

    garden.replace(applier, "choose", make)


@bug("built-on-others-and-pushed", "ORDER", knobs=_PEOPLE)
def _built_on_others_and_pushed(garden: Garden) -> None:
    """What was built on another person's pending change goes out without that."""
    garden.replace(Behind, "waits", lambda waits: lambda self, key, row: False)


@bug("only-what-others-wrote-last-is-waited-for", "ORDER", knobs=_PEOPLE)
def _only_the_first_link_is_waited_for(garden: Garden) -> None:
    """What was built on something that waits for another person does not wait itself."""

    def make(waits: Any) -> Any:
        def bad(self: Any, key: bytes, row: bytes) -> Any:
            found = waits(self, key, row)
            self._found.clear()
            return found

        return bad

    garden.replace(Behind, "waits", make)


@bug("in-flight-sent-again-by-another", "ATTRIBUTED", knobs=_PEOPLE | {"lost": 300})
def _in_flight_sent_again_by_another(garden: Garden) -> None:
    """What got no answer is sent again under the subject of the next person."""
    garden.replace(cycle, "sent_by_others", lambda good: lambda state, ranges: False)


@bug("newest-commit-goes-to-the-next-person", "ATTRIBUTED", knobs=_PEOPLE)
def _newest_commit_goes_to_the_next(garden: Garden) -> None:
    """The last commit before somebody leaves counts as the next person's."""
    garden.replace(
        signing,
        "own_gaps",
        lambda gaps: lambda others, last: gaps(others, last - 1 if last < 2**62 else last),
    )


@bug("third-person-forgotten", "ATTRIBUTED", knobs=_PEOPLE)
def _third_person_forgotten(garden: Garden) -> None:
    """Who signs in makes the device forget for whom else work waits."""

    def make(sign_in: Any) -> Any:
        def bad(writer: Any, subject: str) -> None:
            sign_in(writer, subject)
            state = writer.sync_state
            last = state.others[-1:]
            writer.set_sync_state(replace(state, others=last))

        return bad

    garden.replace(applier, "sign_in", make)


@bug("logout-that-stays-in", "ATTRIBUTED", knobs=_PEOPLE)
def _logout_that_stays_in(garden: Garden) -> None:
    """Signing out notes whose the work is, and goes on as the same person."""

    def make(sign_out: Any) -> Any:
        def bad(writer: Any, subject: str | None) -> None:
            before = writer.sync_state.subject
            sign_out(writer, subject)
            writer.set_sync_state(replace(writer.sync_state, subject=before))

        return bad

    garden.replace(review, "sign_out", make)


@bug("withdrawn-and-of-the-next-person", "ATTRIBUTED", knobs=_PEOPLE)
def _withdrawn_and_of_the_next_person(garden: Garden) -> None:
    """Who comes next has written what was withdrawn of the person before."""
    garden.replace(signing, "has_discarded", lambda good: lambda snapshot, first, last: False)


@bug("overruled-of-who-is-there", "ATTRIBUTED", knobs=_PEOPLE | {"person": 200})
def _overruled_of_who_is_there(garden: Garden) -> None:
    """Whoever is there when a policy decides has written what it decides against."""
    garden.replace(overruled, "subject_of", lambda good: lambda state, sequence: state.subject)


@bug("server-ignores-who-committed", "ATTRIBUTED", knobs=_PEOPLE)
def _server_ignores_who_committed(garden: Garden) -> None:
    """A push of one person is taken with the token of another."""
    garden.replace(Front, "_check_subject", lambda check: lambda self, grant, request: None)


@bug("own-work-left-for-others", "LIVENESS", knobs=_PEOPLE)
def _own_work_left_for_others(garden: Garden) -> None:
    """Everything after the first commit of another person is left for that one."""

    def make(own: Any) -> Any:
        def bad(ranges: list[list[int]], end: int) -> Any:
            gaps = list(own(ranges, end))
            return iter(gaps[:1] if len(gaps) > 1 else gaps)

        return bad

    garden.replace(batch, "_gaps", make)
