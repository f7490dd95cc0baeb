"""Why vLLM failed: what its processes log, and exceptions in one line."""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any


def prepare_process() -> None:
    """What vLLM reads when it is first imported; whatever the operator set stays."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # A worker has threads, and a fork of a process with threads can hang.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    failure_log()


@functools.lru_cache(maxsize=1)
def failure_log() -> Path | None:
    """A file that gets the errors which vLLM logs, here and in its child processes.

    The child only tells us that it failed; why, it tells its log. None where the operator
    configured vLLM's logging, which is left alone.
    """
    if {"VLLM_LOGGING_CONFIG_PATH", "VLLM_CONFIGURE_LOGGING"} & os.environ.keys():
        return None
    folder = tempfile.TemporaryDirectory(prefix="vllm-log-")
    _KEPT.append(folder)
    log, config = Path(folder.name, "errors.log"), Path(folder.name, "logging.json")
    log.touch()
    level = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING").upper()
    config.write_text(json.dumps(_logging_config(log, level)))
    os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(config)
    return log


_KEPT: list[Any] = []  # a temporary folder is removed with the object, so at the process's end


def _logging_config(log: Path, level: str) -> dict[str, Any]:
    line = {"format": "%(levelname)s %(asctime)s pid=%(process)d %(name)s: %(message)s"}
    stream = {"class": "logging.StreamHandler", "level": level, "formatter": "line"}
    file = {"class": "logging.FileHandler", "level": "ERROR", "filename": str(log)}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": line},
        "handlers": {"stream": stream, "file": file},
        "loggers": {"vllm": {"handlers": ["stream", "file"], "level": level, "propagate": False}},
    }


EXCEPTION_LINE = re.compile(r"^(?:[\w.]+\.)?\w*(?:Error|Exception|Exit)\b(?:: .+)?$")
ADVICE = re.compile(
    r"Failed to load model - not enough GPU memory.*|\w+: CUDA out of memory occurred when .*"
)
"""What says more than the exception that it stands beside."""
NO_CAUSE = ("See root cause", "See stack trace", "initialization failed", "EngineDeadError")


def logged_cause(log: Path | None, since: str = "") -> str:
    """The last line of the first logged traceback that names a cause.

    Where the log has the words `since`, only what follows them counts.
    """
    if log is None or not log.exists():
        return ""
    text = log.read_text(errors="replace")
    text = text[max(text.find(since), 0) :]
    if advice := ADVICE.search(text):
        return advice[0][:500]
    for line in text.splitlines():
        if EXCEPTION_LINE.match(line) and not any(words in line for words in NO_CAUSE):
            return line[:500]
    return ""


def in_one_line(error: BaseException) -> str:
    problems = getattr(error, "errors", None)  # pydantic's ValidationError
    if callable(problems):
        return "; ".join(_problem(problem) for problem in problems())[:500]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]


def _problem(problem: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in problem.get("loc", ()))
    return f"{place}: {problem['msg']}" if place else str(problem["msg"])
