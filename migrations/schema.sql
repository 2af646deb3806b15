-- The sum of the migrations, written by `make schema` with PostgreSQL 18.

CREATE SCHEMA approvals;

CREATE SCHEMA audit;

CREATE SCHEMA keys;

CREATE SCHEMA ledger;

CREATE SCHEMA muniment;

CREATE SCHEMA projections;

CREATE SCHEMA records;

CREATE SCHEMA sessions;

CREATE SCHEMA tasks;

CREATE FUNCTION keys.refuse_change() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    IF TG_OP = 'UPDATE' THEN
        IF NEW.retired AND (NEW.wrapped IS NULL OR NEW.wrapped = OLD.wrapped)
            AND (NEW.project_id, NEW.subject, NEW.key, NEW.created_at)
                = (OLD.project_id, OLD.subject, OLD.key, OLD.created_at)
        THEN
            RETURN NEW;
        END IF;
    END IF;
    RAISE EXCEPTION '% on keys.data_keys is refused: a key is retired, then destroyed, and never comes back', TG_OP
        USING ERRCODE = 'insufficient_privilege';
END
$$;

CREATE FUNCTION ledger.keep_log() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    IF NEW.origin <> OLD.origin AND NEW.ledger_id = OLD.ledger_id AND NEW.size = OLD.size
        AND NEW.signed IS NULL AND NEW.published IS NULL AND OLD.contradicted_by IS NOT NULL
        AND EXISTS (
            SELECT FROM ledger.ledgers AS l CROSS JOIN muniment.deployment AS d
            WHERE l.ledger_id = NEW.ledger_id AND NEW.origin = d.name || '/' || l.epoch::text
        )
    THEN
        RETURN NEW;  -- another log: what the one before has signed is named by the ledger itself
    END IF;
    IF (NEW.ledger_id, NEW.origin) <> (OLD.ledger_id, OLD.origin)
        OR NEW.size < OLD.size
        OR NEW.published_size < OLD.published_size
        OR OLD.signed IS NOT NULL AND NEW.signed IS NULL
        OR NEW.size = OLD.size AND split_part(NEW.signed, E'\n\n', 1) <> split_part(OLD.signed, E'\n\n', 1)
        OR NEW.published_size = OLD.published_size
        AND split_part(NEW.published, E'\n\n', 1) <> split_part(OLD.published, E'\n\n', 1)
    THEN
        RAISE EXCEPTION 'the log % has signed another checkpoint: it only grows', OLD.origin
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NEW;
END
$$;

CREATE FUNCTION ledger.keep_log_key() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    IF (NEW.number, NEW.public, NEW.added_at) <> (OLD.number, OLD.public, OLD.added_at) OR OLD.retired_at IS NOT NULL
    THEN
        RAISE EXCEPTION 'the key % of the log may be retired once, and not change', OLD.number
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NEW;
END
$$;

CREATE FUNCTION ledger.keep_tile() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    IF (NEW.ledger_id, NEW.level, NEW.index) <> (OLD.ledger_id, OLD.level, OLD.index)
        OR substring(NEW.hashes FOR octet_length(OLD.hashes)) <> OLD.hashes
    THEN
        RAISE EXCEPTION 'tile %/% of ledger % may grow, and not change', OLD.level, OLD.index, OLD.ledger_id
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NEW;
END
$$;

CREATE FUNCTION ledger.refuse_change() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    RAISE EXCEPTION '% on %.% is refused: the ledger is append-only', TG_OP, TG_TABLE_SCHEMA, TG_TABLE_NAME
        USING ERRCODE = 'insufficient_privilege';
END
$$;

