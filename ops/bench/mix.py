"""The fixed mix: 20 % open, 40 % record, 20 % change, 20 % annotate; each command appends one event.

A unit is one session's work: opened, a record, activated, a record, annotated. Of every four records one has
a personal value, of one of 100 customers. All ids are UUIDv7, as our client makes them. Changing anything
here makes the figures of before and after incomparable.
"""

import itertools
import random
from collections.abc import Iterator, Sequence

import msgspec
from msgspec.structs import replace
from uuid_utils.compat import uuid7

from ledger.commands import AnnotateSession, ChangeSession, Command, OpenSession, Record
from ledger.values import Actor

AGENT = Actor(
    issuer="https://id.example/realms/main",
    sub="9f0c4c1e-agent",
    kind="agent",
    assurance="authenticated",
    roles=("agent",),
    client="support-bot",
)
CUSTOMERS = 100
UNIT_COMMANDS = 5
YOUNG_UNITS_AGO = (50, 400)

Unit = list[Command]

_SAID = (
    "I have checked the reservation and the fare rules: the flight can be changed until the day before departure, "
    "and the difference of 114.00 USD would go to the card that was used for the booking. Shall I go on?"
)


def units() -> Iterator[Unit]:
    """Units without end."""
    for number in itertools.count():
        session_id = uuid7()
        yield [
            OpenSession(
                command_id=str(uuid7()),
                session_id=session_id,
                agent_role="airline-support",
                metadata={"ticket": f"T-{number}", "channel": "chat"},
                labels={"team": "support"},
            ),
            Record(
                command_id=str(uuid7()),
                record_id=uuid7(),
                session_id=session_id,
                kind="message.assistant",
                body={"role": "assistant", "content": _SAID},
            ),
            ChangeSession(command_id=str(uuid7()), session_id=session_id, status="active"),
            Record(
                command_id=str(uuid7()),
                record_id=uuid7(),
                session_id=session_id,
                kind="tool.called",
                body={"name": "get_user_details", "arguments": {"user_id": number}, "result": _result(number)},
            ),
            AnnotateSession(command_id=str(uuid7()), session_id=session_id, text="The customer was asked to confirm."),
        ]


def _result(number: int) -> dict[str, object]:
    if number % 2:
        return {"membership": "gold", "saved_passengers": 2, "reservations": ["NO6JO3", "AIXC49", "HKEG34"]}
    person = {"name": "Mia Li", "date_of_birth": "1990-04-05", "email": "mia.li3818@example.com"}
    subject = f"customer-{number // 2 % CUSTOMERS}"
    return {"membership": "gold", "customer": {"$personal": {"subject": subject, "value": person}}}


def copied(unit: Unit) -> Unit:
    """The same commands once more: a committer takes what it needs out of those it is given."""
    return [replace(command) for command in unit]


def with_replays(before: Sequence[Unit], fresh: Sequence[Unit], share: float, *, old: bool) -> list[Unit]:
    """`fresh`, in which at random places commands are sent once more, so that they are `share` of all.

    Old ones are those of `before`, one after the other; young ones are from 50 to 400 units ago, so answered, and
    at first they too are of `before`.
    """
    chance = random.Random(7)  # noqa: S311  (the same places in every run)
    a_unit = share / (1 - share) * UNIT_COMMANDS
    again = itertools.cycle(itertools.chain.from_iterable(before))
    sent = [*before, *fresh]
    planned = []
    for index, unit in enumerate(fresh, len(before)):
        mixed = list(unit)
        for _ in range(int(a_unit) + (chance.random() < a_unit % 1)):
            repeated = next(again) if old else chance.choice(sent[index - chance.randint(*YOUNG_UNITS_AGO)])
            mixed.insert(chance.randint(0, len(mixed)), replace(repeated))
        planned.append(mixed)
    return planned


def body(command: Command) -> bytes:
    """A command as a client sends it to `POST /commands`."""
    return msgspec.json.encode(command)


def session_body(unit: Unit) -> bytes:
    """The unit's first command as a client sends it to `POST /sessions`."""
    fields = msgspec.to_builtins(unit[0])
    del fields["type"]
    return msgspec.json.encode(fields)
