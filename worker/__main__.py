"""`python -m worker --name X [--gpu I]`: one GPU worker, a Celery worker with a lease loop.

Celery brings the wake-ups and the signals; the loop has its own thread and would find its work
without them.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading

import structlog

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "portal.settings")
logger = structlog.get_logger(__name__)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def main() -> int:
    options = _options()
    import django

    django.setup()
    from worker import orphans, running
    from worker.heartbeat import Heartbeat
    from worker.loop import LeaseLoop

    name = orphans.claim_name(options.name)
    if name is None:
        logger.error("a worker of this name runs here already; choose another", name=options.name)
        return 1
    loop = LeaseLoop(options.name, options.gpu)
    running.set_loop(loop)
    crashed = threading.Event()
    thread = threading.Thread(target=_run, args=(loop, crashed), name="lease-loop", daemon=True)
    heartbeat = Heartbeat(loop)
    thread.start()
    heartbeat.start()
    try:
        _celery(options.name, loop)
    finally:
        loop.stop()
        thread.join(26)
        heartbeat.join(2)
    if thread.is_alive():
        logger.error("the lease loop did not end in time")
        os._exit(1)  # a regular exit would wait for its threads
    name.close()
    return 1 if crashed.is_set() else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="worker", description="One GPU worker.")
    parser.add_argument("--name", required=True, help="unique among all workers")
    parser.add_argument("--gpu", type=int, help="index of the GPU to use")
    options = parser.parse_args()
    if not _NAME.fullmatch(options.name):
        parser.error("--name takes letters, digits, dots, dashes and underscores")
    return options


def _run(loop: object, crashed: threading.Event) -> None:
    """The thread's body; when the loop crashes the process must go, to be started afresh."""
    try:
        loop.run()  # type: ignore[attr-defined]
    except Exception:
        logger.exception("the lease loop crashed")
        crashed.set()
        os.kill(os.getpid(), signal.SIGTERM)


def _celery(name: str, loop: object) -> None:
    """Run until SIGTERM; the loop stops feeding as soon as the signal comes."""
    from celery import current_app
    from celery.signals import worker_shutting_down

    worker_shutting_down.connect(lambda **_: loop.stop(), weak=False)  # type: ignore[attr-defined]
    arguments = ["--quiet", "worker", "--queues=gpu", "--pool=threads", "--concurrency=1"]
    arguments += [f"--hostname={name}@%h", "--without-gossip", "--without-mingle"]
    try:
        current_app.worker_main([*arguments, "--without-heartbeat", "--loglevel=INFO"])
    except SystemExit as end:
        if end.code not in (0, None, signal.SIGTERM):
            logger.error("celery ended", code=end.code)


if __name__ == "__main__":
    sys.exit(main())
