-- Which entries belong to what was asked for.

-- name: streams
-- All positions, up to a size, of the streams that these positions are of, and of others.
SELECT position FROM ledger.events
WHERE ledger_id = %(ledger_id)s AND position <= %(size)s AND stream_id IN (
    SELECT stream_id FROM ledger.events WHERE ledger_id = %(ledger_id)s AND position = ANY(%(positions)s)
    UNION ALL
    SELECT unnest(%(stream_ids)s)
)
ORDER BY position

-- name: adoptions
-- Where the log went on from an earlier one.
SELECT position FROM ledger.events
WHERE ledger_id = %(ledger_id)s AND stream_id = %(log)s AND position > %(after)s AND position <= %(size)s
ORDER BY position
