-- name: write
record_rows AS (
    INSERT INTO records.records (ledger_id, position, recorded_at, terms)
    SELECT a.ledger_id, r.position, r.recorded_at::timestamptz, r.terms
    FROM advanced AS a, unnest(%(record_positions)s, %(record_times)s, %(record_terms)s)
        AS r (position, recorded_at, terms)
    WHERE a.view = 'records'
)
