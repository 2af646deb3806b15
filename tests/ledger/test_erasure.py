"""The rules of erasing a subject and of the holds that prevent it; and what was sealed before, after and beside."""

import asyncio
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from uuid_utils.compat import uuid7

from ledger.commands import OpenSession, Record
from ledger.committer import Committer
from ledger.erasure import Erasure
from ledger.events import HoldPlaced, HoldReleased, SubjectErased
from ledger.hold import Hold
from ledger.postgres import open_keys_pool, open_pool
from ledger.receipt import Receipt
from ledger.session import Session
from ledger.subjects import OF_SUBJECTS, EraseSubject, PlaceHold, ReleaseHold, may_be_of_a_subject, stream_of
from ledger.values import Actor, moment
from ledger.vault import Place, Vault
from ledger.writer import ALONE_AFTER_BATCHES
from tests.check import check_ledger, of_type, states
from tests.conftest import Database
from tests.ledger.given import AGENT, NOW, Given, given, later, on

MIA, BEN = "0a" * 16, "1b" * 16
HOLD = UUID("0199a7c2-0000-7000-8000-0000000000aa")
ANA = Actor(issuer="i", sub="ana", kind="human", assurance="authenticated", roles=("operator",))
PLACED = on(HOLD, HoldPlaced(subject=MIA, reason="case 7"))
RELEASED = HoldReleased(subject=MIA, reason="closed")
MARK = {"$personal": {"subject": "mia", "value": "Mia Li, 1 Elm St"}}
ERASED = {"$erased": True}


# Rules


def keys(past: Given, **retired: int) -> Given:
    """So many keys has each subject, who is called by name."""
    past.retired |= {{"mia": MIA, "ben": BEN}[name]: number for name, number in retired.items()}
    return past


def erase(subject: str = MIA) -> EraseSubject:
    return EraseSubject(subject=subject, ground="she asked")


def test_an_erasure_says_up_to_which_key_and_by_whom() -> None:
    outcome = keys(given(), mia=2).when(erase(), ANA).then(SubjectErased(subject=MIA, ground="she asked", through=2))
    state: Erasure = outcome.state
    assert (state.subject, state.through, state.erased_by.sub, state.erased_at) == (MIA, 2, "ana", NOW)
    assert outcome.events[0].stream_id == stream_of(MIA)


def test_a_subject_without_a_key_is_erased_as_well_and_one_that_was_erased_is_again() -> None:
    nothing = SubjectErased(subject=MIA, ground="she asked", through=0)
    past = keys(given(), mia=0).when(erase(), ANA).then(nothing).taken()
    again = past.when(erase(), ANA).then(nothing)
    assert again.state.version == 2


def test_where_keys_are_missing_an_erasure_is_of_all_that_the_one_before_was_of() -> None:
    before = SubjectErased(subject=MIA, ground="she asked", through=3)
    for left, through in ((1, 3), (4, 4)):
        past = keys(given(on(stream_of(MIA), before)), mia=left)
        past.when(erase(), ANA).then(SubjectErased(subject=MIA, ground="she asked", through=through))


def test_a_hold_prevents_an_erasure_until_it_is_released() -> None:
    held = keys(given(PLACED), mia=1, ben=1)
    held.when(erase(), ANA).refused("held", subject=MIA, hold_id=HOLD)
    held.when(erase(BEN), ANA).then(SubjectErased(subject=BEN, ground="she asked", through=1))
    freed = held.when(ReleaseHold(hold_id=HOLD, reason="closed"), ANA).then(RELEASED).taken()
    freed.when(erase(), ANA).then(SubjectErased(subject=MIA, ground="she asked", through=1))


def test_of_two_holds_one_that_is_left_is_enough() -> None:
    other = uuid7()
    past = keys(given(PLACED, on(other, HoldPlaced(subject=MIA, reason="case 8")), on(HOLD, RELEASED)), mia=1)
    past.when(erase(), ANA).refused("held", hold_id=other)