CREATE FUNCTION projections.make_schema(name text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
BEGIN
    IF name !~ '^[a-z]+_next$' THEN
        RAISE EXCEPTION 'no view is built in a schema called %', name USING ERRCODE = 'insufficient_privilege';
    END IF;
    EXECUTE format('CREATE SCHEMA %I AUTHORIZATION muniment_worker', name);
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO muniment_api', name);
END
$_$;

CREATE FUNCTION projections.rename_schema(name text, new_name text) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'pg_catalog', 'pg_temp'
    AS $_$
BEGIN
    IF new_name !~ '^[a-z]+(_next|_old)?$' OR split_part(name, '_', 1) <> split_part(new_name, '_', 1) OR NOT EXISTS (
        SELECT FROM pg_namespace WHERE nspname = name AND nspowner = 'muniment_worker'::regrole
    ) THEN
        RAISE EXCEPTION 'the schema % is not to be called %', name, new_name USING ERRCODE = 'insufficient_privilege';
    END IF;
    EXECUTE format('ALTER SCHEMA %I RENAME TO %I', name, new_name);
END
$_$;

CREATE TABLE approvals.approvals (
    ledger_id uuid NOT NULL,
    approval_id uuid NOT NULL,
    "position" bigint NOT NULL,
    state text NOT NULL,
    session_id uuid,
    task_id uuid,
    tool text NOT NULL,
    risk smallint NOT NULL,
    roles text[] NOT NULL,
    requester_issuer text NOT NULL,
    requester_sub text NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    due_at timestamp with time zone,
    approval bytea NOT NULL,
    state_since bigint
)
WITH (fillfactor='50');
ALTER TABLE ONLY approvals.approvals ALTER COLUMN state SET (n_distinct=10);
ALTER TABLE ONLY approvals.approvals ALTER COLUMN session_id SET (n_distinct=-0.1);
ALTER TABLE ONLY approvals.approvals ALTER COLUMN task_id SET (n_distinct=-0.1);
ALTER TABLE ONLY approvals.approvals ALTER COLUMN tool SET (n_distinct=1000);
ALTER TABLE ONLY approvals.approvals ALTER COLUMN risk SET (n_distinct=4);
ALTER TABLE ONLY approvals.approvals ALTER COLUMN requester_sub SET (n_distinct=1000);

CREATE TABLE approvals.spans (
    ledger_id uuid NOT NULL,
    stream_id uuid NOT NULL,
    since bigint NOT NULL,
    until bigint NOT NULL,
    "position" bigint NOT NULL,
    class smallint NOT NULL,
    state text NOT NULL
);

CREATE TABLE audit.segments (
    ledger_id uuid NOT NULL,
    first bigint NOT NULL,
    recorded_ats timestamp with time zone[] NOT NULL,
    terms tsvector NOT NULL
);
ALTER TABLE ONLY audit.segments ALTER COLUMN terms SET STORAGE EXTERNAL;

CREATE TABLE keys.data_keys (
    project_id text NOT NULL,
    subject text NOT NULL,
    key integer NOT NULL,
    wrapped bytea,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    retired boolean DEFAULT false NOT NULL,
    CONSTRAINT data_keys_key_check CHECK ((key > 0)),
    CONSTRAINT data_keys_subject_check CHECK ((subject ~ '^[0-9a-f]{32}$'::text)),
    CONSTRAINT data_keys_wrapped_check CHECK ((octet_length(wrapped) = 60))
)
WITH (autovacuum_vacuum_threshold='1', autovacuum_vacuum_scale_factor='0');

COMMENT ON COLUMN keys.data_keys.subject IS 'The pseudonym of the subject: an HMAC under the project key.';

COMMENT ON COLUMN keys.data_keys.wrapped IS 'Nonce, data key and tag (AES-256-GCM under the project key). Null: destroyed.';

COMMENT ON COLUMN keys.data_keys.retired IS 'Nothing more is sealed under it: an erasure of its subject was asked for.';

CREATE TABLE keys.project_keys (
    project_id text NOT NULL,
    key_id bytea NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    CONSTRAINT project_keys_key_id_check CHECK ((octet_length(key_id) = 16))
);

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
    seen_position bigint NOT NULL
);

CREATE TABLE ledger.events (
    ledger_id uuid NOT NULL,
    "position" bigint NOT NULL,
    stream_id uuid NOT NULL,
    stream_version bigint NOT NULL,
    type text NOT NULL,
    entry bytea NOT NULL,
    leaf bytea NOT NULL,
    CONSTRAINT events_entry_check CHECK ((octet_length(entry) < 65536)),
    CONSTRAINT events_leaf_check CHECK ((octet_length(leaf) = 32)),
    CONSTRAINT events_position_check CHECK (("position" > 0)),
    CONSTRAINT events_stream_version_check CHECK ((stream_version > 0))
);

COMMENT ON COLUMN ledger.events.entry IS 'The exact bytes that are hashed. Never parsed and written back.';

COMMENT ON COLUMN ledger.events.leaf IS 'RFC 6962 s2.1: SHA-256(0x00 || entry).';

CREATE TABLE ledger.ledgers (
    ledger_id uuid NOT NULL,
    project_id text NOT NULL,
    is_foreign boolean DEFAULT false NOT NULL,
    size bigint DEFAULT 0 NOT NULL,
    last_recorded_at timestamp with time zone DEFAULT '0001-01-01 00:00:00+00'::timestamp with time zone NOT NULL,
    created_at timestamp with time zone DEFAULT now() NOT NULL,
    epoch uuid,
    CONSTRAINT ledgers_size_check CHECK ((size >= 0))
)
WITH (fillfactor='10', autovacuum_vacuum_threshold='1000', autovacuum_vacuum_scale_factor='0');

