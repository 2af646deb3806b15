-- name: write
record_rows AS (
    INSERT INTO records.segments (ledger_id, first, recorded_ats, terms)
    SELECT a.ledger_id, s.first, s.recorded_ats::timestamptz[], s.terms
    FROM advanced AS a, unnest(%(record_firsts)s::bigint[], %(record_times)s::text[], %(record_terms)s::tsvector[])
        AS s (first, recorded_ats, terms)
    WHERE a.view = 'records'
)
