-- name: log_of
-- The log of a ledger, once a checkpoint of it is published.
SELECT origin, published, published_size, published_at, refused FROM ledger.logs
WHERE ledger_id = %(ledger_id)s AND published_size > 0

-- name: keys
-- The keys that sign, and those that did, with their public halves alone.
SELECT number, public, added_at, retired_at FROM ledger.log_keys ORDER BY number

-- name: add_key
INSERT INTO ledger.log_keys (number, public, added_at)
VALUES (%(number)s, %(public)s, coalesce(%(at)s::timestamptz, now()))
ON CONFLICT DO NOTHING

-- name: retire_key
UPDATE ledger.log_keys SET retired_at = greatest(added_at, %(at)s) WHERE number = %(number)s AND retired_at IS NULL

-- name: leaves
-- The leaf hashes of runs of positions, each run as one string: shorter than asked for where events are missing.
SELECT r.place, coalesce(e.leaves, '')
FROM unnest(%(firsts)s::bigint[], %(lasts)s::bigint[]) WITH ORDINALITY AS r (first, last, place)
CROSS JOIN LATERAL (
    SELECT string_agg(leaf, ''::bytea ORDER BY position) AS leaves FROM ledger.events
    WHERE ledger_id = %(ledger_id)s::uuid AND position BETWEEN r.first AND r.last
) AS e

-- name: tiles
-- Stored tiles, each no wider than asked for.
SELECT t.level, t.index, substring(t.hashes FOR a.width::integer)
FROM unnest(%(levels)s::bigint[], %(indexes)s::bigint[], %(widths)s::bigint[]) AS a (level, index, width)
JOIN ledger.tiles AS t ON t.ledger_id = %(ledger_id)s::uuid AND t.level = a.level AND t.index = a.index

-- name: entries
-- The bytes that were hashed, in order.
SELECT entry FROM ledger.events
WHERE ledger_id = %(ledger_id)s::uuid AND position BETWEEN %(first)s::bigint AND %(last)s::bigint
ORDER BY position

-- name: payload
-- Data that stands beside its entry; what is the same more than once is there as often.
SELECT data FROM ledger.payloads
WHERE ledger_id = %(ledger_id)s AND sha256(data) = %(digest)s AND position <= %(size)s
LIMIT 1

-- name: extend
-- Tiles that are new, or have grown; a trigger refuses one that has not grown but changed.
INSERT INTO ledger.tiles AS t (ledger_id, level, index, hashes)
SELECT %(ledger_id)s::uuid, n.* FROM unnest(%(levels)s::bigint[], %(indexes)s::bigint[], %(hashes)s::bytea[]) AS n
ON CONFLICT (ledger_id, level, index) DO UPDATE SET hashes = excluded.hashes
