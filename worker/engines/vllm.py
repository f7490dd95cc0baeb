"""vLLM as an engine: its own AsyncLLM and its own OpenAI serving layer, called in this process.

The only module that knows vLLM's import paths (0.26 to 0.33); no queue, no database, no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import functools
import gc
import json
import multiprocessing
import os
import random
import re
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import orjson
import psutil

from models_registry import profiles
from worker import gpus
from worker.engines import ladder, streaming
from worker.engines.base import (
    FULLS,
    Answer,
    Chunk,
    Engine,
    EngineDied,
    LoadFailed,
    ModelSpec,
    Refused,
    Report,
    Usage,
)
from worker.engines.gauge import Gauge
from worker.engines.streaming import encoded

WATCH_SECONDS = 0.25
"""How often the engine's processes are looked at."""
DEATH_GRACE_SECONDS = 0.5
"""How long vLLM may take to fail a dead engine's requests itself, before they are ended here."""
SHUTDOWN_SECONDS = 10.0
"""How long the engine's processes may take to end by themselves, before they are killed."""

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

URGENT, BATCH = 0, 1
"""vLLM's `priority`: the smaller one first. Never the tenants' own."""

EXTRAS = frozenset(
    {
        "annotations",
        "audio",
        "completion_tokens_details",
        "created_cache_tokens",
        "ec_transfer_params",
        "function_call",
        "input_messages",
        "kv_transfer_params",
        "metrics",
        "multi_modal",
        "multimodal_tokens",
        "output_messages",
        "prompt_logprobs",
        "prompt_text",
        "prompt_token_ids",
        "prompt_tokens_details",
        "reasoning",
        "reasoning_content",
        "routed_experts",
        "stop_reason",
        "token_ids",
    }
)
"""Keys that vLLM sends as null and that OpenAI's answers do not have, or have only when set."""


@dataclass(frozen=True, slots=True)
class Call:
    """How one endpoint is asked: the body's parser, and the handler that vLLM made (or none)."""

    parse: Callable[[dict[str, Any]], Any]
    handler: Callable[[Any], Awaitable[Any]] | None


