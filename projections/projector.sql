-- name: behind
-- The ledgers in which some view has not come to the end, but for what is parked.
SELECT l.ledger_id FROM ledger.ledgers AS l
WHERE l.size > 0 AND NOT l.is_foreign AND (
    SELECT count(*) FROM projections.positions AS p
    WHERE p.ledger_id = l.ledger_id AND p.view = ANY(%(views)s)
    AND (p.position = l.size OR p.parked_position IS NOT NULL)
) < cardinality(%(views)s)

-- name: begin
-- A place for each view in a ledger that the projector has not met. A foreign ledger has none: its events are
-- not ours to read.
INSERT INTO projections.positions (view, ledger_id)
SELECT v.view, l.ledger_id FROM ledger.ledgers AS l CROSS JOIN unnest(%(views)s::text[]) AS v (view)
WHERE l.ledger_id = %(ledger_id)s AND NOT l.is_foreign
ON CONFLICT DO NOTHING

-- name: places
-- A schema's number stays with it when it is renamed; a view without a schema has none.
SELECT view, position, parked_position IS NOT NULL, coalesce(to_regnamespace(view)::oid::bigint, 0)
FROM projections.positions WHERE ledger_id = %(ledger_id)s AND view = ANY(%(views)s)

-- name: read
-- The next events, so many or so large at most, and one at least. octet_length does not read what is stored out
-- of line.
SELECT position, type, entry, data FROM (
    SELECT
        e.position, e.type, e.entry, p.data,
        sum(octet_length(e.entry) + coalesce(octet_length(p.data), 0)) OVER before AS bytes_before
    FROM (
        SELECT ledger_id, position, type, entry FROM ledger.events
        WHERE ledger_id = %(ledger_id)s::uuid AND position > %(after)s::bigint
        ORDER BY position LIMIT %(limit)s::bigint
    ) AS e
    LEFT JOIN ledger.payloads AS p ON p.ledger_id = e.ledger_id AND p.position = e.position
    WINDOW before AS (ORDER BY e.position ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
) AS next
WHERE (bytes_before < %(bytes)s::bigint) IS NOT FALSE
ORDER BY position

-- name: advance
-- The one write, completed by what each view writes. A view is moved on only from where this projector believes it
-- to be, and only in the schema that it believes to be the view's; all its rows follow from that: where another
-- projector has been quicker, or the view was switched, nothing is written. The row's lock makes one projector wait
-- for the other, and the table's for a switch: it has this statement planned again, and so find the names as they
-- are after it (rebuild.py). The transaction need not reach the disk before it ends: what a crash
-- takes back, it takes back together.
WITH advanced AS (
    UPDATE projections.positions
    SET position = %(reached)s::bigint, parked_position = NULL, parked_reason = NULL, parked_at = NULL, updated_at = now()
    WHERE ledger_id = %(ledger_id)s::uuid AND view = ANY(%(views)s::text[]) AND position = %(expected)s::bigint
    AND coalesce(to_regnamespace(view)::oid::bigint, 0) = ANY(%(schemas)s::bigint[])
    RETURNING view, ledger_id, set_config('synchronous_commit', 'off', true)
)

-- name: advanced
SELECT count(*) FROM advanced

-- name: park
UPDATE projections.positions
SET parked_position = position + 1, parked_reason = %(reason)s, parked_at = coalesce(parked_at, now())
WHERE ledger_id = %(ledger_id)s::uuid AND view = %(view)s AND position = %(expected)s::bigint
AND coalesce(to_regnamespace(view)::oid::bigint, 0) = %(schema)s

-- name: pass_over
-- Leave out the next event, if an operator said that this view may.
UPDATE projections.positions
SET position = position + 1, parked_position = NULL, parked_reason = NULL, parked_at = NULL, updated_at = now()
WHERE ledger_id = %(ledger_id)s AND view = %(view)s AND position = %(expected)s
AND coalesce(to_regnamespace(view)::oid::bigint, 0) = %(schema)s AND EXISTS (
    SELECT FROM projections.skips AS s
    WHERE s.view = %(skipped_by)s AND s.ledger_id = %(ledger_id)s AND s.position = %(expected)s + 1
)

-- name: parked
SELECT DISTINCT ledger_id FROM projections.positions WHERE view = ANY(%(views)s) AND parked_position IS NOT NULL
