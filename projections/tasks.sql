-- name: load
-- The tasks that a batch goes on with.
SELECT task_id, position, task FROM tasks.tasks WHERE ledger_id = %(ledger_id)s AND task_id = ANY(%(ids)s)

-- name: write
task_rows AS (
    INSERT INTO tasks.tasks (ledger_id, task_id, position, submitted_at, kind, state, session_id, worker, task)
    SELECT
        a.ledger_id, t.task_id, t.position, t.submitted_at, t.kind, t.state, t.session_id, nullif(t.worker, ''), t.task
    FROM advanced AS a, unnest(
        %(task_ids)s::uuid[], %(task_positions)s::bigint[], %(task_submitted_ats)s::timestamptz[],
        %(task_kinds)s::text[], %(task_states)s::text[], %(task_session_ids)s::uuid[], %(task_workers)s::text[],
        %(tasks)s::bytea[]
    ) AS t (task_id, position, submitted_at, kind, state, session_id, worker, task)
    WHERE a.view = 'tasks'
    ON CONFLICT (ledger_id, task_id) DO UPDATE
    SET state = excluded.state, worker = excluded.worker, task = excluded.task
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
