"""vLLM's options for a registry entry: ours, the operator's, and what suits the machine."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from worker.engines import ladder
from worker.engines.base import LoadFailed, ModelSpec

OURS = frozenset({"model", "model-tag", "served-model-name", "revision", "config", "headless"})
"""vLLM options that the registry entry decides, or that make no sense in process."""
DEFAULT_OPTIONS: dict[str, Any] = {
    "disable-log-stats": True,
    "scheduling-policy": "priority",  # what somebody waits for goes before batches
    "enable-prompt-tokens-details": True,  # usage of cached tokens is billed apart
    # Bodies are tenants' text: a URL in one must not make this host fetch it. An empty list would
    # allow every host, so the list names one that cannot exist; `data:` URLs stay allowed.
    "allowed-media-domains": ["none.invalid"],
}
TASK_OPTIONS: dict[str, dict[str, Any]] = {
    "embedding": {"runner": "pooling"},
    "score": {"runner": "pooling"},
}
CPU_OPTIONS: dict[str, Any] = {
    "dtype": "float32",  # bfloat16 with AMX can die of SIGILL in a tiny first forward pass
    "enforce-eager": True,
    "enable-chunked-prefill": False,  # with it a request's own seed kills the engine
    "kv-cache-memory-bytes": "1G",  # without a bound it takes most of the host's memory
    "structured-outputs-config": {"backend": "xgrammar", "disable_any_whitespace": True},
}


def on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def knows_sleep() -> bool:
    """Whether this build of vLLM can put a model to sleep on this platform."""
    from vllm.platforms import current_platform

    has_allocator = getattr(current_platform, "is_cumem_allocator_available", lambda: True)
    return bool(current_platform.is_sleep_mode_available() and has_allocator())


def memory_options(engine_args: Any) -> dict[str, Any]:
    """What the ladder may change, as vLLM filled it in; without what it leaves to the model."""
    found = {name: getattr(engine_args, name.replace("-", "_"), None) for name in ladder.OPTIONS}
    return {name: value for name, value in found.items() if value is not None}


def _cli() -> Any:
    try:
        from vllm.entrypoints.common import cli_args  # 0.33
    except ImportError:
        try:
            from vllm.entrypoints.launchers import cli_args  # 0.30 to 0.32
        except ImportError:
            from vllm.entrypoints.openai import cli_args  # before
    return cli_args


def parsed(spec: ModelSpec, usual: Mapping[str, Any]) -> Any:
    """vLLM's own parsed arguments for a registry entry; raises LoadFailed for a bad option.

    `usual` are options that suit the GPU, unless the entry has others.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def refuse(message: str) -> NoReturn:
        raise LoadFailed(f"vLLM refuses the engine_args: {message}")

    parser = _cli().make_arg_parser(FlexibleArgumentParser(prog="vllm"))
    parser.error = refuse  # argparse would end the process
    try:
        args = parser.parse_args(words(spec, usual, parser._option_string_actions))
        _cli().validate_parsed_serve_args(args)
    except SystemExit:
        raise LoadFailed("vLLM refuses the engine_args") from None
    # What serves HTTP takes a list here; the parser leaves a single name a string.
    args.served_model_name = [spec.name]
    return args


def words(spec: ModelSpec, usual: Mapping[str, Any], known: dict[str, Any]) -> list[str]:
    """The command line for a registry entry: our options, then those of its `engine_args`, then
    what it settled on."""
    options = {**DEFAULT_OPTIONS, **usual, **TASK_OPTIONS.get(spec.task, {})}
    options |= CPU_OPTIONS if on_cpu() else {}
    options["enable-sleep-mode"] = spec.may_sleep and knows_sleep()
    options = {name: value for name, value in options.items() if f"--{name}" in known}
    for name, value in spec.engine_args.items():
        option = ladder.named(name)
        if option in OURS:
            raise LoadFailed(f"engine_args cannot set {name}: the model's entry does")
        options[option] = value
    options |= spec.settled
    if "tool-call-parser" in options:  # which vLLM does not look at without this
        options.setdefault("enable-auto-tool-choice", True)
    words = [f"--model={spec.source}", f"--served-model-name={spec.name}"]
    if spec.revision:
        words.append(f"--revision={spec.revision}")
    return words + [word for pair in options.items() for word in _option(*pair, known)]


def _option(name: str, value: Any, known: dict[str, Any]) -> list[str]:
    """One option as words of a command line, written as its parser wants it."""
    flag = f"--{name}"
    action = known.get(flag.partition(".")[0])  # `--json-option.key` sets one key
    if action is None:
        close = difflib.get_close_matches(flag, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise LoadFailed(f"vLLM has no option {flag}{hint}")
    if value is None or value == []:
        return []
    if value is True and action.nargs is not None:
        return [flag]
    if value is False and f"--no-{name}" in known:
        return [f"--no-{name}"]
    if value is False and action.nargs == 0:
        return []
    if isinstance(value, list) and action.nargs in ("+", "*"):
        return [flag, *map(str, value)]
    return [f"{flag}={json.dumps(value) if isinstance(value, list | dict) else value}"]
