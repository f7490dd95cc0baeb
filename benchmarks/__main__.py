"""`./run bench NAME [--json FILE]`: runs one benchmark, prints its table, keeps its numbers.

Each benchmark is a module here with `run() -> dict`: one flat object of headline numbers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from pathlib import Path

NAMES = (
    "api",
    "claims",
    "control",
    "engine",
    "eta",
    "feed",
    "gpu",
    "lane",
    "pages",
    "queue",
    "scale",
    "storage",
    "webhooks",
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="run bench", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the headline numbers")
    options = parser.parse_args()
    module = importlib.import_module(f"benchmarks.{options.name}")
    print(f"{options.name}: {module.__doc__.splitlines()[0]}", flush=True)
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}", flush=True)
    numbers: dict[str, float] = module.run()
    width = max(map(len, numbers))
    for name, value in numbers.items():
        print(
            f"  {name:<{width}}  {value:>12,.3f}"
            if value < 100
            else f"  {name:<{width}}  {value:>12,.0f}"
        )
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