COMMENT ON COLUMN ledger.ledgers.is_foreign IS 'Written through the eventsourcing library: its events are opaque to Muniment, whose API never writes there.';

COMMENT ON COLUMN ledger.ledgers.epoch IS 'The id by which the ledger is known outside, and its log, since it was adopted; null: as ledger_id, which is for here.';

CREATE TABLE ledger.log_keys (
    number bigint NOT NULL,
    public bytea NOT NULL,
    added_at timestamp with time zone NOT NULL,
    retired_at timestamp with time zone,
    CONSTRAINT log_keys_check CHECK ((retired_at >= added_at)),
    CONSTRAINT log_keys_number_check CHECK ((number > 0)),
    CONSTRAINT log_keys_public_check CHECK ((octet_length(public) = 32))
);

CREATE TABLE ledger.logs (
    ledger_id uuid NOT NULL,
    origin text NOT NULL,
    size bigint DEFAULT 0 NOT NULL,
    signed text,
    signed_by bigint[] DEFAULT '{}'::bigint[] NOT NULL,
    published_size bigint DEFAULT 0 NOT NULL,
    published text,
    published_at timestamp with time zone,
    refused text,
    contradicted_by text,
    CONSTRAINT logs_check CHECK (((published_size >= 0) AND (published_size <= size))),
    CONSTRAINT logs_check1 CHECK (((size > 0) OR (signed IS NULL))),
    CONSTRAINT logs_check2 CHECK (((published_size > 0) = ((published IS NOT NULL) AND (published_at IS NOT NULL))))
)
WITH (fillfactor='50', autovacuum_vacuum_threshold='1000', autovacuum_vacuum_scale_factor='0');

COMMENT ON COLUMN ledger.logs.signed IS 'C2SP signed-note: a checkpoint with the signatures of this log alone, by the keys numbered in signed_by.';

COMMENT ON COLUMN ledger.logs.contradicted_by IS 'A note that this log has signed, and that is no beginning of the ledger as it is: nothing more is signed.';

CREATE TABLE ledger.open_items (
    ledger_id uuid NOT NULL,
    item_id uuid NOT NULL,
    item_type text NOT NULL,
    session_id uuid,
    root_session_id uuid NOT NULL,
    task_id uuid,
    match bytea
);

COMMENT ON COLUMN ledger.open_items.root_session_id IS 'The topmost session above it; without a session its task, or what stands for its requester.';

COMMENT ON COLUMN ledger.open_items.match IS 'What another request for the same thing in the same session has as well.';

CREATE TABLE ledger.payloads (
    ledger_id uuid NOT NULL,
    "position" bigint NOT NULL,
    data bytea NOT NULL
);

CREATE TABLE ledger.tasks (
    ledger_id uuid NOT NULL,
    task_id uuid NOT NULL,
    kind text NOT NULL,
    session_id uuid,
    state text NOT NULL,
    rank timestamp with time zone NOT NULL,
    run_at timestamp with time zone NOT NULL,
    deadline_at timestamp with time zone,
    lease_id uuid,
    lease_until timestamp with time zone,
    holder text NOT NULL
)
WITH (fillfactor='70', autovacuum_vacuum_scale_factor='0.05');

COMMENT ON COLUMN ledger.tasks.rank IS 'When it may run, put forward by its priority: the order in which it is handed out.';

COMMENT ON COLUMN ledger.tasks.holder IS 'The principal whose lease it is; empty where it has none.';

CREATE TABLE ledger.tiles (
    ledger_id uuid NOT NULL,
    level smallint NOT NULL,
    index bigint NOT NULL,
    hashes bytea NOT NULL,
    CONSTRAINT tiles_hashes_check CHECK ((((octet_length(hashes) >= 32) AND (octet_length(hashes) <= 8192)) AND ((octet_length(hashes) % 32) = 0))),
    CONSTRAINT tiles_index_check CHECK ((index >= 0)),
    CONSTRAINT tiles_level_check CHECK (((level >= 1) AND (level <= 7)))
);
ALTER TABLE ONLY ledger.tiles ALTER COLUMN hashes SET STORAGE EXTERNAL;

CREATE TABLE muniment.deployment (
    only_row boolean DEFAULT true NOT NULL,
    name text NOT NULL,
    CONSTRAINT deployment_only_row_check CHECK (only_row)
);

