-- What operators ask of views is in a ledger of their own: these tables are what is done about it, and how far.
-- Why: a worker that is killed after it switched a view, and before it said so there, must find whose request that was.
-- When: before the code.
-- Locks: projections.rebuilds, for a moment; it has a row a view.

ALTER TABLE projections.rebuilds ADD COLUMN request bigint;

COMMENT ON COLUMN projections.rebuilds.request IS
'The version of the view, in the operators'' ledger, at which was asked for what made this state; null: nobody asked there.';
