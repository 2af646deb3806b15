-- When each thing was in which state, so that lists can be asked as of the past; and what code each view is of.
-- Why: the views say what is; `spans` says what was, each written once when a state is left. What was built before has
-- none of it: it is of version 1, and a worker builds it again, aside, while it is read (projections/rebuild.py).
-- When: before the code.
-- Locks: the tables of the views, for a moment.

-- The version of the code that a build of a view is of, by the name of its schema: a release with a higher one builds
-- the view again.
CREATE TABLE projections.versions (
    view text PRIMARY KEY,
    version bigint NOT NULL
);
GRANT SELECT ON projections.versions TO muniment_api;
GRANT INSERT, UPDATE, DELETE ON projections.versions TO muniment_worker;

INSERT INTO projections.versions (view, version)
-- Where a worker has run, one of version 1 may still be running, and write.
SELECT v.view, CASE WHEN v.is_changed AND NOT EXISTS (SELECT FROM projections.leases) THEN 2 ELSE 1 END
FROM (
    VALUES ('sessions', true), ('tasks', true), ('approvals', true), ('records', false), ('audit', false)
) AS v (view, is_changed);

SET LOCAL ROLE muniment_worker;

-- Made of tables as they were: not to be switched to any more.
-- squawk-ignore ban-drop-schema
DROP SCHEMA IF EXISTS sessions_next, sessions_old, tasks_next, tasks_old, approvals_next, approvals_old CASCADE;
DELETE FROM projections.positions WHERE view ~ '^(sessions|tasks|approvals)_';
UPDATE projections.rebuilds SET state = 'cancelled', ended_because = 'a migration changed its tables', ended_at = now()
WHERE view IN ('sessions', 'tasks', 'approvals') AND state IN ('filling', 'comparing');

-- The position of the event by which it came into the state that it is in; none where version 1 wrote it.
ALTER TABLE sessions.sessions ADD COLUMN state_since bigint;
ALTER TABLE tasks.tasks ADD COLUMN state_since bigint;
ALTER TABLE approvals.approvals ADD COLUMN state_since bigint;

-- One row for each state that was left: in force from the position `since` to before `until`. `position` is that of the
-- thing's first event; `class` says how far `until` is from there, in powers of two (projections/spans.sql).
CREATE TABLE sessions.spans (
    ledger_id uuid NOT NULL,
    stream_id uuid NOT NULL,
    since bigint NOT NULL,
    until bigint NOT NULL,
    position bigint NOT NULL,
    class smallint NOT NULL,
    state text NOT NULL,
    PRIMARY KEY (ledger_id, stream_id, since)
);
CREATE INDEX spans_around ON sessions.spans (ledger_id, state, class, position, until, since);
CREATE TABLE tasks.spans (
    ledger_id uuid NOT NULL,
    stream_id uuid NOT NULL,
    since bigint NOT NULL,
    until bigint NOT NULL,
    position bigint NOT NULL,
    class smallint NOT NULL,
    state text NOT NULL,
    PRIMARY KEY (ledger_id, stream_id, since)
);
CREATE INDEX spans_around ON tasks.spans (ledger_id, state, class, position, until, since);
CREATE TABLE approvals.spans (
    ledger_id uuid NOT NULL,
    stream_id uuid NOT NULL,
    since bigint NOT NULL,
    until bigint NOT NULL,
    position bigint NOT NULL,
    class smallint NOT NULL,
    state text NOT NULL,
    PRIMARY KEY (ledger_id, stream_id, since)
);
CREATE INDEX spans_around ON approvals.spans (ledger_id, state, class, position, until, since);

-- What lists are filtered by. Where all have the same, the planner, which does not see what is asked for, would take any
-- other for as common, and read the whole table for what nothing has.
ALTER TABLE sessions.sessions ALTER COLUMN agent_role SET (n_distinct = 1000), ALTER COLUMN state SET (n_distinct = 10);
ALTER TABLE tasks.tasks
ALTER COLUMN kind SET (n_distinct = 1000), ALTER COLUMN worker SET (n_distinct = 1000),
ALTER COLUMN session_id SET (n_distinct = -0.1), ALTER COLUMN state SET (n_distinct = 10);
ALTER TABLE approvals.approvals
ALTER COLUMN tool SET (n_distinct = 1000), ALTER COLUMN requester_sub SET (n_distinct = 1000),
ALTER COLUMN session_id SET (n_distinct = -0.1), ALTER COLUMN task_id SET (n_distinct = -0.1),
ALTER COLUMN state SET (n_distinct = 10), ALTER COLUMN risk SET (n_distinct = 4);

RESET ROLE;
