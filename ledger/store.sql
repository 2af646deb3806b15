-- name: create_ledger
-- A project's ledger, unless it has one: two processes that meet a new project agree on the first.
INSERT INTO ledger.ledgers (ledger_id, project_id, is_foreign) VALUES (%(ledger_id)s, %(project_id)s, %(is_foreign)s)
ON CONFLICT (project_id) DO NOTHING

-- name: find_ledger
-- The ledger of a project and where it stands.
SELECT ledger_id, is_foreign, size, last_recorded_at, coalesce(epoch, ledger_id) FROM ledger.ledgers
WHERE project_id = %(project_id)s

-- name: list_ledgers
-- Every ledger and where it stands: what a projector compares its own positions with.
SELECT ledger_id, project_id, is_foreign, size, created_at FROM ledger.ledgers ORDER BY project_id

-- name: head
-- Where a ledger stands.
SELECT size, last_recorded_at, coalesce(epoch, ledger_id) FROM ledger.ledgers WHERE ledger_id = %(ledger_id)s::uuid

-- name: stands
-- Whether a ledger has that size, and that leaf at its end.
SELECT size = %(size)s::bigint AND (%(leaf)s::bytea IS NULL OR EXISTS (
    SELECT FROM ledger.events AS e WHERE e.ledger_id = l.ledger_id AND e.position = l.size AND e.leaf = %(leaf)s::bytea
))
FROM ledger.ledgers AS l
WHERE ledger_id = %(ledger_id)s::uuid

-- name: lock
-- The same, and nobody else appends until this transaction ends. It writes a row lock to the log, so on a
-- server with a synchronous standby its commit waits for everything before it to be there as well.
SELECT size, last_recorded_at, coalesce(epoch, ledger_id) FROM ledger.ledgers WHERE ledger_id = %(ledger_id)s::uuid
FOR UPDATE

-- name: append
-- The one write. The ledger's row is updated only if it still has the size that the batch was decided on;
-- everything else follows from that row, so on a miss nothing at all is written. READ COMMITTED re-reads
-- only the locked row after a wait: that is why the size is the test and not an index. The leaf tells a history of that
-- size from another one, in a database that was put back to an older state meanwhile and has grown again.
WITH head AS (
    UPDATE ledger.ledgers SET size = size + %(event_count)s::bigint, last_recorded_at = %(recorded_at)s::timestamptz
    WHERE ledger_id = %(ledger_id)s::uuid AND size = %(seen)s::bigint AND last_recorded_at <= %(recorded_at)s::timestamptz
        AND (%(leaf)s::bytea IS NULL OR EXISTS (
            SELECT FROM ledger.events
            WHERE ledger_id = %(ledger_id)s::uuid AND position = %(seen)s::bigint AND leaf = %(leaf)s::bytea
        ))
    RETURNING ledger_id
), written AS (
    INSERT INTO ledger.events (ledger_id, position, stream_id, stream_version, type, entry, leaf)
    SELECT head.ledger_id, %(seen)s::bigint + e.place, e.stream_id, e.stream_version, e.type, e.entry, e.leaf
    FROM head, unnest(
        %(streams)s::uuid[], %(versions)s::bigint[], %(types)s::text[], %(entries)s::bytea[], %(leaves)s::bytea[]
    ) WITH ORDINALITY AS e (stream_id, stream_version, type, entry, leaf, place)
), answered AS (
    INSERT INTO ledger.commands
        (ledger_id, principal, command_id, fingerprint, type, target, status, first_position, event_count, seen_position)
    SELECT head.ledger_id, c.*
    FROM head, unnest(
        %(principals)s::text[], %(command_ids)s::text[], %(fingerprints)s::bytea[], %(command_types)s::text[],
        %(targets)s::uuid[], %(statuses)s::smallint[], %(firsts)s::bigint[], %(counts)s::bigint[], %(seens)s::bigint[]
    ) AS c
)
SELECT count(*) FROM head

-- name: append_payloads
-- Data too large for its entry, beside it, in the same transaction.
INSERT INTO ledger.payloads (ledger_id, position, data)
SELECT %(ledger_id)s, p.* FROM unnest(%(positions)s::bigint[], %(payloads)s::bytea[]) AS p

-- name: open_items
-- What is open under these roots.
SELECT item_id, item_type, session_id, root_session_id, task_id, match FROM ledger.open_items
WHERE ledger_id = %(ledger_id)s AND root_session_id = ANY(%(roots)s)

