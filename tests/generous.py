"""Rate limits for tests and benchmarks, which send in a minute what no customer does."""

RATE_LIMITS = {
    f"RATE_LIMIT_{name}": "1000000" for name in ("REQUESTS", "BATCHES", "FILES", "ANONYMOUS")
}
