-- Where a ledger was.

-- name: moved
-- When a ledger last moved, what time it is, and whether something is being appended that may not be seen yet: whoever
-- appends has locked the ledger's row until that is committed, and the row tells who locked it last.
SELECT last_recorded_at, clock_timestamp(), last_recorded_at <= %(time)s AND EXISTS (
    SELECT FROM pg_locks AS k WHERE k.locktype = 'transactionid' AND k.transactionid = l.xmax AND k.granted
)
FROM ledger.ledgers AS l WHERE ledger_id = %(ledger_id)s

-- name: find
-- The last position recorded at a time or before, by halving: times never decrease within a ledger, so no index on
-- them is needed. Up to `low` all were, from `high` on none. An entry holds its time as text of one width. A NUL, which an
-- entry may hold and PostgreSQL's json cannot, is read as another character: it is in no time.
WITH RECURSIVE halves (low, high) AS (
    SELECT CASE WHEN last_recorded_at <= %(time)s THEN size ELSE 0 END, size + 1
    FROM ledger.ledgers WHERE ledger_id = %(ledger_id)s
    UNION ALL
    SELECT
        CASE WHEN probe.was THEN probe.position ELSE halves.low END,
        CASE WHEN probe.was THEN halves.high ELSE probe.position END
    FROM halves CROSS JOIN LATERAL (
        SELECT position, (
            (replace(convert_from(entry, 'UTF8'), '\u0000', '\u0001')::json ->> 'recorded_at') COLLATE "C" <= %(stamp)s
        ) IS TRUE AS was
        FROM ledger.events WHERE ledger_id = %(ledger_id)s AND position = (halves.low + halves.high) / 2
    ) AS probe
    WHERE halves.high - halves.low > 1
)
SELECT halves.low FROM halves WHERE halves.high - halves.low = 1