-- name: waited_on
-- The approvals that these sessions wait on, in whatever root they are open.
SELECT session_id, item_id FROM ledger.open_items
WHERE ledger_id = %(ledger_id)s AND session_id = ANY(%(sessions)s) AND item_type = 'approval'
ORDER BY item_id

-- name: deployment
-- What this deployment is called.
SELECT name FROM muniment.deployment

-- name: append_open_items
-- An item that was there already is now of another type: what was asked for has been granted.
INSERT INTO ledger.open_items (ledger_id, item_id, item_type, session_id, root_session_id, task_id, match)
SELECT %(ledger_id)s, i.*
FROM unnest(
    %(item_ids)s::uuid[], %(item_types)s::text[], %(sessions)s::uuid[], %(roots)s::uuid[],
    %(tasks)s::uuid[], %(matches)s::bytea[]
) AS i
ON CONFLICT (ledger_id, item_id) DO UPDATE SET item_type = excluded.item_type

-- name: close_open_items
DELETE FROM ledger.open_items WHERE ledger_id = %(ledger_id)s AND item_id = ANY(%(item_ids)s)

-- name: append_tasks
-- A heartbeat may have moved a lease on: unless it is another lease, its end is left alone.
INSERT INTO ledger.tasks AS t
    (ledger_id, task_id, kind, session_id, state, rank, run_at, deadline_at, lease_id, lease_until, holder)
SELECT %(ledger_id)s::uuid, q.*
FROM unnest(
    %(tasks)s::uuid[], %(kinds)s::text[], %(sessions)s::uuid[], %(states)s::text[], %(ranks)s::timestamptz[],
    %(runs)s::timestamptz[], %(deadlines)s::timestamptz[], %(leases)s::uuid[], %(ends)s::timestamptz[], %(holders)s::text[]
) AS q
ON CONFLICT (ledger_id, task_id) DO UPDATE SET
    state = excluded.state, rank = excluded.rank, run_at = excluded.run_at, lease_id = excluded.lease_id,
    holder = excluded.holder,
    lease_until = CASE WHEN t.lease_id = excluded.lease_id THEN t.lease_until ELSE excluded.lease_until END

-- name: close_tasks
DELETE FROM ledger.tasks WHERE ledger_id = %(ledger_id)s::uuid AND task_id = ANY(%(tasks)s::uuid[])

-- name: offers
-- The next tasks of some kinds, in the order in which they are handed out: from each kind as many as are wanted
-- in all, of which the first are taken. What waits for its next try is among them once that time has come.
SELECT t.task_id
FROM unnest(%(kinds)s::text[]) AS k (kind)
CROSS JOIN LATERAL (
    SELECT o.task_id, o.rank, o.run_at FROM ledger.tasks AS o
    WHERE o.ledger_id = %(ledger_id)s::uuid AND o.kind = k.kind AND o.state IN ('queued', 'retrying')
        AND o.run_at <= %(now)s::timestamptz AND (o.deadline_at IS NULL OR o.deadline_at > %(now)s::timestamptz)
        AND (%(session_id)s::uuid IS NULL OR o.session_id = %(session_id)s::uuid)
    ORDER BY o.rank, o.run_at, o.task_id LIMIT %(limit)s::bigint
) AS t
ORDER BY t.rank, t.run_at, t.task_id LIMIT %(limit)s::bigint

-- name: leases
-- When leases really end. A heartbeat that comes now waits for this transaction, and then finds its lease gone.
SELECT task_id, lease_until FROM ledger.tasks
WHERE ledger_id = %(ledger_id)s::uuid AND task_id = ANY(%(tasks)s::uuid[])
ORDER BY task_id FOR UPDATE

-- name: heartbeat
-- Only while the lease is in force. No event: it is telemetry.
UPDATE ledger.tasks SET lease_until = greatest(lease_until, %(lease_until)s)
WHERE ledger_id = %(ledger_id)s AND task_id = %(task_id)s AND lease_id = %(lease_id)s AND holder = %(holder)s
  AND state = 'running'
RETURNING lease_until

