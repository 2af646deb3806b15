-- name: load
-- The approvals that a batch goes on with.
SELECT approval_id, position, state_since, approval FROM approvals.approvals
WHERE ledger_id = %(ledger_id)s AND approval_id = ANY(%(ids)s)

-- name: write
-- Where neither state nor deadline changes, no index is touched.
approval_rows AS (
    INSERT INTO approvals.approvals (
        ledger_id, approval_id, position, state, state_since, session_id, task_id, tool, risk, roles,
        requester_issuer, requester_sub, expires_at, due_at, approval
    )
    SELECT
        a.ledger_id, p.approval_id, p.position, p.state, nullif(p.state_since, 0), p.session_id, p.task_id, p.tool, p.risk,
        string_to_array(p.roles, chr(10)), p.requester_issuer, p.requester_sub, p.expires_at, p.due_at, p.approval
    FROM advanced AS a, unnest(
        %(approval_ids)s::uuid[], %(approval_positions)s::bigint[], %(approval_states)s::text[],
        %(approval_sinces)s::bigint[], %(approval_session_ids)s::uuid[], %(approval_task_ids)s::uuid[], %(approval_tools)s::text[],
        %(approval_risks)s::smallint[], %(approval_roles)s::text[], %(approval_issuers)s::text[],
        %(approval_subs)s::text[], %(approval_expires_ats)s::timestamptz[], %(approval_due_ats)s::timestamptz[],
        %(approvals)s::bytea[]
    ) AS p (
        approval_id, position, state, state_since, session_id, task_id, tool, risk, roles,
        requester_issuer, requester_sub, expires_at, due_at, approval
    )
    WHERE a.view = 'approvals'
    ON CONFLICT (ledger_id, approval_id) DO UPDATE
    SET state = excluded.state, state_since = excluded.state_since, due_at = excluded.due_at,
        approval = excluded.approval
)

-- name: get
SELECT approval FROM approvals.approvals WHERE ledger_id = %(ledger_id)s AND approval_id = %(approval_id)s

-- name: due
-- Approvals whose time has run out, the longest overdue first. Where the view is parked it would name the same ones
-- for ever; there they are seen to when a command touches them.
SELECT l.project_id, k.approval
FROM approvals.approvals AS k
JOIN ledger.ledgers AS l ON l.ledger_id = k.ledger_id
WHERE k.due_at <= now() AND NOT EXISTS (
    SELECT FROM projections.positions AS p
    WHERE p.view = 'approvals' AND p.ledger_id = k.ledger_id AND p.parked_position IS NOT NULL
)
ORDER BY k.due_at LIMIT %(limit)s

-- name: waiting
-- What waits for people in all projects; where that is very much, some of it.
SELECT approval, now() FROM approvals.approvals WHERE state = 'pending' LIMIT %(limit)s

-- A list is made of the parts below. `after` is always the position of the last one shown; what else it is sorted by
-- never changes.

-- name: list
SELECT k.position, k.approval FROM approvals.approvals AS k WHERE k.ledger_id = %(ledger_id)s

-- name: pending
-- Spelled out: else the planner, which does not see the values, could not tell that the indexes of what is pending
-- hold all of it, nor that this is the rarest of all that is asked for.
AND k.state = 'pending'

-- name: state
AND k.state = %(state)s

-- name: session_id
AND k.session_id = %(session_id)s

-- name: task_id
AND k.task_id = %(task_id)s

-- name: tool
AND k.tool = %(tool)s

-- name: risk
AND k.risk = %(risk)s

-- name: role
AND k.roles @> ARRAY[%(role)s::text]

-- name: requester
AND k.requester_sub = %(requester)s

-- name: pending_tool
-- In a form that no index has: to the planner any tool is rare, and so is any requester, and it would rather go through
-- all that one ever asked for than through what is pending, which is little.
AND (k.tool = %(tool)s) IS TRUE

-- name: pending_requester
AND (k.requester_sub = %(requester)s) IS TRUE

-- name: issuer
AND k.requester_issuer = %(issuer)s

-- name: expires_before
AND k.expires_at < %(expires_before)s

-- name: after_asc
AND k.position > %(after)s

-- name: after_desc
AND k.position < %(after)s

-- name: after_risk
AND (k.risk, k.position) > (
    SELECT risk, position FROM approvals.approvals WHERE ledger_id = %(ledger_id)s AND position = %(after)s
)

-- name: after_expires_at
AND (k.expires_at, k.position) > (
    SELECT expires_at, position FROM approvals.approvals WHERE ledger_id = %(ledger_id)s AND position = %(after)s
)

-- name: by_asc
ORDER BY k.position LIMIT %(limit)s

-- name: by_desc
ORDER BY k.position DESC LIMIT %(limit)s

-- name: by_risk
ORDER BY k.risk, k.position LIMIT %(limit)s

-- name: by_expires_at
ORDER BY k.expires_at, k.position LIMIT %(limit)s

-- The past is listed by the same parts: of all approvals that were there, of those in a state since, or in a span of it
-- (spans.sql).

-- name: then
SELECT k.position, k.approval_id AS stream_id FROM approvals.approvals AS k
WHERE k.ledger_id = %(ledger_id)s AND k.position <= %(as_of)s

-- name: since_then
AND k.state_since <= %(as_of)s

-- name: perhaps_then
-- What may have been in that state: it is now, or was another one then. For few approvals.
AND (k.state = %(state)s OR k.state_since > %(as_of)s)

-- name: then_of
-- Of those in a span, those that fulfil what else was asked for. One by one, as a scalar: never all that do.
AND (
    SELECT true FROM approvals.approvals AS k WHERE k.ledger_id = %(ledger_id)s AND k.approval_id = s.stream_id {filters}
)

-- name: then_sorted
-- All of {list}, to be sorted by what is in their rows: little, as what is pending is.
SELECT k.position, k.approval_id AS stream_id FROM ({list}) AS f CROSS JOIN LATERAL (
    SELECT * FROM approvals.approvals WHERE ledger_id = %(ledger_id)s AND approval_id = f.stream_id LIMIT 1
) AS k
WHERE true

-- name: perhaps_pending
-- What sessions may have waited for: what is pending, or was another one then; and what nothing is known of, because an
-- earlier version kept no more.
SELECT k.approval_id FROM approvals.approvals AS k
WHERE k.ledger_id = %(ledger_id)s AND k.session_id = ANY(%(session_ids)s) AND k.position <= %(as_of)s
AND (k.state = 'pending' OR k.state_since > %(as_of)s OR k.state_since IS NULL)
