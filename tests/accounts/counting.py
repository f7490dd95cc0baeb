"""A process of its own that counts calls as a web server does, and prints how many passed.

Run by `test_rate_limits_processes.py`: ORGANIZATION LIMIT CALLS MOMENT, by the clock at MOMENT.
"""

from __future__ import annotations

import sys

import django
import time_machine
from django.http import HttpRequest


def main(id: str, limit: str, calls: str, moment: str) -> int:
    """How many of the calls passed."""
    django.setup()
    from accounts import consumption, throttling
    from accounts.access import Caller
    from accounts.models import Organization, Project, Quota

    organization = Organization(pk=id)
    quota = Quota(organization=organization, requests_per_minute=int(limit))
    consumption.quotas_of = lambda *_: [quota]
    caller = Caller(organization, Project(organization=organization))
    print("ready", flush=True)
    sys.stdin.readline()
    passed = 0
    with time_machine.travel(float(moment), tick=False):
        for _ in range(int(calls)):
            request = HttpRequest()
            request.method, request.path = "GET", "/v1/models"
            try:
                throttling.count(request, caller)
            except throttling.RateLimited:
                continue
            passed += 1
    return passed


if __name__ == "__main__":
    print(main(*sys.argv[1:]), flush=True)
