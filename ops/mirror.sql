-- What a mirror has besides the tree.

-- name: beside
-- The positions up to a size, after another, whose data stands beside the entry.
SELECT position FROM ledger.payloads
WHERE ledger_id = %(ledger_id)s AND position > %(after)s AND position <= %(size)s
ORDER BY position

-- name: payload
SELECT data FROM ledger.payloads WHERE ledger_id = %(ledger_id)s AND position = %(position)s
