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
