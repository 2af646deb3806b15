-- Rebuilding views while they are read: which are being rebuilt, and what operators let a view leave out.
-- Why: a view is built again in a schema beside its own, and the two change names when both are at the same place
-- (projections/rebuild.py). To make and rename schemas takes a right on the database, which a restored copy of it
-- loses: so the worker gets two functions instead, which are good for its views alone.
-- Locks: none on existing tables.

-- The latest rebuild of each view. What came of it stays to be read: who, why, over which ledgers (a digest of their
-- heads), how many rows, and the digest that the new build and an independent replay of the ledgers had in common.
CREATE TABLE projections.rebuilds (
    view text PRIMARY KEY,
    number bigint NOT NULL DEFAULT 1,
    state text NOT NULL CHECK (state IN ('filling', 'comparing', 'switched', 'rolled_back', 'cancelled', 'failed')),
    asked_by text NOT NULL,
    reason text NOT NULL,
    began_at timestamptz NOT NULL DEFAULT now(),
    ended_at timestamptz,
    ended_because text,
    code_version text,
    heads_digest text,
    rows_compared bigint,
    digest text
);

-- Events that a view may leave out of a project's part where it cannot take them, by an operator's decision. Without
-- an entry here, such an event stops that part.
CREATE TABLE projections.skips (
    view text NOT NULL,
    ledger_id uuid NOT NULL,
    position bigint NOT NULL,
    asked_by text NOT NULL,
    reason text NOT NULL,
    asked_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (view, ledger_id, position)
);

GRANT SELECT ON projections.rebuilds, projections.skips TO muniment_api;
GRANT INSERT, UPDATE, DELETE ON projections.rebuilds, projections.skips TO muniment_worker;

-- Make an empty schema of the worker's, beside that of a view.
CREATE FUNCTION projections.make_schema(name text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF name !~ '^[a-z]+_next$' THEN
        RAISE EXCEPTION 'no view is built in a schema called %', name USING ERRCODE = 'insufficient_privilege';
    END IF;
    EXECUTE format('CREATE SCHEMA %I AUTHORIZATION muniment_worker', name);
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO muniment_api', name);
END
$$;

-- Give one of a view's schemas another of its names.
CREATE FUNCTION projections.rename_schema(name text, new_name text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF new_name !~ '^[a-z]+(_next|_old)?$' OR split_part(name, '_', 1) <> split_part(new_name, '_', 1) OR NOT EXISTS (
        SELECT FROM pg_namespace WHERE nspname = name AND nspowner = 'muniment_worker'::regrole
    ) THEN
        RAISE EXCEPTION 'the schema % is not to be called %', name, new_name USING ERRCODE = 'insufficient_privilege';
    END IF;
    EXECUTE format('ALTER SCHEMA %I RENAME TO %I', name, new_name);
END
$$;

REVOKE ALL ON FUNCTION projections.make_schema(text), projections.rename_schema(text, text) FROM public;
GRANT EXECUTE ON FUNCTION projections.make_schema(text), projections.rename_schema(text, text) TO muniment_worker;
