-- name: prepare
-- What pgbench takes its positions from: in order, as ours are.
CREATE SCHEMA bench CREATE SEQUENCE position;
GRANT USAGE ON SCHEMA bench TO muniment_api;
GRANT USAGE ON SEQUENCE bench.position TO muniment_api

-- name: rows
-- The rows of the mix, one kind after the other.
SELECT e.type, e.stream_version, e.entry, e.leaf, c.principal, c.fingerprint, c.type, c.status
FROM ledger.events e
JOIN ledger.commands c ON c.ledger_id = e.ledger_id AND c.first_position = e.position
ORDER BY e.type, position('$sealed'::bytea IN e.entry) > 0, e.position

-- name: uuid7
uuidv7()

-- name: uuid7_before_18
-- RFC 9562 s5.7: the time in front of what gen_random_uuid() makes.
encode(overlay(uuid_send(gen_random_uuid()) placing substring(int8send(floor(extract(epoch FROM clock_timestamp())
    * 1000)::bigint) FROM 3) FROM 1 FOR 6), 'hex')::uuid

-- name: insert_one
-- One event and its command: the least that PostgreSQL can do and have both.
WITH place AS MATERIALIZED (
    SELECT nextval('bench.position') AS position, {uuid7} AS stream
), event AS (
    INSERT INTO ledger.events (ledger_id, position, stream_id, stream_version, type, entry, leaf)
    SELECT {ledger}, position, stream, {version}, {type}, {entry}, {leaf} FROM place
)
INSERT INTO ledger.commands
    (ledger_id, principal, command_id, fingerprint, type, target, status, first_position, event_count, seen_position)
SELECT {ledger}, {principal}, {uuid7}::text, {fingerprint}, {command}, stream, {status}, position, 1, position FROM place;

-- name: insert_many
-- A thousand of them in one statement.
WITH kind (n, type, version, entry, leaf, principal, fingerprint, command, status) AS MATERIALIZED (
    VALUES {rows}
), place AS MATERIALIZED (
    SELECT i % {kinds} AS n, nextval('bench.position') AS position, {uuid7} AS stream, {uuid7}::text AS id
    FROM generate_series(1, {count}) AS i
), event AS (
    INSERT INTO ledger.events (ledger_id, position, stream_id, stream_version, type, entry, leaf)
    SELECT {ledger}, position, stream, version, type, entry, leaf FROM place JOIN kind USING (n)
)
INSERT INTO ledger.commands
    (ledger_id, principal, command_id, fingerprint, type, target, status, first_position, event_count, seen_position)
SELECT {ledger}, principal, id, fingerprint, command, stream, status, position, 1, position FROM place JOIN kind USING (n);
