"""The views `audit` and `records`: everything is found by what it says, and by nothing that is sealed."""

import random
from typing import Any
from uuid import UUID

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from uuid_utils.compat import uuid7

from ledger.errors import MalformedRequest
from ledger.events import CommandRefused, FactRecorded, SessionActivated, SessionAnnotated, SessionFailed, SessionOpened
from ledger.postgres import Connection
from ledger.values import Actor, AgentDescription, Artifact, Principal, Ref, Usage, moment
from projections import Projector, audit, records, segments, terms
from projections.audit import Facets, Filter
from projections.segments import Order
from tests.conftest import Database
from tests.projections.conftest import AGENT, History, NewHistory, project_all, rows_read

ANN = Actor(issuer="https://id.example", sub="ann", kind="human", assurance="authenticated")


async def found(connection: Connection, history: History, order: Order = "asc", **wanted: Any) -> list[int]:
    return await audit.search(connection, history.ledger_id, Filter(**wanted), limit=1000, order=order)


async def recorded(connection: Connection, history: History, **wanted: Any) -> list[UUID]:
    page = await records.search(connection, history.ledger_id, records.Filter(**wanted), limit=200, order="asc")
    return [record.record_id for record in page.records]


async def test_events_are_found_by_each_filter_and_by_all_together(
    history: History, projector: Projector, reader: Connection
) -> None:
    session_id = history.open()
    history.add(SessionActivated(), session_id, actor=ANN)
    record = history.add(FactRecorded(kind="note"), session_id=session_id, refs=(Ref(type="invoice", id="9:a"),))
    history.add(FactRecorded(kind="note"), correlation_id="order 7", actor=ANN)
    history.add(SessionOpened(agent_role="x", expires_at=history.time(9)), correlation_id="order 7")
    await project_all(projector, history)
    assert await found(reader, history) == [1, 2, 3, 4, 5]
    assert await found(reader, history, type="SessionOpened") == [1, 5]
    assert await found(reader, history, type="sessionopened") == []
    assert await found(reader, history, stream=session_id) == [1, 2]
    assert await found(reader, history, stream=record) == [3]
    assert await found(reader, history, session=session_id) == [1, 2, 3]
    assert await found(reader, history, actor="ann") == [2, 4]
    assert await found(reader, history, actor="https://id.example#ann") == [2, 4]
    assert await found(reader, history, actor="https://other.example#ann") == []
    assert await found(reader, history, ref="invoice:9:a") == [3]
    assert await found(reader, history, correlation="order 7") == [4, 5]
    assert await found(reader, history, correlation=str(session_id)) == [1, 2, 3]
    assert await found(reader, history, actor="ann", type="FactRecorded", q="note order") == [4]
    assert await found(reader, history, session=session_id, actor="ann", type="FactRecorded") == []


async def test_since_is_inclusive_and_until_exclusive_on_the_time_of_recording(
    history: History, projector: Projector, reader: Connection
) -> None:
    for n in range(37):
        history.add(FactRecorded(kind="even" if n % 2 else "odd"))
    await project_all(projector, history)
    assert await found(reader, history, since=moment("0001-01-01T00:00:00.000000Z")) == list(range(1, 38))
    for position in range(1, 38):
        time = moment(history.time(position))
        assert await found(reader, history, since=time) == list(range(position, 38))
        assert await found(reader, history, until=time, order="desc") == list(range(position - 1, 0, -1))
        assert await found(reader, history, since=time, until=time) == []
        assert await found(reader, history, until=time, q="odd") == list(range(1, position, 2))
        assert len(await recorded(reader, history, since=time)) == 38 - position
        assert len(await recorded(reader, history, until=time, kind="odd")) == position // 2
    assert await found(reader, history, since=moment("9999-01-01T00:00:00.000000Z")) == []