-- name: due_tasks
-- What the sweeper has to see to: leases that nobody renewed, tries whose time has come, deadlines.
(
    SELECT l.project_id, t.task_id, 'lose', t.lease_id, t.lease_until
    FROM ledger.tasks AS t JOIN ledger.ledgers AS l USING (ledger_id)
    WHERE t.state = 'running' AND t.lease_until <= now() ORDER BY t.lease_until LIMIT %(limit)s
) UNION ALL (
    SELECT l.project_id, t.task_id, 'queue', NULL, t.run_at
    FROM ledger.tasks AS t JOIN ledger.ledgers AS l USING (ledger_id)
    WHERE t.state = 'retrying' AND t.run_at <= now() ORDER BY t.run_at LIMIT %(limit)s
) UNION ALL (
    SELECT l.project_id, t.task_id, 'expire', NULL, t.deadline_at
    FROM ledger.tasks AS t JOIN ledger.ledgers AS l USING (ledger_id)
    WHERE t.deadline_at <= now() ORDER BY t.deadline_at LIMIT %(limit)s
)

-- name: read_streams
-- Whole streams, each in its own order.
SELECT e.position, e.type, e.entry, p.data
FROM ledger.events AS e
LEFT JOIN ledger.payloads AS p ON p.ledger_id = e.ledger_id AND p.position = e.position
WHERE e.ledger_id = %(ledger_id)s AND e.stream_id = ANY(%(stream_ids)s)
ORDER BY e.stream_id, e.stream_version

-- name: read_streams_upto
-- The same, as they were when the ledger ended at a position: `+ 0`, so that nobody thinks of going through it up to there.
SELECT e.position, e.type, e.entry, p.data
FROM ledger.events AS e
LEFT JOIN ledger.payloads AS p ON p.ledger_id = e.ledger_id AND p.position = e.position
WHERE e.ledger_id = %(ledger_id)s AND e.stream_id = ANY(%(stream_ids)s) AND e.position + 0 <= %(upto)s
ORDER BY e.stream_id, e.stream_version

-- name: read_after
-- A ledger in order after a position. Dense: a gap here would be a fault, so readers assert next = last + 1.
SELECT e.position, e.type, e.entry, p.data
FROM ledger.events AS e
LEFT JOIN ledger.payloads AS p ON p.ledger_id = e.ledger_id AND p.position = e.position
WHERE e.ledger_id = %(ledger_id)s AND e.position > %(after)s
ORDER BY e.position
LIMIT %(limit)s

-- name: adopt
-- Another epoch, and with it another log, over what is there. Only where the log before was contradicted.
UPDATE ledger.ledgers SET epoch = %(epoch)s WHERE ledger_id = %(ledger_id)s

-- name: begin_log
-- After that: it is the next statement, for the log's own rule looks at what the ledger is called by now.
UPDATE ledger.logs SET
    origin = (SELECT name FROM muniment.deployment) || '/' || %(epoch)s::uuid::text, signed = NULL, signed_by = '{}',
    published_size = 0, published = NULL, published_at = NULL, contradicted_by = NULL, refused = NULL
WHERE ledger_id = %(ledger_id)s AND contradicted_by IS NOT NULL

-- name: changes
-- The leaf at the end of a ledger of a size, the one at a position, and the streams of the first events after that.
SELECT
    (SELECT leaf FROM ledger.events WHERE ledger_id = %(ledger_id)s::uuid AND position = %(size)s::bigint),
    (SELECT leaf FROM ledger.events WHERE ledger_id = %(ledger_id)s::uuid AND position = %(after)s::bigint),
    ARRAY(
        SELECT DISTINCT stream_id
        FROM (
            SELECT stream_id FROM ledger.events WHERE ledger_id = %(ledger_id)s::uuid AND position > %(after)s::bigint
            ORDER BY position LIMIT %(limit)s::bigint
        ) AS later
    )

-- name: read_positions
-- The events at these positions.
SELECT e.position, e.type, e.entry, p.data
FROM ledger.events AS e
LEFT JOIN ledger.payloads AS p ON p.ledger_id = e.ledger_id AND p.position = e.position
WHERE e.ledger_id = %(ledger_id)s AND e.position = ANY(%(positions)s)
ORDER BY e.position

-- name: find_commands
-- What these commands did, where they were answered before.
SELECT c.principal, c.command_id, c.fingerprint, c.type, c.target, c.status, c.first_position, c.event_count, c.seen_position
FROM unnest(%(principals)s::text[], %(command_ids)s::text[]) AS k (principal, command_id)
JOIN ledger.commands AS c
    ON c.ledger_id = %(ledger_id)s::uuid AND c.principal = k.principal AND c.command_id = k.command_id
