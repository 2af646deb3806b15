-- name: load
-- The sessions that a batch goes on with.
SELECT position, session FROM sessions.sessions
WHERE ledger_id = %(ledger_id)s AND session_id = ANY(%(session_ids)s)

-- name: write
-- Where neither state nor expiry changes, no index is touched.
session_rows AS (
    INSERT INTO sessions.sessions
        (ledger_id, session_id, position, opened_at, expires_at, state, agent_role, session)
    SELECT
        a.ledger_id, s.session_id, s.position, s.opened_at::timestamptz, s.expires_at::timestamptz,
        s.state, s.agent_role, s.session
    FROM advanced AS a, unnest(
        %(session_ids)s, %(session_positions)s, %(session_opened_ats)s, %(session_expires_ats)s,
        %(session_states)s, %(session_roles)s, %(sessions)s
    ) AS s (session_id, position, opened_at, expires_at, state, agent_role, session)
    WHERE a.view = 'sessions'
    ON CONFLICT (ledger_id, session_id) DO UPDATE
    SET state = excluded.state, expires_at = excluded.expires_at, session = excluded.session
), label_rows AS (
    INSERT INTO sessions.labels (ledger_id, key, value, opened_at, position, session_id)
    SELECT a.ledger_id, l.key, l.value, l.opened_at::timestamptz, l.position, l.session_id
    FROM advanced AS a, unnest(
        %(label_keys)s, %(label_values)s, %(label_opened_ats)s, %(label_positions)s, %(label_session_ids)s
    ) AS l (key, value, opened_at, position, session_id)
    WHERE a.view = 'sessions'
)

-- name: get
SELECT session FROM sessions.sessions WHERE ledger_id = %(ledger_id)s AND session_id = %(session_id)s

-- name: due
-- Sessions whose time has run out, oldest first. Where the view is parked it would name the same ones for
-- ever; there they expire when a command touches them.
SELECT l.project_id, s.session_id, s.expires_at
FROM sessions.sessions AS s
JOIN ledger.ledgers AS l ON l.ledger_id = s.ledger_id
WHERE s.state IN ('pending', 'active') AND s.expires_at <= now() AND NOT EXISTS (
    SELECT FROM projections.positions AS p
    WHERE p.view = 'sessions' AND p.ledger_id = s.ledger_id AND p.parked_position IS NOT NULL
)
ORDER BY s.expires_at LIMIT %(limit)s

-- A list is made of the parts below: where it begins, what was asked for, how it ends. `k` is what it is
-- sorted by: the sessions, or one label's entries, in whose order the sessions are then looked up one by one
-- (OFFSET 0 keeps the planner from joining and sorting a label that every session has).

-- name: from_all
FROM sessions.sessions AS k CROSS JOIN LATERAL (SELECT k.session, k.state, k.agent_role) AS s
WHERE k.ledger_id = %(ledger_id)s

-- name: from_label
FROM sessions.labels AS k CROSS JOIN LATERAL (
    SELECT * FROM sessions.sessions WHERE ledger_id = k.ledger_id AND session_id = k.session_id OFFSET 0
) AS s
WHERE k.ledger_id = %(ledger_id)s AND k.key = %(key)s AND k.value = %(value)s

-- name: state
AND s.state = %(state)s

-- name: agent_role
AND s.agent_role = %(agent_role)s

-- name: since
AND k.opened_at >= %(since)s

-- name: until
AND k.opened_at < %(until)s

-- name: after
AND (k.opened_at, k.position) < (%(after_time)s, %(after_position)s)

-- name: newest_first
ORDER BY k.opened_at DESC, k.position DESC

-- name: page
LIMIT %(limit)s OFFSET %(offset)s

-- name: bound
-- Counted in the list's order too: else the planner would take the first rows it meets for as good as any, and
-- read the whole table for a rare state.
LIMIT %(total_max)s + 1
