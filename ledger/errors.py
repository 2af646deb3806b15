"""The one table of everything that can go wrong for a caller.

One class is one code: its HTTP status, its title, and the sentence that says what happened and what
to do. Nothing else in this package raises to a caller. An error is a pure function of its code and its
params, so a refusal recorded in the ledger can be said again years later, word for word
(`ERRORS[code](**params)`). Nothing here may hold a stack trace, SQL, or a personal value.
"""

from typing import Any, ClassVar


class MunimentError(Exception):
    """What a caller is told: `code`, `status`, `title`, and `detail` filled in from `params`."""

    code: ClassVar[str]
    status: ClassVar[int]
    title: ClassVar[str]
    template: ClassVar[str]
    retry_after_seconds: ClassVar[int | None] = None
    unrecordable: ClassVar[bool] = False

    def __init__(self, **params: Any) -> None:
        self.params = params
        super().__init__(self.detail)

    @property
    def detail(self) -> str:
        """What happened, with values, and what to do."""
        shown = {
            k: ", ".join(map(str, v)) or "nothing" if isinstance(v, list | tuple) else v for k, v in self.params.items()
        }
        return self.template.format_map(shown)

    @property
    def recorded(self) -> bool:
        """Whether the refusal is itself appended to the ledger (SPEC: 403, 409, 410 and 422 are)."""
        return self.status in (403, 409, 410, 422) and not self.unrecordable


# 400: the request cannot be read. Never recorded; the command id stays free.


class MalformedRequest(MunimentError):
    """`errors`: a list of {pointer, detail}, one for each thing that is wrong."""

    code, status, title = "malformed_request", 400, "The request could not be read"
    template = "Nothing was done: {summary}. Mend what `errors` names and send it again."

    def __init__(self, errors: list[dict[str, str]]) -> None:
        self.errors = errors
        summary = "; ".join(f"{e['pointer'] or 'the body'}: {e['detail']}" for e in errors[:3])
        super().__init__(summary=summary)


class NumberOutOfRange(MalformedRequest):
    code, title = "number_out_of_range", "A number does not survive JSON"


# 401, 403, 404, 405: who you are, what you may, what there is.


class Unauthenticated(MunimentError):
    code, status, title = "unauthenticated", 401, "No valid credential"
    template = "{why}. Send a valid token: `Authorization: Bearer <token>`."


class Forbidden(MunimentError):
    code, status, title = "forbidden", 403, "You may not do this"
    template = "{action} is for: {needed}. This token has the roles: {roles}. Ask with one that may."


class UnknownProject(MunimentError):
    code, status, title = "unknown_project", 403, "This project has no ledger"
    template = (
        "The project {project} has no ledger here. An operator creates one with `muniment project create {project}`."
    )
    unrecordable = True  # there is no ledger to record it in


class SelfApprovalForbidden(MunimentError):
    code, status, title = "self_approval_forbidden", 403, "Nobody approves what is asked for them"
    template = "{sub} asked for {id}, or it was asked on their behalf. Somebody else has to decide it."


class NotEligible(MunimentError):
    code, status, title = "not_eligible", 403, "You may not vote on this"
    template = "{why}. A vote on {id} is for a person with one of the roles {roles}."


class NotFound(MunimentError):
    code, status, title = "not_found", 404, "There is no such thing here"
    template = "There is no {what} {id} in this project. Check the id, and that the token is for the right project."


class MethodNotAllowed(MunimentError):
    code, status, title = "method_not_allowed", 405, "This address does not take that method"
    template = "{method} is not possible here. Possible: {allowed}."


# 409, 410, 412: it was understood, and the present state forbids it.


class AlreadyExists(MunimentError):
    code, status, title = "already_exists", 409, "That id is taken"
    template = "The {what} {id} already exists. Choose another id, or leave it out and one is made."


class LeaseLost(MunimentError):
    code, status, title = "lease_lost", 409, "The task is not leased to you any more"
    template = "The lease {lease_id} of task {id} is not the one in force. What you brought has no effect; claim again."


class DigestMismatch(MunimentError):
    code, status, title = "digest_mismatch", 409, "That is not what was asked about"
    template = "For {id} the {what} is {expected}, and you sent {sent}. Read the approval again, and look at it."


class AlreadyVoted(MunimentError):
    code, status, title = "already_voted", 409, "You have voted the other way"
    template = "Your vote on {id} is: {verdict}. Withdraw it first, while nothing is decided."


