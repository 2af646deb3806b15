-- Erasure: a data key is retired, so that nothing more is sealed under it, and then destroyed, for ever.
-- Why: what a key sealed can be read by nobody once the key is gone, while every byte of the ledger stays as it is. A key
-- is retired before its erasure is on record, and destroyed after: a process that dies between the two leaves one that is
-- retired, and a worker finds it (ops/eraser.py).
-- When: before the code.
-- Locks: keys.data_keys, against writing, for as long as the index takes to read it: some 0.2 s a million keys.

ALTER TABLE keys.data_keys ADD COLUMN retired boolean NOT NULL DEFAULT false;

COMMENT ON COLUMN keys.data_keys.retired IS 'Nothing more is sealed under it: an erasure of its subject was asked for.';

-- squawk-ignore require-concurrent-index-creation
CREATE INDEX data_keys_to_destroy ON keys.data_keys (project_id, subject) WHERE retired AND wrapped IS NOT NULL;

-- Rows that are destroyed make room soon: what they were is not to lie about.
ALTER TABLE keys.data_keys SET (autovacuum_vacuum_threshold = 1, autovacuum_vacuum_scale_factor = 0);

-- A key may be retired, and a retired one destroyed. Nothing is taken back, and nothing else is ever changed, whoever asks.
CREATE FUNCTION keys.refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
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

CREATE TRIGGER only_erased BEFORE UPDATE ON keys.data_keys FOR EACH ROW EXECUTE FUNCTION keys.refuse_change();
CREATE TRIGGER kept BEFORE DELETE OR TRUNCATE ON keys.data_keys FOR EACH STATEMENT EXECUTE FUNCTION keys.refuse_change();

GRANT UPDATE (retired, wrapped) ON keys.data_keys TO muniment_api;
