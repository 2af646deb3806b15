-- What was found of views: kept, looked up, and forgotten when what it is about is gone.

-- name: keep
-- Not over what was found by a proof that began later. Says whether it differs in anything new.
WITH before AS (
    SELECT drifted, drifts FROM projections.verdicts
    WHERE view = %(view)s AND ledger_id = %(ledger_id)s AND schema = %(schema)s
)
INSERT INTO projections.verdicts AS v (
    view, ledger_id, schema, position, code_version, row_count, digest, replay_digest, drifted, drifts, verified_at, seconds
) VALUES (
    %(view)s, %(ledger_id)s, %(schema)s, %(position)s, %(code_version)s, %(rows)s, %(digest)s, %(replay_digest)s,
    %(drifted)s, %(drifts)s::jsonb, clock_timestamp() - make_interval(secs => %(seconds)s), %(seconds)s
)
ON CONFLICT (view, ledger_id, schema) DO UPDATE SET
    position = excluded.position, code_version = excluded.code_version, row_count = excluded.row_count,
    digest = excluded.digest, replay_digest = excluded.replay_digest, drifted = excluded.drifted,
    drifts = excluded.drifts, verified_at = excluded.verified_at, seconds = excluded.seconds
WHERE v.verified_at <= excluded.verified_at
RETURNING (v.drifted, v.drifts) IS DISTINCT FROM (SELECT (b.drifted, b.drifts) FROM before AS b)

-- name: latest
-- What was last found of the builds that these schemas are now.
SELECT
    v.drifts::text, v.verified_at, v.seconds,
    v.view, l.project_id, v.ledger_id, v.position, v.code_version, v.schema, v.row_count, v.digest, v.replay_digest, v.drifted
FROM unnest(%(schemas)s::text[]) AS s (name)
JOIN projections.verdicts AS v
ON v.view = split_part(s.name, '_', 1) AND v.schema = to_regnamespace(s.name)::oid::bigint
JOIN ledger.ledgers AS l ON l.ledger_id = v.ledger_id
WHERE %(project)s::text IS NULL OR l.project_id = %(project)s
ORDER BY s.name, l.project_id

-- name: due
-- The parts of views that are to be proven again: first those that never were, then those that were longest ago. Of
-- another version than this code's, none.
SELECT p.view, l.project_id
FROM unnest(%(views)s::text[], %(versions)s::bigint[]) AS c (view, version)
JOIN projections.versions AS b ON b.view = c.view AND b.version = c.version
JOIN projections.positions AS p ON p.view = c.view
JOIN ledger.ledgers AS l ON l.ledger_id = p.ledger_id
LEFT JOIN projections.verdicts AS v
ON v.view = p.view AND v.ledger_id = p.ledger_id AND v.schema = to_regnamespace(p.view)::oid::bigint
WHERE (v.verified_at < now() - make_interval(secs => %(seconds)s)) IS NOT FALSE
ORDER BY v.verified_at NULLS FIRST, l.project_id, p.view LIMIT %(limit)s

-- name: forget
-- What is about a build that is not there any more.
DELETE FROM projections.verdicts AS v WHERE NOT EXISTS (SELECT FROM pg_namespace AS n WHERE n.oid = v.schema)
