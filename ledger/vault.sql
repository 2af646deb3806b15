-- name: find_project_key
-- Which key the project began with.
SELECT key_id FROM keys.project_keys WHERE project_id = %(project_id)s

-- name: claim_project_key
-- The first process to open a project says which key it has; one that comes second changes nothing.
INSERT INTO keys.project_keys (project_id, key_id) VALUES (%(project_id)s, %(key_id)s)
ON CONFLICT (project_id) DO NOTHING

-- name: find_data_keys
-- Every key these subjects ever had, destroyed ones too.
SELECT subject, key, wrapped, retired FROM keys.data_keys
WHERE project_id = %(project_id)s::text AND subject = ANY(%(subjects)s::text[])

-- name: create_data_keys
-- Two processes that create the same keys agree on the first. Sorted, so that they wait for each other
-- in one order and never for ever.
INSERT INTO keys.data_keys (project_id, subject, key, wrapped)
SELECT %(project_id)s, new.subject, new.key, new.wrapped
FROM unnest(%(subjects)s::text[], %(numbers)s::integer[], %(wrapped)s::bytea[]) AS new (subject, key, wrapped)
ORDER BY new.subject
ON CONFLICT (project_id, subject, key) DO NOTHING

-- name: retire_data_keys
-- Nothing more is sealed under the keys that this subject has. Answers with the number of the last key that is retired;
-- one that is made meanwhile by another process is not seen, and not retired.
WITH retiring AS (
    UPDATE keys.data_keys SET retired = true
    WHERE project_id = %(project_id)s AND subject = %(subject)s AND NOT retired
    RETURNING key
)
SELECT coalesce(max(key), 0) FROM (
    SELECT key FROM retiring
    UNION ALL
    SELECT key FROM keys.data_keys WHERE project_id = %(project_id)s AND subject = %(subject)s AND retired
) AS retired

-- name: destroy_data_keys
-- For ever. In one order, so that two who destroy the same wait for each other and never in a circle. Retired too: after
-- a restore of older keys, they may not be. The last number stays taken, also where it came with no key in that restore:
-- else new keys would be counted from where the restored ones end, up to those that old values are sealed under.
WITH doomed AS (
    SELECT d.subject, d.key FROM keys.data_keys AS d
    JOIN unnest(%(subjects)s::text[], %(through)s::integer[]) AS erased (subject, through)
        ON d.subject = erased.subject AND d.key <= erased.through
    WHERE d.project_id = %(project_id)s AND d.wrapped IS NOT NULL
    ORDER BY d.subject, d.key FOR UPDATE OF d
), destroyed AS (
    UPDATE keys.data_keys AS k SET retired = true, wrapped = NULL FROM doomed
    WHERE k.project_id = %(project_id)s AND k.subject = doomed.subject AND k.key = doomed.key
    RETURNING k.subject
), taken AS (
    INSERT INTO keys.data_keys (project_id, subject, key, retired)
    SELECT %(project_id)s, erased.subject, erased.through, true
    FROM unnest(%(subjects)s::text[], %(through)s::integer[]) AS erased (subject, through)
    WHERE erased.through > 0 ORDER BY erased.subject
    ON CONFLICT (project_id, subject, key) DO NOTHING
)
SELECT subject FROM destroyed

-- name: find_retired
-- Keys that were retired and are there still: their erasure is being recorded, or whoever was to destroy them died.
SELECT DISTINCT project_id, subject FROM keys.data_keys WHERE retired AND wrapped IS NOT NULL
