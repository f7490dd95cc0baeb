"""The network between workers and the database is cut: nothing is lost or doubled, and they come back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests import stack as stacks
from tests.chaos.witness import (
    QUICK,
    assert_whole,
    database,
    ended,
    is_done,
    journal,
    leased_to,
)
from tests.machines import Machine, machine
from tests.network import Proxy, proxied
from tests.stack import Stack, lines, send, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chaos")]

REQUESTS = 5_000
"""Enough that one worker alone is not done with it while the others are cut off."""
CUT_SECONDS = 60
CUTS = ("stall", "swallow", "reset")


class Remote:
    """A worker whose way to PostgreSQL and to Valkey can be cut."""

    def __init__(self, machine: Machine, ways: list[Proxy]) -> None:
        self.machine = machine
        self.name = machine.name
        self.ways = ways

    def cut(self) -> None:
        """The way in which it is cut is its name."""
        for way in self.ways:
            getattr(way, self.name)()

    def mend(self) -> None:
        for way in self.ways:
            way.mend()


@contextmanager
def remotes(stack: Stack, folder: Path) -> Iterator[list[Remote]]:
    with ExitStack() as ends:
        made = []
        for name in CUTS:
            services = stack.services
            database = ends.enter_context(proxied(services.database_url))
            redis = ends.enter_context(proxied(services.redis_url))
            urls = {"DATABASE_URL": database.url, "REDIS_URL": redis.url}
            worker = ends.enter_context(machine(stack, folder / name, name, **QUICK, **urls))
            made.append(Remote(worker, [database, redis]))
        yield made


def test_workers_that_are_cut_off_for_longer_than_a_lease_lose_and_double_nothing(
    tmp_path: Path,
) -> None:
    """I1, I2. Packets that vanish, connections that go mute for good, and such as are reset."""
    with (
        stacks.running(tmp_path / "portal", **QUICK) as stack,
        remotes(stack, tmp_path) as cut_off,
        database(stack) as rows,
    ):
        model = stack.instant("slow", delay_ms=500, concurrency=20)
        client = stack.client()
        batch = send(client, lines(REQUESTS, model))
        chunks = [wait_for(lambda name=each.name: leased_to(rows, name)) for each in cut_off]
        for each in cut_off:  # one that cannot even load the model has nothing to lose
            wait_for(lambda log=each.machine: log.has_said("model loaded"))
        for each in cut_off:
            each.cut()
        since = time.monotonic()
        for chunk in chunks:  # by gpu0, once the leases have expired
            wait_for(lambda chunk=chunk: is_done(rows, chunk))
        before = [journal(rows, batch.id, chunk) for chunk in chunks]
        assert [len(saved) for saved in before] == [200] * len(CUTS)
        wait_for(lambda: time.monotonic() - since > CUT_SECONDS, seconds=CUT_SECONDS + 10)
        for each in cut_off:
            each.mend()
        for each in cut_off:
            wait_for(lambda log=each.machine: log.has_said("lease lost"))
            wait_for(lambda name=each.name: leased_to(rows, name))
        assert [journal(rows, batch.id, chunk) for chunk in chunks] == before
        assert_whole(client, ended(client, batch.id), REQUESTS)
        assert [each.machine.process.poll() for each in cut_off] == [None] * 3
