-- What a ledger and a view of it have, in the order of streams or of positions, from `start` on; compared as it comes.
-- Times are read as the text that events have them in, whatever they are.

-- name: streams
-- The events of these types that the view has taken in, stream by stream.
SELECT e.stream_id, e.position, e.type, e.entry, p.data
FROM ledger.events AS e
LEFT JOIN ledger.payloads AS p ON p.ledger_id = e.ledger_id AND p.position = e.position
WHERE e.ledger_id = %(ledger_id)s AND e.stream_id >= %(start)s AND e.stream_id <= %(last)s AND e.type = ANY(%(types)s)
AND e.position <= %(reached)s
ORDER BY e.stream_id, e.stream_version

-- name: events
-- All events up to a position, each by itself.
SELECT e.position, e.position, e.type, e.entry, p.data
FROM ledger.events AS e
LEFT JOIN ledger.payloads AS p ON p.ledger_id = e.ledger_id AND p.position = e.position
WHERE e.ledger_id = %(ledger_id)s AND e.position >= %(start)s AND e.position <= %(position)s
ORDER BY e.position

-- name: sessions
SELECT
    session_id, position,
    to_char(opened_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS opened_at,
    to_char(expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS expires_at,
    state, state_since, agent_role, session
FROM sessions.sessions
WHERE ledger_id = %(ledger_id)s AND session_id >= %(start)s AND NOT position BETWEEN %(position)s::bigint + 1 AND %(reached)s
ORDER BY session_id

-- name: labels
SELECT
    session_id, key, value,
    to_char(opened_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS opened_at,
    position, state, agent_role
FROM sessions.labels
WHERE ledger_id = %(ledger_id)s AND session_id >= %(start)s AND NOT position BETWEEN %(position)s::bigint + 1 AND %(reached)s
ORDER BY session_id, key COLLATE "C", value COLLATE "C"

-- name: tasks
SELECT
    task_id, position,
    to_char(submitted_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS submitted_at,
    kind, state, state_since, session_id, worker, task
FROM tasks.tasks
WHERE ledger_id = %(ledger_id)s AND task_id >= %(start)s AND NOT position BETWEEN %(position)s::bigint + 1 AND %(reached)s
ORDER BY task_id

-- name: approvals
SELECT
    approval_id, position, state, state_since, session_id, task_id, tool, risk, roles, requester_issuer, requester_sub,
    to_char(expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS expires_at,
    to_char(due_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS due_at,
    approval
FROM approvals.approvals
WHERE ledger_id = %(ledger_id)s AND approval_id >= %(start)s AND NOT position BETWEEN %(position)s::bigint + 1 AND %(reached)s
ORDER BY approval_id

-- name: spans
SELECT stream_id, since, state, class, position, until
FROM view.spans
WHERE ledger_id = %(ledger_id)s AND stream_id >= %(start)s AND NOT position BETWEEN %(position)s::bigint + 1 AND %(reached)s
ORDER BY stream_id, since

-- name: segments
-- Segments as they are stored, but those that are wholly of what was taken in since; what they say of each event is
-- read out of them (slices.py).
SELECT
    first,
    ARRAY(
        SELECT to_char(t.recorded_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
        FROM unnest(recorded_ats) WITH ORDINALITY AS t (recorded_at, place) ORDER BY place
    ) AS recorded_ats,
    tsvectorsend(terms) AS terms
FROM view.segments
WHERE ledger_id = %(ledger_id)s AND first > %(start)s::bigint - %(places_max)s
AND (first <= %(position)s OR first > %(reached)s::bigint - %(places_max)s)
ORDER BY first
