-- name: rolled_back
-- The ledgers that what their log has signed contradicts: whose, what they are called, how many events they have.
SELECT l.project_id, coalesce(l.epoch, l.ledger_id), g.origin, l.is_foreign, l.size, g.contradicted_by,
    has_column_privilege('ledger.ledgers', 'epoch', 'UPDATE')
FROM ledger.logs AS g
JOIN ledger.ledgers AS l USING (ledger_id)
WHERE starts_with(g.contradicted_by, g.origin || E'\n')
ORDER BY l.project_id
