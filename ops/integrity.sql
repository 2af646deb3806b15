-- name: ledgers
-- Every ledger, and where its last event really stands; one statement, so that both are of one moment.
SELECT
    l.ledger_id, l.project_id, l.is_foreign, l.size, l.last_recorded_at,
    coalesce((SELECT max(e.position) FROM ledger.events AS e WHERE e.ledger_id = l.ledger_id), 0),
    coalesce(l.epoch, l.ledger_id)
FROM ledger.ledgers AS l
ORDER BY l.project_id

-- name: events
-- The next events as they are stored, each with where the one before it in its stream stands.
SELECT e.position, e.stream_id, e.stream_version, e.type, e.entry, e.leaf, p.data, b.position
FROM ledger.events AS e
LEFT JOIN ledger.payloads AS p ON p.ledger_id = e.ledger_id AND p.position = e.position
LEFT JOIN ledger.events AS b
    ON b.ledger_id = e.ledger_id AND b.stream_id = e.stream_id AND b.stream_version = e.stream_version - 1
WHERE e.ledger_id = %(ledger_id)s AND e.position > %(after)s AND e.position <= %(size)s
ORDER BY e.position
LIMIT %(limit)s

-- name: commands
-- How many events the commands of a ledger say that they made, and how many say what cannot be.
SELECT
    coalesce(sum(event_count), 0)::bigint,
    count(*) FILTER (WHERE event_count < 0 OR (first_position = 0) <> (event_count = 0) OR seen_position > %(size)s)
FROM ledger.commands
WHERE ledger_id = %(ledger_id)s AND first_position + event_count - 1 <= %(size)s
