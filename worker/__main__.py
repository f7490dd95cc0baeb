"""`python -m worker --name X [--gpu I[,J…]]`: one GPU worker, a Celery worker with a lease loop.

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
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import structlog

if TYPE_CHECKING:
    from worker.identity import Identity
    from worker.loop import LeaseLoop
    from worker.models import Worker

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "portal.settings")
logger = structlog.get_logger(__name__)
_GPU = re.compile(r"\d{1,3}(,\d{1,3}){0,15}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Refused(Exception):
    """The worker may not start; the message says why, and what to do."""


def main() -> int:
    options = _options()
    import django

    django.setup()
    from worker import gpus, identity, orphans

    lock = orphans.claim_name(options.name)
    if lock is None:
        logger.error("a worker of this name runs here already; choose another", name=options.name)
        return 1
    orphans.end_left_over(options.name)
    me = identity.of_this_process(options.name, gpu=options.gpu, gpu_kind=gpus.kind_of(options.gpu))
    try:
        row = _claim(me)
    except Refused as error:
        logger.error("cannot start", reason=str(error))
        return 1
    code = _work(me, draining=row.draining)
    lock.close()
    return code


def _claim(me: Identity) -> Worker:
    """This worker's row; waits for the database."""
    from django.conf import settings
    from django.db import ProgrammingError
    from django.db.backends.signals import connection_created

    from worker import services
    from worker.database import end_idle_transactions, patiently

    if not (settings.DATABASE_URL and settings.REDIS_URL):
        raise Refused("DATABASE_URL and REDIS_URL must say where the portal's services are")
    connection_created.connect(end_idle_transactions)
    try:
        return patiently(lambda: services.claim(me))
    except services.NameTaken as error:
        raise Refused(str(error)) from error
    except ProgrammingError as error:
        said = "the database has not the tables of this version; upgrade the portal's host first"
        raise Refused(f"{said} ({str(error).splitlines()[0]})") from error


def _work(me: Identity, *, draining: bool) -> int:
    """Run until SIGTERM, or until something ends this process; returns its exit code."""
    from worker import running
    from worker.heartbeat import Heartbeat
    from worker.loop import LeaseLoop

    loop = LeaseLoop(me.name, me.gpu)
    loop.draining = draining
    running.set_loop(loop)
    codes, over = [0], threading.Event()

    def end(code: int) -> None:
        codes.append(code)
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=_run, args=(loop, end), name="lease-loop", daemon=True)
    heartbeat = Heartbeat(loop, me, end)
    thread.start()
    heartbeat.start()
    try:
        signal.signal(signal.SIGTERM, _exit)  # until Celery, which takes a while, has its own
        _celery(me.name, loop)
    except SystemExit:
        pass
    finally:
        over.set()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        loop.stop()
        thread.join(26)
        heartbeat.join(2)
    if thread.is_alive():
        logger.error("the lease loop did not end in time")
        os._exit(1)  # a regular exit would wait for its threads
    return max(codes)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="worker", description="One GPU worker.")
    parser.add_argument("--name", required=True, help="unique among all workers")
    parser.add_argument("--gpu", help="index of the GPU to use; of several: 0,1")
    options = parser.parse_args()
    if not _NAME.fullmatch(options.name):
        parser.error("--name takes letters, digits, dots, dashes and underscores")
    if options.gpu is not None and not _GPU.fullmatch(options.gpu):
        parser.error("--gpu takes an index, or several with commas between, as 0,1")
    return options


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(0)


def _run(loop: LeaseLoop, end: Callable[[int], None]) -> None:
    """The thread's body; when the loop crashes the process must go, to be started afresh."""
    try:
        loop.run()
    except Exception:
        logger.exception("the lease loop crashed")
        end(1)


def _celery(name: str, loop: LeaseLoop) -> None:
    """Run until SIGTERM; the loop stops feeding as soon as the signal comes."""
    from celery import current_app
    from celery.signals import worker_shutting_down

    worker_shutting_down.connect(lambda **_: loop.stop(), weak=False)
    arguments = ["--quiet", "worker", "--queues=gpu", "--pool=threads", "--concurrency=1"]
    arguments += [f"--hostname={name}@%h", "--without-gossip", "--without-mingle"]
    try:
        current_app.worker_main([*arguments, "--without-heartbeat", "--loglevel=INFO"])
    except SystemExit as end:
        if end.code not in (0, None, signal.SIGTERM):
            logger.error("celery ended", code=end.code)


if __name__ == "__main__":
    sys.exit(main())
