-- name: finish
-- Statements that make the indexes that one schema has and another does not, and count what is there. The name of the
-- table is the first thing in the definition of an index that comes after an ON.
SELECT statement FROM (
    SELECT
        1 AS turn,
        regexp_replace(pg_get_indexdef(i.indexrelid), format(' ON %%I\.', n.nspname), format(' ON %%I.', %(schema)s::text)) AS statement
    FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE n.nspname = %(view)s AND NOT EXISTS (
        SELECT FROM pg_class AS made WHERE made.relnamespace = to_regnamespace(%(schema)s) AND made.relname = c.relname
    )
    UNION ALL
    SELECT 2, format('ANALYZE %%I.%%I', %(schema)s::text, c.relname) FROM pg_class AS c
    WHERE c.relnamespace = to_regnamespace(%(schema)s) AND c.relkind = 'r'
) AS statements
ORDER BY turn, statement

-- name: one_processor
-- An index is to be made by one process alone: others are to be left to those who wait for answers.
SET LOCAL max_parallel_maintenance_workers = 0

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

-- name: compare
UPDATE projections.rebuilds SET state = 'comparing', code_version = %(code_version)s
WHERE view = %(view)s AND number = %(number)s AND state IN ('filling', 'comparing')

-- name: compared
UPDATE projections.rebuilds SET heads_digest = %(heads_digest)s, rows_compared = %(rows)s, digest = %(digest)s
WHERE view = %(view)s AND number = %(number)s AND state = 'comparing'