async def test_records_are_found_by_each_filter(history: History, projector: Projector, reader: Connection) -> None:
    session_id, other, task, approval = history.open(), uuid7(), uuid7(), uuid7()
    first = history.add(FactRecorded(kind="tool.called", status="ok", task_id=task), session_id=session_id)
    second = history.add(
        FactRecorded(kind="tool.called", status="error", approval_id=approval, parent_record_id=first),
        session_id=session_id,
        actor=ANN,
    )
    third = history.add(
        FactRecorded(kind="tool", body={"a": [1.0, "x"]}), refs=(Ref(type="r", id="1"),), external_id="mine"
    )
    history.add(SessionActivated(), session_id)
    await project_all(projector, history)
    assert await recorded(reader, history) == [first, second, third]
    assert await recorded(reader, history, session_id=session_id) == [first, second]
    assert await recorded(reader, history, session_id=other) == []
    assert await recorded(reader, history, kind="tool.called") == [first, second]
    assert await recorded(reader, history, kind="tool") == [third]
    assert await recorded(reader, history, status="error") == [second]
    assert await recorded(reader, history, task_id=task) == [first]
    assert await recorded(reader, history, approval_id=approval) == [second]
    assert await recorded(reader, history, parent_record_id=first) == [second]
    assert await recorded(reader, history, external_id="mine") == [third]
    assert await recorded(reader, history, ref="r:1") == [third]
    assert await recorded(reader, history, actor="ann", kind="tool.called") == [second]
    record = await records.get(reader, history.ledger_id, third)
    assert record is not None
    assert (record.body, record.external_id, record.actor) == ({"a": [1.0, "x"]}, "mine", AGENT)
    assert await records.get(reader, history.ledger_id, session_id) is None
    assert await records.get(reader, history.ledger_id, other) is None


@pytest.mark.parametrize("seed", range(3))
async def test_an_event_is_found_only_if_all_that_is_asked_for_is_said_of_it(
    history: History, projector: Projector, reader: Connection, seed: int
) -> None:
    chance = random.Random(seed)
    said: list[tuple[set[str], Actor]] = []
    while len(said) < 700:  # together, apart, and side by side in one segment
        for _ in range(chance.choice((1, 2, 30, 300))):
            said.append(({word for word in "abcde" if chance.random() < 0.3}, chance.choice((ANN, AGENT))))
            history.add(FactRecorded(kind="k", body=" ".join(sorted(said[-1][0]))), actor=said[-1][1])
        await project_all(projector, history)
    for words in ("a", "a b", "b c d", "a b c d e"):
        for actor in (None, ANN, AGENT):
            expected = [
                position
                for position, (spoken, by) in enumerate(said, 1)
                if spoken >= set(words.split()) and actor in (None, by)
            ]
            name = actor.principal if actor else None
            assert await found(reader, history, q=words, actor=name) == expected
            counted = await audit.facets(reader, history.ledger_id, Filter(q=words, actor=name))
            assert (counted.counted, counted.types.get("FactRecorded", 0)) == (len(expected), len(expected))
            by_ann = sum(said[position - 1][1] == ANN for position in expected)
            assert counted.actors.get(ANN.principal, 0) == by_ann


async def test_what_two_events_say_together_neither_is_found_by(
    history: History, projector: Projector, reader: Connection
) -> None:
    name = uuid7()
    first, second = str(name)[:18], str(name)[19:]
    history.add(FactRecorded(kind="k", body=first), actor=replace(ANN, sub="ann", issuer="https://a.example"))
    history.add(FactRecorded(kind="k", body=second), actor=replace(ANN, sub="bob", issuer="https://b.example"))
    history.add(FactRecorded(kind="k", body=f"{first} {second}"))
    await project_all(projector, history)
    assert await found(reader, history, q=str(name)) == [3]
    assert await found(reader, history, actor="https://a.example#bob") == []
    assert await found(reader, history, actor="https://b.example#bob") == [2]


