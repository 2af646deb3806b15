-- name: load
-- The sessions that a batch goes on with.
SELECT session_id, position, state_since, session FROM sessions.sessions
WHERE ledger_id = %(ledger_id)s AND session_id = ANY(%(ids)s)

-- name: write
-- Where neither state nor expiry changes, no index is touched.
session_rows AS (
    INSERT INTO sessions.sessions
        (ledger_id, session_id, position, opened_at, expires_at, state, state_since, agent_role, session)
    SELECT
        a.ledger_id, s.session_id, s.position, s.opened_at::timestamptz, s.expires_at::timestamptz,
        s.state, nullif(s.state_since, 0), s.agent_role, s.session
    FROM advanced AS a, unnest(
        %(session_ids)s::uuid[], %(session_positions)s::bigint[], %(session_opened_ats)s::text[], %(session_expires_ats)s::text[],
        %(session_states)s::text[], %(session_sinces)s::bigint[], %(session_roles)s::text[], %(sessions)s::bytea[]
    ) AS s (session_id, position, opened_at, expires_at, state, state_since, agent_role, session)
    WHERE a.view = 'sessions'
    ON CONFLICT (ledger_id, session_id) DO UPDATE
    SET state = excluded.state, state_since = excluded.state_since, expires_at = excluded.expires_at,
        session = excluded.session
), label_rows AS (
    INSERT INTO sessions.labels (ledger_id, key, value, opened_at, position, session_id, state, agent_role)
    SELECT a.ledger_id, l.key, l.value, l.opened_at::timestamptz, l.position, l.session_id, l.state, l.agent_role
    FROM advanced AS a, unnest(
        %(label_keys)s::text[], %(label_values)s::text[], %(label_opened_ats)s::text[], %(label_positions)s::bigint[], %(label_session_ids)s::uuid[],
        %(label_states)s::text[], %(label_roles)s::text[]
    ) AS l (key, value, opened_at, position, session_id, state, agent_role)
    WHERE a.view = 'sessions'
    ON CONFLICT (ledger_id, key, value, opened_at, position) DO UPDATE SET state = excluded.state
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

-- A list is made of the parts below: whose entries it goes through (`k`: all sessions, or those with a label),
-- what was asked for, and the order, in which every index above has them.

-- name: from_all
SELECT k.session_id, k.opened_at, k.position FROM sessions.sessions AS k
WHERE k.ledger_id = %(ledger_id)s

-- name: from_label
SELECT k.session_id, k.opened_at, k.position FROM sessions.labels AS k
WHERE k.ledger_id = %(ledger_id)s AND k.key = %(key)s AND k.value = %(value)s

-- name: state
AND k.state = %(state)s

-- name: agent_role
AND k.agent_role = %(agent_role)s

-- name: since
AND k.opened_at >= %(since)s

-- name: until
AND k.opened_at < %(until)s

-- name: after
AND (k.opened_at, k.position) < (%(after_time)s, %(after_position)s)

-- name: newest_first
ORDER BY k.opened_at DESC, k.position DESC

-- The past is listed by the same parts. Whose entries: of the sessions that were there, all, those in a state since, or
-- those in a span of it (spans.sql). Positions and times of opening are in one order.

-- name: then_all
SELECT k.position, k.session_id AS stream_id FROM sessions.sessions AS k
WHERE k.ledger_id = %(ledger_id)s AND (k.opened_at, k.position) <= (%(at)s, %(as_of)s)

-- name: then_label
SELECT k.position, k.session_id AS stream_id FROM sessions.labels AS k
WHERE k.ledger_id = %(ledger_id)s AND k.key = %(key)s AND k.value = %(value)s
AND (k.opened_at, k.position) <= (%(at)s, %(as_of)s)

-- name: since_then
AND k.state_since <= %(as_of)s

-- name: since_then_labelled
AND (
    SELECT state_since FROM sessions.sessions WHERE ledger_id = %(ledger_id)s AND session_id = k.session_id
) <= %(as_of)s

-- name: then_of
-- Of those in a span, those that fulfil what else was asked for. One by one, as a scalar: never all that do.
AND (
    SELECT true FROM sessions.sessions AS k WHERE k.ledger_id = %(ledger_id)s AND k.session_id = s.stream_id {filters}
)

-- name: then_labelled
AND (
    SELECT true FROM sessions.labels AS k
    WHERE k.ledger_id = %(ledger_id)s AND k.key = %(key)s AND k.value = %(value)s AND k.position = s.position
    AND k.opened_at = (
        SELECT opened_at FROM sessions.sessions WHERE ledger_id = %(ledger_id)s AND session_id = s.stream_id
    ) {filters}
)

-- name: then_after
AND s.position < %(after_position)s

-- name: then_newest_first
ORDER BY s.position DESC

-- name: then_page
SELECT k.position, k.stream_id FROM ({list}) AS k ORDER BY k.position DESC LIMIT %(limit)s OFFSET %(offset)s

-- name: then_count
SELECT count(*) FROM (SELECT FROM ({list}) AS k LIMIT %(total_max)s + 1) AS k

-- name: part
-- Of each source no more than can be shown, or counted.
LIMIT %(part)s

-- name: count
-- In the list's order too: else the planner would take the first rows it meets for as good as any, and read the
-- whole table for a rare state.
SELECT count(*) FROM ({list} LIMIT %(total_max)s + 1) AS k

-- name: page
-- LIMIT 1, so that the sessions are looked up one by one, and only those shown.
SELECT k.position, s.session FROM ({list} LIMIT %(limit)s OFFSET %(offset)s) AS k
CROSS JOIN LATERAL (
    SELECT session FROM sessions.sessions WHERE ledger_id = %(ledger_id)s AND session_id = k.session_id LIMIT 1
) AS s
ORDER BY k.opened_at DESC, k.position DESC
