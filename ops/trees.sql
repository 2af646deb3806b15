-- What the logs of all ledgers signed, and what is stored of their trees.

-- name: logs
-- Every log, with the ledger that it is of, and the name that it should have.
SELECT g.ledger_id, l.project_id, l.size, d.name || '/' || coalesce(l.epoch, g.ledger_id)::text, g.origin, g.size, g.signed, g.published_size,
    g.published
FROM ledger.logs AS g
CROSS JOIN muniment.deployment AS d
LEFT JOIN ledger.ledgers AS l ON l.ledger_id = g.ledger_id
ORDER BY l.project_id

-- name: tiles
SELECT level, index, hashes FROM ledger.tiles WHERE ledger_id = %(ledger_id)s

-- name: unlogged
-- What should have a log by now, and has none that has signed anything: where a worker signs, it does within seconds.
-- Whose log was refused from the beginning has nothing signed either, and says why.
SELECT coalesce(l.project_id, t.ledger_id::text), coalesce(l.size, 0), t.ledger_id IS NOT NULL
FROM ledger.ledgers AS l
FULL JOIN (SELECT DISTINCT ledger_id FROM ledger.tiles) AS t ON t.ledger_id = l.ledger_id
WHERE NOT EXISTS (
    SELECT FROM ledger.logs AS g
    WHERE g.ledger_id = coalesce(l.ledger_id, t.ledger_id) AND (g.signed IS NOT NULL OR g.refused IS NOT NULL)
) AND (
    t.ledger_id IS NOT NULL
    OR l.size > 0 AND l.created_at < now() - interval '5 minutes' AND (
        EXISTS (SELECT FROM ledger.logs WHERE signed IS NOT NULL)
        OR EXISTS (SELECT FROM ledger.log_keys WHERE added_at < now() - interval '5 minutes')
    )
)
ORDER BY 1