def test_a_hold_ends_when_its_time_has_come() -> None:
    until = later(NOW, hours=1)
    placing = PlaceHold(subject=MIA, reason="case 7", until=until, hold_id=HOLD)
    past = keys(given().when(placing, ANA).taken(), mia=1)
    past.when(erase(), ANA).refused("held")
    past.at("2026-11-21T10:00:00.000000Z").when(erase(), ANA).then(
        SubjectErased(subject=MIA, ground="she asked", through=1)
    )


def test_a_hold_that_would_have_ended_before_is_not_placed() -> None:
    placing = PlaceHold(subject=MIA, reason="case 7", until=moment(NOW))
    given().when(placing, ANA, target=HOLD).turned_away("malformed_request")


def test_a_hold_is_told_whole() -> None:
    state: Hold = given(PLACED).when(ReleaseHold(hold_id=HOLD, reason="closed"), ANA).state
    assert (state.hold_id, state.subject, state.state, state.version) == (HOLD, MIA, "released", 2)
    assert (state.placed_by.sub, state.reason, state.until) == ("agent-7", "case 7", None)
    assert (state.released_by and state.released_by.sub, state.released_reason) == ("ana", "closed")


def test_what_is_released_or_was_never_placed_is_not_released() -> None:
    release = ReleaseHold(hold_id=HOLD, reason="closed")
    given(on(HOLD, HoldPlaced(subject=MIA, reason="x"), RELEASED)).when(release, ANA).refused("invalid_transition")
    given().when(ReleaseHold(hold_id=HOLD, reason="closed"), ANA).turned_away("not_found", what="hold")
    given(PLACED).when(PlaceHold(subject=BEN, reason="x", hold_id=HOLD), ANA).refused("already_exists")


@pytest.mark.parametrize("command", OF_SUBJECTS, ids=lambda command: command.__name__)
def test_only_operators_erase_and_hold(command: Any) -> None:
    fields: dict[str, Any] = {"ground": "x"} if command is EraseSubject else {"reason": "x", "hold_id": HOLD}
    if command is not ReleaseHold:
        fields["subject"] = MIA
    for roles in (("agent",), ("auditor",), ("approver", "importer"), ()):
        who = Actor(issuer="i", sub="s", kind="human", assurance="authenticated", roles=roles)
        given(PLACED).when(command(**fields), who).refused("forbidden", needed=["operator"])


def test_nobody_begins_what_is_kept_for_a_subject() -> None:
    """Whoever did could keep a subject from being erased, or make its holds be overlooked."""
    assert stream_of(MIA) == UUID("5ab1ec70-da0e-88a5-af85-045a399c594f"), "a frozen name"
    assert may_be_of_a_subject(stream_of(MIA))
    assert not may_be_of_a_subject(uuid7())
    for command in (OpenSession(agent_role="x", session_id=stream_of(MIA)), Record(kind="x", record_id=stream_of(MIA))):
        given().when(command, AGENT).refused("already_exists")


# What was sealed


def put(value: Any = MARK) -> OpenSession:
    return OpenSession(agent_role="finance", metadata={"customer": value})


async def done(committer: Committer, command: Any, who: Actor) -> Receipt:
    receipt = await committer.submit("demo", command, who)
    assert receipt.refusal is None, receipt.refusal
    return receipt


async def erased(committer: Committer, subject: str = "mia") -> Erasure:
    """It is on record, and done."""
    state: Erasure = (await done(committer, EraseSubject(subject=subject, ground="she asked"), ANA)).state
    await committer.vault.destroy("demo", {state.subject: state.through})
    return state


async def read(committer: Committer, receipt: Receipt) -> Any:
    """What the session's customer reads as."""
    state = receipt.state
    place = Place("demo", state.session_id, state.metadata_version, state.metadata_event_id, "/data/metadata")
    return (await committer.vault.unseal("demo", state.metadata, place))["customer"]


def key_of(receipt: Receipt) -> int:
    number: int = receipt.state.metadata["customer"]["$sealed"]["key"]
    return number


