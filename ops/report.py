"""What a bundle of evidence says, as a page that reads like a story and stands alone: no network, no script.

Who did what, under whose authority, with which model and instructions; what was shown to whom, who said yes, what ran
and what came of it. All of it is told from the entries, each statement with the position it is from; whatever stands in
an entry is text here, and never markup.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import islice
from string import Template
from typing import Any, NamedTuple, cast

import msgspec

from ledger.checkpoint import Signed
from ledger.entry import FACTS, Event, whole
from ledger.epoch import Epoch
from ledger.evidence import Manifest
from ledger.personal import ERASED, SEALED
from ledger.verify import UNREADABLE, Read, Stated, Verdict

EVENTS_MAX = 5_000
"""So many are told; a browser bears no more. All are in the bundle."""
SHOWN_CHARACTERS = 600
"""What is longer is folded away."""


class Told(NamedTuple):
    """An event as it is told: decoded, and unsealed where it was."""

    position: int
    event: dict[str, Any]

    @property
    def data(self) -> dict[str, Any]:
        data: dict[str, Any] = self.event.get("data") or {}
        return data

    def reads_as(self, data: Any) -> bool:
        """Whether it is an event with such data. Whoever signs a log may write there what they like."""
        try:
            msgspec.convert(self.event, cast("Any", Event)[data])
        except (msgspec.ValidationError, RecursionError):
            return False
        return True

    @property
    def is_known(self) -> bool:
        """Whether it is a fact as Muniment records it: of these there is a story, all else is shown as it is."""
        fact = FACTS.get(str(self.event.get("type")))
        return fact is not None and fact.stream_type == self.event.get("stream_type") and self.reads_as(fact)


def report(manifest: Manifest, signed: Signed, vkey: str, events: Sequence[Told], epochs: Iterable[Epoch] = ()) -> str:
    """The page. `events` are the first that the bundle has, in order: no more than EVENTS_MAX."""
    complete = manifest.completeness
    readable = [told for told in events if told.reads_as(dict)]
    known = [told for told in readable if told.is_known]
    project = readable[0].event["project"] if readable else "unknown"
    missing = "".join(f"<br>{_text(one)}" for one in complete.missing)
    left = manifest.entries - len(events)
    return _page.substitute(
        title=_text(f"Evidence: {manifest.asked}"),
        subtitle=_text(
            f"Project {project}: {manifest.entries:,} events, recorded from {manifest.first_recorded_at} to "
            f"{manifest.last_recorded_at}"
        ),
        state=complete.state,
        state_said=complete.state.replace("_", " "),
        because=_text(f"{_begun(complete.because)}."),
        missing=missing,
        epochs="".join(f'<p class="state gap">{_text(_begun(str(one)))}.</p>' for one in epochs),
        people=_titled("Who acted", _people(readable)),
        sessions=_titled("In which sessions", map(_session, _streams(known, "session"))),
        approvals=_titled("What was asked, and who decided", _approvals(known)),
        events="\n".join(map(_line, events)),
        left_out=f"<p>{left:,} more events are in the bundle, and not told here.</p>" if left > 0 else "",
        rests="".join(_rests(manifest, signed)),
        vkey=_text(vkey),
    )


def report_of(manifest: Manifest, found: Verdict, read: Read) -> str:
    """The page, from a bundle that was verified, and found to be signed."""
    assert found.signed is not None
    positions = islice((at for first, last in manifest.runs for at in range(first, last + 1)), EVENTS_MAX)
    events = [Told(position, _event(read(f"entries/{position}.json"), read)) for position in positions]
    vkey = next(key for key, at in found.signed.by.items() if at is None)
    return report(manifest, found.signed, str(vkey), events, found.epochs)


def _event(entry: bytes, read: Read) -> dict[str, Any]:
    """The event of an entry; none where there is none in it."""
    try:
        beside = Stated.of(entry).data_sha256
        event: dict[str, Any] = msgspec.json.decode(whole(entry, read(f"payload/{beside}") if beside else None))
    except (*UNREADABLE, KeyError):
        return {}
    return event


_page = Template(files("ops").joinpath("report.html").read_text("utf-8"))


def _begun(sentence: str) -> str:
    return f"{sentence[:1].upper()}{sentence[1:]}"


def _titled(title: str, parts: Iterable[str]) -> str:
    text = "\n".join(parts)
    return f"<h2>{title}</h2>\n{text}" if text else ""


def _streams(events: Iterable[Told], kind: str) -> list[list[Told]]:
    streams: dict[str, list[Told]] = defaultdict(list)
    for told in events:
        if told.event["stream_type"] == kind:
            streams[told.event["stream_id"]].append(told)
    return list(streams.values())


# Who acted


def _people(events: Iterable[Told]) -> Iterator[str]:
    """Everyone once, as whoever let them in called them."""
    found: dict[str, list[int]] = defaultdict(list)
    for told in events:
        found[_actor(told.event["actor"])].append(told.position)
    rows = [
        f'<li>{actor}: {len(places):,} events, <a href="#p{places[0]}">from position {places[0]} on</a></li>'
        for actor, places in found.items()
    ]
    yield f"<ul>{''.join(rows)}</ul>"


def _session(stream: list[Told]) -> str:
    first = stream[0]
    agent = first.data.get("agent") or {}
    rows = [
        ("Opened by", _actor(first.event["actor"])),
        ("Opened", _at(first)),
        ("Role", _value(first.data.get("agent_role"))),
        ("Model", _value(" ".join(filter(None, (agent.get("provider"), agent.get("model")))))),
        ("Agent", _value(" ".join(filter(None, (agent.get("name"), agent.get("version")))))),
        *((name.replace("_", " ").capitalize(), _value(agent.get(name))) for name in DIGESTS),
        ("For the work", _value(first.data.get("task_id"))),
        ("Known elsewhere as", _value(first.event.get("external_id"))),
    ]
    said = "What it says of its model and instructions it says of itself." if agent else "It names no model."
    last = stream[-1]
    rows.append(("Last", f"{_text(_sentence(last))}, {_at(last)}"))
    name = f"Session <code>{_text(first.event['stream_id'])}</code>"
    return f'<h3>{name}</h3>{_table(rows)}<p class="note">{said}</p>'


DIGESTS = ("instructions_digest", "tools_digest", "policy_digest")


# What was asked


def _approvals(events: Sequence[Told]) -> Iterator[str]:
    records = {told.event["stream_id"]: told for told in events if told.event["stream_type"] == "record"}
    tasks = {stream[0].event["stream_id"]: stream for stream in _streams(events, "task")}
    for stream in _streams(events, "approval"):
        yield _approval(stream, tasks.get(stream[0].data.get("task_id") or "", []), records)


def _approval(stream: list[Told], task: list[Told], records: Mapping[str, Told]) -> str:
    asked = stream[0]
    data = asked.data
    action = data.get("action")
    tool = action.get("tool", "an action") if isinstance(action, dict) else "an action"
    quorum = data.get("quorum") or {}
    rows = [
        ("Asked by", _actor(asked.event["actor"])),
        ("Asked", _at(asked)),
        ("To run", _value(action)),
        ("Said of it", _value(data.get("summary"))),
        ("Because", _value(asked.event.get("reason"))),
        ("Risk", _value(data.get("risk"))),
        ("Needed", _value(f"{quorum.get('approve', 1)} of {', '.join(quorum.get('roles', ('approver',)))}")),
        ("In place of", _value(data.get("supersedes"))),
        ("Changed by", _value((data.get("edited_by") or {}).get("sub"))),
    ]
    if data.get("imported"):
        rows.append(("Imported", "It was brought from elsewhere, and could not be used here"))
    for told in stream[1:]:
        label = APPROVAL_ROWS.get(told.event["type"])
        if label is not None:
            rows.append((label, _approval_row(told, data, records)))
    rows += [("As a task", f"{_text(_sentence(told))}{_value(_came_out(told))} {_at(told)}") for told in task]
    return f"<h3>{_text(str(tool))}: <code>{_text(asked.event['stream_id'])}</code></h3>{_table(rows)}"


APPROVAL_ROWS = {
    "ApprovalPresented": "Shown to",
    "VoteCast": "Vote",
    "VoteWithdrawn": "Vote taken back",
    "ApprovalGranted": "Decided",
    "ApprovalDenied": "Decided",
    "ApprovalExpired": "Decided",
    "ApprovalWithdrawn": "Decided",
    "ApprovalCancelled": "Decided",
    "ApprovalSuperseded": "Decided",
    "ApprovalRevoked": "Taken back",
    "ApprovalLapsed": "Not used",
    "ApprovalUseBegun": "Ran",
    "ApprovalUseCompleted": "Came out",
    "ApprovalOutcomeUnknown": "Came out",
    "OutcomeReconciled": "Found later",
}


def _came_out(told: Told) -> Any:
    return told.data.get("result") if told.data.get("result") is not None else told.data.get("error")


def _approval_row(told: Told, asked: dict[str, Any], records: Mapping[str, Told]) -> str:
    data = told.data
    kind = told.event["type"]
    if kind == "VoteCast":
        voter = data.get("voter")
        who = _actor(voter | {"kind": "human", "assurance": "imported"} if voter else told.event["actor"])
        seen = data.get("digest_seen")
        saw = "" if not seen else ", of this very request" if seen == asked.get("request_digest") else ", of another"
        shown = records.get((voter or {}).get("evidence") or "")
        saw += f', by what was said at <a href="#p{shown.position}">position {shown.position}</a>' if shown else ""
        return f"<strong>{_text(str(data.get('verdict')))}</strong>{saw}, {who}{_because(data)}, {_at(told)}"
    if kind == "ApprovalPresented":
        return f"{_actor(told.event['actor'])}, in {_text(str(data.get('channel')))}, {_at(told)}"
    if kind in ("ApprovalUseCompleted", "OutcomeReconciled"):
        return f"<strong>{_text(str(data.get('outcome')))}</strong>{_value(data.get('result'))} {_at(told)}"
    return f"{_text(_sentence(told))}{_because(data)}, {_at(told)}"


def _because(data: dict[str, Any]) -> str:
    return f" ({_value(data['reason'])})" if data.get("reason") else ""


# What happened


def _line(told: Told) -> str:
    event = told.event
    if not told.reads_as(dict):
        return (
            f'<li id="p{told.position}"><span class="when">{told.position} · entries/{told.position}.json</span><br>'
            f"It is no event as Muniment records them.{_value(event, block=True)}</li>"
        )
    said = {name: value for name, value in told.data.items() if value not in (None, {}, [], "")}
    path = f"entries/{told.position}.json"
    # A message is read as one; all else is shown as it is.
    body = said.get("body")
    content = body.get("content") if isinstance(body, dict) else None
    shown = f"<pre>{_text(content)}</pre>" if isinstance(content, str) and content else ""
    if said and not shown:
        shown = _value(said, block=True)
    elif shown and body != {"content": content}:
        shown += f"<details><summary>all of it</summary>{_value(said, block=True)}</details>"
    reason = f"<p>{_value(event['reason'])}</p>" if event.get("reason") else ""
    return (
        f'<li id="p{told.position}">'
        f'<span class="when">{told.position} · {_text(event["recorded_at"])} · {path}</span><br>'
        f"<strong>{_name(event['actor'])}</strong> {_text(_sentence(told))}{reason}{shown}</li>"
    )


SENTENCES = {
    "SessionOpened": "opened a session, as {agent_role}",
    "SessionActivated": "started the session",
    "SessionCompleted": "completed the session",
    "SessionFailed": "gave the session up as failed",
    "SessionExpired": "let the session expire",
    "SessionCancelled": "cancelled the session",
    "SessionTaskBound": "said what work the session is for",
    "SessionMetadataChanged": "changed the session's metadata",
    "SessionAnnotated": "annotated the session",
    "FactRecorded": "recorded {kind}",
    "TaskSubmitted": "submitted a task, {kind}",
    "TaskQueued": "offered the task again",
    "TaskClaimed": "took the task, as {worker} (attempt {attempt})",
    "TaskCompleted": "completed the task",
    "AttemptFailed": "failed at the task (attempt {attempt})",
    "AttemptLost": "lost the task: nothing was heard of attempt {attempt}",
    "TaskSuspended": "put the task off until approval {approval_id} is decided",
    "TaskResumed": "took the task up again: {decision}",
    "ApprovalRequested": "asked for approval (risk {risk})",
    "ApprovalPresented": "was shown the request, in {channel}",
    "VoteCast": "voted to {verdict}",
    "VoteWithdrawn": "took a vote back",
    "ApprovalGranted": "approved until {approved_until}",
    "ApprovalDenied": "denied",
    "ApprovalExpired": "expired undecided",
    "ApprovalWithdrawn": "withdrawn",
    "ApprovalCancelled": "cancelled ({cause})",
    "ApprovalSuperseded": "replaced by {by}",
    "ApprovalUseBegun": "began to run it (execution {execution_id})",
    "ApprovalUseCompleted": "said what came of it: {outcome}",
    "ApprovalOutcomeUnknown": "unknown: nothing was said of execution {execution_id} in time",
    "OutcomeReconciled": "said later what came of it: {outcome}",
    "ApprovalRevoked": "revoked",
    "ApprovalLapsed": "lapsed unused",
    "LedgerAdopted": "went on with the ledger as it is here, in place of {adopted}, whose history was rolled back",
    "CommandRefused": "was refused {command_type}: {code}",
    "LateResultRefused": "brought a result too late",
}


class _Fields(dict[str, Any]):
    def __missing__(self, name: str) -> str:
        return "?"


def _sentence(told: Told) -> str:
    kind = str(told.event["type"])
    sentence = SENTENCES.get(kind)
    if sentence is None or not told.is_known:
        return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", kind).lower()
    about = str(told.data.get("kind"))
    if kind == "FactRecorded" and about.startswith("message."):
        return f"recorded what the {about.removeprefix('message.')} said"
    return sentence.format_map(_Fields(told.data))


# What it rests on


def _rests(manifest: Manifest, signed: Signed) -> Iterator[str]:
    yield _row("Log", f"<code>{_text(manifest.origin)}</code>")
    yield _row("Checkpoint", f"{manifest.size:,} entries, root <code>{signed.checkpoint.root.hex()}</code>")
    for key, at in signed.by.items():
        if at is None:
            yield _row("Signed by", f"<code>{_text(str(key))}</code>")
        else:
            yield _row("Seen by", f"{_text(key.name)}, {at:%Y-%m-%d %H:%M:%S} UTC")
    runs = ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in manifest.runs[:100])
    yield _row("Positions", _text(runs + (" …" if len(manifest.runs) > 100 else "")))


# Values


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return f"<dl>{''.join(_row(name, value) for name, value in rows if value)}</dl>"


def _row(name: str, value: str) -> str:
    return f"<dt>{_text(name)}</dt><dd>{value}</dd>"


def _at(told: Told) -> str:
    return f'<a class="when" href="#p{told.position}">{_text(told.event["recorded_at"])}, position {told.position}</a>'


def _actor(actor: dict[str, Any]) -> str:
    """Who it was, under whose authority, as whoever let them in called them."""
    name = f"<strong>{_name(actor)}</strong>"
    if actor.get("kind") == "system":
        return f"{name} itself (what time or another event brings with it)"
    known = ", ".join(filter(None, (actor.get("kind"), actor.get("issuer"), *actor.get("roles", ()))))
    if actor.get("assurance") != "authenticated":
        known += f", {actor.get('assurance')} only"
    chain = [str(one.get("sub")) for one in actor.get("on_behalf_of", ())]
    return f"{name} ({_text(known)})" + (f" on behalf of {_text(', '.join(chain))}" if chain else "")


def _name(actor: dict[str, Any]) -> str:
    return "Muniment" if actor.get("kind") == "system" else _text(str(actor["sub"]))


def _value(value: Any, *, block: bool = False) -> str:
    if value in (None, "", [], {}):
        return ""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, dict) and (SEALED in value or ERASED in value):
        return _text(_readable(value))
    try:
        text = json.dumps(_readable(value), ensure_ascii=False, indent=2)
    except (RecursionError, ValueError):  # a number may have more digits than are ever written
        return "(more than can be shown)"
    if block and len(text) > SHOWN_CHARACTERS:
        return f"<details><summary>what it says ({len(text):,} characters)</summary><pre>{_text(text)}</pre></details>"
    return f"<pre>{_text(text)}</pre>"


def _readable(value: Any) -> Any:
    """With what is sealed named as such."""
    if isinstance(value, dict):
        if SEALED in value:
            box = value[SEALED]
            subject = str(box.get("subject", ""))[:8] if isinstance(box, dict) else ""
            return f"[sealed: of person {subject}…]"
        if ERASED in value:
            return "[erased]"
        return {name: _readable(item) for name, item in value.items()}
    return [_readable(item) for item in value] if isinstance(value, list) else value


def _text(text: str) -> str:
    return escape(visible(text))


def visible(text: str) -> str:
    """Without control characters, and those that cannot be seen or turn the order of others: they could make a page, or
    a terminal, say what an entry does not."""
    return _UNSEEN.sub("\ufffd", text)


_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