CREATE TABLE muniment.migrations (
    name text NOT NULL,
    sha256 bytea NOT NULL,
    applied_at timestamp with time zone DEFAULT now() NOT NULL,
    phase text DEFAULT 'before'::text NOT NULL
);

CREATE TABLE projections.leases (
    job text NOT NULL,
    holder text NOT NULL,
    fence bigint NOT NULL,
    until timestamp with time zone NOT NULL
)
WITH (fillfactor='10', autovacuum_vacuum_threshold='1000', autovacuum_vacuum_scale_factor='0');

CREATE TABLE projections.positions (
    view text NOT NULL,
    ledger_id uuid NOT NULL,
    "position" bigint DEFAULT 0 NOT NULL,
    parked_position bigint,
    parked_reason text,
    parked_at timestamp with time zone,
    updated_at timestamp with time zone DEFAULT now() NOT NULL
)
WITH (fillfactor='10', autovacuum_vacuum_threshold='1000', autovacuum_vacuum_scale_factor='0');

CREATE TABLE projections.rebuilds (
    view text NOT NULL,
    number bigint DEFAULT 1 NOT NULL,
    state text NOT NULL,
    asked_by text NOT NULL,
    reason text NOT NULL,
    began_at timestamp with time zone DEFAULT now() NOT NULL,
    ended_at timestamp with time zone,
    ended_because text,
    code_version text,
    heads_digest text,
    rows_compared bigint,
    digest text,
    request bigint,
    CONSTRAINT rebuilds_state_check CHECK ((state = ANY (ARRAY['filling'::text, 'comparing'::text, 'switched'::text, 'rolled_back'::text, 'cancelled'::text, 'failed'::text])))
);

COMMENT ON COLUMN projections.rebuilds.request IS 'The version of the view, in the operators'' ledger, at which was asked for what made this state; null: nobody asked there.';

CREATE TABLE projections.skips (
    view text NOT NULL,
    ledger_id uuid NOT NULL,
    "position" bigint NOT NULL,
    asked_by text NOT NULL,
    reason text NOT NULL,
    asked_at timestamp with time zone DEFAULT now() NOT NULL
);

CREATE TABLE projections.verdicts (
    view text NOT NULL,
    ledger_id uuid NOT NULL,
    schema bigint NOT NULL,
    "position" bigint NOT NULL,
    code_version text NOT NULL,
    row_count bigint NOT NULL,
    digest text NOT NULL,
    replay_digest text NOT NULL,
    drifted bigint NOT NULL,
    drifts jsonb NOT NULL,
    verified_at timestamp with time zone NOT NULL,
    seconds double precision NOT NULL
);

CREATE TABLE projections.versions (
    view text NOT NULL,
    version bigint NOT NULL
);

CREATE TABLE records.segments (
    ledger_id uuid NOT NULL,
    first bigint NOT NULL,
    recorded_ats timestamp with time zone[] NOT NULL,
    terms tsvector NOT NULL
);
ALTER TABLE ONLY records.segments ALTER COLUMN terms SET STORAGE EXTERNAL;

CREATE TABLE sessions.labels (
    ledger_id uuid NOT NULL,
    key text NOT NULL,
    value text NOT NULL,
    opened_at timestamp with time zone NOT NULL,
    "position" bigint NOT NULL,
    session_id uuid NOT NULL,
    state text NOT NULL,
    agent_role text NOT NULL
);

CREATE TABLE sessions.sessions (
    ledger_id uuid NOT NULL,
    session_id uuid NOT NULL,
    "position" bigint NOT NULL,
    opened_at timestamp with time zone NOT NULL,
    expires_at timestamp with time zone NOT NULL,
    state text NOT NULL,
    agent_role text NOT NULL,
    session bytea NOT NULL,
    state_since bigint
)
WITH (fillfactor='50');
ALTER TABLE ONLY sessions.sessions ALTER COLUMN state SET (n_distinct=10);
ALTER TABLE ONLY sessions.sessions ALTER COLUMN agent_role SET (n_distinct=1000);

CREATE TABLE sessions.spans (
    ledger_id uuid NOT NULL,
    stream_id uuid NOT NULL,
    since bigint NOT NULL,
    until bigint NOT NULL,
    "position" bigint NOT NULL,
    class smallint NOT NULL,
    state text NOT NULL
);

CREATE TABLE tasks.spans (
    ledger_id uuid NOT NULL,
    stream_id uuid NOT NULL,
    since bigint NOT NULL,
    until bigint NOT NULL,
    "position" bigint NOT NULL,
    class smallint NOT NULL,
    state text NOT NULL
);

