"""The golden bytes: one line of the ledger for every fact, as it was first released.

A change here is not a mistake in the test but a broken proof for everyone who holds one.
"""

from typing import Any
from uuid import UUID

from msgspec.structs import replace

from ledger.entry import Event, canonical
from ledger.events import (
    ApprovalCancelled,
    ApprovalDenied,
    ApprovalExpired,
    ApprovalGranted,
    ApprovalLapsed,
    ApprovalOutcomeUnknown,
    ApprovalPresented,
    ApprovalRequested,
    ApprovalRevoked,
    ApprovalSuperseded,
    ApprovalUseBegun,
    ApprovalUseCompleted,
    ApprovalWithdrawn,
    AttemptFailed,
    AttemptLost,
    CommandRefused,
    Fact,
    FactRecorded,
    HoldPlaced,
    HoldReleased,
    LateResultRefused,
    OutcomeReconciled,
    SessionActivated,
    SessionAnnotated,
    SessionCancelled,
    SessionCompleted,
    SessionExpired,
    SessionFailed,
    SessionMetadataChanged,
    SessionOpened,
    SessionTaskBound,
    SubjectErased,
    TaskCancelled,
    TaskClaimed,
    TaskCompleted,
    TaskDeadLettered,
    TaskExpired,
    TaskQueued,
    TaskRedriven,
    TaskResumed,
    TaskRetryScheduled,
    TaskSubmitted,
    TaskSuspended,
    VoteCast,
    VoteWithdrawn,
)
from ledger.log_events import LedgerAdopted, LogKeyAdded, LogKeyRetired
from ledger.values import Actor, AgentDescription, Artifact, Cost, Principal, Quorum, Replayed, Usage, Voter
from ledger.view_events import (
    EventSkipped,
    EventSkipRequested,
    ParkedRetried,
    ParkedRetryRequested,
    RebuildCancelled,
    RebuildCancelRequested,
    RebuildRequested,
    RollBackRequested,
    VerificationRequested,
    ViewRequestFailed,
    ViewRolledBack,
    ViewSwitched,
    ViewVerified,
)

NAMED = UUID("0199a7c2-5d4e-7000-8000-0123456789ab")
AGENT = Actor(
    issuer="https://id.example/realms/main",
    sub="9f0c",
    kind="agent",
    assurance="authenticated",
    roles=("agent",),
    client="finance-bot",
)
SEALED = {"$sealed": {"subject": "a" * 32, "key": 1, "nonce": "AAAAAAAAAAAAAAAA", "box": "AAAA"}}
DIGEST = "sha256:" + "0" * 64
OPERATOR = Principal("i", "ana")
REPLAYED = Replayed(code_version="1+a", heads_digest=DIGEST, digest=DIGEST, rows=7)


def event_of(data: Fact, **fields: Any) -> Event[Any]:
    """An event with everything fixed but what is given."""
    told: dict[str, Any] = {
        "v": 1,
        "project": "demo",
        "ledger": UUID("0199a7b0-0000-7000-8000-000000000001"),
        "event_id": UUID("0199a7c3-0000-7000-8000-000000000002"),
        "stream_type": data.stream_type,
        "stream_id": NAMED,
        "stream_version": 1,
        "type": type(data).__name__,
        "schema_version": 1,
        "occurred_at": "2026-11-21T09:00:00.000000Z",
        "recorded_at": "2026-11-21T09:00:00.001234Z",
        "actor": AGENT,
        "command_id": "0199a7c2-0000-7000-8000-000000000003",
        "correlation_id": str(NAMED),
        "data": data,
    }
    return Event(**told | fields)


# The middle of a line, common to all, stands once.

HEAD = (
    '{"actor":{"assurance":"authenticated","client":"finance-bot","issuer":"https://id.example/realms/main",'
    '"kind":"agent","roles":["agent"],"sub":"9f0c"},"command_id":"0199a7c2-0000-7000-8000-000000000003",'
    '"correlation_id":"0199a7c2-5d4e-7000-8000-0123456789ab","data":'
)
TAIL = (
    ',"event_id":"0199a7c3-0000-7000-8000-000000000002","ledger":"0199a7b0-0000-7000-8000-000000000001",'
    '"occurred_at":"2026-11-21T09:00:00.000000Z","project":"demo","recorded_at":"2026-11-21T09:00:00.001234Z",'
    '"schema_version":1,"stream_id":"0199a7c2-5d4e-7000-8000-0123456789ab","stream_type":"%s","stream_version":1,'
    '"type":"%s","v":1}'
)


