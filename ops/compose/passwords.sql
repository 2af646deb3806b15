-- The roles that the migrations made may log in from now on, with what compose.yaml has in its secrets.
\set api `cat /run/secrets/api_password`
\set worker `cat /run/secrets/worker_password`
ALTER ROLE muniment_api PASSWORD :'api';
ALTER ROLE muniment_worker PASSWORD :'worker';
