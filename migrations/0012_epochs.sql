-- A ledger may begin another epoch: what a restore has rolled back is adopted by an operator, under another id and log.
-- Why: its log has signed what is no longer there, and signs nothing more; another one begins over what is there, and
-- names the one before (`LedgerAdopted`). What somebody holds that contradicts the ledger is kept beside its log, so that
-- every worker sees it, not only the one that met it.
-- When: before the code.
-- Locks: ledger.ledgers and ledger.logs, for a moment.

ALTER TABLE ledger.ledgers ADD COLUMN epoch uuid;

COMMENT ON COLUMN ledger.ledgers.epoch IS
'The id by which the ledger is known outside, and its log, since it was adopted; null: as ledger_id, which is for here.';

ALTER TABLE ledger.logs ADD COLUMN contradicted_by text;
-- A log that has just begun over what was there has signed nothing yet of the tree of that size.
-- squawk-ignore ban-drop-constraint
ALTER TABLE ledger.logs DROP CONSTRAINT logs_check1;
-- squawk-ignore constraint-missing-not-valid
ALTER TABLE ledger.logs ADD CONSTRAINT logs_check1 CHECK (size > 0 OR signed IS NULL);

COMMENT ON COLUMN ledger.logs.contradicted_by IS
'A note that this log has signed, and that is no beginning of the ledger as it is: nothing more is signed.';

CREATE OR REPLACE FUNCTION ledger.keep_log() RETURNS trigger LANGUAGE plpgsql AS $$
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

GRANT UPDATE (epoch) ON ledger.ledgers TO muniment_worker;
GRANT UPDATE (origin, contradicted_by) ON ledger.logs TO muniment_worker;
