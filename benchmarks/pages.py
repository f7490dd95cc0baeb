"""Pages: how soon does each begin to arrive, with 100,000 batches and 1,000 organizations there?

A whole portal as `./run serve` starts it, filled by set-based SQL. One organization has a fifth of
all batches, and it is hers whose pages are asked for, one request after the other: what is measured
is how long a page takes, not how many a host can serve. Operators' pages see all tenants. One batch
was run in earnest, by the instant engine, so that there are results to show.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import psycopg

from benchmarks.site import Site
from tests import stack as stacks
from tests.stack import Stack

BATCHES, ORGANIZATIONS = 100_000, 1_000
HERS, UNFINISHED = 20_000, 2_000
"""Of the batches: those of the organization that is looked at, and those of all that still wait."""
REQUESTS = 5_000
"""Of the batch that was run."""
WARM, TIMES = 3, 40
EMAIL, PASSWORD = "owner@acme.test", "correct horse 9 battery"

PAGES = {
    "home": "/",
    "home_part": "/",
    "batches": "/batches",
    "batches_part": "/batches",
    "batches_older": "/batches?after={middle}",
    "batches_found": "/batches?q=input-7&status=completed",
    "new_batch": "/batches/new",
    "batch": "/batches/{done}",
    "batch_running": "/batches/{running}",
    "batch_running_part": "/batches/{running}",
    "chunks": "/batches/{done}/chunks",
    "log": "/batches/{done}/log",
    "results": "/batches/{done}/results",
    "results_far": "/batches/{done}/results?after=4900",
    "results_failed": "/batches/{done}/results?failed=on",
    "result": "/batches/{done}/results/2500",
    "files": "/files",
    "files_found": "/files?q=output-777",
    "file": "/files/{file}",
    "webhooks": "/organization/webhooks",
    "webhook": "/organization/webhooks/{webhook}",
    "dead_letters": "/organization/webhooks/deliveries",
    "handlers": "/organization/handlers",
    "handler": "/organization/handlers/{handler}",
    "retention": "/organization/retention",
    "models": "/models",
    "model": "/models/m1",
    "members": "/organization/members",
    "keys": "/organization/keys",
    "projects": "/organization/projects",
    "limits": "/organization/limits",
    "usage": "/organization/usage",
    "usage_90_days": "/organization/usage?range=90",
    "audit": "/organization/audit",
    "operator_organizations": "/operator/organizations",
    "operator_organizations_found": "/operator/organizations?q=o77",
    "operator_organization": "/operator/organizations/{organization}",
    "operator_limits": "/operator/organizations/{organization}/limits",
    "operator_audit": "/operator/audit",
    "operator_queue": "/operator/queue",
    "operator_queue_part": "/operator/queue",
    "operator_queue_last": "/operator/queue?page=40",
    "operator_queue_found": "/operator/queue?organization=acme&model=m5",
    "operator_pauses": "/operator/pauses",
    "operator_workers": "/operator/workers",
    "operator_workers_part": "/operator/workers",
    "operator_people": "/operator/people",
    "operator_usage": "/operator/usage",
    "operator_system": "/operator/system",
    "operator_webhooks": "/operator/webhooks",
}
"""By name; `_part` is asked for as HTMX does. To be added to with every page that lists anything."""

SEED = (
    """
    INSERT INTO accounts_organization (id, name, slug, created_at, suspended_why)
    SELECT 'org_' || lpad(at::text, 8, '0'), 'o' || at, 'o' || at, now() - at * interval '1 hour', ''
    FROM generate_series(2, %(organizations)s) AS at
    """,
    """
    INSERT INTO accounts_project (id, organization_id, name, created_at)
    SELECT 'proj_' || id, id, 'Default', created_at FROM accounts_organization
    WHERE slug <> 'acme'
    """,
    """
    CREATE TEMPORARY TABLE tenants AS
    SELECT row_number() OVER (ORDER BY organization.slug <> 'acme', organization.id) - 1 AS number,
        organization.id, (SELECT min(id) FROM accounts_project WHERE organization_id = organization.id)
            AS project
    FROM accounts_organization AS organization
    """,
    """
    INSERT INTO models_registry_model (name, source, revision, task, engine, engine_args, base_url,
        encrypted_secret, restricted, input_price, output_price, load_error, created_at, updated_at)
    SELECT 'm' || at, 'none', '', 'chat', 'instant', '{}', '', '', false, 1, 2, '', now(), now()
    FROM generate_series(1, 20) AS at
    """,
    """
    INSERT INTO batches_file (id, organization_id, project_id, filename, purpose, bytes, storage_name,
        created_at)
    SELECT 'file-' || tenants.number || '-' || at, tenants.id, tenants.project, 'input-' || at || '.jsonl',
        'batch', 1000000, 'none', now() FROM tenants, generate_series(1, 10) AS at
    """,
    """
    INSERT INTO batches_batch (id, organization_id, project_id, endpoint, completion_window, priority,
        metadata, input_file_id, index_name, model_id, status, created_at, in_progress_at, expires_at,
        completed_at, failed_at, total, completed, failed, input_tokens, cached_tokens, output_tokens,
        reasoning_tokens, gpu_seconds)
    SELECT 'batch_' || lpad(at::text, 12, '0'), tenants.id, tenants.project, '/v1/chat/completions', '24h',
        0, '{"run": "nightly"}', 'file-' || tenants.number || '-' || 1 + at %% 10, '', model.id, kind.status,
        moment.made, moment.made, moment.made + interval '24 hours' + kind.more,
        CASE kind.status WHEN 'completed' THEN moment.made END,
        CASE kind.status WHEN 'failed' THEN moment.made END,
        1000, kind.completed, kind.failed, 500000, 0, 250000, 0, 60
    FROM generate_series(1, %(batches)s) AS at
    CROSS JOIN LATERAL (SELECT now() - (%(batches)s - at) * interval '60 seconds' AS made) AS moment
    CROSS JOIN LATERAL (
        SELECT CASE WHEN at %% 5 = 0 OR at > %(batches)s - 100 THEN 0
            ELSE 1 + at %% (%(organizations)s - 1) END AS number
    ) AS whose
    CROSS JOIN LATERAL (
        SELECT * FROM (VALUES
            ('in_progress', 400, 0, interval '100 days'), ('failed', 0, 0, interval '0'),
            ('completed', 990, 10, interval '0'), ('completed', 1000, 0, interval '0')
        ) AS kinds (status, completed, failed, more)
        OFFSET CASE WHEN at > %(batches)s - %(unfinished)s THEN 0 WHEN at %% 50 = 0 THEN 1
            WHEN at %% 7 = 0 THEN 2 ELSE 3 END LIMIT 1
    ) AS kind
    JOIN tenants ON tenants.number = whose.number
    JOIN models_registry_model AS model ON model.name = 'm' || 1 + at %% 20
    """,
    """
    INSERT INTO batches_chunk (batch_id, start, "end", tokens, state, lease_owner, fencing_token, attempts)
    SELECT id, 400, 1000, 600000, 'ready', '', 0, 0 FROM batches_batch WHERE status = 'in_progress'
    """,
    """
    INSERT INTO accounts_reservation (batch_id, organization_id, project_id, model, tokens, cost,
        input_price, cached_price, output_price, created_at, noted_requests, noted_input_tokens,
        noted_output_tokens)
    SELECT batch.id, organization_id, project_id, 'm1', 1000000, 1, 1, 1, 2, batch.created_at,
        completed, input_tokens, output_tokens
    FROM batches_batch AS batch WHERE status = 'in_progress'
    """,
    """
    INSERT INTO accounts_user (password, is_superuser, is_staff, is_active, email, name, date_joined)
    SELECT '!', false, false, true, 'person' || at || '@acme.test', 'Person ' || at, now()
    FROM generate_series(1, 500) AS at
    """,
    """
    INSERT INTO accounts_membership (organization_id, user_id, role, created_at)
    SELECT tenants.id, person.id, 'member', now() FROM accounts_user AS person, tenants
    WHERE person.email LIKE 'person%%' AND tenants.number = 0
    """,
    """
    INSERT INTO accounts_apikey (id, organization_id, project_id, created_by_id, name, prefix, digest,
        scopes, allowed_ips, created_at)
    SELECT 'key_' || lpad(person.id::text, 8, '0'), tenants.id, tenants.project, person.id,
        person.name || '''s key', 'p' || person.id, md5(person.email), '{batches}', '{}', now()
    FROM accounts_user AS person, tenants WHERE person.email LIKE 'person%%' AND tenants.number = 0
    """,
    """
    INSERT INTO accounts_usagerecord (day, organization_id, project_id, user_id, api_key_id, model, endpoint,
        batches, requests, input_tokens, cached_tokens, output_tokens, reasoning_tokens, gpu_seconds, cost)
    SELECT current_date - at, key.organization_id, key.project_id, key.created_by_id, key.id, 'm' || model,
        '/v1/chat/completions', 1, 1000, 500000, 0, 250000, 0, 60, 1
    FROM generate_series(0, 89) AS at, generate_series(1, 5) AS model,
        (SELECT * FROM accounts_apikey WHERE prefix LIKE 'p%%' ORDER BY id LIMIT 40) AS key
    """,
    """
    INSERT INTO accounts_usagerecord (day, organization_id, project_id, model, endpoint,
        batches, requests, input_tokens, cached_tokens, output_tokens, reasoning_tokens, gpu_seconds, cost)
    SELECT current_date - at, tenants.id, tenants.project, 'm1', '/v1/chat/completions',
        1, 1000, 500000, 0, 250000, 0, 60, 1
    FROM generate_series(0, 29) AS at, tenants WHERE tenants.number > 0
    """,
    """
    INSERT INTO accounts_hourlyuse (organization_id, hour, requests, input_tokens, output_tokens)
    SELECT tenants.id, date_trunc('hour', now(), 'UTC') - at * interval '1 hour', 1000, 500000, 250000
    FROM generate_series(0, 24 * 31) AS at, tenants WHERE tenants.number < 200
    ON CONFLICT DO NOTHING
    """,
    """
    INSERT INTO accounts_auditevent (id, organization_id, number, created_at, action, via, actor_id,
        actor_label, credential, request_id, target_kind, target_id, target_label, changes, previous_hash,
        hash)
    SELECT 'audit_0' || lpad(at::text, 12, '0'), tenants.id, 1000 + at,
        now() - (100000 - at) * interval '1 minute', 'batch.cancelled', 'session', NULL, 'owner@acme.test',
        '', '', 'batch', 'batch_' || at, 'input.jsonl', '{}', md5(at::text), md5((at + 1)::text)
    FROM generate_series(1, 100000) AS at JOIN tenants ON tenants.number = at %% 5
    """,
    """
    INSERT INTO batches_file (id, organization_id, project_id, filename, purpose, bytes, storage_name,
        created_at)
    SELECT 'file-out-' || at, tenants.id, tenants.project, 'output-' || at || '.jsonl',
        'batch_output', 1000000, 'none', now() - at * interval '1 minute'
    FROM tenants, generate_series(1, %(hers)s) AS at WHERE tenants.number = 0
    """,
    """
    INSERT INTO batches_sample (batch_id, at, answered, input_tokens, output_tokens)
    SELECT batch.id, now() - at * interval '1 minute', 400 - at, 1000 * (400 - at), 500 * (400 - at)
    FROM (SELECT max(batch.id) AS id FROM batches_batch AS batch JOIN tenants
        ON tenants.id = organization_id WHERE number = 0 AND status = 'in_progress') AS batch,
        generate_series(0, 239) AS at
    """,
    """
    INSERT INTO batches_webhookendpoint (id, organization_id, name, url, event_types, encrypted_headers,
        encrypted_secret, secret_hint, encrypted_old_secret, timeout, disabled_why, failures, resume_at,
        created_at, updated_at)
    SELECT 'we_1', tenants.id, 'nightly', 'https://hooks.example.com/', '["batch.completed"]', '', '', '',
        '', 15, '', 0, now() + interval '30 days', now(), now() FROM tenants WHERE tenants.number = 0
    """,
    """
    INSERT INTO batches_event (id, organization_id, project_id, type, created_at, body)
    SELECT 'evt_' || lpad(to_hex((extract(epoch FROM now()) * 1000)::bigint), 12, '0') || lpad(at::text, 20, '0'),
        tenants.id, tenants.project, 'batch.completed', now(), '{}'
    FROM tenants, generate_series(1, %(hers)s) AS at WHERE tenants.number = 0
    """,
    """
    INSERT INTO batches_webhookdelivery (id, organization_id, event_id, endpoint_id, state, tries,
        ended_at, error)
    SELECT 'whd_' || substr(id, 5), organization_id, id, 'we_1',
        CASE WHEN id LIKE '%%0' THEN 'dead' ELSE 'delivered' END, 1, now(), '' FROM batches_event
    WHERE id LIKE 'evt_0%%'
    """,
    """
    INSERT INTO batches_webhookattempt (delivery_id, at, milliseconds, status, answer, error)
    SELECT id, now(), 20, CASE state WHEN 'dead' THEN 500 ELSE 200 END, '', ''
    FROM batches_webhookdelivery
    """,
    """
    INSERT INTO batches_resulthandler (id, organization_id, name, kind, settings, encrypted_secrets,
        position, enabled, by_default, created_at, updated_at)
    SELECT 'rh_1', tenants.id, 'nightly', 'parquet', '{}', '', 1, true, true, now(), now()
    FROM tenants WHERE tenants.number = 0
    """,
    """
    INSERT INTO batches_handlerrun (id, organization_id, batch_id, handler_id, position, state, attempts,
        rows, result, error, created_at, started_at, ended_at)
    SELECT 'hrun_' || batch.id, tenants.id, batch.id, 'rh_1', 1, 'done', 1, 1000, '', '', now(), now(), now()
    FROM batches_batch AS batch JOIN tenants ON tenants.id = organization_id
    WHERE tenants.number = 0 AND status = 'completed'
    """,
    """
    INSERT INTO worker_worker (name, host, pid, gpu, gpu_kind, state, loaded_model, asleep, in_flight,
        tokens_per_second, swaps, draining, error, started_at, heartbeat_at)
    SELECT 'gpu' || at, 'host' || at / 8, at, '0', 'NVIDIA H200', 'running', 'm' || 1 + at %% 20, '[]', 200,
        20000, 3, false, '', now(), now() + interval '1 hour'
    FROM generate_series(1, 200) AS at
    """,
    "UPDATE accounts_user SET is_staff = true WHERE email = 'owner@acme.test'",
)
"""Each one statement, whatever the number of rows; the sweep leaves these rows as they are, and so
events have ids of now: it forgets older ones."""


def run() -> dict[str, float]:
    with ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        stack = ends.enter_context(stacks.running(folder, "--gpu-workers=0"))
        done = _one_that_ran(stack)
        known = _fill(stack) | {"done": done}
        client = ends.enter_context(httpx.Client(base_url=stack.base_url, timeout=60))
        _sign_in(client)
        numbers: dict[str, float] = {}
        for name, path in PAGES.items():
            numbers |= _measured(client, name, path.format(**known))
    worst = max(value for name, value in numbers.items() if name.endswith("_p95_ms"))
    return numbers | {"worst_p95_ms": worst}


def _one_that_ran(stack: Stack) -> str:
    """The id of a batch with answers to show; its worker is gone before the others' rows are made."""
    site = Site(stack, gpu=None, sources=[])
    stack.instant("ran")
    with site.worker():
        return str(site.batch("ran", REQUESTS).id)


def _fill(stack: Stack) -> dict[str, str]:
    """Make all the rows; returns what the addresses of pages need."""
    sizes = {
        "batches": BATCHES,
        "organizations": ORGANIZATIONS,
        "unfinished": UNFINISHED,
        "hers": HERS,
    }
    with psycopg.connect(stack.services.database_url, autocommit=True) as database:
        for statement in SEED:
            database.execute(statement, sizes)  # type: ignore[arg-type]
        database.execute("VACUUM ANALYZE")
        database.execute("CHECKPOINT")  # or pages would share the disk with all that was written
        found = database.execute("SELECT id FROM accounts_organization WHERE slug = 'acme'")
        ((organization,),) = found.fetchall()
        mine = "SELECT count(*) FROM batches_batch WHERE organization_id = %s"
        ((hers,),) = database.execute(mine, [organization]).fetchall()
        running = "SELECT max(batch_id) FROM batches_sample WHERE batch_id LIKE 'batch_0000%'"
        ((unfinished,),) = database.execute(running).fetchall()
        own = "SELECT input_file_id FROM batches_batch WHERE id NOT LIKE 'batch_0000%'"
        ((file,),) = database.execute(own).fetchall()
    assert hers >= HERS, hers
    return {
        "organization": organization,
        "middle": f"batch_{BATCHES // 2:012}",
        "running": unfinished,
        "file": file,
        "webhook": "we_1",
        "handler": "rh_1",
    }


def _sign_in(client: httpx.Client) -> None:
    client.get("/accounts/login/")
    form = {
        "login": EMAIL,
        "password": PASSWORD,
        "csrfmiddlewaretoken": client.cookies["csrftoken"],
    }
    answer = client.post("/accounts/login/", data=form, headers={"referer": str(client.base_url)})
    assert answer.status_code == 302, answer.status_code


def _measured(client: httpx.Client, name: str, path: str) -> dict[str, float]:
    headers = {"hx-request": "true"} if name.endswith("_part") else {}
    for _ in range(WARM):
        _first_byte(client, path, headers)
    times = sorted(_first_byte(client, path, headers) for _ in range(TIMES))
    return {
        f"{name}_p50_ms": 1000 * times[TIMES // 2],
        f"{name}_p95_ms": 1000 * times[int(0.95 * TIMES)],
    }


def _first_byte(client: httpx.Client, path: str, headers: dict[str, str]) -> float:
    """Seconds until the answer's head is there, which the server sends with its body's beginning."""
    began = time.perf_counter()
    with client.stream("GET", path, headers=headers) as response:
        taken = time.perf_counter() - began
        assert response.status_code in (200, 286), (path, response.status_code)
        response.read()
    return taken