CREATE TABLE tasks.tasks (
    ledger_id uuid NOT NULL,
    task_id uuid NOT NULL,
    "position" bigint NOT NULL,
    submitted_at timestamp with time zone NOT NULL,
    kind text NOT NULL,
    state text NOT NULL,
    session_id uuid,
    worker text,
    task bytea NOT NULL,
    state_since bigint
);
ALTER TABLE ONLY tasks.tasks ALTER COLUMN kind SET (n_distinct=1000);
ALTER TABLE ONLY tasks.tasks ALTER COLUMN state SET (n_distinct=10);
ALTER TABLE ONLY tasks.tasks ALTER COLUMN session_id SET (n_distinct=-0.1);
ALTER TABLE ONLY tasks.tasks ALTER COLUMN worker SET (n_distinct=1000);

ALTER TABLE ONLY approvals.approvals
    ADD CONSTRAINT approvals_pkey PRIMARY KEY (ledger_id, approval_id);

ALTER TABLE ONLY approvals.spans
    ADD CONSTRAINT spans_pkey PRIMARY KEY (ledger_id, stream_id, since);

ALTER TABLE ONLY audit.segments
    ADD CONSTRAINT segments_pkey PRIMARY KEY (ledger_id, first);

ALTER TABLE ONLY keys.data_keys
    ADD CONSTRAINT data_keys_pkey PRIMARY KEY (project_id, subject, key);

ALTER TABLE ONLY keys.project_keys
    ADD CONSTRAINT project_keys_pkey PRIMARY KEY (project_id);

ALTER TABLE ONLY ledger.commands
    ADD CONSTRAINT commands_pkey PRIMARY KEY (ledger_id, principal, command_id);

ALTER TABLE ONLY ledger.events
    ADD CONSTRAINT events_ledger_id_stream_id_stream_version_key UNIQUE (ledger_id, stream_id, stream_version);

ALTER TABLE ONLY ledger.events
    ADD CONSTRAINT events_pkey PRIMARY KEY (ledger_id, "position");

ALTER TABLE ONLY ledger.ledgers
    ADD CONSTRAINT ledgers_pkey PRIMARY KEY (ledger_id);

ALTER TABLE ONLY ledger.ledgers
    ADD CONSTRAINT ledgers_project_id_key UNIQUE (project_id);

ALTER TABLE ONLY ledger.log_keys
    ADD CONSTRAINT log_keys_pkey PRIMARY KEY (number);

ALTER TABLE ONLY ledger.log_keys
    ADD CONSTRAINT log_keys_public_key UNIQUE (public);

ALTER TABLE ONLY ledger.logs
    ADD CONSTRAINT logs_origin_key UNIQUE (origin);

ALTER TABLE ONLY ledger.logs
    ADD CONSTRAINT logs_pkey PRIMARY KEY (ledger_id);

ALTER TABLE ONLY ledger.open_items
    ADD CONSTRAINT open_items_pkey PRIMARY KEY (ledger_id, item_id);

ALTER TABLE ONLY ledger.payloads
    ADD CONSTRAINT payloads_pkey PRIMARY KEY (ledger_id, "position");

ALTER TABLE ONLY ledger.tasks
    ADD CONSTRAINT tasks_pkey PRIMARY KEY (ledger_id, task_id);

ALTER TABLE ONLY ledger.tiles
    ADD CONSTRAINT tiles_pkey PRIMARY KEY (ledger_id, level, index);

ALTER TABLE ONLY muniment.deployment
    ADD CONSTRAINT deployment_pkey PRIMARY KEY (only_row);

ALTER TABLE ONLY muniment.migrations
    ADD CONSTRAINT migrations_pkey PRIMARY KEY (name);

ALTER TABLE ONLY projections.leases
    ADD CONSTRAINT leases_pkey PRIMARY KEY (job);

ALTER TABLE ONLY projections.positions
    ADD CONSTRAINT positions_pkey PRIMARY KEY (view, ledger_id);

ALTER TABLE ONLY projections.rebuilds
    ADD CONSTRAINT rebuilds_pkey PRIMARY KEY (view);

ALTER TABLE ONLY projections.skips
    ADD CONSTRAINT skips_pkey PRIMARY KEY (view, ledger_id, "position");

ALTER TABLE ONLY projections.verdicts
    ADD CONSTRAINT verdicts_pkey PRIMARY KEY (view, ledger_id, schema);