class VllmEngine(Engine):
    """One model on vLLM. What a request does not say is vLLM's default, which takes sampling
    values from the model's own `generation_config.json` unless `engine_args` say otherwise.

    `gpu` are the indexes of the devices that the engine may see, with commas between; None leaves
    the environment's choice.
    """

    def __init__(self, spec: ModelSpec, *, gpu: str | None = None) -> None:
        self.spec = spec
        self.gpu = gpu
        self.gpus = 1
        self.capacity = self.slots = 1
        self.can_sleep = False
        self._by_priority = False
        self._gauge = Gauge(self._tell)
        self._engine: Any = None
        self._calls: dict[str, Call] = {}
        self._cores: list[BaseProcess] = []
        self._strangers: set[int | None] | None = None
        self._building: asyncio.Future[Any] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._in_flight: set[asyncio.Task[Any]] = set()
        self._evicted: set[asyncio.Task[Any]] = set()
        self._dead = False

    async def check(self) -> None:
        """Look for the folder and let vLLM parse the options; raises LoadFailed."""
        if Path(self.spec.source).is_absolute() and not Path(self.spec.source).exists():
            raise LoadFailed(f"There is no {self.spec.source} on this host.")
        _prepare_process()
        await asyncio.to_thread(lambda: _parse(self.spec, self._usual_options()))

    async def load(self) -> None:
        """Start the engine; raises LoadFailed with the root cause. Takes 10 s to minutes."""
        await self.unload()
        try:
            await self._load()
        except LoadFailed:
            await self.unload()
            raise
        except Exception as error:
            await self.unload()
            raise LoadFailed(_in_one_line(error)) from error
        except BaseException:
            await self.unload()
            raise

    async def _load(self) -> None:
        self._dead = False
        # In a thread, because importing vLLM and starting its engine would hold up the loop (and
        # with it the heartbeat) for long. vLLM starts its asyncio parts at the first await below.
        self._building = asyncio.ensure_future(asyncio.to_thread(self._build))
        args = await asyncio.shield(self._building)
        self._building = None
        tasks = await self._engine.get_supported_tasks()
        state = await _serving_layer(self._engine, args, tasks)
        self._calls = _calls(state)
        self.slots = _slots(self._engine.vllm_config)
        self.capacity = FULLS * self.slots
        self.cache_tokens = _cache_tokens(self._engine.vllm_config)
        self.can_sleep = self._engine.vllm_config.model_config.enable_sleep_mode
        self._by_priority = self._engine.vllm_config.scheduler_config.policy == "priority"
        parallel = self._engine.vllm_config.parallel_config
        self.gpus = parallel.world_size * parallel.data_parallel_size
        self._watcher = asyncio.create_task(self._watch(), name=f"watch {self.spec.name}")
        # What is here now stays while the model does: the collector need not walk a million
        # objects of torch's and vLLM's again and again while requests come and go.
        gc.collect()
        gc.freeze()

    def _build(self) -> Any:
        """Everything of the start that blocks; returns vLLM's parsed arguments."""
        _prepare_process()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        args = _parse(self.spec, self._usual_options())
        log = _failure_log()
        if log:
            os.truncate(log, 0)
        self._strangers = {child.pid for child in multiprocessing.active_children()}
        with _environment(self._environment(args)):
            engine_args = AsyncEngineArgs.from_cli_args(args)
            try:
                # Offline use, so that vLLM's defaults are those for throughput, not for latency.
                self._engine = AsyncLLM.from_engine_args(
                    engine_args,
                    usage_context=UsageContext.LLM_CLASS,
                    stat_loggers=[self._gauge.logger],
                )
            except Exception as error:
                raise LoadFailed(_logged_cause(log) or _in_one_line(error)) from error
            finally:
                random.seed()  # vLLM gave this process's generator the engine's seed, which is 0
                self.options = _memory_options(engine_args)
        if engine_args.disable_log_stats:
            # Of the statistics that a logger switches on, only the scheduler's few counts are
            # wanted; those of each request and token would cost this process's one thread dear.
            self._engine.log_stats = self._engine.output_processor.log_stats = False
        self._cores = self._children()
        return args

    def _usual_options(self) -> dict[str, Any]:
        """What suits the GPU, and nothing where there is none (or no telling)."""
        found = [] if _on_cpu() else gpus.facts(self.gpu)
        memory = min((each.memory for each in found), default=0)
        return profiles.engine_args(memory) if memory else {}

    def _tell(self, report: Report) -> None:
        self.report = report
        if self.on_report is not None:
            # Not here and now: an exception would end vLLM's own task.
            asyncio.get_running_loop().call_soon(self.on_report)

    def _environment(self, args: Any) -> dict[str, str]:
        """What the engine's processes must find in their environment when they are spawned."""
        if self.gpu is not None and not _on_cpu():
            # The child decides at its first CUDA call which devices there are; after its spawn
            # it is too late. Only the child, because the next engine may be given another one.
            # CUDA's own order is by speed; ours, the driver's, is by place on the bus.
            order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
            wanted = {"CUDA_VISIBLE_DEVICES": self.gpu} | order
        else:
            wanted = {}
        usual = {}
        if Path(self.spec.source).is_dir():
            usual["HF_HUB_OFFLINE"] = "1"
        if _on_cpu():
            # One process fewer between a request and its forward pass, and one import of torch.
            usual["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if _on_cpu() and args.enforce_eager:
            # Some of vLLM's small functions are compiled at their first use whatever the engine
            # was told: the first request for logprobs would hold up all others for 20 s.
            usual["TORCHDYNAMO_DISABLE"] = "1"
        return wanted | {name: usual[name] for name in usual.keys() - os.environ.keys()}

    async def answer(self, endpoint: str, body: dict[str, Any], *, urgent: bool = False) -> Answer:
        """Answer one request body; a refusal is an answer, only the engine's end is an error."""
        with self._in_care():
            try:
                handler, request = self._prepared(endpoint, body, urgent=urgent)
                if getattr(request, "stream", None):
                    return _error(400, "This request cannot be streamed", param="stream")
                answer = _read(await handler(request))
            except Refused as refusal:
                return refusal.answer
            except Exception as error:
                if self.gone():
                    raise EngineDied(self._last_words()) from error
                return _refusal(error)
            if answer.status >= 500 and self.gone():
                raise EngineDied(self._last_words())
            return answer

    async def stream(self, endpoint: str, body: dict[str, Any]) -> AsyncGenerator[Chunk, None]:
        """The events of vLLM's own server, with OpenAI's keys alone."""
        asked = streaming.Asked(body)
        # With usage in each event, also what is broken off is counted.
        body = streaming.with_usage(body, continuous_usage_stats=True)
        with self._in_care():
            try:
                async with contextlib.aclosing(self._events(endpoint, body)) as events:
                    async for event in events:
                        _strip_answer(event)
                        yield asked.chunk(event)
            except Refused:
                if self.gone():
                    raise EngineDied(self._last_words()) from None
                raise
            except Exception as error:
                if self.gone():
                    raise EngineDied(self._last_words()) from error
                raise Refused(_refusal(error)) from error

    async def _events(
        self, endpoint: str, body: dict[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        handler, request = self._prepared(endpoint, body, urgent=True)
        if not getattr(request, "stream", None):
            raise Refused(_error(400, "This request cannot be streamed", param="stream"))
        answer = await handler(request)
        if not hasattr(answer, "__aiter__"):
            raise Refused(_read(answer))
        async with contextlib.aclosing(answer) as texts:
            async for text in texts:
                event = text.removeprefix("data: ").strip()
                if event == "[DONE]":
                    return
                yield _unless_error(orjson.loads(event))

    @contextlib.contextmanager
    def _in_care(self) -> Iterator[None]:
        """While the current task waits for the engine, the engine's end becomes `EngineDied`."""
        if self.gone():
            raise EngineDied(f"the engine of {self.spec.name} is not running")
        task = asyncio.current_task()
        assert task is not None
        cancelled_before = task.cancelling()
        self._in_flight.add(task)
        try:
            yield
        finally:
            self._in_flight.discard(task)
            self._gauge.ended()
            # Here and not in an `except`, because some of vLLM's handlers take a cancellation
            # for a client that hung up, and return an ordinary error.
            self._raise_if_ended(task, cancelled_before)

    def _raise_if_ended(self, task: asyncio.Task[Any], cancelled_before: int) -> None:
        if task in self._evicted:
            self._evicted.discard(task)
            if task.uncancel() == cancelled_before:
                raise EngineDied(self._last_words()) from None
        if task.cancelling() > cancelled_before:
            raise asyncio.CancelledError

    def _prepared(
        self, endpoint: str, body: dict[str, Any], *, urgent: bool
    ) -> tuple[Callable[[Any], Awaitable[Any]], Any]:
        """The handler and what it takes; raises `Refused`, and whatever vLLM's parsers do."""
        call = self._calls.get(endpoint)
        if call is None:
            raise Refused(_error(404, f"Unknown endpoint {endpoint}"))
        if call.handler is None:
            said = f"The model `{self.spec.name}` does not support {endpoint}"
            raise Refused(_error(400, said))
        # vLLM books a request before it packs it for its other process, and forgets to strike
        # off what cannot be packed (lone surrogates, huge integers): find that out first.
        orjson.dumps(body)
        priority = URGENT if urgent or not self._by_priority else BATCH
        # A copy: vLLM's validators write defaults into the body, and the caller may retry it.
        return call.handler, call.parse({**body, "priority": priority})

    async def sleep(self) -> None:
        """Level 1: the weights to the host's memory. Level 2 would read them from disk again on
        waking, in place, which some models do not survive unchanged."""
        await self._engine.sleep(level=1)

    async def wake(self) -> None:
        if await self._engine.wake_up() is False:  # None before vLLM 0.32
            raise EngineDied(f"the engine of {self.spec.name} is not fully awake")

    def gone(self) -> bool:
        return self._dead or self._engine is None or bool(self._engine.errored)

    def _last_words(self) -> str:
        cause = _logged_cause(_failure_log(), since="encountered a fatal error")
        return f"the engine of {self.spec.name} died" + (f": {cause}" if cause else "")

    async def _watch(self) -> None:
        """Notice the engine's death, also one by a signal, and end what waits for its answers."""
        while all(core.is_alive() for core in self._cores) and not self._engine.errored:
            await asyncio.sleep(WATCH_SECONDS)
        self._dead = True
        await asyncio.sleep(DEATH_GRACE_SECONDS)
        self._evict()

    def _evict(self) -> None:
        for task in self._in_flight - self._evicted:
            self._evicted.add(task)
            task.cancel()

    async def unload(self) -> None:
        """End the engine and its processes; requests in flight raise EngineDied. Idempotent."""
        if self._building is not None:  # a cancelled load: its thread cannot be stopped
            await asyncio.wait([self._building])
            self._building.exception()
            self._building = None
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        self._dead = True
        self._evict()
        engine, self._engine, self._calls = self._engine, None, {}
        if engine is not None:
            if engine.output_handler is not None:
                engine.output_handler.cancel()  # else it logs the shutdown as a failure
            with contextlib.suppress(Exception):  # whatever is left is killed below
                await asyncio.to_thread(engine.shutdown, timeout=SHUTDOWN_SECONDS)
            del engine
        await self._end_processes()
        gc.unfreeze()
        gc.collect()  # handlers, renderer and engine refer to each other in circles

    async def _end_processes(self) -> None:
        """Wait for what the engine started; kill by pid what does not end."""
        left = [psutil.Process(pid) for pid in self.pids() if psutil.pid_exists(pid)]
        self._cores, self._strangers = [], None
        if not left:
            return
        _, left = await asyncio.to_thread(psutil.wait_procs, left, timeout=SHUTDOWN_SECONDS)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        await asyncio.to_thread(psutil.wait_procs, left, timeout=SHUTDOWN_SECONDS)

    def _children(self) -> list[BaseProcess]:
        """The engine's own child processes: those that vLLM made through multiprocessing since
        the load began. Python's resource tracker, which ends with this process, is none."""
        if self._strangers is None:
            return []
        strangers = self._strangers
        return [core for core in multiprocessing.active_children() if core.pid not in strangers]

    def pids(self) -> list[int]:
        """The engine's processes and theirs, also while it loads."""
        found = []
        for core in self._cores or self._children():
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(core.pid)
                found += [process.pid, *(child.pid for child in process.children(recursive=True))]
        return found


def _prepare_process() -> None:
    """What vLLM reads when it is first imported; whatever the operator set stays."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # A worker has threads, and a fork of a process with threads can hang.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    _failure_log()


@functools.lru_cache(maxsize=1)
def _failure_log() -> Path | None:
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


def _logged_cause(log: Path | None, since: str = "") -> str:
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


def _in_one_line(error: BaseException) -> str:
    problems = getattr(error, "errors", None)  # pydantic's ValidationError
    if callable(problems):
        return "; ".join(_problem(problem) for problem in problems())[:500]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]


def _problem(problem: dict[str, Any]) -> str:
    place = ".".join(str(part) for part in problem.get("loc", ()))
    return f"{place}: {problem['msg']}" if place else str(problem["msg"])


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the processes that are spawned inside the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _knows_sleep() -> bool:
    """Whether this build of vLLM can put a model to sleep on this platform."""
    from vllm.platforms import current_platform

    has_allocator = getattr(current_platform, "is_cumem_allocator_available", lambda: True)
    return bool(current_platform.is_sleep_mode_available() and has_allocator())


def _memory_options(engine_args: Any) -> dict[str, Any]:
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


def _parse(spec: ModelSpec, usual: Mapping[str, Any]) -> Any:
    """vLLM's own parsed arguments for a registry entry; raises LoadFailed for a bad option.

    `usual` are options that suit the GPU, unless the entry has others.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    def refuse(message: str) -> NoReturn:
        raise LoadFailed(f"vLLM refuses the engine_args: {message}")

    parser = _cli().make_arg_parser(FlexibleArgumentParser(prog="vllm"))
    parser.error = refuse  # argparse would end the process
    try:
        args = parser.parse_args(_words(spec, usual, parser._option_string_actions))
        _cli().validate_parsed_serve_args(args)
    except SystemExit:
        raise LoadFailed("vLLM refuses the engine_args") from None
    # What serves HTTP takes a list here; the parser leaves a single name a string.
    args.served_model_name = [spec.name]
    return args


def _words(spec: ModelSpec, usual: Mapping[str, Any], known: dict[str, Any]) -> list[str]:
    """The command line for a registry entry: our options, then those of its `engine_args`, then
    what it settled on."""
    options = {**DEFAULT_OPTIONS, **usual, **TASK_OPTIONS.get(spec.task, {})}
    options |= CPU_OPTIONS if _on_cpu() else {}
    options["enable-sleep-mode"] = spec.may_sleep and _knows_sleep()
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


async def _serving_layer(engine: Any, args: Any, tasks: Any) -> Any:
    """The object on which vLLM's own server keeps its handlers."""
    from starlette.datastructures import State

    try:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    except ImportError:
        from vllm.entrypoints.openai.api_server import init_app_state

    state = State()
    await init_app_state(engine, state, args, tasks)
    return state


def _calls(state: Any) -> dict[str, Call]:
    """Every endpoint that can be asked. vLLM puts None for one that the model cannot do."""
    from pydantic import TypeAdapter
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest
    from vllm.entrypoints.pooling.scoring.protocol import RerankRequest, ScoreRequest

    def call(request: Any, name: str, method: str = "") -> Call:
        handler = getattr(state, name, None)
        ask = getattr(handler, method) if handler is not None and method else handler
        return Call(TypeAdapter(request).validate_python, ask)

    chat = call(ChatCompletionRequest, "openai_serving_chat", "create_chat_completion")
    completion = call(CompletionRequest, "openai_serving_completion", "create_completion")
    score = call(ScoreRequest, "serving_scores")
    rerank = call(RerankRequest, "serving_scores")
    return {
        "/v1/chat/completions": chat,
        "/v1/completions": completion,
        "/v1/responses": call(ResponsesRequest, "openai_serving_responses", "create_responses"),
        "/v1/embeddings": call(EmbeddingRequest, "serving_embedding"),
        "/v1/score": score,
        "/score": score,
        "/v1/rerank": rerank,
        "/rerank": rerank,
    }


def _slots(config: Any) -> int:
    """How many requests it can run at once, on all data-parallel ranks."""
    return int(config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size)


def _cache_tokens(config: Any) -> int:
    """Tokens of KV cache, of all data-parallel ranks. Where it could not hold even one request of
    the greatest length, the model keeps none (an encoder), and vLLM has made up the number."""
    cache = config.cache_config
    tokens = (cache.num_gpu_blocks or 0) * (cache.block_size or 0)
    return int(tokens) if tokens >= config.model_config.max_model_len else 0


def _read(response: Any) -> Answer:
    """An Answer from what a handler returned: its model, its error, or a finished HTTP response."""
    if hasattr(response, "model_dump"):
        error = getattr(response, "error", None)
        if error is not None and not hasattr(response, "usage"):
            return _error(int(error.code), error.message, param=error.param)
        return _success(response.model_dump(mode="json", by_alias=True, warnings="none"))
    raw = getattr(response, "body", None)
    if raw is None or "json" not in (response.media_type or ""):
        return _error(400, "This answer would not be JSON; ask for another `encoding_format`")
    body = orjson.loads(raw)
    if response.status_code >= 400:
        given = body.get("error") or {}
        return _error(response.status_code, given.get("message", ""), param=given.get("param"))
    return _success(body)


def _success(body: dict[str, Any]) -> Answer:
    _strip_answer(body)
    return Answer(200, encoded(body), Usage.of(body.get("usage")))


def _unless_error(event: dict[str, Any]) -> dict[str, Any]:
    """The event of a stream; raises `Refused` if it says that there are no more."""
    if error := event.get("error"):
        raise Refused(_error(int(error["code"]), error["message"], param=error["param"]))
    return event


def _strip_answer(body: dict[str, Any]) -> None:
    """Leave OpenAI's keys in an answer, or in an event of one."""
    _strip(body)
    for choice in body.get("choices") or ():
        _strip(choice)
        for said in ("message", "delta"):
            if said in choice:
                _strip(choice[said])
    if usage := body.get("usage"):
        _strip(usage)
        for detail in usage.values():
            if isinstance(detail, dict):
                _strip(detail)


def _strip(values: dict[str, Any]) -> None:
    """Drop vLLM's own keys that say nothing; OpenAI's nullable keys stay."""
    for name in EXTRAS & values.keys():
        if values[name] is None:
            del values[name]


def _refusal(error: Exception) -> Answer:
    """What vLLM's own server would answer to an exception, but never 5xx for a bad body."""
    if type(error).__name__ == "EngineGenerateError" and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the wrapper has no message
    response = _vllm_error(error)
    status = int(response.error.code)
    if isinstance(error, NotImplementedError | RecursionError):
        status = 400
    message = response.error.message
    if callable(getattr(error, "errors", None)):  # pydantic: without the input and its web address
        message = _in_one_line(error)
    return _error(status, message or type(error).__name__, param=response.error.param)


def _vllm_error(error: Exception) -> Any:
    try:
        from vllm.entrypoints.serve import create_error_response
    except ImportError:
        from vllm.entrypoints.serve.utils.error_response import create_error_response
    return create_error_response(error)


def _error(status: int, message: str, *, param: str | None = None) -> Answer:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": param, "code": None}
    return Answer(status, encoded({"error": error}))
