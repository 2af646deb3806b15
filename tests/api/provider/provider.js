// A certified OpenID provider for tests: oidc-provider on a port of this machine.
//
// Each line of standard input is a whole configuration; from then on the provider is rebuilt from that one, at
// the same address. Each is answered by a line of JSON: {issuer, key_requests}, the requests for keys so far.
//
//   keys            the private JWKs; the first that fits signs, and all are published
//   audience        whom access tokens are for, unless a client says otherwise
//   clients         [{client_id, claims, typ?, audience?}]; `claims` stand in its access tokens as they are
//   clock_seconds   how far its clock is from the true one
//   keys_status     what is answered where its keys should be

import { createServer } from 'node:http';
import { createInterface } from 'node:readline';
import Provider from 'oidc-provider';

console.info = console.error; // standard output is for answers

const trueNow = Date.now;
let serve = (request, response) => response.writeHead(503).end();
let keysStatus;
let keyRequests = 0;

const server = createServer((request, response) => {
  if (request.url === '/jwks') {
    keyRequests += 1;
    if (keysStatus) return response.writeHead(keysStatus).end();
  }
  return serve(request, response);
});

function provider(issuer, { keys, audience, clients }) {
  const known = new Map(clients.map((client) => [client.client_id, client]));
  return new Provider(issuer, {
    jwks: { keys },
    cookies: { keys: ['muniment-tests'] },
    ttl: { AccessToken: 600, ClientCredentials: 600 },
    clients: clients.map(({ client_id }) => ({
      client_id,
      client_secret: 'secret',
      token_endpoint_auth_method: 'client_secret_post',
      grant_types: ['authorization_code', 'client_credentials'],
      redirect_uris: ['http://127.0.0.1/callback'],
    })),
    features: {
      clientCredentials: { enabled: true },
      resourceIndicators: {
        enabled: true,
        defaultResource: (_, client) => known.get(client.clientId).audience ?? audience,
        useGrantedResource: () => true,
        getResourceServerInfo: (_, resource) => ({
          scope: 'ledger',
          audience: resource,
          accessTokenFormat: 'jwt',
          jwt: { sign: { alg: keys[0].alg } },
        }),
      },
    },
    findAccount: (_, accountId) => ({ accountId, claims: () => ({ sub: accountId }) }),
    extraTokenClaims: (_, token) => known.get(token.clientId).claims,
    formats: {
      customizers: {
        jwt(_, token, jwt) {
          const { typ } = known.get(token.clientId);
          if (typ) jwt.header = { typ };
        },
      },
    },
    // Nobody is asked for consent.
    async loadExistingGrant({ oidc: { client, session, provider: { Grant } } }) {
      const grant = new Grant({ clientId: client.clientId, accountId: session.accountId });
      grant.addOIDCScope('openid');
      grant.addResourceScope(audience, 'ledger');
      await grant.save();
      return grant;
    },
  });
}

server.listen(Number(process.argv[2] ?? 0), '127.0.0.1', () => {
  const issuer = `http://127.0.0.1:${server.address().port}`;
  createInterface({ input: process.stdin }).on('line', (line) => {
    const wanted = JSON.parse(line);
    Date.now = () => trueNow() + 1000 * (wanted.clock_seconds ?? 0);
    keysStatus = wanted.keys_status;
    serve = provider(issuer, wanted).callback();
    console.log(JSON.stringify({ issuer, key_requests: keyRequests }));
  }).on('close', () => process.exit());
});