ALTER TABLE ONLY projections.versions
    ADD CONSTRAINT versions_pkey PRIMARY KEY (view);

ALTER TABLE ONLY records.segments
    ADD CONSTRAINT segments_pkey PRIMARY KEY (ledger_id, first);

ALTER TABLE ONLY sessions.labels
    ADD CONSTRAINT labels_pkey PRIMARY KEY (ledger_id, key, value, opened_at, "position");

ALTER TABLE ONLY sessions.sessions
    ADD CONSTRAINT sessions_pkey PRIMARY KEY (ledger_id, session_id);

ALTER TABLE ONLY sessions.spans
    ADD CONSTRAINT spans_pkey PRIMARY KEY (ledger_id, stream_id, since);

ALTER TABLE ONLY tasks.spans
    ADD CONSTRAINT spans_pkey PRIMARY KEY (ledger_id, stream_id, since);

ALTER TABLE ONLY tasks.tasks
    ADD CONSTRAINT tasks_pkey PRIMARY KEY (ledger_id, task_id);

CREATE UNIQUE INDEX approvals_by_position ON approvals.approvals USING btree (ledger_id, "position");

CREATE INDEX approvals_by_requester ON approvals.approvals USING btree (ledger_id, requester_sub, "position");

CREATE INDEX approvals_by_risk ON approvals.approvals USING btree (ledger_id, risk, "position");

CREATE INDEX approvals_by_session ON approvals.approvals USING btree (ledger_id, session_id, "position") WHERE (session_id IS NOT NULL);

CREATE INDEX approvals_by_state ON approvals.approvals USING btree (ledger_id, state, "position");

CREATE INDEX approvals_by_task ON approvals.approvals USING btree (ledger_id, task_id, "position") WHERE (task_id IS NOT NULL);

CREATE INDEX approvals_by_tool ON approvals.approvals USING btree (ledger_id, tool, "position");

CREATE INDEX approvals_due ON approvals.approvals USING btree (due_at) WHERE (due_at IS NOT NULL);

CREATE INDEX approvals_pending ON approvals.approvals USING btree (ledger_id, "position") WHERE (state = 'pending'::text);

CREATE INDEX approvals_pending_by_expiry ON approvals.approvals USING btree (ledger_id, expires_at, "position") WHERE (state = 'pending'::text);

CREATE INDEX approvals_pending_by_risk ON approvals.approvals USING btree (ledger_id, risk, "position") WHERE (state = 'pending'::text);

CREATE INDEX spans_around ON approvals.spans USING btree (ledger_id, state, class, "position", until, since);

CREATE INDEX segments_by_term ON audit.segments USING gin (terms) WITH (fastupdate=off);

CREATE INDEX data_keys_to_destroy ON keys.data_keys USING btree (project_id, subject) WHERE (retired AND (wrapped IS NOT NULL));

CREATE INDEX open_items_by_root ON ledger.open_items USING btree (ledger_id, root_session_id);

CREATE INDEX open_items_waited_on ON ledger.open_items USING btree (ledger_id, session_id) WHERE (item_type = 'approval'::text);

CREATE INDEX payloads_by_digest ON ledger.payloads USING btree (ledger_id, sha256(data));

CREATE INDEX tasks_leased ON ledger.tasks USING btree (lease_until) WHERE (state = 'running'::text);

CREATE INDEX tasks_on_offer ON ledger.tasks USING btree (ledger_id, kind, rank, run_at, task_id) WHERE (state = ANY (ARRAY['queued'::text, 'retrying'::text]));

CREATE INDEX tasks_retrying ON ledger.tasks USING btree (run_at) WHERE (state = 'retrying'::text);

CREATE INDEX tasks_with_deadline ON ledger.tasks USING btree (deadline_at) WHERE (deadline_at IS NOT NULL);

CREATE INDEX segments_by_term ON records.segments USING gin (terms) WITH (fastupdate=off);

CREATE INDEX labels_by_state ON sessions.labels USING btree (ledger_id, key, value, state, opened_at, "position");

CREATE INDEX sessions_by_role ON sessions.sessions USING btree (ledger_id, agent_role, opened_at, "position");

CREATE INDEX sessions_by_role_and_state ON sessions.sessions USING btree (ledger_id, agent_role, state, opened_at, "position");

CREATE INDEX sessions_by_state ON sessions.sessions USING btree (ledger_id, state, opened_at, "position");

CREATE INDEX sessions_by_time ON sessions.sessions USING btree (ledger_id, opened_at, "position");

