-- What a proof is about: the parts of a build of a view, and how far each has come.

-- name: snapshot
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY

-- name: places
-- The projects of a build of a view; none where it is of another version than the code.
SELECT l.ledger_id, l.project_id FROM projections.positions AS p
JOIN projections.versions AS b ON b.view = p.view AND b.version = %(version)s
JOIN ledger.ledgers AS l ON l.ledger_id = p.ledger_id
WHERE p.view = %(schema)s AND (%(project)s::text IS NULL OR l.project_id = %(project)s)
ORDER BY l.project_id

-- name: place
-- As of the snapshot; and the number of the schema, as of now.
SELECT position, to_regnamespace(%(schema)s)::oid::bigint FROM projections.positions WHERE view = %(schema)s AND ledger_id = %(ledger_id)s

-- name: skips
SELECT position FROM projections.skips WHERE view = %(view)s AND ledger_id = %(ledger_id)s

-- name: last
SELECT stream_id FROM ledger.events WHERE ledger_id = %(ledger_id)s ORDER BY stream_id DESC LIMIT 1
