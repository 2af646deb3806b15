-- The transparency log of each ledger: its tiles, the newest checkpoint that was signed, and the one that is served.
-- Why: whoever holds a checkpoint can then show that nothing before it was changed, without trusting anybody here; and
-- who signs can see, from what was signed before, that history was rolled back, and refuse.
-- When: before the code.
-- Locks: ledger.payloads, against appends of data that stands beside its entry, while it is indexed.

-- One row a ledger that a publisher has met, and the lock by which one of them works on it. `signed` is the newest note
-- that the log has signed, durable before anybody sees it; `published` the one that is served, with what witnesses said
-- of it. `refused` says why the publisher does not go on. The low fillfactor keeps updates heap-only.
CREATE TABLE ledger.logs (
    ledger_id uuid PRIMARY KEY,
    origin text NOT NULL UNIQUE,
    size bigint NOT NULL DEFAULT 0,
    signed text,
    signed_by bigint [] NOT NULL DEFAULT '{}',
    published_size bigint NOT NULL DEFAULT 0,
    published text,
    published_at timestamptz,
    refused text,
    CHECK (published_size BETWEEN 0 AND size),
    CHECK ((size > 0) = (signed IS NOT NULL)),
    CHECK ((published_size > 0) = (published IS NOT NULL AND published_at IS NOT NULL))
) WITH (fillfactor = 50, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0);

COMMENT ON COLUMN ledger.logs.signed IS
'C2SP signed-note: a checkpoint with the signatures of this log alone, by the keys numbered in signed_by.';

-- C2SP tlog-tiles, from level 1 on: level 0 is the leaves of ledger.events. A tile grows by a hash whenever a tile of
-- the level below is full, until it has 256; narrower ones, as of earlier sizes, are what it begins with.
CREATE TABLE ledger.tiles (
    ledger_id uuid NOT NULL,
    level smallint NOT NULL CHECK (level BETWEEN 1 AND 7),
    index bigint NOT NULL CHECK (index >= 0),
    hashes bytea NOT NULL CHECK (octet_length(hashes) BETWEEN 32 AND 8192 AND octet_length(hashes) % 32 = 0),
    PRIMARY KEY (ledger_id, level, index)
);
-- Hashes do not compress, and a part of one that is not compressed can be read by itself.
ALTER TABLE ledger.tiles ALTER hashes SET STORAGE EXTERNAL;

-- The public halves of the keys that sign, for the ledgers of all projects. The seeds are files of the worker's.
CREATE TABLE ledger.log_keys (
    number bigint PRIMARY KEY CHECK (number > 0),
    public bytea NOT NULL UNIQUE CHECK (octet_length(public) = 32),
    added_at timestamptz NOT NULL,
    retired_at timestamptz CHECK (retired_at >= added_at)
);

-- What stands beside an entry is asked for by the digest that the entry says.
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX payloads_by_digest ON ledger.payloads (ledger_id, sha256(data));

-- A checkpoint that anybody may hold is never taken back, nor is another put in its place; more may sign it.
CREATE FUNCTION ledger.keep_log() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (NEW.ledger_id, NEW.origin) <> (OLD.ledger_id, OLD.origin)
        OR NEW.size < OLD.size
        OR NEW.published_size < OLD.published_size
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

CREATE FUNCTION ledger.keep_tile() RETURNS trigger LANGUAGE plpgsql AS $$
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

CREATE FUNCTION ledger.keep_log_key() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (NEW.number, NEW.public, NEW.added_at) <> (OLD.number, OLD.public, OLD.added_at) OR OLD.retired_at IS NOT NULL
    THEN
        RAISE EXCEPTION 'the key % of the log may be retired once, and not change', OLD.number
            USING ERRCODE = 'insufficient_privilege';
    END IF;
    RETURN NEW;
END
$$;

CREATE TRIGGER only_grows BEFORE UPDATE ON ledger.logs FOR EACH ROW EXECUTE FUNCTION ledger.keep_log();
CREATE TRIGGER kept BEFORE DELETE OR TRUNCATE ON ledger.logs
FOR EACH STATEMENT EXECUTE FUNCTION ledger.refuse_change();
CREATE TRIGGER only_grows BEFORE UPDATE ON ledger.tiles FOR EACH ROW EXECUTE FUNCTION ledger.keep_tile();
CREATE TRIGGER kept BEFORE DELETE OR TRUNCATE ON ledger.tiles
FOR EACH STATEMENT EXECUTE FUNCTION ledger.refuse_change();
CREATE TRIGGER only_retired BEFORE UPDATE ON ledger.log_keys FOR EACH ROW EXECUTE FUNCTION ledger.keep_log_key();
CREATE TRIGGER kept BEFORE DELETE OR TRUNCATE ON ledger.log_keys
FOR EACH STATEMENT EXECUTE FUNCTION ledger.refuse_change();

GRANT SELECT ON ledger.logs, ledger.tiles, ledger.log_keys TO muniment_api;
GRANT INSERT ON ledger.logs, ledger.tiles, ledger.log_keys TO muniment_worker;
GRANT UPDATE (size, signed, signed_by, published_size, published, published_at, refused) ON ledger.logs TO muniment_worker;
GRANT UPDATE (hashes) ON ledger.tiles TO muniment_worker;
GRANT UPDATE (retired_at) ON ledger.log_keys TO muniment_worker;
