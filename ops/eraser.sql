-- What was erased, by its events.

-- name: erased
-- The streams of subjects that were ever erased, some at a time. All their names begin alike (ledger/subjects.py), so this
-- is a range of the index; it asks no view, which may be behind or parked.
SELECT DISTINCT stream_id FROM ledger.events
WHERE ledger_id = %(ledger_id)s AND stream_id > %(after)s AND stream_id < %(end)s AND type = 'SubjectErased'
ORDER BY stream_id LIMIT %(limit)s
