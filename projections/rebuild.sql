-- name: begin
-- One rebuild of a view at a time: who comes second waits for this row, and then finds it taken.
INSERT INTO projections.rebuilds AS r (view, state, asked_by, reason) VALUES (%(view)s, 'filling', %(asked_by)s, %(reason)s)
ON CONFLICT (view) DO UPDATE SET
    number = r.number + 1, state = 'filling', asked_by = excluded.asked_by, reason = excluded.reason, began_at = now(),
    ended_at = NULL, ended_because = NULL, code_version = NULL, heads_digest = NULL, rows_compared = NULL, digest = NULL
WHERE r.state NOT IN ('filling', 'comparing')
RETURNING number

-- name: drop_places
DELETE FROM projections.positions WHERE view = %(schema)s

-- name: make_schema
SELECT projections.make_schema(%(schema)s)

-- name: tables
-- Statements that make the tables of one schema in another, but for their indexes. LIKE leaves out how full pages are
-- to be.
SELECT format(
    'CREATE TABLE %%I.%%I (LIKE %%I.%%I INCLUDING ALL EXCLUDING INDEXES)%%s', %(new)s::text, c.relname, n.nspname, c.relname,
    ' WITH (' || array_to_string(c.reloptions, ', ') || ')'
)
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND c.relkind = 'r'
UNION ALL
SELECT format('ALTER TABLE %%I.%%I ADD CONSTRAINT %%I %%s', %(new)s::text, c.relname, k.conname, pg_get_constraintdef(k.oid))
FROM pg_constraint AS k JOIN pg_class AS c ON c.oid = k.conrelid JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND k.contype IN ('p', 'u')

-- name: indexes
-- Statements that make the indexes that one schema has and another does not. The name of the table is the first thing
-- in such a definition that comes after an ON.
SELECT regexp_replace(pg_get_indexdef(i.indexrelid), format(' ON %%I\.', n.nspname), format(' ON %%I.', %(new)s::text))
FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND NOT EXISTS (
    SELECT FROM pg_class AS made WHERE made.relnamespace = to_regnamespace(%(new)s) AND made.relname = c.relname
)
ORDER BY c.relname

-- name: names
SELECT c.relname FROM pg_class AS c WHERE c.relnamespace = to_regnamespace(%(schema)s) AND c.relkind = 'r'

-- name: under_way
SELECT view, number FROM projections.rebuilds WHERE state IN ('filling', 'comparing') ORDER BY began_at

-- name: left_over
-- What a rebuild that was cancelled, failed, or was cut short after a roll-back leaves behind.
SELECT view FROM projections.rebuilds
WHERE state NOT IN ('filling', 'comparing') AND to_regnamespace(view || '_next') IS NOT NULL

-- name: state
SELECT state FROM projections.rebuilds WHERE view = %(view)s AND number = %(number)s

-- name: all
-- Each view's latest rebuild, and whether what it replaced is still there.
SELECT
    view, number, state, asked_by, reason, began_at, ended_at, ended_because, code_version, heads_digest, rows_compared,
    digest, to_regnamespace(view || '_old') IS NOT NULL
FROM projections.rebuilds

-- name: progress
-- By schema: how many events it has taken, of how many there are, and in how many projects it is parked.
SELECT p.view, sum(p.position)::bigint, count(p.parked_position),
    (SELECT coalesce(sum(size), 0)::bigint FROM ledger.ledgers WHERE NOT is_foreign)
FROM projections.positions AS p GROUP BY p.view

-- name: reached
SELECT l.project_id, p.position FROM projections.positions AS p
JOIN ledger.ledgers AS l ON l.ledger_id = p.ledger_id
WHERE p.view = %(view)s

-- name: missing
-- How many events a build has not taken that the view has.
SELECT coalesce(sum(greatest(l.position - coalesce(n.position, 0), 0)), 0)::bigint
FROM projections.positions AS l
LEFT JOIN projections.positions AS n ON n.ledger_id = l.ledger_id AND n.view = %(schema)s
WHERE l.view = %(view)s

