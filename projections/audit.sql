-- name: write
audit_rows AS (
    INSERT INTO audit.segments (ledger_id, first, recorded_ats, terms)
    SELECT a.ledger_id, s.first, s.recorded_ats::timestamptz[], s.terms
    FROM advanced AS a, unnest(%(audit_firsts)s::bigint[], %(audit_times)s::text[], %(audit_terms)s::tsvector[])
        AS s (first, recorded_ats, terms)
    WHERE a.view = 'audit'
)
