-- name: find
-- The nearest segments with an event that has all the terms, in one span: where they begin, and of their terms those
-- asked for (which get weight A) and, where it is wanted, those that are counted (B, see segments.py), which may be
-- hundreds. Nothing but the terms may choose the plan: the planner knows neither how rare they are nor that they name
-- the ledger and the span, and with an ORDER BY in sight it would walk the primary key and filter. OFFSET 0 keeps it
-- from looking inside.
SELECT nearest.first, tsvectorsend(ts_filter(setweight(nearest.terms, 'A', %(asked)s), %(weights)s::"char"[]))
FROM (
    SELECT found.first, found.terms
    FROM (
        SELECT ledger_id, first, recorded_ats, terms FROM {table} WHERE terms @@ %(query)s::tsquery OFFSET 0
    ) AS found
    WHERE found.ledger_id = %(ledger_id)s
    AND found.first + cardinality(found.recorded_ats) > %(first)s AND found.first < %(end)s
    ORDER BY found.first {direction} LIMIT %(limit)s
) AS nearest
ORDER BY nearest.first {direction}

-- name: end
-- One past the last position in the view.
SELECT coalesce(max(position), 0) + 1 FROM (
    SELECT first + cardinality(recorded_ats) - 1 AS position FROM {table}
    WHERE ledger_id = %(ledger_id)s
    ORDER BY first DESC LIMIT 1
) AS last

-- name: end_before
-- One past the last position recorded before a time, by halving: times never decrease within a ledger, so no
-- index on them is needed. Segments below `low` began before, those from `high` on did not; of the last that did, the
-- times say how far.
WITH RECURSIVE halves (low, high) AS (
    SELECT 1::bigint, coalesce(max(first), 0) + 1 FROM {table} WHERE ledger_id = %(ledger_id)s
    UNION ALL
    SELECT
        CASE WHEN probe.began < %(time)s THEN probe.first + 1 ELSE halves.low END,
        CASE WHEN probe.began < %(time)s THEN halves.high ELSE (halves.low + halves.high) / 2 END
    FROM halves CROSS JOIN LATERAL (
        SELECT first, recorded_ats[1] AS began FROM {table}
        WHERE ledger_id = %(ledger_id)s AND first >= (halves.low + halves.high) / 2
        ORDER BY first LIMIT 1
    ) AS probe
    WHERE halves.low < halves.high
)
SELECT coalesce(max(first + before), 1) FROM (
    SELECT first, (SELECT count(*) FROM unnest(recorded_ats) AS recorded_at WHERE recorded_at < %(time)s) AS before
    FROM {table}
    WHERE ledger_id = %(ledger_id)s AND first = (SELECT low - 1 FROM halves WHERE low >= high)
) AS last