-- name: stuck
-- Where a build cannot take an event that the view has.
SELECT g.project_id, n.parked_position, n.parked_reason
FROM projections.positions AS n
JOIN projections.positions AS l ON l.ledger_id = n.ledger_id AND l.view = %(view)s
JOIN ledger.ledgers AS g ON g.ledger_id = n.ledger_id
WHERE n.view = %(schema)s AND n.parked_position <= l.position
ORDER BY g.project_id LIMIT 1

-- name: behind
-- The ledgers in which a view and a build of it are not at the same place.
SELECT ledger_id FROM projections.positions WHERE view IN (%(view)s, %(schema)s)
GROUP BY ledger_id HAVING count(*) < 2 OR min(position) <> max(position)
ORDER BY ledger_id

-- name: compare
UPDATE projections.rebuilds SET state = 'comparing', code_version = %(code_version)s
WHERE view = %(view)s AND number = %(number)s AND state IN ('filling', 'comparing')

-- name: compared
UPDATE projections.rebuilds SET heads_digest = %(heads)s, rows_compared = %(rows)s, digest = %(digest)s
WHERE view = %(view)s AND number = %(number)s AND state = 'comparing'

-- name: fail
UPDATE projections.rebuilds SET state = 'failed', ended_because = %(because)s, ended_at = now()
WHERE view = %(view)s AND number = %(number)s AND state IN ('filling', 'comparing')

-- name: cancel
UPDATE projections.rebuilds SET state = 'cancelled', ended_because = %(because)s, ended_at = now()
WHERE view = %(view)s AND state IN ('filling', 'comparing')

-- name: take
-- This rebuild's row, until the transaction ends.
SELECT state FROM projections.rebuilds WHERE view = %(view)s FOR UPDATE

-- name: hold
-- No view moves until this transaction ends; who reads is not held up. Statements that wait for this lock are planned
-- again when they have it, and then find schemas by the names that they have by then.
LOCK TABLE projections.positions IN SHARE ROW EXCLUSIVE MODE

-- name: rename_schema
SELECT projections.rename_schema(%(schema)s, %(new)s)

-- name: rename_places
UPDATE projections.positions SET view = %(new)s WHERE view = %(schema)s

-- name: settle
-- What the views moved on in this transaction need not reach the disk at once; that they were switched must.
UPDATE projections.rebuilds SET state = %(state)s, ended_because = %(because)s, ended_at = now() WHERE view = %(view)s
RETURNING set_config('synchronous_commit', (SELECT reset_val FROM pg_settings WHERE name = 'synchronous_commit'), true)

-- name: parked
-- The parts of views that are stopped before an event.
SELECT p.view, l.project_id, p.parked_position, e.type, p.parked_at, p.parked_reason
FROM projections.positions AS p
JOIN ledger.ledgers AS l ON l.ledger_id = p.ledger_id
LEFT JOIN ledger.events AS e ON e.ledger_id = p.ledger_id AND e.position = p.parked_position
WHERE p.view = ANY(%(views)s) AND p.parked_position IS NOT NULL
ORDER BY p.view, l.project_id

-- name: skip
-- Only what is parked there: an event that a view can take cannot be left out.
INSERT INTO projections.skips (view, ledger_id, position, asked_by, reason)
SELECT p.view, p.ledger_id, p.parked_position, %(asked_by)s, %(reason)s
FROM projections.positions AS p JOIN ledger.ledgers AS l ON l.ledger_id = p.ledger_id
WHERE p.view = %(view)s AND l.project_id = %(project)s AND p.parked_position = %(position)s
ON CONFLICT (view, ledger_id, position) DO UPDATE
SET asked_by = excluded.asked_by, reason = excluded.reason, asked_at = now()

-- name: retry
-- The projector looks at it again.
UPDATE projections.positions AS p SET parked_position = NULL, parked_reason = NULL, parked_at = NULL
FROM ledger.ledgers AS l
WHERE l.ledger_id = p.ledger_id AND p.view = %(view)s AND p.parked_position IS NOT NULL
AND (%(project)s::text IS NULL OR l.project_id = %(project)s)
RETURNING l.project_id, p.position
