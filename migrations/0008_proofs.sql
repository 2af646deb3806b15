-- Proofs of views: what was last found of each project's part of each build of a view.
-- Why: a view can then state at any time of which ledger, up to which position and by which code it is a replay, and
-- with which digest; and a part that was found to be something else is known to be, by readers too.
-- When: before the code.
-- Locks: none on existing tables.

-- `schema` is the number of the build's schema, which it keeps whatever its name: what was found of one build is never
-- said of another, and is said of it again after a roll-back. What is not there any more is forgotten by a worker.
-- `verified_at` is when the proof began, so that nothing later is in it.
CREATE TABLE projections.verdicts (
    view text NOT NULL,
    ledger_id uuid NOT NULL,
    schema bigint NOT NULL,
    position bigint NOT NULL,
    code_version text NOT NULL,
    row_count bigint NOT NULL,
    digest text NOT NULL,
    replay_digest text NOT NULL,
    drifted bigint NOT NULL,
    drifts jsonb NOT NULL,
    verified_at timestamptz NOT NULL,
    seconds double precision NOT NULL,
    PRIMARY KEY (view, ledger_id, schema)
);

GRANT SELECT ON projections.verdicts TO muniment_api;
GRANT INSERT, UPDATE, DELETE ON projections.verdicts TO muniment_worker;
