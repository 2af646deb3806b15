-- The keys of personal values: which project key a project began with, and one data key a subject.
-- Why: a schema of its own, so that who may read keys, and what a backup of them holds, is decided apart
-- from the ledger. No personal value is here, nor any project key: those are in files.
-- Locks: none on existing tables.

CREATE SCHEMA keys;
GRANT USAGE ON SCHEMA keys TO muniment_api;

-- What tells the project's key from any other file of 32 bytes. Derived from it, and of no use without it.
CREATE TABLE keys.project_keys (
    project_id text PRIMARY KEY,
    key_id bytea NOT NULL CHECK (octet_length(key_id) = 16),
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE keys.data_keys (
    project_id text NOT NULL,
    subject text NOT NULL CHECK (subject ~ '^[0-9a-f]{32}$'),
    -- squawk-ignore prefer-bigint-over-int
    key integer NOT NULL CHECK (key > 0),
    wrapped bytea CHECK (octet_length(wrapped) = 60),
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (project_id, subject, key)
);

COMMENT ON COLUMN keys.data_keys.subject IS 'The pseudonym of the subject: an HMAC under the project key.';
COMMENT ON COLUMN keys.data_keys.wrapped IS 'Nonce, data key and tag (AES-256-GCM under the project key). Null: destroyed.';

-- Neither update nor delete: a key that a request could overwrite would erase a person by accident.
GRANT SELECT, INSERT ON keys.project_keys, keys.data_keys TO muniment_api;
