-- name: save
INSERT INTO records (ledger_id, position, recorded_at, terms)
SELECT %(ledger_id)s, r.position, r.recorded_at::timestamptz, r.terms
FROM unnest(%(positions)s, %(recorded_ats)s, %(terms)s) AS r (position, recorded_at, terms)
