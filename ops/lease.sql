-- name: take
-- The job is ours if nobody holds it, or who did has let it run out. The server's clock is the only one asked.
INSERT INTO projections.leases AS l (job, holder, fence, until)
VALUES (%(job)s, %(holder)s, 1, clock_timestamp() + make_interval(secs => %(seconds)s))
ON CONFLICT (job) DO UPDATE SET holder = excluded.holder, fence = l.fence + 1, until = excluded.until
WHERE l.until < clock_timestamp()
RETURNING fence

-- name: keep
UPDATE projections.leases SET until = clock_timestamp() + make_interval(secs => %(seconds)s)
WHERE job = %(job)s AND fence = %(fence)s
RETURNING true

-- name: release
-- Let the next one have it at once.
UPDATE projections.leases SET until = '-infinity' WHERE job = %(job)s AND fence = %(fence)s
