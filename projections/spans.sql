-- Spans: when a thing was in which state, of states that it has left; the one that it is in stands in the view's row.
-- Queries of every view that keeps them: {view} is its schema, {thing} what the values are named by.

-- name: write
-- Never changed afterwards.
{thing}_span_rows AS (
    INSERT INTO {view}.spans (ledger_id, state, class, position, until, since, stream_id)
    SELECT a.ledger_id, s.state, s.class, s.position, s.until, s.since, s.stream_id
    FROM advanced AS a, unnest(
        %({thing}_span_states)s::text[], %({thing}_span_classes)s::smallint[], %({thing}_span_positions)s::bigint[],
        %({thing}_span_untils)s::bigint[], %({thing}_span_sinces)s::bigint[], %({thing}_span_ids)s::uuid[]
    ) AS s (state, class, position, until, since, stream_id)
    WHERE a.view = '{view}'
)

-- name: found
-- Of one class of spans, those that a position lies in. What ended after it, and less than 2^(class+1) after its thing
-- began, began in a range; and of those in the range that began last, all but what was not in this state yet are
-- wanted. The index has all of it, in the order of a list.
SELECT s.position, s.stream_id FROM {view}.spans AS s
WHERE s.ledger_id = %(ledger_id)s AND s.state = %(state)s AND s.class = c.class
AND s.position <= %(as_of)s::bigint AND s.position > %(as_of)s::bigint - (2::bigint << c.class)
AND s.until > %(as_of)s::bigint AND s.since <= %(as_of)s::bigint

-- name: after_asc
AND s.position > %(after)s

-- name: after_desc
AND s.position < %(after)s

-- name: by_asc
ORDER BY s.position LIMIT %(limit)s

-- name: by_desc
ORDER BY s.position DESC LIMIT %(limit)s

-- name: whole
-- Not taken apart: else all spans of the state would be gone through, class after class.
OFFSET 0

-- name: united
-- What was in a state as of a position: what is in it since ({rows}), and what was in it then ({spans}).
SELECT k.position, k.stream_id FROM (
    ({rows})
    UNION ALL
    SELECT found.position, found.stream_id
    FROM generate_series(0, %(classes)s::int) AS c (class) CROSS JOIN LATERAL ({spans}) AS found
) AS k

-- name: version
SELECT version FROM projections.versions WHERE view = %(schema)s
