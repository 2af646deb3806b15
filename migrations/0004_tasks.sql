-- The queue: tasks that are open, as claims look for them; and what requests for the same thing are known by.
-- Why: a claim must not read a view, which may be behind, nor every task there ever was.
-- Locks: adding columns without a default to ledger.open_items takes its lock for a moment, and an index of it as long
-- as there are open items to read: some milliseconds.

-- Kept by the append. All but `lease_until`, which heartbeats move on, can be rebuilt from the events.
CREATE TABLE ledger.tasks (
    ledger_id uuid NOT NULL,
    task_id uuid NOT NULL,
    kind text NOT NULL,
    session_id uuid,
    state text NOT NULL,
    rank timestamptz NOT NULL,
    run_at timestamptz NOT NULL,
    deadline_at timestamptz,
    lease_id uuid,
    lease_until timestamptz,
    holder text NOT NULL,
    PRIMARY KEY (ledger_id, task_id)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);

COMMENT ON COLUMN ledger.tasks.holder IS 'The principal whose lease it is; empty where it has none.';
COMMENT ON COLUMN ledger.tasks.rank IS 'When it may run, put forward by its priority: the order in which it is handed out.';

CREATE INDEX tasks_on_offer ON ledger.tasks (ledger_id, kind, rank, run_at, task_id) WHERE state IN ('queued', 'retrying');
CREATE INDEX tasks_leased ON ledger.tasks (lease_until) WHERE state = 'running';
CREATE INDEX tasks_retrying ON ledger.tasks (run_at) WHERE state = 'retrying';
CREATE INDEX tasks_with_deadline ON ledger.tasks (deadline_at) WHERE deadline_at IS NOT NULL;

GRANT SELECT, INSERT, UPDATE, DELETE ON ledger.tasks TO muniment_api;

ALTER TABLE ledger.open_items ADD COLUMN task_id uuid, ADD COLUMN match bytea;
-- squawk-ignore ban-drop-not-null
ALTER TABLE ledger.open_items ALTER COLUMN session_id DROP NOT NULL;
-- What a session waits on. Until now nothing but sessions could be open, so there is nothing to put in it yet.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX open_items_waited_on ON ledger.open_items (ledger_id, session_id) WHERE item_type = 'approval';

COMMENT ON COLUMN ledger.open_items.root_session_id IS
'The topmost session above it; without a session its task, or what stands for its requester.';
COMMENT ON COLUMN ledger.open_items.match IS 'What another request for the same thing in the same session has as well.';
