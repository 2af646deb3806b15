-- name: create_ledger
-- A project's ledger, unless it has one: two processes that meet a new project agree on the first.
INSERT INTO ledger.ledgers (ledger_id, project_id, is_foreign) VALUES (%(ledger_id)s, %(project_id)s, %(is_foreign)s)
ON CONFLICT (project_id) DO NOTHING

-- name: find_ledger
-- The ledger of a project and where it stands.
SELECT ledger_id, is_foreign, size, last_recorded_at FROM ledger.ledgers WHERE project_id = %(project_id)s

-- name: list_ledgers
-- Every ledger and where it stands: what a projector compares its own positions with.
SELECT ledger_id, project_id, is_foreign, size, created_at FROM ledger.ledgers ORDER BY project_id

-- name: head
-- Where a ledger stands.
SELECT size, last_recorded_at FROM ledger.ledgers WHERE ledger_id = %(ledger_id)s::uuid

-- name: lock
-- The same, and nobody else appends until this transaction ends. It writes a row lock to the log, so on a
-- server with a synchronous standby its commit waits for everything before it to be there as well.
SELECT size, last_recorded_at FROM ledger.ledgers WHERE ledger_id = %(ledger_id)s::uuid FOR UPDATE

-- name: append
-- The one write. The ledger's row is updated only if it still has the size that the batch was decided on;
-- everything else follows from that row, so on a miss nothing at all is written. READ COMMITTED re-reads
-- only the locked row after a wait: that is why the size is the test and not an index.
WITH head AS (
    UPDATE ledger.ledgers SET size = size + %(event_count)s::bigint, last_recorded_at = %(recorded_at)s::timestamptz
    WHERE ledger_id = %(ledger_id)s::uuid AND size = %(seen)s::bigint AND last_recorded_at <= %(recorded_at)s::timestamptz
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
-- What these sessions, being roots, have open below them.
SELECT item_id, item_type, session_id, root_session_id FROM ledger.open_items
WHERE ledger_id = %(ledger_id)s AND root_session_id = ANY(%(roots)s)

-- name: append_open_items
INSERT INTO ledger.open_items (ledger_id, item_id, item_type, session_id, root_session_id)
SELECT %(ledger_id)s, i.*
FROM unnest(%(item_ids)s::uuid[], %(item_types)s::text[], %(sessions)s::uuid[], %(roots)s::uuid[]) AS i

-- name: close_open_items
DELETE FROM ledger.open_items WHERE ledger_id = %(ledger_id)s AND item_id = ANY(%(item_ids)s)

-- name: read_streams
-- Whole streams, each in its own order.
SELECT e.position, e.type, e.entry, p.data
FROM ledger.events AS e
LEFT JOIN ledger.payloads AS p ON p.ledger_id = e.ledger_id AND p.position = e.position
WHERE e.ledger_id = %(ledger_id)s AND e.stream_id = ANY(%(stream_ids)s)
ORDER BY e.stream_id, e.stream_version

-- name: read_after
-- A ledger in order after a position. Dense: a gap here would be a fault, so readers assert next = last + 1.
SELECT e.position, e.type, e.entry, p.data
FROM ledger.events AS e
LEFT JOIN ledger.payloads AS p ON p.ledger_id = e.ledger_id AND p.position = e.position
WHERE e.ledger_id = %(ledger_id)s AND e.position > %(after)s
ORDER BY e.position
LIMIT %(limit)s

-- name: changed_streams
-- The streams of the first events after a position.
SELECT DISTINCT stream_id
FROM (
    SELECT stream_id FROM ledger.events WHERE ledger_id = %(ledger_id)s::uuid AND position > %(after)s::bigint
    ORDER BY position LIMIT %(limit)s::bigint
) AS later

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

-- name: announce
-- Tell whoever listens that ledgers grew. Sent on its own and seldom: a NOTIFY inside the append would put
-- every commit of the server in one queue. It need not be durable.
SELECT set_config('synchronous_commit', 'off', true), pg_notify('ledger', %(ledger_ids)s::text)