CREATE INDEX sessions_due ON sessions.sessions USING btree (expires_at) WHERE (state = ANY (ARRAY['pending'::text, 'active'::text]));

CREATE INDEX spans_around ON sessions.spans USING btree (ledger_id, state, class, "position", until, since);

CREATE INDEX spans_around ON tasks.spans USING btree (ledger_id, state, class, "position", until, since);

CREATE INDEX tasks_by_kind ON tasks.tasks USING btree (ledger_id, kind, "position");

CREATE INDEX tasks_by_kind_and_state ON tasks.tasks USING btree (ledger_id, kind, state, "position");

CREATE UNIQUE INDEX tasks_by_position ON tasks.tasks USING btree (ledger_id, "position");

CREATE INDEX tasks_by_session ON tasks.tasks USING btree (ledger_id, session_id, "position") WHERE (session_id IS NOT NULL);

CREATE INDEX tasks_by_state ON tasks.tasks USING btree (ledger_id, state, "position");

CREATE INDEX tasks_by_time ON tasks.tasks USING btree (ledger_id, submitted_at, "position");

CREATE INDEX tasks_by_worker ON tasks.tasks USING btree (ledger_id, worker, "position") WHERE (worker IS NOT NULL);

CREATE TRIGGER kept BEFORE DELETE OR TRUNCATE ON keys.data_keys FOR EACH STATEMENT EXECUTE FUNCTION keys.refuse_change();

CREATE TRIGGER only_erased BEFORE UPDATE ON keys.data_keys FOR EACH ROW EXECUTE FUNCTION keys.refuse_change();

CREATE TRIGGER append_only BEFORE DELETE OR UPDATE OR TRUNCATE ON ledger.commands FOR EACH STATEMENT EXECUTE FUNCTION ledger.refuse_change();

CREATE TRIGGER append_only BEFORE DELETE OR UPDATE OR TRUNCATE ON ledger.events FOR EACH STATEMENT EXECUTE FUNCTION ledger.refuse_change();

CREATE TRIGGER append_only BEFORE DELETE OR UPDATE OR TRUNCATE ON ledger.payloads FOR EACH STATEMENT EXECUTE FUNCTION ledger.refuse_change();

CREATE TRIGGER kept BEFORE DELETE OR TRUNCATE ON ledger.ledgers FOR EACH STATEMENT EXECUTE FUNCTION ledger.refuse_change();

CREATE TRIGGER kept BEFORE DELETE OR TRUNCATE ON ledger.log_keys FOR EACH STATEMENT EXECUTE FUNCTION ledger.refuse_change();

CREATE TRIGGER kept BEFORE DELETE OR TRUNCATE ON ledger.logs FOR EACH STATEMENT EXECUTE FUNCTION ledger.refuse_change();

CREATE TRIGGER kept BEFORE DELETE OR TRUNCATE ON ledger.tiles FOR EACH STATEMENT EXECUTE FUNCTION ledger.refuse_change();

CREATE TRIGGER only_grows BEFORE UPDATE ON ledger.logs FOR EACH ROW EXECUTE FUNCTION ledger.keep_log();

CREATE TRIGGER only_grows BEFORE UPDATE ON ledger.tiles FOR EACH ROW EXECUTE FUNCTION ledger.keep_tile();

CREATE TRIGGER only_retired BEFORE UPDATE ON ledger.log_keys FOR EACH ROW EXECUTE FUNCTION ledger.keep_log_key();

GRANT USAGE ON SCHEMA approvals TO muniment_api;

GRANT USAGE ON SCHEMA audit TO muniment_api;

GRANT USAGE ON SCHEMA keys TO muniment_api;

GRANT USAGE ON SCHEMA ledger TO muniment_api;

GRANT USAGE ON SCHEMA muniment TO PUBLIC;

GRANT USAGE ON SCHEMA projections TO muniment_api;

GRANT USAGE ON SCHEMA records TO muniment_api;

GRANT USAGE ON SCHEMA sessions TO muniment_api;

GRANT USAGE ON SCHEMA tasks TO muniment_api;

REVOKE ALL ON FUNCTION projections.make_schema(name text) FROM PUBLIC;
GRANT ALL ON FUNCTION projections.make_schema(name text) TO muniment_worker;

REVOKE ALL ON FUNCTION projections.rename_schema(name text, new_name text) FROM PUBLIC;
GRANT ALL ON FUNCTION projections.rename_schema(name text, new_name text) TO muniment_worker;

GRANT SELECT ON TABLE approvals.approvals TO muniment_api;

GRANT SELECT ON TABLE approvals.spans TO muniment_api;

