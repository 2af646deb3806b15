-- name: begin
-- The log of a ledger, which has none yet.
INSERT INTO ledger.logs (ledger_id, origin)
SELECT l.ledger_id, d.name || '/' || coalesce(l.epoch, l.ledger_id)::text
FROM ledger.ledgers AS l CROSS JOIN muniment.deployment AS d
WHERE l.ledger_id = %(ledger_id)s
ON CONFLICT DO NOTHING

-- name: read
-- What was signed and published of a ledger.
SELECT origin, size, signed, signed_by, published_size, published, refused, contradicted_by,
    pg_postmaster_start_time()::text || ' ' || (SELECT oid FROM pg_database WHERE datname = current_database())::text
FROM ledger.logs
WHERE ledger_id = %(ledger_id)s

-- name: lock
-- The same, for as long as the transaction lasts; nothing where another publisher is at it. The lock is itself written
-- to the server's log: where that has a synchronous standby, the commit waits for everything before it to be there.
SELECT origin, size, signed, signed_by, published_size, published, refused, contradicted_by,
    pg_postmaster_start_time()::text || ' ' || (SELECT oid FROM pg_database WHERE datname = current_database())::text
FROM ledger.logs
WHERE ledger_id = %(ledger_id)s FOR UPDATE SKIP LOCKED

-- name: sign
UPDATE ledger.logs SET size = %(size)s, signed = %(signed)s, signed_by = %(signed_by)s WHERE ledger_id = %(ledger_id)s

-- name: publish
-- Unless another publisher was faster, or the log is another one by now.
UPDATE ledger.logs
SET published_size = %(size)s, published = %(published)s, published_at = clock_timestamp(), refused = NULL
WHERE ledger_id = %(ledger_id)s AND origin = %(origin)s AND published_size = %(seen)s

-- name: refuse
-- What contradicts the ledger is kept until it is judged again, or the ledger is adopted; not what is of the log before.
UPDATE ledger.logs SET refused = %(why)s, contradicted_by = coalesce(contradicted_by, %(note)s)
WHERE ledger_id = %(ledger_id)s AND (%(note)s::text IS NULL OR starts_with(%(note)s::text, origin || E'\n'))
    AND (refused IS DISTINCT FROM %(why)s OR contradicted_by IS NULL AND %(note)s::text IS NOT NULL)

-- name: go_on
-- Nothing contradicts it: not what was said to.
UPDATE ledger.logs SET refused = NULL, contradicted_by = NULL
WHERE ledger_id = %(ledger_id)s AND contradicted_by IS NOT DISTINCT FROM %(seen)s

-- name: behind
-- The ledgers of which not all that is there is published, or not under a key that signs by now; and where it was
-- refused to, lest it be refused for ever.
SELECT l.ledger_id
FROM ledger.ledgers AS l
LEFT JOIN ledger.logs AS g ON g.ledger_id = l.ledger_id
WHERE l.size <> coalesce(g.published_size, 0)
    OR g.size > 0 AND NOT coalesce(starts_with(g.published, g.signed), false)
    OR g.size > 0 AND NOT %(keys)s::bigint[] <@ g.signed_by
    OR g.refused IS NOT NULL
    OR %(all)s AND l.size > 0
