-- The event store: ledgers, their events, the commands that made them, and what decisions read besides.
-- Why: everything else in Muniment can be rebuilt from these tables, so nothing here is ever changed.
-- Locks: none on existing tables.

DO $$
BEGIN
    -- jit and custom plans halve the append, whose one statement always runs over arrays. A process that
    -- stops inside a transaction would hold its ledger's row: it is thrown out instead.
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'muniment_api') THEN
        CREATE ROLE muniment_api LOGIN;
        ALTER ROLE muniment_api SET jit = off;
        ALTER ROLE muniment_api SET plan_cache_mode = force_generic_plan;
        ALTER ROLE muniment_api SET idle_in_transaction_session_timeout = '10s';
        ALTER ROLE muniment_api SET statement_timeout = '30s';
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'muniment_worker') THEN
        CREATE ROLE muniment_worker LOGIN IN ROLE muniment_api;
        ALTER ROLE muniment_worker SET jit = off;
        ALTER ROLE muniment_worker SET idle_in_transaction_session_timeout = '60s';
    END IF;
END
$$;

CREATE SCHEMA ledger;
GRANT USAGE ON SCHEMA ledger TO muniment_api;

-- One row a project. `size` is the number of events, the position of the last one, and (its row lock held
-- to commit) what puts appends in order. A low fillfactor keeps the constant updates heap-only.
CREATE TABLE ledger.ledgers (
    ledger_id uuid PRIMARY KEY,
    project_id text NOT NULL UNIQUE,
    is_foreign boolean NOT NULL DEFAULT false,
    size bigint NOT NULL DEFAULT 0 CHECK (size >= 0),
    last_recorded_at timestamptz NOT NULL DEFAULT '0001-01-01 00:00:00+00',
    created_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 10, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0);

COMMENT ON COLUMN ledger.ledgers.is_foreign IS
'Written through the eventsourcing library: its events are opaque to Muniment, whose API never writes there.';

-- No foreign key to the ledger: every append inserts from the ledger's own row, and the check would cost
-- more than the insert.
CREATE TABLE ledger.events (
    ledger_id uuid NOT NULL,
    position bigint NOT NULL CHECK (position > 0),
    stream_id uuid NOT NULL,
    stream_version bigint NOT NULL CHECK (stream_version > 0),
    type text NOT NULL,
    entry bytea NOT NULL CHECK (octet_length(entry) < 65536),
    leaf bytea NOT NULL CHECK (octet_length(leaf) = 32),
    PRIMARY KEY (ledger_id, position),
    UNIQUE (ledger_id, stream_id, stream_version)
);

COMMENT ON COLUMN ledger.events.entry IS 'The exact bytes that are hashed. Never parsed and written back.';
COMMENT ON COLUMN ledger.events.leaf IS 'RFC 6962 s2.1: SHA-256(0x00 || entry).';

-- The data of an event too large to stand inside its entry, which carries its digest and length instead.
CREATE TABLE ledger.payloads (
    ledger_id uuid NOT NULL,
    position bigint NOT NULL,
    data bytea NOT NULL,
    PRIMARY KEY (ledger_id, position)
);

-- What every answered command did, for the life of the ledger. The answer itself is not stored: it is a
-- function of this row, the events it points to, and the target folded to `seen_position`.
CREATE TABLE ledger.commands (
    ledger_id uuid NOT NULL,
    principal text NOT NULL,
    command_id text NOT NULL,
    fingerprint bytea NOT NULL,
    type text NOT NULL,
    target uuid,
    status smallint NOT NULL,
    first_position bigint NOT NULL,
    event_count bigint NOT NULL,
    seen_position bigint NOT NULL,
    PRIMARY KEY (ledger_id, principal, command_id)
);

-- What is open under a session: its child sessions (later its tasks and approvals). Kept by the append,
-- so that a decision can trust it; rebuilt from the events if it were ever lost.
CREATE TABLE ledger.open_items (
    ledger_id uuid NOT NULL,
    item_id uuid NOT NULL,
    item_type text NOT NULL,
    session_id uuid NOT NULL,
    root_session_id uuid NOT NULL,
    PRIMARY KEY (ledger_id, item_id)
);
CREATE INDEX open_items_by_root ON ledger.open_items (ledger_id, root_session_id);

-- The application is not granted these; the triggers say so to an owner's slip of the hand as well.
CREATE FUNCTION ledger.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% on %.% is refused: the ledger is append-only', TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME
        USING ERRCODE = 'insufficient_privilege';
END
$$;

CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger.events
FOR EACH STATEMENT EXECUTE FUNCTION ledger.refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger.payloads
FOR EACH STATEMENT EXECUTE FUNCTION ledger.refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger.commands
FOR EACH STATEMENT EXECUTE FUNCTION ledger.refuse_change();
CREATE TRIGGER kept BEFORE DELETE OR TRUNCATE ON ledger.ledgers
FOR EACH STATEMENT EXECUTE FUNCTION ledger.refuse_change();

GRANT SELECT, INSERT ON ledger.ledgers, ledger.events, ledger.payloads, ledger.commands TO muniment_api;
GRANT UPDATE (size, last_recorded_at) ON ledger.ledgers TO muniment_api;
GRANT SELECT, INSERT, UPDATE, DELETE ON ledger.open_items TO muniment_api;
