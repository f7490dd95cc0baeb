"""How much an engine is given: enough to keep it full, and a little that waits in it.

What was fed cannot be had back before it has run, and whatever is leased for it is kept from other
workers: so no more than that. Counting only; the lease loop starts the requests. The rule:

1. No more than `capacity` requests, which is twice what the engine runs at once: as many again wait.
2. By estimate, no more tokens wait in it than its KV cache holds. Long requests fill an engine with
   few, and need few that wait.
3. Estimates can be far too high (a `max_tokens` of 16,000, prefixes that are shared). So while the
   engine says that fewer wait in it than run, it is fed on whatever the tokens, until as many wait
   as run. As it says so at each of its steps, one that was underestimated is full within a few.

Of an engine that says nothing of itself, the first cache-full by estimate is taken to run. One
without a KV cache is held to rule 1.
"""

from __future__ import annotations

from collections import deque

from worker.engines.base import FULLS, Engine

REMEMBERED = 16_384
"""Of so many requests it is known how long they are, should they wait."""


class Feed:
    """What is in flight, and whether the engine should have more. Tokens are estimates."""

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        self.headroom = 0
        """Requests of rule 1 that are kept free for others."""
        self._fed = deque([0], maxlen=REMEMBERED)
        """After each request, the tokens of all that were ever fed."""

    def begin(self, tokens: int) -> None:
        """A request entered the engine."""
        self.requests += 1
        self.tokens += tokens
        self._fed.append(self._fed[-1] + tokens)

    def end(self, tokens: int) -> None:
        """It left."""
        self.requests -= 1
        self.tokens -= tokens

    def takes(self, engine: Engine, tokens: int) -> bool:
        """Whether to feed one more request of so many tokens; a single one may be of any size."""
        if not self.requests:
            return True
        if self.requests >= engine.capacity - self.headroom:
            return False
        return self._room_for(engine, tokens) or self._runs_on(engine)

    def wants(self, engine: Engine, requests: int, tokens: int) -> bool:
        """Whether to lease more when this much is leased and not fed: less than an engine-full."""
        cache = engine.cache_tokens
        return requests < engine.capacity - self.headroom and (not cache or tokens < cache)

    def fullness(self, engine: Engine) -> float:
        """How much of the engine is in use, from 0 to 1."""
        if not self.requests:
            return 0.0
        if engine.report is not None:
            full = max(1.0, engine.capacity / FULLS)
            return 1.0 if engine.report.waiting else min(1.0, engine.report.running / full)
        by_tokens = self.tokens / (FULLS * engine.cache_tokens) if engine.cache_tokens else 0.0
        return min(1.0, max(self.requests / engine.capacity, by_tokens))

    def _room_for(self, engine: Engine, tokens: int) -> bool:
        """Rule 2; the first that waits may be of any size."""
        if not engine.cache_tokens:
            return True
        waiting = self._waiting_tokens(engine)
        return not waiting or waiting + tokens <= engine.cache_tokens

    def _waiting_tokens(self, engine: Engine) -> int:
        """Of those that wait in the engine: the last ones that were fed, as it takes them in turn."""
        if engine.report is None:
            return max(0, self.tokens - engine.cache_tokens)
        waiting = min(max(0, self.requests - engine.report.running), len(self._fed) - 1)
        return self._fed[-1] - self._fed[-1 - waiting]

    def _runs_on(self, engine: Engine) -> bool:
        """Rule 3. Both counts, as one request may be several to the engine (`n`, lists of prompts),
        and as what was fed last is not in the report yet."""
        report = engine.report
        if report is None:
            return False
        return report.waiting < report.running and self.requests < FULLS * report.running
