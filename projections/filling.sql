-- Filling one build of a view. {filling} is the table that says how far it is filled: it stands in the build's own
-- schema, and goes with it, or when the build is filled.

-- name: begin
CREATE TABLE IF NOT EXISTS {filling} (
    ledger_id uuid PRIMARY KEY,
    upto bigint NOT NULL,
    stream_id uuid NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000',
    stream_version bigint NOT NULL DEFAULT 0
)

-- name: ledgers
-- What is to be filled of each ledger: what it has now, but for what comes after an event that the view could not take,
-- or left out. A ledger in which the build has a place already is the projector's.
WITH filled AS (
    INSERT INTO {filling} (ledger_id, upto)
    SELECT l.ledger_id, least(
        l.size,
        (SELECT p.parked_position - 1 FROM projections.positions AS p WHERE p.view = %(view)s AND p.ledger_id = l.ledger_id),
        (SELECT min(s.position) - 1 FROM projections.skips AS s WHERE s.view = %(view)s AND s.ledger_id = l.ledger_id)
    )
    FROM ledger.ledgers AS l
    WHERE l.size > 0 AND NOT l.is_foreign AND NOT EXISTS (
        SELECT FROM projections.positions AS p WHERE p.view = %(schema)s AND p.ledger_id = l.ledger_id
    )
    RETURNING ledger_id
)
INSERT INTO projections.positions (view, ledger_id) SELECT %(schema)s, ledger_id FROM filled

-- name: places
SELECT f.ledger_id, p.position, f.upto, f.stream_id, f.stream_version
FROM {filling} AS f JOIN projections.positions AS p ON p.view = %(schema)s AND p.ledger_id = f.ledger_id
WHERE f.stream_id <> 'ffffffff-ffff-ffff-ffff-ffffffffffff' ORDER BY f.ledger_id

-- name: number
SELECT to_regnamespace(%(schema)s)::oid::bigint

-- name: boundary
-- The last of the next so many events in the order of streams; the index alone tells.
SELECT stream_id, stream_version FROM ledger.events
WHERE ledger_id = %(ledger_id)s::uuid
AND (stream_id, stream_version) > (%(stream_id)s::uuid, %(stream_version)s::bigint)
ORDER BY stream_id, stream_version OFFSET %(offset)s::bigint LIMIT 1

-- name: streams
-- The events of these types up to a position, in the order of streams, from one to another.
SELECT position, type, entry FROM ledger.events
WHERE ledger_id = %(ledger_id)s::uuid
AND (stream_id, stream_version) > (%(stream_id)s::uuid, %(stream_version)s::bigint)
AND (stream_id, stream_version) <= (%(last_id)s::uuid, %(last_version)s::bigint)
AND type = ANY(%(types)s::text[]) AND position <= %(upto)s::bigint
ORDER BY stream_id, stream_version

-- name: events
-- All events from one position to another.
SELECT position, type, entry FROM ledger.events
WHERE ledger_id = %(ledger_id)s::uuid AND position > %(after)s::bigint AND position <= %(last)s::bigint
ORDER BY position

-- name: payload
SELECT data FROM ledger.payloads WHERE ledger_id = %(ledger_id)s::uuid AND position = %(position)s::bigint

-- name: count
SELECT count(*) FROM ledger.events WHERE ledger_id = %(ledger_id)s::uuid AND position <= %(upto)s::bigint

-- name: moved
-- Where to go on in the order of streams, as a part of the one write (projector.sql).
, moved AS (
    UPDATE {filling} AS f SET stream_id = %(stream_id)s::uuid, stream_version = %(stream_version)s::bigint
    FROM advanced AS a WHERE f.ledger_id = a.ledger_id
)

-- name: give_up
-- Leave a ledger to the projector, from where the build is; or from the beginning.
UPDATE {filling} SET stream_id = 'ffffffff-ffff-ffff-ffff-ffffffffffff' WHERE ledger_id = %(ledger_id)s

-- name: empty
DELETE FROM {table} WHERE ledger_id = %(ledger_id)s

-- name: from_the_beginning
UPDATE projections.positions SET position = 0 WHERE view = %(schema)s AND ledger_id = %(ledger_id)s

-- name: filled
DROP TABLE {filling}

-- name: written
-- How many events there are.
SELECT coalesce(sum(size), 0)::bigint FROM ledger.ledgers

-- name: names
SELECT c.relname FROM pg_class AS c WHERE c.relnamespace = to_regnamespace(%(schema)s) AND c.relkind = 'r' AND c.relname <> 'filling'
