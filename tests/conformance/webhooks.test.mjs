// The official Node SDK reads what the portal delivered (see test_webhooks.py, which kept it).
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { mock, test } from 'node:test';

import OpenAI from 'openai';

const { WEBHOOK_SECRET: secret, BATCH_ID: batchId } = process.env;
const deliveries = JSON.parse(readFileSync('deliveries.json', 'utf8'));
const client = new OpenAI({ apiKey: 'none', webhookSecret: secret });

const refused = ({ body, headers }, key = secret) =>
  assert.rejects(client.webhooks.unwrap(body, headers, key), OpenAI.InvalidWebhookSignatureError);

test('real deliveries are accepted', async () => {
  const events = [];
  for (const { body, headers } of deliveries) {
    events.push(await client.webhooks.unwrap(body, headers));
  }
  assert.deepEqual(
    events.map(({ type, data }) => [type, data.id]),
    [
      ['batch.in_progress', batchId],
      ['batch.completed', batchId],
    ],
  );
});

test('tampered ones are refused', async () => {
  const [{ body, headers }] = deliveries;
  await refused({ body: `${body} `, headers });
  await refused({ body, headers: { ...headers, 'webhook-id': 'evt_other' } });
  await refused({ body, headers: { ...headers, 'webhook-signature': 'v1,AAAA' } });
  await refused({ body, headers }, 'whsec_c29tZWJvZHkgZWxzZSdzIHNlY3JldCwgdGhpcw==');
});

test('stale ones are refused', async () => {
  const sent = 1000 * deliveries[0].headers['webhook-timestamp'];
  for (const minutes of [6, -6]) {
    mock.timers.enable({ apis: ['Date'], now: sent + minutes * 60_000 });
    await refused(deliveries[0]);
    mock.timers.reset();
  }
});
