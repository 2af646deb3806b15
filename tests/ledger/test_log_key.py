"""Which keys sign: added and retired by operators, in the project that is theirs; one of them always signs."""

import pytest

from ledger.events import Fact
from ledger.log_events import LogKeyAdded, LogKeyRetired
from ledger.log_key import Key, LogKeys
from ledger.operations import LOG_KEYS, OPERATORS, AddLogKey, OfLogKeys, RetireLogKey
from ledger.project_key import ProjectKey
from ledger.values import Actor
from tests.ledger.given import AGENT, NOW, VAULT, Given, Outcome, by, given, on

ANA = Actor(issuer="https://id.example", sub="ana", kind="human", assurance="asserted", roles=("operator",))
A, B = "0a" * 32, "0b" * 32
FIRST, SECOND = LogKeyAdded(number=1, public=A), LogKeyAdded(number=2, public=B)

VAULT._projects[OPERATORS] = ProjectKey(OPERATORS, bytes(32))


class Operators(Given):
    """The operators' ledger."""

    project_id = OPERATORS


def keys(*history: Fact) -> Operators:
    return Operators(on(LOG_KEYS, *(by(ANA, fact) for fact in history)))


def then(outcome: Outcome, *facts: Fact) -> LogKeys:
    state: LogKeys = outcome.then(*(on(LOG_KEYS, fact) for fact in facts)).state
    return state


def test_a_key_is_added_and_signs_from_then_on() -> None:
    outcome = Operators().when(AddLogKey(number=1, public=A, reason="the first"), ANA)
    state = then(outcome, FIRST)
    assert state.keys == (Key(number=1, public=A, added_at=NOW),)
    assert (outcome.events[0].actor, outcome.events[0].reason) == (ANA, "the first")


def test_one_key_follows_the_other() -> None:
    state = then(keys(FIRST, SECOND).when(RetireLogKey(number=1), ANA), LogKeyRetired(number=1))
    assert [(key.number, key.retired_at) for key in state.keys] == [(1, NOW), (2, None)]
    assert state.version == 3


@pytest.mark.parametrize(
    ("history", "command"),
    [
        ((FIRST,), AddLogKey(number=1, public=A)),
        ((FIRST, SECOND, LogKeyRetired(number=1)), RetireLogKey(number=1)),
        ((FIRST, SECOND, LogKeyRetired(number=1)), AddLogKey(number=1, public=A)),
    ],
)
def test_what_is_so_already_is_no_event(history: tuple[Fact, ...], command: OfLogKeys) -> None:
    then(keys(*history).when(command, ANA))


@pytest.mark.parametrize("command", [AddLogKey(number=1, public=B), AddLogKey(number=2, public=A)])
def test_a_number_is_of_one_key_and_a_key_has_one_number(command: AddLogKey) -> None:
    keys(FIRST).when(command, ANA).refused("already_exists")


@pytest.mark.parametrize("history", [(FIRST,), (FIRST, SECOND, LogKeyRetired(number=2))])
def test_the_last_key_that_signs_is_not_retired(history: tuple[Fact, ...]) -> None:
    keys(*history).when(RetireLogKey(number=1), ANA).refused("invalid_transition")


def test_a_key_that_is_not_there_is_not_retired() -> None:
    keys(FIRST).when(RetireLogKey(number=2), ANA).turned_away("not_found", what="log_key", id=2)


@pytest.mark.parametrize("command", [AddLogKey(number=1, public=A), RetireLogKey(number=1)])
def test_only_operators_do_it_and_only_in_the_project_that_is_theirs(command: OfLogKeys) -> None:
    keys(FIRST, SECOND).when(command, AGENT).refused("forbidden", needed=["operator"])
    given().when(command, ANA).turned_away("not_found", what="log_key")
