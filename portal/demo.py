"""`./run demo`: the whole way of a batch on this machine, from nothing to the first answers.

It uses the portal as a stranger would: `./run serve`, management commands and the openai SDK.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from portal import supervisor

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import Batch

ROOT = Path(__file__).resolve().parent.parent
EMAIL, ORGANIZATION = "owner@demo.example.com", "demo"
ENDED = {"completed", "failed", "expired", "cancelled"}
REQUESTS = 24
TOPICS = ["a lighthouse", "the number seven", "rain", "a lost key", "bread", "the moon"]


class Unwell(Exception):
    """The demo cannot go on; the message says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        with serving(options) as (process, base_url):
            failed = show(options, base_url)
            if options.once:
                return 1 if failed else 0
            print("Ctrl-C stops everything.", flush=True)
            return process.wait()
    except Unwell as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run demo", description=__doc__)
    parser.add_argument("--model", help="a real chat model: a Hugging Face name or a folder")
    parser.add_argument("--once", action="store_true", help="stop after the answers")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--data-dir", type=Path, default=supervisor.default_data_dir())
    return parser.parse_args(arguments)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


# --- The portal -------------------------------------------------------------------------------


@contextmanager
def serving(options: argparse.Namespace) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`./run serve` in the background, its log in DATA_DIR; stopped when the demo ends."""
    data_dir = options.data_dir.resolve()
    data_dir.mkdir(parents=True, exist_ok=True)
    log = data_dir / "log" / "demo.log"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "portal.supervisor", "serve", f"--port={options.port}"]
    say(f"starting PostgreSQL, Valkey, web, cpu worker, beat and a GPU worker (log: {log})")
    with log.open("ab") as out:
        # A session of its own: a terminal's Ctrl-C reaches the demo, and the demo stops the rest.
        process = subprocess.Popen(
            [*command, f"--data-dir={data_dir}"],
            cwd=ROOT,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield process, _ready(process, data_dir, log)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        say("stopping")
        process.terminate()
        process.wait()


def _ready(process: subprocess.Popen[bytes], data_dir: Path, log: Path) -> str:
    limit = time.monotonic() + 180
    while time.monotonic() < limit:
        if process.poll() is not None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            raise Unwell(f"the portal did not start:\n{tail}")
        try:
            return supervisor.wait_ready(data_dir, timeout=1)
        except TimeoutError:
            continue
    raise Unwell(f"the portal did not become ready; see {log}")


def manage(options: argparse.Namespace, *arguments: str, stdin: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-m", "portal.supervisor", "manage", *arguments],
        cwd=ROOT,
        env=os.environ | {"DATA_DIR": str(options.data_dir.resolve())},
        input=stdin,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Unwell(f"{arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


# --- What it shows ----------------------------------------------------------------------------


def show(options: argparse.Namespace, base_url: str) -> bool:
    """Make what is missing, send the batches, print the answers; True when any request failed."""
    from openai import OpenAI

    known = _account(options)
    models = _models(options)
    client = OpenAI(base_url=f"{base_url}/v1", api_key=known["key"])
    batches = [_send(client, model, task) for model, task in models]
    ended = _watch(client, batches)
    for batch in ended:
        _print_answers(client, batch)
    print(f"\nSign in at {base_url}  ·  {EMAIL}  ·  {known['password']}")
    print(f"API: {base_url}/v1  ·  documentation: {base_url}/v1/docs  ·  key: {known['key']}")
    return any(
        batch.status != "completed" or (batch.request_counts and batch.request_counts.failed)
        for batch in ended
    )


def _account(options: argparse.Namespace) -> dict[str, str]:
    """The demo's owner and key: made once, then read from DATA_DIR/demo.json."""
    path = options.data_dir / "demo.json"
    if path.exists():
        known: dict[str, str] = json.loads(path.read_text())
        return known
    password = secrets.token_urlsafe(12)
    say(f"making the organization {ORGANIZATION!r}, its owner and an API key")
    manage(
        options, "create_org", ORGANIZATION, "--owner", EMAIL, "--password-stdin", stdin=password
    )
    key = manage(options, "create_api_key", "--org", ORGANIZATION, "--name", "demo")
    path.touch(mode=0o600)
    path.write_text(json.dumps({"password": password, "key": key}))
    return {"password": password, "key": key}


