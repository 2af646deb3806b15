-- The views: how far each has come, which worker does what, and a schema for each view.
-- Why: everything here is disposable. A view is one schema that the worker owns, so that it can fill another
-- beside it and swap their names; what may read it is granted by default, also to a schema made later.
-- Locks: none on existing tables.

-- The worker too runs statements over arrays, whose plans never depend on the values.
ALTER ROLE muniment_worker SET plan_cache_mode = force_generic_plan;
-- Whatever the API reads has its index. A plan made while a table was small is kept until the table is next
-- analyzed: it must not be one that reads the whole of it.
ALTER ROLE muniment_api SET enable_seqscan = off;

DO $$
BEGIN
    -- To make things in another role's name, one must be a member of it; a superuser is of every one.
    IF NOT pg_has_role(current_user, 'muniment_worker', 'MEMBER') THEN
        EXECUTE format('GRANT muniment_worker TO %I', current_user);
    END IF;
END
$$;

CREATE SCHEMA projections;
GRANT USAGE ON SCHEMA projections TO muniment_api;

-- How far each view has come in each ledger. It is saved in the transaction of the rows it speaks of.
-- A parked part stands before an event that cannot be projected. The low fillfactor keeps updates heap-only.
CREATE TABLE projections.positions (
    view text NOT NULL,
    ledger_id uuid NOT NULL,
    position bigint NOT NULL DEFAULT 0,
    parked_position bigint,
    parked_reason text,
    parked_at timestamptz,
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (view, ledger_id)
) WITH (fillfactor = 10, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0);

-- One runner a job among any number of workers: a row, since an advisory lock is lost behind a pooler.
CREATE TABLE projections.leases (
    job text PRIMARY KEY,
    holder text NOT NULL,
    fence bigint NOT NULL,
    until timestamptz NOT NULL
) WITH (fillfactor = 10, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0);

GRANT SELECT ON projections.positions, projections.leases TO muniment_api;
GRANT INSERT, UPDATE, DELETE ON projections.positions, projections.leases TO muniment_worker;

ALTER DEFAULT PRIVILEGES FOR ROLE muniment_worker GRANT USAGE ON SCHEMAS TO muniment_api;
ALTER DEFAULT PRIVILEGES FOR ROLE muniment_worker GRANT SELECT ON TABLES TO muniment_api;

CREATE SCHEMA sessions AUTHORIZATION muniment_worker;
CREATE SCHEMA records AUTHORIZATION muniment_worker;
CREATE SCHEMA audit AUTHORIZATION muniment_worker;
-- Default privileges speak of what a role makes itself; these three were made in its name.
GRANT USAGE ON SCHEMA sessions, records, audit TO muniment_api;

SET LOCAL ROLE muniment_worker;

-- One row a session: the whole state as its exact bytes, and beside it what lists are filtered and sorted by.
-- `position` is that of the event that opened it. State changes alone touch an index.
CREATE TABLE sessions.sessions (
    ledger_id uuid NOT NULL,
    session_id uuid NOT NULL,
    position bigint NOT NULL,
    opened_at timestamptz NOT NULL,
    expires_at timestamptz NOT NULL,
    state text NOT NULL,
    agent_role text NOT NULL,
    session bytea NOT NULL,
    PRIMARY KEY (ledger_id, session_id)
) WITH (fillfactor = 50);
CREATE INDEX sessions_by_time ON sessions.sessions (ledger_id, opened_at, position);
CREATE INDEX sessions_by_state ON sessions.sessions (ledger_id, state, opened_at, position);
CREATE INDEX sessions_by_role ON sessions.sessions (ledger_id, agent_role, opened_at, position);
-- The commonest pair of filters. One of the two alone can be a small part of the other: read in order and
-- filtered, a rare state of a common role would cost the whole role.
CREATE INDEX sessions_by_role_and_state ON sessions.sessions (ledger_id, agent_role, state, opened_at, position);
-- The sweeper's: over all ledgers, since time runs out in all of them alike.
CREATE INDEX sessions_due ON sessions.sessions (expires_at) WHERE state IN ('pending', 'active');

-- The labels of each session, with what else a list may be filtered by: a label that every session has, and a
-- state that few are in, would else be looked for session by session.
CREATE TABLE sessions.labels (
    ledger_id uuid NOT NULL,
    key text NOT NULL,
    value text NOT NULL,
    opened_at timestamptz NOT NULL,
    position bigint NOT NULL,
    session_id uuid NOT NULL,
    state text NOT NULL,
    agent_role text NOT NULL,
    PRIMARY KEY (ledger_id, key, value, opened_at, position)
);
CREATE INDEX labels_by_state ON sessions.labels (ledger_id, key, value, state, opened_at, position);

-- One row for up to 256 events in a row: the terms that records are found by, with which of these events has each
-- (projections/segments.py), and when all of them were recorded. The ledger holds the records.
CREATE TABLE records.segments (
    ledger_id uuid NOT NULL,
    first bigint NOT NULL,
    recorded_ats timestamptz [] NOT NULL,
    terms tsvector NOT NULL,
    PRIMARY KEY (ledger_id, first)
);
-- To compress a segment costs more than to write it, and a list of pending entries more than it saves.
ALTER TABLE records.segments ALTER terms SET STORAGE EXTERNAL;
CREATE INDEX segments_by_term ON records.segments USING gin (terms) WITH (fastupdate = off);

-- The same of every event, the words of its text among its terms.
CREATE TABLE audit.segments (
    ledger_id uuid NOT NULL,
    first bigint NOT NULL,
    recorded_ats timestamptz [] NOT NULL,
    terms tsvector NOT NULL,
    PRIMARY KEY (ledger_id, first)
);
ALTER TABLE audit.segments ALTER terms SET STORAGE EXTERNAL;
CREATE INDEX segments_by_term ON audit.segments USING gin (terms) WITH (fastupdate = off);

RESET ROLE;