GRANT SELECT ON TABLE audit.segments TO muniment_api;

GRANT SELECT,INSERT ON TABLE keys.data_keys TO muniment_api;

GRANT UPDATE(wrapped) ON TABLE keys.data_keys TO muniment_api;

GRANT UPDATE(retired) ON TABLE keys.data_keys TO muniment_api;

GRANT SELECT,INSERT ON TABLE keys.project_keys TO muniment_api;

GRANT SELECT,INSERT ON TABLE ledger.commands TO muniment_api;

GRANT SELECT,INSERT ON TABLE ledger.events TO muniment_api;

GRANT SELECT,INSERT ON TABLE ledger.ledgers TO muniment_api;

GRANT UPDATE(size) ON TABLE ledger.ledgers TO muniment_api;

GRANT UPDATE(last_recorded_at) ON TABLE ledger.ledgers TO muniment_api;

GRANT UPDATE(epoch) ON TABLE ledger.ledgers TO muniment_worker;

GRANT SELECT ON TABLE ledger.log_keys TO muniment_api;
GRANT INSERT ON TABLE ledger.log_keys TO muniment_worker;

GRANT UPDATE(retired_at) ON TABLE ledger.log_keys TO muniment_worker;

GRANT SELECT ON TABLE ledger.logs TO muniment_api;
GRANT INSERT ON TABLE ledger.logs TO muniment_worker;

GRANT UPDATE(origin) ON TABLE ledger.logs TO muniment_worker;

GRANT UPDATE(size) ON TABLE ledger.logs TO muniment_worker;

GRANT UPDATE(signed) ON TABLE ledger.logs TO muniment_worker;

GRANT UPDATE(signed_by) ON TABLE ledger.logs TO muniment_worker;

GRANT UPDATE(published_size) ON TABLE ledger.logs TO muniment_worker;

GRANT UPDATE(published) ON TABLE ledger.logs TO muniment_worker;

GRANT UPDATE(published_at) ON TABLE ledger.logs TO muniment_worker;

GRANT UPDATE(refused) ON TABLE ledger.logs TO muniment_worker;

GRANT UPDATE(contradicted_by) ON TABLE ledger.logs TO muniment_worker;

GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE ledger.open_items TO muniment_api;

GRANT SELECT,INSERT ON TABLE ledger.payloads TO muniment_api;

GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE ledger.tasks TO muniment_api;

GRANT SELECT ON TABLE ledger.tiles TO muniment_api;
GRANT INSERT ON TABLE ledger.tiles TO muniment_worker;

GRANT UPDATE(hashes) ON TABLE ledger.tiles TO muniment_worker;

GRANT SELECT ON TABLE muniment.deployment TO PUBLIC;

GRANT SELECT ON TABLE muniment.migrations TO PUBLIC;

GRANT SELECT ON TABLE projections.leases TO muniment_api;
GRANT INSERT,DELETE,UPDATE ON TABLE projections.leases TO muniment_worker;

GRANT SELECT ON TABLE projections.positions TO muniment_api;
GRANT INSERT,DELETE,UPDATE ON TABLE projections.positions TO muniment_worker;

GRANT SELECT ON TABLE projections.rebuilds TO muniment_api;
GRANT INSERT,DELETE,UPDATE ON TABLE projections.rebuilds TO muniment_worker;

GRANT SELECT ON TABLE projections.skips TO muniment_api;
GRANT INSERT,DELETE,UPDATE ON TABLE projections.skips TO muniment_worker;

GRANT SELECT ON TABLE projections.verdicts TO muniment_api;
GRANT INSERT,DELETE,UPDATE ON TABLE projections.verdicts TO muniment_worker;

GRANT SELECT ON TABLE projections.versions TO muniment_api;
GRANT INSERT,DELETE,UPDATE ON TABLE projections.versions TO muniment_worker;

GRANT SELECT ON TABLE records.segments TO muniment_api;

GRANT SELECT ON TABLE sessions.labels TO muniment_api;

GRANT SELECT ON TABLE sessions.sessions TO muniment_api;

GRANT SELECT ON TABLE sessions.spans TO muniment_api;

GRANT SELECT ON TABLE tasks.spans TO muniment_api;

GRANT SELECT ON TABLE tasks.tasks TO muniment_api;

ALTER DEFAULT PRIVILEGES FOR ROLE muniment_worker GRANT USAGE ON SCHEMAS TO muniment_api;

ALTER DEFAULT PRIVILEGES FOR ROLE muniment_worker GRANT SELECT ON TABLES TO muniment_api;