def _models(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Register what the demo runs; returns names and tasks."""
    if options.model:
        folder = Path(options.model).expanduser()
        name = folder.resolve().name if folder.is_dir() else options.model
        _register(options, name, options.model, "chat")
        return [(name, "chat")]
    folder = options.data_dir / "models"
    done = "taking the" if folder.exists() else "making"
    say(f"{done} tiny models of random weights (their answers are noise; --model takes a real one)")
    maker = [sys.executable, str(ROOT / "examples" / "make_tiny_models.py"), str(folder)]
    made = subprocess.run(maker, capture_output=True, text=True, check=False)
    if made.returncode:
        raise Unwell(f"the tiny models could not be made:\n{made.stderr.strip()}")
    tiny = [("tiny-chat-a", "chat"), ("tiny-chat-b", "chat"), ("tiny-embed", "embedding")]
    for name, task in tiny:
        _register(options, name, str(folder / name), task)
    return tiny


def _register(options: argparse.Namespace, name: str, source: str, task: str) -> None:
    manage(options, "register_model", name, "--source", source, "--task", task)


def _send(client: OpenAI, model: str, task: str) -> Batch:
    chat = task == "chat"
    content = b"".join(_line(at, model, chat) for at in range(REQUESTS))
    file = client.files.create(file=(f"{task}.jsonl", content), purpose="batch")
    return client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions" if chat else "/v1/embeddings",
        completion_window="24h",
        metadata={"sample": f"{model}: {REQUESTS} requests"},
    )


def _line(at: int, model: str, chat: bool) -> bytes:
    topic = f"{TOPICS[at % len(TOPICS)]} ({at})"
    if chat:
        said = [{"role": "user", "content": f"One sentence about {topic}, please."}]
        body: dict[str, Any] = {"model": model, "messages": said, "max_tokens": 24}
    else:
        body = {"model": model, "input": topic}
    url = "/v1/chat/completions" if chat else "/v1/embeddings"
    line = {"custom_id": f"request-{at}", "method": "POST", "url": url, "body": body}
    return json.dumps(line).encode() + b"\n"


def _watch(client: OpenAI, batches: Sequence[Batch]) -> list[Batch]:
    """Draw the progress of all batches until they have ended."""
    started, drawn = time.monotonic(), ""
    while True:
        now = [client.batches.retrieve(batch.id) for batch in batches]
        counts = [batch.request_counts for batch in now if batch.request_counts]
        done = sum(count.completed + count.failed for count in counts)
        ended = sum(batch.status in ENDED for batch in now)
        bar = f"{_bar(done, REQUESTS * len(now))} · {ended} of {len(now)} batches"
        if sys.stdout.isatty():
            print(f"\r{bar}, {time.monotonic() - started:.0f} s\033[K", end="", flush=True)
        elif bar != drawn:  # a log wants what changed, not a line for every look
            print(bar, flush=True)
        if ended == len(now):
            print()
            return now
        drawn = bar
        time.sleep(0.3)


def _bar(done: int, total: int, width: int = 40) -> str:
    full = width * done // total
    return f"[{'#' * full}{'.' * (width - full)}] {done}/{total} answers"


def _print_answers(client: OpenAI, batch: Batch, most: int = 2) -> None:
    print(f"\n{batch.id}  {batch.model}  {batch.status}")
    file = batch.output_file_id or batch.error_file_id
    if file is None:
        print(f"   {batch.errors}")
        return
    for text in client.files.content(file).text.splitlines()[:most]:
        line = json.loads(text)
        body = (line["response"] or {}).get("body") or line["error"]
        print(f"   {line['custom_id']}: {_short(body)}")


def _short(body: dict[str, Any]) -> str:
    """What was answered, on one line of a terminal."""
    if "choices" in body:
        said = json.dumps(body["choices"][0]["message"]["content"], ensure_ascii=False)
    elif "data" in body:
        numbers = body["data"][0]["embedding"]
        said = f"{len(numbers)} numbers: {', '.join(f'{x:.3f}' for x in numbers[:4])} …"
    else:
        said = json.dumps(body)
    return said if len(said) < 100 else f"{said[:97]}…"


def say(text: str) -> None:
    print(f"· {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
