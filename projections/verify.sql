-- What a view has of one ledger, in the order of its streams or of the positions: compared with a replay as it comes.
-- Times are read as the text that events have them in, whatever they are.

-- name: snapshot
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY

-- name: places
-- How far a build of a view has come in each project.
SELECT l.ledger_id, l.project_id FROM projections.positions AS p
JOIN ledger.ledgers AS l ON l.ledger_id = p.ledger_id
WHERE p.view = %(schema)s AND (%(project)s::text IS NULL OR l.project_id = %(project)s)
ORDER BY l.project_id

-- name: place
-- As of the snapshot; and the number of the schema, as of now.
SELECT position, to_regnamespace(%(schema)s)::oid::bigint FROM projections.positions WHERE view = %(schema)s AND ledger_id = %(ledger_id)s

-- name: skips
SELECT position FROM projections.skips WHERE view = %(view)s AND ledger_id = %(ledger_id)s

-- name: streams
-- The events of these types up to a position, stream by stream.
SELECT e.stream_id, e.position, e.type, e.entry, p.data
FROM ledger.events AS e
LEFT JOIN ledger.payloads AS p ON p.ledger_id = e.ledger_id AND p.position = e.position
WHERE e.ledger_id = %(ledger_id)s AND e.type = ANY(%(types)s) AND e.position <= %(position)s
ORDER BY e.stream_id, e.stream_version

-- name: events
-- All events up to a position, each by itself.
SELECT e.position, e.position, e.type, e.entry, p.data
FROM ledger.events AS e
LEFT JOIN ledger.payloads AS p ON p.ledger_id = e.ledger_id AND p.position = e.position
WHERE e.ledger_id = %(ledger_id)s AND e.position <= %(position)s
ORDER BY e.position

-- name: sessions
SELECT
    session_id, position,
    to_char(opened_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS opened_at,
    to_char(expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS expires_at,
    state, agent_role, session
FROM sessions.sessions WHERE ledger_id = %(ledger_id)s ORDER BY session_id

-- name: labels
SELECT
    session_id, key, value,
    to_char(opened_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS opened_at,
    position, state, agent_role
FROM sessions.labels WHERE ledger_id = %(ledger_id)s ORDER BY session_id, key COLLATE "C", value COLLATE "C"

-- name: tasks
SELECT
    task_id, position,
    to_char(submitted_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS submitted_at,
    kind, state, session_id, worker, task
FROM tasks.tasks WHERE ledger_id = %(ledger_id)s ORDER BY task_id

-- name: approvals
SELECT
    approval_id, position, state, session_id, task_id, tool, risk, roles, requester_issuer, requester_sub,
    to_char(expires_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS expires_at,
    to_char(due_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS due_at,
    approval
FROM approvals.approvals WHERE ledger_id = %(ledger_id)s ORDER BY approval_id

-- name: segments
-- Segments as they are stored; what they say of each event is read out of them (verify.py).
SELECT
    first,
    ARRAY(
        SELECT to_char(t.recorded_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
        FROM unnest(recorded_ats) WITH ORDINALITY AS t (recorded_at, place) ORDER BY place
    ) AS recorded_ats,
    tsvectorsend(terms) AS terms
FROM audit.segments WHERE ledger_id = %(ledger_id)s ORDER BY first
