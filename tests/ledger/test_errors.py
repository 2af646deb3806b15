"""The one table of errors: closed, consistent, and able to say again tomorrow what it said today."""

import re
import string
from typing import Any

import msgspec
import pytest

from ledger.entry import canonical
from ledger.errors import ERRORS, MalformedRequest, MunimentError, NumberOutOfRange

# The codes of SPEC section 5 that this release can answer with, and their statuses. Frozen: a code on the
# wire, or in a recorded refusal, never changes its name or its status.
FROZEN = {
    "malformed_request": 400,
    "number_out_of_range": 400,
    "unauthenticated": 401,
    "forbidden": 403,
    "unknown_project": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "already_exists": 409,
    "precondition_failed": 412,
    "body_too_large": 413,
    "unsupported_media_type": 415,
    "invalid_transition": 422,
    "idempotency_key_reused": 422,
    "session_full": 422,
    "unknown_parent": 422,
    "rate_limited": 429,
    "store_unavailable": 503,
    "view_behind": 503,
    "upgrade_required": 503,
    "clock_skew": 503,
}
WITH_PARAMS = {code: cls for code, cls in ERRORS.items() if not issubclass(cls, MalformedRequest)}
each = pytest.mark.parametrize("code", sorted(WITH_PARAMS))


def params_of(cls: type[MunimentError]) -> dict[str, Any]:
    """A value for each name in the template of this error."""
    names = [name for _, name, _, _ in string.Formatter().parse(cls.template) if name]
    return {name: ["a", "b"] if name in ("allowed", "needed", "roles") else f"<{name}>" for name in names}


def test_no_code_changes_its_status_and_none_is_lost() -> None:
    assert {code: cls.status for code, cls in ERRORS.items() if code in FROZEN} == FROZEN


def test_a_code_is_a_lower_case_word_and_belongs_to_one_class() -> None:
    classes = [MunimentError]
    for cls in classes:
        classes += cls.__subclasses__()
    here = [cls for cls in classes[1:] if cls.__module__ == "ledger.errors"]  # a client has one of its own
    assert len(ERRORS) == len(here), "two classes have one code"
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in ERRORS)
    assert all(cls.title and not cls.title.endswith(".") for cls in ERRORS.values())
    assert len({cls.title for cls in ERRORS.values()}) == len(ERRORS)


def test_exactly_the_refusals_of_the_contract_are_recorded() -> None:
    recorded = {code for code, cls in WITH_PARAMS.items() if cls(**params_of(cls)).recorded}
    by_status = {code for code, cls in ERRORS.items() if cls.status in (403, 409, 410, 422)}
    assert recorded == by_status - {"idempotency_key_reused", "unknown_project"}


def test_a_client_is_told_when_to_try_again_whenever_trying_again_may_help() -> None:
    assert {code for code, cls in ERRORS.items() if cls.retry_after_seconds} == {
        code for code, cls in ERRORS.items() if cls.status in (429, 503)
    }


@each
def test_a_detail_says_every_value_in_whole_sentences(code: str) -> None:
    cls = WITH_PARAMS[code]
    params = params_of(cls)
    error = cls(**params)
    assert error.detail == str(error)
    assert "{" not in error.detail
    assert error.detail.endswith(".")
    for value in params.values():
        assert (", ".join(value) if isinstance(value, list) else value) in error.detail


@each
def test_a_detail_is_the_same_after_its_params_were_stored(code: str) -> None:
    """A recorded refusal is said again, word for word, from its code and its params as JSON."""
    error = WITH_PARAMS[code](**params_of(WITH_PARAMS[code]))
    stored = canonical(msgspec.to_builtins(error.params))
    assert ERRORS[code](**msgspec.json.decode(stored)).detail == error.detail


def test_an_empty_list_reads_as_nothing() -> None:
    error = ERRORS["invalid_transition"](command="ChangeSession", id="s", current_state="failed", allowed=())
    assert error.detail == "ChangeSession is not possible while s is failed. From there it can become: nothing."


def test_a_value_with_braces_is_no_template() -> None:
    assert "{id} {0.__class__}" in ERRORS["not_found"](what="session", id="{id} {0.__class__}").detail


@pytest.mark.parametrize("cls", [MalformedRequest, NumberOutOfRange])
def test_a_malformed_request_names_three_things_and_holds_them_all(cls: type[MalformedRequest]) -> None:
    error = cls([{"pointer": f"/{n}" if n else "", "detail": f"wrong {n}"} for n in range(5)])
    assert len(error.errors) == 5
    assert "the body: wrong 0; /1: wrong 1; /2: wrong 2. Mend" in error.detail
    assert not error.recorded
    assert issubclass(NumberOutOfRange, MalformedRequest), "who handles the one handles the other"
