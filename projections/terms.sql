-- name: page
-- A stretch of the ledger, without any term.
SELECT position FROM {table}
WHERE ledger_id = %(ledger_id)s AND position >= %(first)s AND position < %(end)s
ORDER BY position {direction} LIMIT %(limit)s

-- name: find
-- What has all the terms, in one span. Nothing but the terms may choose the plan: the planner knows neither
-- how rare they are nor that they name the ledger and the span, and with an ORDER BY in sight it would walk
-- the primary key and filter. OFFSET 0 keeps it from looking inside.
SELECT position FROM (
    SELECT ledger_id, position FROM {table} WHERE terms @@ %(query)s::tsquery OFFSET 0
) AS found
WHERE ledger_id = %(ledger_id)s AND position >= %(first)s AND position < %(end)s
ORDER BY position {direction} LIMIT %(limit)s

-- name: end
-- One past the last position in the view.
SELECT coalesce(max(position), 0) + 1 FROM {table} WHERE ledger_id = %(ledger_id)s

-- name: end_before
-- One past the last position recorded before a time, by halving: times never decrease within a ledger, so no
-- index on them is needed. Below `low` all were recorded before, from `high` on none.
WITH RECURSIVE halves (low, high) AS (
    SELECT 1::bigint, coalesce(max(position), 0) + 1 FROM {table} WHERE ledger_id = %(ledger_id)s
    UNION ALL
    SELECT
        CASE WHEN probe.recorded_at < %(time)s THEN probe.position + 1 ELSE halves.low END,
        CASE WHEN probe.recorded_at < %(time)s THEN halves.high ELSE (halves.low + halves.high) / 2 END
    FROM halves CROSS JOIN LATERAL (
        SELECT position, recorded_at FROM {table}
        WHERE ledger_id = %(ledger_id)s AND position >= (halves.low + halves.high) / 2
        ORDER BY position LIMIT 1
    ) AS probe
    WHERE halves.low < halves.high
)
SELECT low FROM halves WHERE low >= high