class ExecutionStarted(MunimentError):
    code, status, title = "execution_started", 409, "It is being run"
    template = "The execution {execution_id} of {id} has begun, and nobody has said what came of it."


class UsesExhausted(MunimentError):
    code, status, title = "uses_exhausted", 409, "It was used already"
    template = "{id} was approved for {uses} use(s), and all were begun. Ask again."


class NotUsable(MunimentError):
    code, status, title = "not_usable", 409, "It can never be used"
    template = "{id} is imported history. Ask again, here, to run such an action."


class Held(MunimentError):
    code, status, title = "held", 409, "It is on hold"
    template = (
        "What is recorded of the subject {subject} is under the hold {hold_id}, so nothing of it is erased. Release "
        "the hold first, or wait for its end."
    )


class RequestExpired(MunimentError):
    code, status, title = "approval_expired", 410, "It is too late for that"
    template = "The time of {id} ended at {deadline}. A timeout is never a yes: ask again."


class PreconditionFailed(MunimentError):
    code, status, title = "precondition_failed", 412, "It has changed since you read it"
    template = "You expected version {expected} of {id}, and it is at version {current}. Read it again, then decide."


# 413, 415, 422, 429


class BodyTooLarge(MunimentError):
    code, status, title = "body_too_large", 413, "The body is too large"
    template = "The body is over {limit_bytes} bytes. Send less at once, or keep it elsewhere and record its digest."


class UnsupportedMediaType(MunimentError):
    code, status, title = "unsupported_media_type", 415, "Only JSON is read here"
    template = "The body is {media_type}. Send `Content-Type: application/json`, in UTF-8, without a Content-Encoding."


class InvalidTransition(MunimentError):
    code, status, title = "invalid_transition", 422, "Not possible in its present state"
    template = "{command} is not possible while {id} is {current_state}. From there it can become: {allowed}."


class IdempotencyKeyReused(MunimentError):
    code, status, title = "idempotency_key_reused", 422, "That command id was used for another command"
    template = (
        "The command id {command_id} belongs to a different command that you sent before. A new command needs a new id."
    )
    unrecordable = True  # recording it would need the very id that is taken


class SessionFull(MunimentError):
    code, status, title = "session_full", 422, "The session has too many open items"
    template = "The session {id} already has {limit} open items. Finish or cancel some first."


class OpenWork(MunimentError):
    code, status, title = "open_work", 422, "The session has open work"
    template = "The session {id} has {count} open tasks or approvals. End them, or use `force` with a `reason`."


class UnknownParent(MunimentError):
    code, status, title = "unknown_parent", 422, "The parent does not exist"
    template = "There is no {what} {id} in this project to be the parent. Create it first, or check the id."


class RateLimited(MunimentError):
    code, status, title = "rate_limited", 429, "Too many refused commands"
    template = (
        "{limit} commands of yours were refused within a minute. Mend what they say first; this one was not recorded."
    )
    retry_after_seconds = 60


# 500: ours to mend. It is in the log, and never recorded.


class InternalError(MunimentError):
    code, status, title = "internal_error", 500, "Something is broken here"
    template = "{why}. It is in the server's log: tell its operator. A command may be sent again with the same id."


# 503: not now; the same command with the same id may be sent again, and happens once.


class StoreUnavailable(MunimentError):
    code, status, title = "store_unavailable", 503, "The ledger cannot be written or read just now"
    template = "{why}. Send the same command again with the same id: it cannot happen twice."
    retry_after_seconds = 1


class ViewBehind(MunimentError):
    code, status, title = "view_behind", 503, "The view has not caught up yet"
    template = "The view {view} is at position {position}; you asked for at least {wanted}. Ask again shortly."
    retry_after_seconds = 1


class UpgradeRequired(MunimentError):
    code, status, title = "upgrade_required", 503, "Written by a newer Muniment"
    template = (
        "This release cannot read events of type {type} in schema version {schema_version}. Upgrade this process."
    )
    retry_after_seconds = 60


class ClockSkew(MunimentError):
    code, status, title = "clock_skew", 503, "This server's clock is wrong"
    template = (
        "This server's clock is {offset_seconds} s from its database's; 2 s are allowed. Its operator must mend it."
    )
    retry_after_seconds = 30


def _leaves(cls: type[MunimentError]) -> list[type[MunimentError]]:
    return [c for sub in cls.__subclasses__() for c in (sub, *_leaves(sub))]


ERRORS: dict[str, type[MunimentError]] = {cls.code: cls for cls in _leaves(MunimentError)}
