-- name: begin
-- One rebuild of a view at a time: who comes second waits for this row, and then finds it taken. A request is done
-- once, and never after a later one.
INSERT INTO projections.rebuilds AS r (view, state, asked_by, reason, request)
VALUES (%(view)s, 'filling', %(asked_by)s, %(reason)s, %(request)s)
ON CONFLICT (view) DO UPDATE SET
    number = r.number + 1, state = 'filling', asked_by = excluded.asked_by, reason = excluded.reason, began_at = now(),
    ended_at = NULL, ended_because = NULL, code_version = NULL, heads_digest = NULL, rows_compared = NULL, digest = NULL,
    request = excluded.request
WHERE r.state NOT IN ('filling', 'comparing') AND (excluded.request <= r.request) IS NOT TRUE
RETURNING number

-- name: versions
SELECT view, version FROM projections.versions

-- name: set_version
INSERT INTO projections.versions (view, version) VALUES (%(schema)s, %(version)s)

-- name: begin_again
-- Whatever asked for it: what was made so far is of no use.
UPDATE projections.rebuilds SET
    number = number + 1, state = 'filling', began_at = now(),
    code_version = NULL, heads_digest = NULL, rows_compared = NULL, digest = NULL
WHERE view = %(view)s AND state IN ('filling', 'comparing')

-- name: drop_places
WITH dropped AS (DELETE FROM projections.versions WHERE view = %(schema)s)
DELETE FROM projections.positions WHERE view = %(schema)s

-- name: make_schema
SELECT projections.make_schema(%(schema)s)

-- name: tables
-- Statements that make the tables of one schema in another, but for their indexes. LIKE leaves out how full pages are
-- to be, and what the planner is told of columns.
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
UNION ALL
SELECT format(
    'ALTER TABLE %%I.%%I ALTER COLUMN %%I SET (%%s)', %(new)s::text, c.relname, a.attname, array_to_string(a.attoptions, ', ')
)
FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND c.relkind = 'r' AND a.attoptions IS NOT NULL
UNION ALL
-- A release before this column does not write it: its workers are kept from what this one builds.
SELECT format('ALTER TABLE %%I.%%I ADD CONSTRAINT state_since_known CHECK (state_since IS NOT NULL)', %(new)s::text, c.relname)
FROM pg_attribute AS a JOIN pg_class AS c ON c.oid = a.attrelid JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE n.nspname = %(schema)s AND c.relkind = 'r' AND a.attname = 'state_since' AND NOT EXISTS (
    SELECT FROM pg_constraint AS known WHERE known.conrelid = c.oid AND known.conname = 'state_since_known'
)

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
    digest, request, to_regnamespace(view || '_old') IS NOT NULL
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

-- name: behind
-- The ledgers in which a view and a build of it are not at the same place.
SELECT ledger_id FROM projections.positions WHERE view IN (%(view)s, %(schema)s)
GROUP BY ledger_id HAVING count(*) < 2 OR min(position) <> max(position)
ORDER BY ledger_id

-- name: fail
UPDATE projections.rebuilds SET state = 'failed', ended_because = %(because)s, ended_at = now()
WHERE view = %(view)s AND number = %(number)s AND state IN ('filling', 'comparing')

-- name: cancel
UPDATE projections.rebuilds SET state = 'cancelled', ended_because = %(because)s, ended_at = now()
WHERE view = %(view)s AND state IN ('filling', 'comparing') AND (%(request)s::bigint = request) IS NOT FALSE

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
WITH renamed AS (UPDATE projections.versions SET view = %(new)s WHERE view = %(schema)s)
UPDATE projections.positions SET view = %(new)s WHERE view = %(schema)s

-- name: settle
-- What the views moved on in this transaction need not reach the disk at once; that they were switched must.
UPDATE projections.rebuilds
SET state = %(state)s, ended_because = %(because)s, ended_at = now(), request = coalesce(%(request)s::bigint, request)
WHERE view = %(view)s
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

-- name: skipped
SELECT EXISTS (
    SELECT FROM projections.skips AS s JOIN ledger.ledgers AS l ON l.ledger_id = s.ledger_id
    WHERE s.view = %(view)s AND l.project_id = %(project)s AND s.position = %(position)s
)

-- name: retry
-- The projector looks at it again.
UPDATE projections.positions AS p SET parked_position = NULL, parked_reason = NULL, parked_at = NULL
FROM ledger.ledgers AS l
WHERE l.ledger_id = p.ledger_id AND p.view = %(view)s AND p.parked_position IS NOT NULL
AND (%(project)s::text IS NULL OR l.project_id = %(project)s)
RETURNING l.project_id, p.position
