-- name: server
SELECT current_user, rolsuper, pg_is_in_recovery(), current_setting('transaction_read_only') = 'on',
    pg_database_size(current_database())
FROM pg_roles WHERE rolname = current_user

-- name: invalid_indexes
-- What a CREATE INDEX CONCURRENTLY that was cut short leaves: kept up by every write, used by no query.
SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid

-- name: role_settings
-- What the migrations set on the roles, and a copy of the database alone leaves behind.
SELECT rolname, coalesce(rolconfig, '{}') FROM pg_roles WHERE rolname = ANY(%(roles)s)

-- name: rights
-- What these roles may do to what was recorded, where they should not. Some columns of some tables they may update.
SELECT r.rolname, t.name, string_agg(p.name, ', ' ORDER BY p.name)
FROM pg_roles AS r
CROSS JOIN (
    VALUES ('ledger.events', '{}'::text[]), ('ledger.payloads', '{}'), ('ledger.commands', '{}'),
        ('ledger.ledgers', '{muniment_api,muniment_worker}'), ('ledger.logs', '{muniment_worker}'),
        ('ledger.tiles', '{muniment_worker}'), ('ledger.log_keys', '{muniment_worker}'),
        ('keys.data_keys', '{muniment_api,muniment_worker}')
) AS t (name, updated_by)
CROSS JOIN unnest(ARRAY['UPDATE', 'DELETE', 'TRUNCATE']) AS p (name)
WHERE r.rolname = ANY(%(roles)s) AND to_regclass(t.name) IS NOT NULL
    AND NOT (p.name = 'UPDATE' AND r.rolname = ANY(t.updated_by)) AND (
        has_table_privilege(r.rolname, to_regclass(t.name), p.name)
        OR p.name = 'UPDATE' AND has_any_column_privilege(r.rolname, to_regclass(t.name), 'UPDATE')
    )
GROUP BY r.rolname, t.name
ORDER BY r.rolname, t.name

-- name: triggers
-- The triggers that refuse changes, where they are missing or do not fire.
SELECT t.name, t.trigger, g.tgname IS NOT NULL
FROM (
    VALUES ('ledger.events', 'append_only'), ('ledger.payloads', 'append_only'), ('ledger.commands', 'append_only'),
        ('ledger.ledgers', 'kept'), ('ledger.logs', 'kept'), ('ledger.logs', 'only_grows'), ('ledger.tiles', 'kept'),
        ('ledger.tiles', 'only_grows'), ('ledger.log_keys', 'kept'), ('ledger.log_keys', 'only_retired'),
        ('keys.data_keys', 'kept'), ('keys.data_keys', 'only_erased')
) AS t (name, trigger)
LEFT JOIN pg_trigger AS g ON g.tgrelid = to_regclass(t.name) AND g.tgname = t.trigger AND NOT g.tgisinternal
WHERE to_regclass(t.name) IS NOT NULL AND coalesce(g.tgenabled NOT IN ('O', 'A'), true)
ORDER BY t.name, t.trigger

-- name: durability
SELECT name, setting FROM pg_settings
WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit', 'data_checksums', 'synchronous_standby_names')

-- name: commit_settings
-- Where a role, a database or both together are told to commit in another way.
SELECT coalesce(r.rolname, 'every role'), substr(c.entry, length('synchronous_commit=') + 1)
FROM pg_db_role_setting AS s
LEFT JOIN pg_roles AS r ON r.oid = s.setrole
LEFT JOIN pg_database AS d ON d.oid = s.setdatabase
CROSS JOIN unnest(s.setconfig) AS c (entry)
WHERE starts_with(c.entry, 'synchronous_commit=') AND (s.setdatabase = 0 OR d.datname = current_database())
    AND (s.setrole = 0 OR r.rolname = ANY(%(roles)s))

-- name: latest
-- The ledger that has the latest time of all.
SELECT project_id, last_recorded_at FROM ledger.ledgers ORDER BY last_recorded_at DESC LIMIT 1

-- name: project_keys
SELECT project_id, key_id FROM keys.project_keys ORDER BY project_id

-- name: logs
-- How far each log is published, and why it does not go on.
SELECT l.project_id, l.size - coalesce(g.published_size, 0), g.refused
FROM ledger.ledgers AS l
LEFT JOIN ledger.logs AS g ON g.ledger_id = l.ledger_id
WHERE l.size > 0
ORDER BY l.project_id

-- name: log_keys
-- How many keys sign.
SELECT count(*) FROM ledger.log_keys WHERE retired_at IS NULL
