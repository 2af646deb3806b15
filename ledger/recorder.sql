-- name: lock
-- Where the ledger stands and what time it is, and nobody else appends until this transaction ends. The
-- time is read outside the subquery: after the lock was had, not while waiting for it.
WITH head AS MATERIALIZED (
    SELECT is_foreign, size, last_recorded_at FROM ledger.ledgers WHERE ledger_id = %(ledger_id)s FOR UPDATE
)
SELECT is_foreign, size, greatest(last_recorded_at, clock_timestamp()) FROM head

-- name: append
-- Under that lock: the events in the next positions. Nothing is written unless all of it is.
WITH head AS (
    UPDATE ledger.ledgers SET size = %(seen)s + %(event_count)s, last_recorded_at = %(recorded_at)s
    WHERE ledger_id = %(ledger_id)s AND size = %(seen)s
    RETURNING ledger_id
), beside AS (
    INSERT INTO ledger.payloads (ledger_id, position, data)
    SELECT head.ledger_id, p.* FROM head, unnest(%(positions)s, %(payloads)s) AS p
)
INSERT INTO ledger.events (ledger_id, position, stream_id, stream_version, type, entry, leaf)
SELECT head.ledger_id, %(seen)s + e.place, e.stream_id, e.stream_version, e.type, e.entry, e.leaf
FROM head, unnest(%(streams)s, %(versions)s, %(types)s, %(entries)s, %(leaves)s)
    WITH ORDINALITY AS e (stream_id, stream_version, type, entry, leaf, place)

-- name: announce
-- Tell whoever listens that this ledger grew: after the append, and without waiting for a disk, since it
-- is only a hint. Inside the append it would put every commit of the server in one queue.
SELECT set_config('synchronous_commit', 'off', true), pg_notify('ledger', %(ledger_id)s::text)

-- name: listen
LISTEN ledger

-- name: read_stream
-- A stream's events between two versions, oldest first.
SELECT e.position, e.stream_id, e.stream_version, e.type, e.entry, p.data
FROM ledger.events AS e
LEFT JOIN ledger.payloads AS p ON p.ledger_id = e.ledger_id AND p.position = e.position
WHERE e.ledger_id = %(ledger_id)s AND e.stream_id = %(stream_id)s
    AND e.stream_version > %(after)s AND e.stream_version <= %(until)s
ORDER BY e.stream_version
LIMIT %(limit)s::bigint

-- name: read_stream_backwards
-- The same, newest first.
SELECT e.position, e.stream_id, e.stream_version, e.type, e.entry, p.data
FROM ledger.events AS e
LEFT JOIN ledger.payloads AS p ON p.ledger_id = e.ledger_id AND p.position = e.position
WHERE e.ledger_id = %(ledger_id)s AND e.stream_id = %(stream_id)s
    AND e.stream_version > %(after)s AND e.stream_version <= %(until)s
ORDER BY e.stream_version DESC
LIMIT %(limit)s::bigint

-- name: read_ledger
-- A ledger in order between two positions, of all types or of these. It walks the positions, so rare types
-- far apart cost what lies between them.
SELECT e.position, e.stream_id, e.stream_version, e.type, e.entry, p.data
FROM ledger.events AS e
LEFT JOIN ledger.payloads AS p ON p.ledger_id = e.ledger_id AND p.position = e.position
WHERE e.ledger_id = %(ledger_id)s AND e.position > %(after)s AND e.position <= %(until)s
    AND (%(types)s::text[] IS NULL OR e.type = ANY(%(types)s::text[]))
ORDER BY e.position
LIMIT %(limit)s
