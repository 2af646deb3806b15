-- name: write
event_rows AS (
    INSERT INTO audit.events (ledger_id, position, recorded_at, type, principal, terms)
    SELECT a.ledger_id, e.position, e.recorded_at::timestamptz, e.type, e.principal, e.terms
    FROM advanced AS a, unnest(
        %(event_positions)s, %(event_times)s, %(event_types)s, %(event_principals)s, %(event_terms)s
    ) AS e (position, recorded_at, type, principal, terms)
    WHERE a.view = 'audit'
)

-- name: count
-- Who did what, over all of a stretch.
SELECT type, principal, count(*) FROM (
    SELECT type, principal FROM audit.events
    WHERE ledger_id = %(ledger_id)s AND position >= %(first)s AND position < %(end)s
    ORDER BY position DESC LIMIT %(limit)s
) AS found
GROUP BY type, principal

-- name: count_found
-- Who did what, among those found; see `find` in terms.sql.
SELECT type, principal, count(*) FROM (
    SELECT type, principal FROM (
        SELECT ledger_id, position, type, principal FROM audit.events WHERE terms @@ %(query)s::tsquery OFFSET 0
    ) AS matching
    WHERE ledger_id = %(ledger_id)s AND position >= %(first)s AND position < %(end)s
    LIMIT %(limit)s
) AS found
GROUP BY type, principal
