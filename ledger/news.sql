-- name: announce
-- Tell whoever listens that ledgers grew. Sent on its own and seldom: a NOTIFY inside the append would put
-- every commit of the server in one queue. It need not be durable.
SELECT set_config('synchronous_commit', 'off', true), pg_notify('ledger', %(ledger_ids)s::text)

-- name: news
-- What came after a position, for those who wait: which of these streams grew, and whether there is work to offer.
-- Of very many events the last 10,000, by a scan of the primary key.
WITH later AS MATERIALIZED (
    SELECT e.stream_id, e.type FROM ledger.events AS e
    WHERE e.ledger_id = %(ledger_id)s::uuid
      AND e.position > COALESCE(%(after)s::bigint, (SELECT size - 1000 FROM ledger.ledgers WHERE ledger_id = %(ledger_id)s::uuid))
    ORDER BY e.position DESC LIMIT 10000
)
SELECT size,
       ARRAY(SELECT DISTINCT stream_id FROM later WHERE stream_id = ANY(%(stream_ids)s::uuid[])),
       EXISTS (SELECT FROM later WHERE type IN ('TaskSubmitted', 'TaskQueued', 'TaskResumed', 'TaskRedriven'))
FROM ledger.ledgers
WHERE ledger_id = %(ledger_id)s::uuid