async def test_events_that_say_much_fill_several_segments(
    history: History, projector: Projector, reader: Connection
) -> None:
    for n in range(20):
        history.add(FactRecorded(kind="k", body=" ".join(f"{n:02}x{word}" for word in range(8_000))))
    await project_all(projector, history)
    assert await found(reader, history) == list(range(1, 21))
    for n in range(20):
        assert await found(reader, history, q=f"{n:02}x5000") == [n + 1]
    for n in (1, 9, 20):
        assert await found(reader, history, since=moment(history.time(n))) == list(range(n, 21))


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_pages_go_through_everything_once_however_it_is_spread(
    history: History, projector: Projector, reader: Connection, order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small spans, so that a few hundred events lie in many of each size.
    monkeypatch.setattr(segments, "SPAN_BITS", (2, 4, 6))
    monkeypatch.setattr(segments, "SEGMENT_BITS", 1)
    chance = random.Random(order)
    expected: dict[str, list[int]] = {"often": [], "seldom": [], "once": [], "early": [], "late": []}
    for position in range(1, 401):
        said = {
            "often": chance.random() < 0.6,
            "seldom": chance.random() < 0.02,
            "once": position == 177,
            "early": position < 40,
            "late": position > 390,
        }
        for word, is_said in said.items():
            if is_said:
                expected[word].append(position)
        history.add(FactRecorded(kind="k", body=" ".join(word for word in said if said[word])))
    await project_all(projector, history)
    for word, positions in expected.items():
        wanted = sorted(positions, reverse=order == "desc")
        for limit in (1, 3, 7, 1000):
            seen: list[int] = []
            while page := await audit.search(
                reader, history.ledger_id, Filter(q=word), limit=limit, after=seen[-1] if seen else None, order=order
            ):
                seen += page
            assert seen == wanted, (word, limit)
    listed: list[int] = []
    after = None
    while len(listed) < 400:
        page_ = await records.search(
            reader, history.ledger_id, records.Filter(kind="k"), limit=30, after=after, order=order
        )
        listed += [int(moment(r.recorded_at).timestamp() - moment(history.time(0)).timestamp()) for r in page_.records]
        after = page_.next
    assert after is None
    assert listed == sorted(range(1, 401), reverse=order == "desc")


async def test_every_word_that_is_said_is_found_whatever_its_case_and_form(
    history: History, projector: Projector, reader: Connection
) -> None:
    session_id = history.open(
        "Travel-Desk",
        labels={"region": "EMEA north"},
        metadata={"deep": [[{"er": ["Grüße aus KÖLN"]}]], "number": "A-113"},
        agent=AgentDescription(name="Otto", model="gpt-4o"),
        task_id="T/42",
    )
    history.add(SessionFailed(reason="card_declined: straße"), session_id)
    body = {
        "tool": "book_reservation",
        "text": "東京タワー",
        "mail": "ann.lee@example.com",
        "cafe": "cafe\u0301 \u212b",
    }
    refs = (Ref(type="invoice", id="INV-77"),)
    history.add(FactRecorded(kind="tool.called", body=body), session_id=session_id, refs=refs, external_id="run#5")
    history.add(
        FactRecorded(
            kind="model.called",
            usage=Usage(provider="Acme", model="m1"),
            artifacts=(Artifact(uri="s3://b/key.pdf", name="Plan"),),
        )
    )
    refused = {"session_id": str(session_id), "text": "please hurry"}
    history.add(
        CommandRefused(
            command_type="AnnotateSession",
            status=404,
            code="not_found",
            params={"what": "elsewhere"},
            attempted=refused,
        ),
        actor=replace(ANN, on_behalf_of=(Principal("x", "boss"),)),
        reason="because of it",
    )
    await project_all(projector, history)
    said = {
        1: "travel;desk TRAVEL;region;emea;North;Grüße;GRÜSSE;köln;KO\u0308LN;A-113;otto;gpt-4o;4o;t/42;sessionopened",
        2: "straße;STRASSE;card_declined;declined;SessionFailed",
        3: "reservation;book_reservation;京;タワー;東京;ann.lee@example.com;lee;café;å;invoice;inv 77;run#5",
        4: "acme;m1;pdf;s3://b/key.pdf;plan",
        5: "hurry;annotatesession;not_found;elsewhere;because;ann",
    }
    for position, texts in said.items():
        for text in texts.split(";"):
            assert position in await found(reader, history, q=text), text
    assert await found(reader, history, q="otto acme") == []
    assert await found(reader, history, q=str(session_id)) == [1, 2, 3, 5]
    assert await found(reader, history, q="boss") == []


async def test_an_event_is_found_by_the_ids_on_it(history: History, projector: Projector, reader: Connection) -> None:
    record = history.add(FactRecorded(kind="k"), command_id="my-command-7")
    command = str(uuid7())
    history.add(FactRecorded(kind="k"), command_id=command, correlation_id="corr-1")
    await project_all(projector, history)
    assert await found(reader, history, q=f"  {str(record).upper()} ") == [1]
    assert await found(reader, history, q="my-command-7") == [1]
    assert await found(reader, history, q=command) == [2]
    assert await found(reader, history, q="corr-1") == [2]


async def test_nothing_sealed_is_ever_found(history: History, projector: Projector, reader: Connection) -> None:
    sealed = {"$sealed": {"subject": "pseudonym", "key": 1, "nonce": "noncenonce", "box": "boxboxbox"}}
    session_id = history.open(metadata={"name": sealed, "list": [sealed, {"inner": sealed, "open": "visible"}]})
    history.add(SessionAnnotated(text=sealed), session_id)
    history.add(FactRecorded(kind="k", body=sealed), session_id=session_id)
    history.add(
        CommandRefused(command_type="X", status=422, code="x", params={}, attempted={"body": sealed}), reason=sealed
    )
    history.add(FactRecorded(kind="k", body={"$erased": True, "x": "gone"}), actor=replace(ANN, name=sealed))
    await project_all(projector, history)
    assert await found(reader, history, q="visible") == [1]
    for word in ("pseudonym", "noncenonce", "boxboxbox", "sealed", "gone"):
        assert await found(reader, history, q=word) == []
    stored = await (await reader.execute("SELECT string_agg(terms::text, ' ') FROM audit.segments")).fetchall()
    assert "boxboxbox" not in stored[0][0]


async def test_large_and_unruly_text_is_searchable_up_to_a_bound(
    history: History, projector: Projector, reader: Connection
) -> None:
    history.add(FactRecorded(kind="k", body=["first", "y" * 100, "x" * 100_000, "never"]))
    history.add(FactRecorded(kind="k", body=[f"w{n}" for n in range(200_000)]))
    history.add(FactRecorded(kind="k", body="\ufdfa" * 60_000 + " z"))
    deep: Any = "bottom"
    for _ in range(400):
        deep = [deep]
    history.add(FactRecorded(kind="k", body=deep))
    history.add(FactRecorded(kind="k", body="\U0001f984\0\ud7ff a\0b \x1f"), correlation_id="\0" * 128)
    history.add(FactRecorded(kind="k", body={}), correlation_id="\U0001f984" * 128)
    await project_all(projector, history)
    assert history.size == 6
    assert await found(reader, history, q="first") == [1]
    assert await found(reader, history, q="y" * 100) == [1]
    assert await found(reader, history, q="y" * 99) == []
    assert await found(reader, history, q="w5000") == [2]
    assert await found(reader, history, q="bottom") == [4]
    assert await found(reader, history, q="b") == [5]
    assert await found(reader, history, correlation="\0" * 128) == [5]
    assert await found(reader, history, correlation="\U0001f984" * 128) == [6]
    assert await found(reader, history) == [1, 2, 3, 4, 5, 6]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=80) | st.text("'\"\\&|!():*<-> \0a%", max_size=20))
