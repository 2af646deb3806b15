-- name: find_project_key
-- Which key the project began with.
SELECT key_id FROM keys.project_keys WHERE project_id = %(project_id)s

-- name: claim_project_key
-- The first process to open a project says which key it has; one that comes second changes nothing.
INSERT INTO keys.project_keys (project_id, key_id) VALUES (%(project_id)s, %(key_id)s)
ON CONFLICT (project_id) DO NOTHING

-- name: find_data_keys
-- Every key these subjects ever had, destroyed ones too.
SELECT subject, key, wrapped FROM keys.data_keys
WHERE project_id = %(project_id)s AND subject = ANY(%(subjects)s)

-- name: create_data_keys
-- Two processes that create the same keys agree on the first. Sorted, so that they wait for each other
-- in one order and never for ever.
INSERT INTO keys.data_keys (project_id, subject, key, wrapped)
SELECT %(project_id)s, new.subject, new.key, new.wrapped
FROM unnest(%(subjects)s::text[], %(numbers)s::integer[], %(wrapped)s::bytea[]) AS new (subject, key, wrapped)
ORDER BY new.subject
ON CONFLICT (project_id, subject, key) DO NOTHING