async def test_what_was_sealed_before_is_erased_in_every_process_at_once_and_what_comes_after_is_not(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    before = await done(committer, put(), agent)
    for process in (committer, another):  # both have the key in memory now
        assert await read(process, before) == "Mia Li, 1 Elm St"
    assert (await erased(committer)).through == 1
    for process in (committer, another):
        assert await read(process, before) == ERASED
    for process in (another, committer):
        after = await done(process, put(), agent)
        assert key_of(after) == 2
        assert await read(committer, after) == await read(another, after) == "Mia Li, 1 Elm St"
    assert (await erased(another)).through == 2
    assert await read(committer, after) == ERASED
    check_ledger(database.owner)


async def test_two_erasures_and_one_of_a_stranger_are_on_record(
    committer: Committer, agent: Actor, database: Database
) -> None:
    await done(committer, put(), agent)
    assert [(await erased(committer, who)).through for who in ("mia", "mia", "nobody")] == [1, 1, 0]
    history = check_ledger(database.owner)["demo"]
    assert [(e.stream_version, e.data.through) for e in of_type(history, "SubjectErased")] == [(1, 1), (2, 1), (1, 0)]


async def test_another_projects_subject_of_the_same_name_is_another(committer: Committer, agent: Actor) -> None:
    before = await committer.submit("other", put(), agent)
    await done(committer, put(), agent)
    await erased(committer)
    place = Place(
        "other",
        before.state.session_id,
        before.state.metadata_version,
        before.state.metadata_event_id,
        "/data/metadata",
    )
    opened = await committer.vault.unseal("other", before.state.metadata, place)
    assert opened["customer"] == "Mia Li, 1 Elm St"


async def test_batches_that_race_erasures_are_erased_if_before_and_readable_if_after(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    """Every value that came before the last erasure reads erased, and every one after it is there."""
    receipts: list[Receipt] = []

    async def write(process: Committer) -> None:
        for _ in range(60):
            receipts.append(await done(process, put(), agent))

    async def erase() -> None:
        for process in (committer, another) * 6:
            await erased(process)
            await asyncio.sleep(0)

    await asyncio.gather(*(write(process) for process in (committer, another) * 2), erase())
    receipts += [await done(process, put(), agent) for process in (committer, another)]
    history = check_ledger(database.owner)["demo"]
    last = max(position for position, event in history if event.type == "SubjectErased")
    for receipt in receipts:
        expected = ERASED if receipt.first_position < last else "Mia Li, 1 Elm St"
        assert await read(committer, receipt) == await read(another, receipt) == expected, receipt.first_position
    through = [event.data.through for event in of_type(history, "SubjectErased")]
    assert through == sorted(through)
    assert through[-1] > 1, "no value came between two erasures"
    assert len(states(history)) > 200


async def test_as_many_erasures_at_once_as_there_are_connections_do_not_wait_for_each_other(
    database: Database, tmp_path: Path, agent: Actor
) -> None:
    async with open_pool(database.api, 2) as pool, open_keys_pool(None, pool) as keys:
        committer = Committer(pool, Vault(tmp_path, keys, create_keys=True), create_ledgers=True)
        projects = ("one", "two", "three")
        for project in projects:
            await committer.submit(project, put(), agent)
        erasures = [committer.submit(project, EraseSubject(subject="mia", ground="x"), ANA) for project in projects]
        assert [receipt.state.through for receipt in await asyncio.gather(*erasures)] == [1, 1, 1]
        await committer.close()


async def test_commands_given_at_once_are_of_the_erasure_or_not_by_their_order(
    committer: Committer, agent: Actor, database: Database
) -> None:
    both = Actor(issuer="i", sub="ana", kind="human", assurance="authenticated", roles=("agent", "operator"))
    many: list[Any] = [
        put(),
        EraseSubject(subject="mia", ground="x"),
        put(),
        put(),
        EraseSubject(subject="mia", ground="x"),
    ]
    verdicts = await committer.submit_all("demo", [*many, put()], both)
    first, one, second, third, two, last = (v for v in verdicts if isinstance(v, Receipt) and not v.refusal)
    assert [key_of(receipt) for receipt in (first, second, third, last)] == [1, 2, 2, 3]
    assert (one.state.through, two.state.through) == (1, 2)
    check_ledger(database.owner)


async def test_a_hold_that_is_released_while_its_subjects_erasure_is_on_its_way_leaves_what_comes_after_it(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    """It is refused at first, with commands decided behind it; then all of them are decided again."""
    both = Actor(issuer="i", sub="ana", kind="human", assurance="authenticated", roles=("agent", "operator"))
    await done(committer, put(), agent)
    hold: Hold = (await done(committer, PlaceHold(subject="mia", reason="case 7"), ANA)).state
    erasing = EraseSubject(subject="mia", ground="x")
    assert (await committer.submit("demo", erasing, ANA)).refusal  # by what is known here, from now on
    for _ in range(ALONE_AFTER_BATCHES):
        await done(committer, put(), agent)
    await done(another, ReleaseHold(hold_id=hold.hold_id, reason="closed"), ANA)
    # The first four go out at once, and miss; the others were decided on top of them.
    many: list[Any] = [*(put() for _ in range(4)), EraseSubject(subject="mia", ground="x"), put(), put()]
    receipts = [v for v in await committer.submit_all("demo", many, both) if isinstance(v, Receipt) and not v.refusal]
    assert [key_of(receipt) for receipt in receipts if isinstance(receipt.state, Session)] == [1] * 4 + [2] * 2
    assert receipts[4].state.through == 1
    await committer.vault.destroy("demo", {receipts[4].state.subject: 1})
    assert [await read(another, receipts[place]) for place in (3, 5, 6)] == [ERASED, *["Mia Li, 1 Elm St"] * 2]
    check_ledger(database.owner)


async def test_a_process_that_dies_before_the_event_leaves_values_readable_and_none_is_sealed_under_that_key(
    committer: Committer, another: Committer, agent: Actor
) -> None:
    before = await done(committer, put(), agent)
    await another.vault.open("demo")
    await another.vault.retire("demo", another.vault.pseudonym("demo", "mia"))
    assert await read(committer, before) == "Mia Li, 1 Elm St"
    after = await done(another, put(), agent)
    assert key_of(after) == 2
    assert await read(committer, after) == "Mia Li, 1 Elm St"
    assert (await erased(another)).through == 1 + 1


async def test_a_hold_in_another_process_is_seen_and_erasing_under_it_destroys_nothing(
    committer: Committer, another: Committer, agent: Actor, database: Database
) -> None:
    before = await done(committer, put(), agent)
    await done(committer, EraseSubject(subject="ben", ground="x"), ANA)
    hold: Hold = (await done(another, PlaceHold(subject="mia", reason="case 7"), ANA)).state
    refused = await committer.submit("demo", EraseSubject(subject="mia", ground="x"), ANA)
    assert refused.refusal
    assert (refused.refusal.code, refused.refusal.params["hold_id"]) == ("held", hold.hold_id)
    assert await read(committer, before) == "Mia Li, 1 Elm St"
    with psycopg.connect(database.owner) as connection:
        assert connection.execute("SELECT count(*) FROM keys.data_keys WHERE retired").fetchone() == (0,)
    await done(committer, ReleaseHold(hold_id=hold.hold_id, reason="closed"), ANA)
    await erased(another)
    assert await read(committer, before) == ERASED
    check_ledger(database.owner)


async def test_a_subjects_name_is_in_no_event_whatever_is_answered(
    committer: Committer, agent: Actor, database: Database
) -> None:
    commands: list[Any] = [put({"$personal": {"subject": "mia.li", "value": 1}})]
    commands += [EraseSubject(subject="mia.li", ground="x"), PlaceHold(subject="mia.li", reason="x")]
    for command in commands:
        await committer.submit("demo", command, agent)
    await done(committer, PlaceHold(subject="mia.li", reason="x"), ANA)
    await committer.submit("demo", EraseSubject(subject="mia.li", ground="x"), ANA)
    history = check_ledger(database.owner)["demo"]
    assert len(of_type(history, "CommandRefused")) == 3
    with psycopg.connect(database.owner) as connection:
        rows = connection.execute("SELECT convert_from(entry, 'UTF8') FROM ledger.events").fetchall()
        commands = connection.execute("SELECT c::text FROM ledger.commands AS c").fetchall()
    assert "mia.li" not in str(rows) + str(commands)