async def test_a_query_is_plain_words_whatever_it_looks_like(history: History, reader: Connection, text: str) -> None:
    usable = text.encode("utf-8", "replace").decode()
    for wanted in (
        Filter(q=usable),
        Filter(actor=usable),
        Filter(ref=usable),
        Filter(correlation=usable),
        Filter(type=usable),
    ):
        if wanted.q is None or terms.words(wanted.q):
            assert await audit.search(reader, history.ledger_id, wanted, limit=5) == []


async def test_a_query_without_words_or_with_too_many_is_refused(history: History, reader: Connection) -> None:
    for text in ("", " ", "!?", "__"):
        with pytest.raises(MalformedRequest, match="0 different words"):
            await audit.search(reader, history.ledger_id, Filter(q=text), limit=5)
    with pytest.raises(MalformedRequest, match="33 different words"):
        await audit.search(reader, history.ledger_id, Filter(q=" ".join(map(str, range(33)))), limit=5)


async def test_facets_count_what_a_search_finds(
    history: History, projector: Projector, reader: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = history.open()
    for n in range(30):
        history.add(FactRecorded(kind="k", body="third" if n % 3 == 0 else "x"), actor=ANN if n % 2 else AGENT)
    history.add(SessionActivated(), session_id)
    await project_all(projector, history)
    agent, ann = "https://id.example#agent-7", "https://id.example#ann"
    everything = await audit.facets(reader, history.ledger_id, Filter())
    assert everything == Facets(
        types={"FactRecorded": 30, "SessionOpened": 1, "SessionActivated": 1},
        actors={agent: 17, ann: 15},
        counted=32,
        is_exact=True,
    )
    some = await audit.facets(reader, history.ledger_id, Filter(q="third", since=moment(history.time(3))))
    assert some == Facets(types={"FactRecorded": 9}, actors={ann: 5, agent: 4}, counted=9, is_exact=True)
    monkeypatch.setattr(audit, "FACETS_EVENTS_MAX", 4)
    for wanted in (Filter(), Filter(type="FactRecorded")):
        bounded = await audit.facets(reader, history.ledger_id, wanted)
        assert (bounded.counted, sum(bounded.types.values()), bounded.is_exact) == (4, 4, False)


async def test_another_project_sees_nothing_of_it(
    history: History, new_history: NewHistory, projector: Projector, reader: Connection
) -> None:
    session_id = history.open()
    history.add(FactRecorded(kind="k", body="secret"), session_id=session_id)
    await project_all(projector, history)
    other = await new_history("other")
    other.add(FactRecorded(kind="k", body="public"))
    await project_all(projector, other)
    assert await found(reader, other) == [1]
    for wanted in ({"q": "secret"}, {"session": session_id}, {"type": "SessionOpened"}):
        assert await found(reader, other, **wanted) == []
    assert await recorded(reader, other, session_id=session_id) == []
    assert await found(reader, history, actor="agent-7") == [1, 2]


async def test_what_is_found_costs_no_more_where_the_ledger_is_long(
    history: History, projector: Projector, reader: Connection, database: Database
) -> None:
    history.add(FactRecorded(kind="k", body="rare"))
    await project_all(projector, history)
    far = 2**40
    async with await psycopg.AsyncConnection.connect(database.owner) as owner:
        await owner.execute(
            "INSERT INTO audit.segments SELECT ledger_id, %s, recorded_ats, terms FROM audit.segments", [far]
        )
    # Within the time that a test has, which is no time to go through so many positions.
    assert await found(reader, history, q="rare") == [1, far]


async def test_a_search_reads_little_more_than_it_finds_also_beside_a_large_project(
    history: History, new_history: NewHistory, projector: Projector, reader: Connection
) -> None:
    small = await new_history("small")
    for n in range(12_000):
        history.add(FactRecorded(kind="k", body="common common" if n % 2 else "even"))
        if n in (3, 9_000):
            history.add(FactRecorded(kind="k", body="rare"))
    for _ in range(3):
        small.add(FactRecorded(kind="k", body="common"))
    await project_all(projector, history)
    await project_all(projector, small)
    # Of a small project every segment, and once for every span that is looked into; of a large one, where all of two
    # spans of 1024 have it, those spans' segments.
    for ledger, wanted, most in (
        (history, Filter(q="rare"), 4 * 2),
        (history, Filter(q="rare common"), 4 * 2),
        (history, Filter(q="common"), 2 * 1024 // 200),
        (history, Filter(q="common", actor="agent-7", type="FactRecorded"), 2 * 1024 // 200),
        (history, Filter(), 2 * 1024 // 200),
        (small, Filter(q="common"), 4),
        (small, Filter(actor="agent-7"), 4),
    ):
        for order in ("asc", "desc"):
            async with reader.transaction():
                before = await rows_read(reader, "audit")
                await audit.search(reader, ledger.ledger_id, wanted, limit=20, order=order)
                # And one row to learn where the ledger ends.
                assert await rows_read(reader, "audit") - before <= most + 1, (wanted, order)
