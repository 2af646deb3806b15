-- name: write
audit_rows AS (
    INSERT INTO audit.segments (ledger_id, first, recorded_ats, terms)
    SELECT a.ledger_id, s.first, s.recorded_ats::timestamptz[], s.terms
    FROM advanced AS a, unnest(%(audit_firsts)s, %(audit_times)s, %(audit_terms)s) AS s (first, recorded_ats, terms)
    WHERE a.view = 'audit'
)
