-- The views of tasks and of approvals.
-- Why: people ask for them by what they are now, and pending approvals by what is urgent.
-- Locks: none on existing tables.

CREATE SCHEMA tasks AUTHORIZATION muniment_worker;
CREATE SCHEMA approvals AUTHORIZATION muniment_worker;
GRANT USAGE ON SCHEMA tasks, approvals TO muniment_api;

SET LOCAL ROLE muniment_worker;

-- One row a task: the whole state as its exact bytes, and beside it what lists are filtered by. `position` is that
-- of its submission, and the order of every list; `worker` is who holds the lease.
CREATE TABLE tasks.tasks (
    ledger_id uuid NOT NULL,
    task_id uuid NOT NULL,
    position bigint NOT NULL,
    submitted_at timestamptz NOT NULL,
    kind text NOT NULL,
    state text NOT NULL,
    session_id uuid,
    worker text,
    task bytea NOT NULL,
    PRIMARY KEY (ledger_id, task_id)
);
CREATE UNIQUE INDEX tasks_by_position ON tasks.tasks (ledger_id, position);
CREATE INDEX tasks_by_time ON tasks.tasks (ledger_id, submitted_at, position);
CREATE INDEX tasks_by_state ON tasks.tasks (ledger_id, state, position);
CREATE INDEX tasks_by_kind ON tasks.tasks (ledger_id, kind, position);
-- The dead of one kind may be few among many dead and many of the kind.
CREATE INDEX tasks_by_kind_and_state ON tasks.tasks (ledger_id, kind, state, position);
CREATE INDEX tasks_by_session ON tasks.tasks (ledger_id, session_id, position) WHERE session_id IS NOT NULL;
CREATE INDEX tasks_by_worker ON tasks.tasks (ledger_id, worker, position) WHERE worker IS NOT NULL;

-- One row an approval, alike. `risk` is 0 for critical to 3 for low; `roles` are those that may decide it; `due_at`
-- is when its time runs out, whatever that means for it now. Votes alone touch no index.
CREATE TABLE approvals.approvals (
    ledger_id uuid NOT NULL,
    approval_id uuid NOT NULL,
    position bigint NOT NULL,
    state text NOT NULL,
    session_id uuid,
    task_id uuid,
    tool text NOT NULL,
    risk smallint NOT NULL,
    roles text [] NOT NULL,
    requester_issuer text NOT NULL,
    requester_sub text NOT NULL,
    expires_at timestamptz NOT NULL,
    due_at timestamptz,
    approval bytea NOT NULL,
    PRIMARY KEY (ledger_id, approval_id)
) WITH (fillfactor = 50);
CREATE UNIQUE INDEX approvals_by_position ON approvals.approvals (ledger_id, position);
CREATE INDEX approvals_by_state ON approvals.approvals (ledger_id, state, position);
CREATE INDEX approvals_by_session ON approvals.approvals (ledger_id, session_id, position)
WHERE session_id IS NOT NULL;
CREATE INDEX approvals_by_task ON approvals.approvals (ledger_id, task_id, position) WHERE task_id IS NOT NULL;
CREATE INDEX approvals_by_tool ON approvals.approvals (ledger_id, tool, position);
CREATE INDEX approvals_by_risk ON approvals.approvals (ledger_id, risk, position);
CREATE INDEX approvals_by_requester ON approvals.approvals (ledger_id, requester_sub, position);
-- What waits for people is little, and looked at all the time. Whatever else is asked of it costs no more than to go
-- through all of it.
CREATE INDEX approvals_pending ON approvals.approvals (ledger_id, position) WHERE state = 'pending';
CREATE INDEX approvals_pending_by_risk ON approvals.approvals (ledger_id, risk, position) WHERE state = 'pending';
CREATE INDEX approvals_pending_by_expiry ON approvals.approvals (ledger_id, expires_at, position)
WHERE state = 'pending';
-- The sweeper's: over all ledgers, since time runs out in all of them alike.
CREATE INDEX approvals_due ON approvals.approvals (due_at) WHERE due_at IS NOT NULL;

RESET ROLE;
