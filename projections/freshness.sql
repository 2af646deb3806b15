-- name: look
-- The head of each ledger, how far the view asked for has come in it, and whether its rows are known to be wrong.
SELECT
    a.view, a.ledger_id, coalesce(p.position, 0), coalesce(l.size, 0), p.parked_position IS NOT NULL,
    coalesce(d.drifted > 0, false)
FROM unnest(%(views)s, %(ledger_ids)s) AS a (view, ledger_id)
LEFT JOIN ledger.ledgers AS l ON l.ledger_id = a.ledger_id
LEFT JOIN projections.positions AS p ON p.view = a.view AND p.ledger_id = a.ledger_id
LEFT JOIN projections.verdicts AS d
ON d.view = a.view AND d.ledger_id = a.ledger_id AND d.schema = to_regnamespace(a.view)::oid::bigint

-- name: lag
-- By view: how many events are not in it yet; the projects it is parked in; how many values of it are wrong, and in
-- which projects; and for how long no proof says anything of that part of it for which this is longest.
SELECT
    v.view, sum(l.size - coalesce(p.position, 0))::bigint,
    coalesce(array_agg(l.project_id ORDER BY l.project_id) FILTER (WHERE p.parked_position IS NOT NULL), '{}'),
    coalesce(sum(d.drifted), 0)::bigint,
    coalesce(array_agg(l.project_id ORDER BY l.project_id) FILTER (WHERE d.drifted > 0), '{}'),
    coalesce(extract(epoch FROM now() - min(coalesce(d.verified_at, l.created_at)) FILTER (WHERE p.position > 0)), 0)::float8
FROM (SELECT u.view, to_regnamespace(u.view)::oid::bigint AS schema FROM unnest(%(views)s) AS u (view)) AS v
CROSS JOIN ledger.ledgers AS l
LEFT JOIN projections.positions AS p ON p.view = v.view AND p.ledger_id = l.ledger_id
LEFT JOIN projections.verdicts AS d ON d.view = v.view AND d.ledger_id = l.ledger_id AND d.schema = v.schema
WHERE NOT l.is_foreign
GROUP BY v.view

-- name: waiting
-- The first event that waits, where some do; of very many ledgers, those whose view has not moved for longest.
SELECT b.view, e.entry
FROM (
    SELECT v.view, l.ledger_id, coalesce(p.position, 0) + 1 AS position
    FROM unnest(%(views)s) AS v (view)
    CROSS JOIN ledger.ledgers AS l
    LEFT JOIN projections.positions AS p ON p.view = v.view AND p.ledger_id = l.ledger_id
    WHERE NOT l.is_foreign AND coalesce(p.position, 0) < l.size
    ORDER BY p.updated_at NULLS FIRST LIMIT 20
) AS b
JOIN ledger.events AS e ON e.ledger_id = b.ledger_id AND e.position = b.position

-- name: is_running
SELECT EXISTS (SELECT FROM projections.leases WHERE job = %(job)s AND until > now()), now()

-- name: log_lag
-- How many events no published checkpoint covers, and why logs do not go on.
SELECT
    coalesce(sum(greatest(l.size - coalesce(g.published_size, 0), 0)), 0)::bigint, count(g.refused),
    coalesce(array_agg(DISTINCT g.refused ORDER BY g.refused) FILTER (WHERE g.refused IS NOT NULL), '{}')
FROM ledger.ledgers AS l
LEFT JOIN ledger.logs AS g ON g.ledger_id = l.ledger_id

-- name: log_waiting
-- As `waiting`, of the logs.
SELECT e.entry
FROM (
    SELECT l.ledger_id, coalesce(g.published_size, 0) + 1 AS position
    FROM ledger.ledgers AS l
    LEFT JOIN ledger.logs AS g ON g.ledger_id = l.ledger_id
    WHERE coalesce(g.published_size, 0) < l.size
    ORDER BY g.published_at NULLS FIRST LIMIT 20
) AS b
JOIN ledger.events AS e ON e.ledger_id = b.ledger_id AND e.position = b.position
