// The official Node SDK, unmodified: only baseURL and apiKey are set (see test_openai_node.py).
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { createReadStream, mkdtempSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';

import OpenAI, { toFile } from 'openai';

const { PORTAL_URL: baseURL, PORTAL_KEY: apiKey, NARROW_KEY: narrowKey } = process.env;
const client = new OpenAI({ baseURL, apiKey });
const ENDPOINT = '/v1/chat/completions';

function lines(count, model = 'echo') {
  const line = (at) => ({
    custom_id: `request-${at}`,
    method: 'POST',
    url: ENDPOINT,
    body: { model, messages: [{ role: 'user', content: `words ${at}` }] },
  });
  return Array.from({ length: count }, (_, at) => `${JSON.stringify(line(at))}\n`).join('');
}

const upload = async (content = lines(1), purpose = 'batch') =>
  client.files.create({ file: await toFile(Buffer.from(content), 'in.jsonl'), purpose });

const batchOf = (file, more = {}, options = {}) =>
  client.batches.create(
    { input_file_id: file.id, endpoint: ENDPOINT, completion_window: '24h', ...more },
    options,
  );

async function finished(batch) {
  while (!['completed', 'failed', 'expired', 'cancelled'].includes(batch.status)) {
    await sleep(100);
    batch = await client.batches.retrieve(batch.id);
  }
  return batch;
}

async function refused(promise, kind, expected) {
  const error = await promise.then(
    () => assert.fail('nothing was refused'),
    (error) => error,
  );
  assert.equal(error.constructor, kind);
  assert.match(error.requestID, /^req_/);
  const { type, param, code } = error;
  assert.deepEqual({ type, param, code }, { type: 'invalid_request_error', ...expected });
}

const idsOf = async (pages) => {
  const ids = [];
  for await (const row of pages) ids.push(row.id);
  return ids;
};

test('a file comes back as it went', async () => {
  const content = lines(2);
  const path = join(mkdtempSync(join(tmpdir(), 'node-')), 'from-disk.jsonl');
  writeFileSync(path, content);
  const file = await client.files.create({ file: createReadStream(path), purpose: 'batch' });
  assert.match(file._request_id, /^req_/);
  assert.equal(file.filename, 'from-disk.jsonl');
  assert.equal(file.bytes, content.length);
  assert.deepEqual(await client.files.retrieve(file.id), file);
  assert.equal((await client.files.waitForProcessing(file.id)).status, 'processed');
  assert.equal(await (await client.files.content(file.id)).text(), content);
  const part = await client.files.content(file.id, { headers: { Range: 'bytes=0-3' } });
  assert.deepEqual([part.status, await part.text()], [206, content.slice(0, 4)]);
  const deleted = { id: file.id, object: 'file', deleted: true };
  assert.deepEqual(await client.files.delete(file.id), deleted);
  await refused(client.files.retrieve(file.id), OpenAI.NotFoundError, {
    param: 'file_id',
    code: 'not_found',
  });
});

test('a file that expires says when', async () => {
  const file = await client.files.create({
    file: await toFile(Buffer.from('x'), 'x.txt'),
    purpose: 'user_data',
    expires_after: { anchor: 'created_at', seconds: 3600 },
  });
  assert.ok([3600, 3601].includes(file.expires_at - file.created_at));
});

test('paging walks all files and batches', async () => {
  const made = [];
  for (let at = 0; at < 5; at++) made.push((await upload('{}\n', 'evals')).id);
  const all = await idsOf(client.files.list({ limit: 2, purpose: 'evals', order: 'asc' }));
  assert.deepEqual(all.slice(-5), made);
  const newest = await idsOf(client.files.list({ limit: 2, purpose: 'evals' }));
  assert.deepEqual(newest.slice(0, 5), made.toReversed());
  const file = await upload();
  const batches = [];
  for (let at = 0; at < 3; at++) batches.push((await batchOf(file)).id);
  assert.deepEqual((await idsOf(client.batches.list({ limit: 2 }))).slice(0, 3), batches.toReversed());
});

test('an upload in parts becomes a file', async () => {
  const content = lines(20);
  const asked = { filename: 'parts.jsonl', purpose: 'batch', mime_type: 'text/jsonl' };
  const { id } = await client.uploads.create({ ...asked, bytes: content.length });
  const pieces = [content.slice(0, 100), content.slice(100)];
  const parts = await Promise.all(
    pieces.map(async (piece) =>
      client.uploads.parts.create(id, { data: await toFile(Buffer.from(piece), 'part') }),
    ),
  );
  const ids = parts.map((part) => part.id);
  await refused(client.uploads.complete(id, { part_ids: [ids[0]] }), OpenAI.BadRequestError, {
    param: 'part_ids',
    code: 'size_mismatch',
  });
  const md5 = createHash('md5').update(content).digest('hex');
  const done = await client.uploads.complete(id, { part_ids: ids, md5 });
  assert.equal(done.status, 'completed');
  assert.equal(await (await client.files.content(done.file.id)).text(), content);
  const other = await client.uploads.create({ ...asked, bytes: 1 });
  assert.equal((await client.uploads.cancel(other.id)).status, 'cancelled');
});

test('a batch is answered in the order of its input', async () => {
  const made = await batchOf(await upload(lines(20)), { metadata: { run: '7' }, priority: 'low' });
  assert.deepEqual([made.metadata, made.priority], [{ run: '7' }, 'low']);
  const batch = await finished(made);
  assert.equal(batch.status, 'completed');
  assert.deepEqual(batch.request_counts, { total: 20, completed: 20, failed: 0 });
  const text = await (await client.files.content(batch.output_file_id)).text();
  const output = text.trim().split('\n').map((line) => JSON.parse(line));
  assert.deepEqual(
    output.map((line) => [line.custom_id, line.response.body.choices[0].message.content]),
    Array.from({ length: 20 }, (_, at) => [`request-${at}`, `words ${at}`]),
  );
  await refused(client.batches.cancel(batch.id), OpenAI.BadRequestError, {
    param: 'batch_id',
    code: 'batch_not_cancellable',
  });
});

test('every bad line is listed', async () => {
  const batch = await finished(await batchOf(await upload(`${lines(1)}{nope\n${lines(1)}`)));
  assert.deepEqual(
    batch.errors.data.map(({ code, param, line }) => [code, param, line]),
    [
      ['invalid_json_line', null, 2],
      ['duplicate_custom_id', 'custom_id', 3],
    ],
  );
});

test('one idempotency key makes one batch', async () => {
  const file = await upload();
  const options = { idempotencyKey: `node-${file.id}` };
  const headers = { headers: { 'Idempotency-Key': `node-${file.id}` } };
  const made = await Promise.all([1, 2, 3, 4].map(() => batchOf(file, {}, { ...options, ...headers })));
  assert.equal(new Set(made.map((batch) => batch.id)).size, 1);
  await refused(batchOf(file, { priority: 'low' }, headers), OpenAI.BadRequestError, {
    param: null,
    code: 'idempotency_key_reused',
  });
});

test('models, their ids, and errors by their class', async () => {
  assert.ok((await idsOf(client.models.list())).includes('node/echo'));
  assert.equal((await client.models.retrieve('node/echo')).owned_by, 'portal');
  await refused(client.models.retrieve('no/pe'), OpenAI.NotFoundError, {
    param: 'model',
    code: 'model_not_found',
  });
  const file = await upload();
  await refused(batchOf(file, { endpoint: '/nope' }), OpenAI.BadRequestError, {
    param: 'endpoint',
    code: 'invalid_value',
  });
  const wrong = new OpenAI({ baseURL, apiKey: 'sk-nope' });
  await refused(wrong.files.list().asResponse(), OpenAI.AuthenticationError, {
    type: 'authentication_error',
    param: null,
    code: 'invalid_api_key',
  });
  const narrow = new OpenAI({ baseURL, apiKey: narrowKey });
  await refused(narrow.batches.list().asResponse(), OpenAI.PermissionDeniedError, {
    type: 'permission_error',
    param: null,
    code: 'insufficient_scope',
  });
  const elsewhere = new OpenAI({ baseURL, apiKey, organization: 'org_other' });
  await refused(elsewhere.files.list().asResponse(), OpenAI.AuthenticationError, {
    type: 'authentication_error',
    param: 'OpenAI-Organization',
    code: null,
  });
});
