-- name: load
-- The tasks that a batch goes on with.
SELECT task_id, position, state_since, task FROM tasks.tasks WHERE ledger_id = %(ledger_id)s AND task_id = ANY(%(ids)s)

-- name: write
task_rows AS (
    INSERT INTO tasks.tasks
        (ledger_id, task_id, position, submitted_at, kind, state, state_since, session_id, worker, task)
    SELECT
        a.ledger_id, t.task_id, t.position, t.submitted_at, t.kind, t.state, nullif(t.state_since, 0), t.session_id,
        nullif(t.worker, ''), t.task
    FROM advanced AS a, unnest(
        %(task_ids)s::uuid[], %(task_positions)s::bigint[], %(task_submitted_ats)s::timestamptz[],
        %(task_kinds)s::text[], %(task_states)s::text[], %(task_sinces)s::bigint[], %(task_session_ids)s::uuid[],
        %(task_workers)s::text[], %(tasks)s::bytea[]
    ) AS t (task_id, position, submitted_at, kind, state, state_since, session_id, worker, task)
    WHERE a.view = 'tasks'
    ON CONFLICT (ledger_id, task_id) DO UPDATE
    SET state = excluded.state, state_since = excluded.state_since, worker = excluded.worker, task = excluded.task
)

-- name: get
SELECT task FROM tasks.tasks WHERE ledger_id = %(ledger_id)s AND task_id = %(task_id)s

-- A list is made of the parts below. Its order is that of the positions, in which every index has its entries.

-- name: list
SELECT k.position, k.task FROM tasks.tasks AS k WHERE k.ledger_id = %(ledger_id)s

-- name: kind
AND k.kind = %(kind)s

-- name: state
AND k.state = %(state)s

-- name: session_id
AND k.session_id = %(session_id)s

-- name: worker
AND k.worker = %(worker)s

-- name: since
-- Times never decrease within a ledger: what was submitted since is what stands from the first of those on.
AND k.position >= (
    SELECT position FROM tasks.tasks WHERE ledger_id = %(ledger_id)s AND submitted_at >= %(since)s
    ORDER BY submitted_at, position LIMIT 1
)

-- name: until
AND k.position <= (
    SELECT position FROM tasks.tasks WHERE ledger_id = %(ledger_id)s AND submitted_at < %(until)s
    ORDER BY submitted_at DESC, position DESC LIMIT 1
)

-- name: after_asc
AND k.position > %(after)s

-- name: after_desc
AND k.position < %(after)s

-- name: asc
ORDER BY k.position LIMIT %(limit)s

-- name: desc
ORDER BY k.position DESC LIMIT %(limit)s

-- The past is listed by the same parts: of all tasks that were there, of those in a state since, or in a span of it
-- (spans.sql).

-- name: then
SELECT k.position, k.task_id AS stream_id FROM tasks.tasks AS k
WHERE k.ledger_id = %(ledger_id)s AND k.position <= %(as_of)s

-- name: since_then
AND k.state = %(state)s AND k.state_since <= %(as_of)s

-- name: perhaps_then
-- What may have been in that state: it is now, or was another one then. For few tasks.
AND (k.state = %(state)s OR k.state_since > %(as_of)s)

-- name: then_of
-- Of those in a span, those that fulfil what else was asked for. One by one, as a scalar: never all that do.
AND (SELECT true FROM tasks.tasks AS k WHERE k.ledger_id = %(ledger_id)s AND k.task_id = s.stream_id {filters})