def spelled(text: str) -> str:
    """`text` with what would hide its shape written out."""
    return text.replace("<id>", str(NAMED)).replace("<sealed>", canonical(SEALED).decode()).replace("<digest>", DIGEST)


GOLDEN: list[tuple[Fact, str, str]] = [
    (
        SessionOpened(agent_role="finance", expires_at="2026-11-28T09:00:00.000000Z"),
        '{"agent_role":"finance","expires_at":"2026-11-28T09:00:00.000000Z"}',
        "7ae9fa014392cc17",
    ),
    (
        SessionOpened(
            agent_role="Prüfer \N{SNOWMAN}",
            expires_at="2026-11-28T09:00:00.000000Z",
            task_id="T-1",
            metadata={"z": 1, "a": [1.5, None, True, {"é": SEALED}], "": '\n"\\/\x00'},
            labels={"b": "2", "a": "1"},
            parent_session_id=NAMED,
            agent=AgentDescription(name="bot", model="m-1", policy_digest="sha256:" + "0" * 64),
        ),
        (
            '{"agent":{"model":"m-1","name":"bot","policy_digest":"sha256:' + "0" * 64 + '"},'
            '"agent_role":"Prüfer \N{SNOWMAN}","expires_at":"2026-11-28T09:00:00.000000Z","labels":{"a":"1","b":"2"},'
            '"metadata":{"":"\\n\\"\\\\/\\u0000","a":[1.5,null,true,{"é":{"$sealed":{"box":"AAAA","key":1,'
            '"nonce":"AAAAAAAAAAAAAAAA","subject":"' + "a" * 32 + '"}}}],"z":1},'
            '"parent_session_id":"0199a7c2-5d4e-7000-8000-0123456789ab","task_id":"T-1"}'
        ),
        "312d5801e9409f21",
    ),
    (SessionActivated(), "{}", "fd13594b8144979a"),
    (SessionCompleted(), "{}", "14560ff2208d325b"),
    (SessionFailed(reason="no seats"), '{"reason":"no seats"}', "4d9365184bc7416e"),
    (
        SessionExpired(deadline="2026-11-28T09:00:00.000000Z"),
        '{"deadline":"2026-11-28T09:00:00.000000Z"}',
        "029aca6158d4ee15",
    ),
    (
        SessionCancelled(reason=SEALED, cascade=True),
        '{"cascade":true,"reason":' + canonical(SEALED).decode() + "}",
        "b36fbe8bfa449f40",
    ),
    (SessionCancelled(), "{}", "b63367e4a7557b93"),
    (SessionTaskBound(task_id="T-2"), '{"task_id":"T-2"}', "81ae1cce87a6ad38"),
    (SessionTaskBound(), "{}", "1b4d8522573325d8"),
    (SessionMetadataChanged(metadata={}), '{"metadata":{}}', "1d591fdcda256a79"),
    (SessionAnnotated(text="seen"), '{"text":"seen"}', "eb536aa3c5fd1716"),
    (FactRecorded(kind="note"), '{"kind":"note"}', "d41a962bd7ee9210"),
    (
        FactRecorded(
            kind="model.called",
            task_id=NAMED,
            approval_id=NAMED,
            parent_record_id=NAMED,
            status="error",
            started_at="0001-01-01T00:00:00.000000Z",
            ended_at="9999-12-31T23:59:59.999999Z",
            body={"n": 9007199254740991, "f": 0.1, "e": 1e300},
            usage=Usage(model="m-1", input_tokens=0, cost=Cost("-0.10", "EUR")),
            artifacts=(Artifact(uri="s3://a", size_bytes=0),),
        ),
        (
            '{"approval_id":"0199a7c2-5d4e-7000-8000-0123456789ab","artifacts":[{"size_bytes":0,"uri":"s3://a"}],'
            '"body":{"e":1e300,"f":0.1,"n":9007199254740991},"ended_at":"9999-12-31T23:59:59.999999Z",'
            '"kind":"model.called","parent_record_id":"0199a7c2-5d4e-7000-8000-0123456789ab",'
            '"started_at":"0001-01-01T00:00:00.000000Z","status":"error","task_id":"0199a7c2-5d4e-7000-8000-0123456789ab",'
            '"usage":{"cost":{"amount":"-0.10","currency":"EUR"},"input_tokens":0,"model":"m-1"}}'
        ),
        "8e7cc69688e5e3a1",
    ),
    (
        CommandRefused(
            command_type="ChangeSession",
            status=422,
            code="invalid_transition",
            params={"id": str(NAMED), "allowed": ["active"]},
            attempted={"status": "completed"},
            target=NAMED,
        ),
        (
            '{"attempted":{"status":"completed"},"code":"invalid_transition","command_type":"ChangeSession",'
            '"params":{"allowed":["active"],"id":"0199a7c2-5d4e-7000-8000-0123456789ab"},"status":422,'
            '"target":"0199a7c2-5d4e-7000-8000-0123456789ab"}'
        ),
        "913d1438796e8a9d",
    ),
    (
        TaskSubmitted(kind="mail.send", run_at="2026-11-21T09:00:00.000000Z"),
        '{"kind":"mail.send","run_at":"2026-11-21T09:00:00.000000Z"}',
        "7fed4330d842ad2a",
    ),
    (
        TaskSubmitted(
            kind="mail.send",
            run_at="2026-11-21T09:00:00.000000Z",
            payload={"to": SEALED, "n": 1},
            priority=0,
            max_attempts=1,
            backoff_seconds=0,
            deadline_at="2026-11-21T10:00:00.000000Z",
        ),
        spelled(
            '{"backoff_seconds":0,"deadline_at":"2026-11-21T10:00:00.000000Z","kind":"mail.send",'
            '"max_attempts":1,"payload":{"n":1,"to":<sealed>},"priority":0,'
            '"run_at":"2026-11-21T09:00:00.000000Z"}'
        ),
        "1adfcf136cdd0621",
    ),
    (TaskQueued(), "{}", "bd658f704584d2f9"),
    (
        TaskClaimed(attempt=1, worker="w-1", lease_id=NAMED, lease_until="2026-11-21T09:01:00.000000Z"),
        spelled('{"attempt":1,"lease_id":"<id>","lease_until":"2026-11-21T09:01:00.000000Z","worker":"w-1"}'),
        "c2a96cf99876afb6",
    ),
    (TaskCompleted(lease_id=NAMED), spelled('{"lease_id":"<id>"}'), "e41c05cfcdee2eb7"),
    (
        TaskCompleted(lease_id=NAMED, result=[1, SEALED], is_error=True),
        spelled('{"is_error":true,"lease_id":"<id>","result":[1,<sealed>]}'),
        "799fd919848cb900",
    ),
    (AttemptFailed(attempt=1, lease_id=NAMED), spelled('{"attempt":1,"lease_id":"<id>"}'), "b57042934e75a42b"),
    (
        AttemptFailed(attempt=2, lease_id=NAMED, error="no seats", retryable=False),
        spelled('{"attempt":2,"error":"no seats","lease_id":"<id>","retryable":false}'),
        "95b3f85197b9da43",
    ),
    (
        AttemptLost(attempt=1, lease_id=NAMED, lease_until="2026-11-21T09:01:00.000000Z"),
        spelled('{"attempt":1,"lease_id":"<id>","lease_until":"2026-11-21T09:01:00.000000Z"}'),
        "e668c10cb2f3a128",
    ),
    (
        TaskRetryScheduled(run_at="2026-11-21T09:00:02.125000Z"),
        '{"run_at":"2026-11-21T09:00:02.125000Z"}',
        "cf293866ccd7cb41",
    ),
    (TaskDeadLettered(attempts=3), '{"attempts":3}', "a7c96b6e987dfc2c"),
    (
        TaskSuspended(approval_id=NAMED, lease_id=NAMED),
        spelled('{"approval_id":"<id>","lease_id":"<id>"}'),
        "a9804e0a984f76cc",
    ),
    (TaskSuspended(approval_id=NAMED), spelled('{"approval_id":"<id>"}'), "b632105fa35f2396"),
    (
        TaskResumed(approval_id=NAMED, decision="approved"),
        spelled('{"approval_id":"<id>","decision":"approved"}'),
        "13786277018c48fb",
    ),
    (TaskCancelled(reason="no need"), '{"reason":"no need"}', "a56ff7414ef99577"),
    (
        TaskExpired(deadline="2026-11-21T10:00:00.000000Z"),
        '{"deadline":"2026-11-21T10:00:00.000000Z"}',
        "11fa1fa63e7ecddf",
    ),
    (TaskRedriven(reason="the gateway is back"), '{"reason":"the gateway is back"}', "262678be8d2b6a6b"),
    (
        LateResultRefused(lease_id=NAMED, outcome="completed", result={"n": 1}),
        spelled('{"lease_id":"<id>","outcome":"completed","result":{"n":1}}'),
        "d8eb7e30dde889cb",
    ),
    (
        ApprovalRequested(
            action={"tool": "refund"},
            requester=Principal("i", "a"),
            risk="medium",
            quorum=Quorum(),
            expires_at="2026-11-22T09:00:00.000000Z",
            valid_for_seconds=900,
            uses=1,
            outcome_within_seconds=300,
            action_digest=DIGEST,
            request_digest=DIGEST,
            salts={"action": "00", "request": "01"},
        ),
        spelled(
            '{"action":{"tool":"refund"},"action_digest":"<digest>",'
            '"expires_at":"2026-11-22T09:00:00.000000Z","outcome_within_seconds":300,"quorum":{"approve":1,'
            '"deny":1,"roles":["approver"]},"request_digest":"<digest>","requester":{"issuer":"i",'
            '"sub":"a"},"risk":"medium","salts":{"action":"00","request":"01"},"uses":1,'
            '"valid_for_seconds":900}'
        ),
        "0009a3adefad15f0",
    ),
    (
        ApprovalRequested(
            action={"tool": "refund", "arguments": {"iban": SEALED, "amount": 1.5}},
            requester=Principal("i", "a"),
            risk="critical",
            quorum=Quorum(approve=2, deny=2, roles=("finance", "legal")),
            expires_at="2026-11-22T09:00:00.000000Z",
            valid_for_seconds=60,
            uses=3,
            outcome_within_seconds=5,
            action_digest=DIGEST,
            request_digest=DIGEST,
            salts=SEALED,
            on_behalf_of=(Principal("i", "b"),),
            task_id=NAMED,
            call_key="call-1",
            summary=SEALED,
            supersedes=NAMED,
            edited_by=Principal("i", "c"),
            imported=True,
            root=NAMED,
            match="0f",
        ),
        spelled(
            '{"action":{"arguments":{"amount":1.5,"iban":<sealed>},"tool":"refund"},'
            '"action_digest":"<digest>","call_key":"call-1","edited_by":{"issuer":"i","sub":"c"},'
            '"expires_at":"2026-11-22T09:00:00.000000Z","imported":true,"match":"0f",'
            '"on_behalf_of":[{"issuer":"i","sub":"b"}],"outcome_within_seconds":5,"quorum":{"approve":2,'
            '"deny":2,"roles":["finance","legal"]},"request_digest":"<digest>","requester":{"issuer":"i",'
            '"sub":"a"},"risk":"critical","root":"<id>","salts":<sealed>,"summary":<sealed>,'
            '"supersedes":"<id>","task_id":"<id>","uses":3,"valid_for_seconds":60}'
        ),
        "14819253acc93534",
    ),
    (ApprovalPresented(channel="console"), '{"channel":"console"}', "2204667e9e46507b"),
    (
        VoteCast(verdict="approve", digest_seen=DIGEST),
        spelled('{"digest_seen":"<digest>","verdict":"approve"}'),
        "a4ef9accc8c7d66b",
    ),
    (
        VoteCast(verdict="deny", reason=SEALED, voter=Voter(issuer="i", sub="b", evidence=NAMED)),
        spelled('{"reason":<sealed>,"verdict":"deny","voter":{"evidence":"<id>","issuer":"i","sub":"b"}}'),
        "f0e86a05825184c7",
    ),
    (VoteWithdrawn(), "{}", "ec19f324ba6597f7"),
    (
        ApprovalGranted(approved_until="2026-11-21T09:15:00.000000Z"),
        '{"approved_until":"2026-11-21T09:15:00.000000Z"}',
        "a9328a331d29394e",
    ),
    (ApprovalDenied(), "{}", "8a7d61e6aed6fd82"),
    (
        ApprovalExpired(deadline="2026-11-22T09:00:00.000000Z"),
        '{"deadline":"2026-11-22T09:00:00.000000Z"}',
        "191226ed6c87d794",
    ),
    (ApprovalWithdrawn(reason="done by hand"), '{"reason":"done by hand"}', "a84d869fac63c170"),
    (ApprovalCancelled(cause="session_ended"), '{"cause":"session_ended"}', "2689d109102d0331"),
    (
        ApprovalCancelled(cause="operator", reason=SEALED),
        spelled('{"cause":"operator","reason":<sealed>}'),
        "2adf842d204ad7d5",
    ),
    (ApprovalSuperseded(by=NAMED), spelled('{"by":"<id>"}'), "a9f9fc865dc6695b"),
    (
        ApprovalUseBegun(execution_id=NAMED, outcome_by="2026-11-21T09:05:00.000000Z"),
        spelled('{"execution_id":"<id>","outcome_by":"2026-11-21T09:05:00.000000Z"}'),
        "c93d05c70fe7c32e",
    ),
    (
        ApprovalUseBegun(execution_id=NAMED, outcome_by="2026-11-21T09:05:00.000000Z", audience="https://pay.example"),
        spelled('{"audience":"https://pay.example","execution_id":"<id>","outcome_by":"2026-11-21T09:05:00.000000Z"}'),
        "c84e5b263b76cd82",
    ),
    (
        ApprovalUseCompleted(execution_id=NAMED, outcome="ok", result=SEALED),
        spelled('{"execution_id":"<id>","outcome":"ok","result":<sealed>}'),
        "bd2026b08d6aafb8",
    ),
    (
        ApprovalOutcomeUnknown(execution_id=NAMED, deadline="2026-11-21T09:05:00.000000Z"),
        spelled('{"deadline":"2026-11-21T09:05:00.000000Z","execution_id":"<id>"}'),
        "c8a167527b666929",
    ),
    (
        OutcomeReconciled(execution_id=NAMED, outcome="failed"),
        spelled('{"execution_id":"<id>","outcome":"failed"}'),
        "b088d1d70fd19f8b",
    ),
    (ApprovalRevoked(reason="wrong account"), '{"reason":"wrong account"}', "021fe9876575dcdc"),
    (
        ApprovalLapsed(approved_until="2026-11-21T09:15:00.000000Z"),
        '{"approved_until":"2026-11-21T09:15:00.000000Z"}',
        "c379c56d3fdb47a8",
    ),
    (
        HoldPlaced(subject="a" * 32, reason="case 7"),
        '{"reason":"case 7","subject":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}',
        "aa8af27013d3b1d5",
    ),
    (
        HoldPlaced(subject="a" * 32, reason="case 7", until="2026-11-28T09:00:00.000000Z"),
        '{"reason":"case 7","subject":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","until":"2026-11-28T09:00:00.000000Z"}',
        "4a1b47d2e6c8a9cf",
    ),
    (
        HoldReleased(subject="a" * 32, reason="closed"),
        '{"reason":"closed","subject":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}',
        "7645c4be3e2e94cf",
    ),
    (
        SubjectErased(subject="a" * 32, ground="she asked", through=2),
        '{"ground":"she asked","subject":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa","through":2}',
        "34aba822e2747c82",
    ),
    (RebuildRequested(view="audit"), '{"view":"audit"}', "dd1cd1e18cf092fc"),
    (RebuildCancelRequested(view="audit", request=1), '{"request":1,"view":"audit"}', "e0d8c71036bb83ba"),
    (RollBackRequested(view="audit"), '{"view":"audit"}', "71818fc600a37764"),
    (VerificationRequested(view="audit"), '{"view":"audit"}', "290f02b10a09009b"),
    (VerificationRequested(view="audit", project="demo"), '{"project":"demo","view":"audit"}', "01649e9df5a160cf"),
    (ParkedRetryRequested(view="audit"), '{"view":"audit"}', "6f515173df174827"),
    (ParkedRetryRequested(view="audit", project="demo"), '{"project":"demo","view":"audit"}', "72bb39c2ac905da5"),
    (
        EventSkipRequested(view="audit", project="demo", position=7),
        '{"position":7,"project":"demo","view":"audit"}',
        "a7d54d407c140818",
    ),
    (
        ViewSwitched(view="audit", request=1, asked_by=OPERATOR, replayed=REPLAYED),
        spelled(
            '{"asked_by":{"issuer":"i","sub":"ana"},"replayed":{"code_version":"1+a","digest":"<digest>",'
            '"heads_digest":"<digest>","rows":7},"request":1,"view":"audit"}'
        ),
        "6454f53b598cb55f",
    ),
    (
        RebuildCancelled(view="audit", request=1, asked_by=OPERATOR, cancelled_by=Principal("i", "bo")),
        '{"asked_by":{"issuer":"i","sub":"ana"},"cancelled_by":{"issuer":"i","sub":"bo"},"request":1,"view":"audit"}',
        "f4c2404a95adbaff",
    ),
    (
        ViewRolledBack(view="audit", request=1, asked_by=OPERATOR),
        '{"asked_by":{"issuer":"i","sub":"ana"},"request":1,"view":"audit"}',
        "96fd9eb35b823165",
    ),
    (
        ViewVerified(view="audit", request=1, asked_by=OPERATOR, holds=True, replayed=REPLAYED),
        spelled(
            '{"asked_by":{"issuer":"i","sub":"ana"},"holds":true,"replayed":{"code_version":"1+a","digest":"<digest>",'
            '"heads_digest":"<digest>","rows":7},"request":1,"view":"audit"}'
        ),
        "cff470a27ac323ad",
    ),
    (
        ViewVerified(
            view="audit",
            request=1,
            asked_by=OPERATOR,
            holds=False,
            project="demo",
            replayed=replace(REPLAYED, projects=1, drifted=2, drifted_projects=("demo",)),
        ),
        spelled(
            '{"asked_by":{"issuer":"i","sub":"ana"},"holds":false,"project":"demo","replayed":{"code_version":"1+a",'
            '"digest":"<digest>","drifted":2,"drifted_projects":["demo"],"heads_digest":"<digest>","projects":1,'
            '"rows":7},"request":1,"view":"audit"}'
        ),
        "0b7caf20fe3da5f2",
    ),
    (
        ParkedRetried(view="audit", request=1, asked_by=OPERATOR),
        '{"asked_by":{"issuer":"i","sub":"ana"},"request":1,"view":"audit"}',
        "7c6276cbe8c8ffb3",
    ),
    (
        EventSkipped(view="audit", request=1, asked_by=OPERATOR, project="demo", position=7),
        '{"asked_by":{"issuer":"i","sub":"ana"},"position":7,"project":"demo","request":1,"view":"audit"}',
        "357f16adc5ec4482",
    ),
    (
        ViewRequestFailed(view="audit", request=1, asked_by=OPERATOR, asked="skip", because="not parked"),
        '{"asked":"skip","asked_by":{"issuer":"i","sub":"ana"},"because":"not parked","request":1,"view":"audit"}',
        "94f1902f1c2a2c9c",
    ),
    (
        LogKeyAdded(number=1, public="0a" * 32),
        spelled('{"number":1,"public":"' + "0a" * 32 + '"}'),
        "b554bce622ee1b52",
    ),
    (LogKeyRetired(number=1), '{"number":1}', "56f12ba320c18b6e"),
    (
        LedgerAdopted(ledger=NAMED, adopted=NAMED, checkpoint="a log\n"),
        spelled('{"adopted":"<id>","checkpoint":"a log\\n","ledger":"<id>"}'),
        "504fa2f48c5015d9",
    ),
]
