"""vLLM's AsyncLLM as an engine: how it is loaded, asked, watched and ended, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import orjson
import psutil

from models_registry import profiles
from worker import gpus
from worker.engines import streaming
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
)
from worker.engines.gauge import Gauge
from worker.engines.vllm import options
from worker.engines.vllm.answers import answer_to, read, refused, strip_answer, unless_error
from worker.engines.vllm.failures import failure_log, in_one_line, logged_cause, prepare_process
from worker.engines.vllm.serving import Call, cache_tokens, calls, serving_layer, slots

WATCH_SECONDS = 0.25
"""How often the engine's processes are looked at."""
DEATH_GRACE_SECONDS = 0.5
"""How long vLLM may take to fail a dead engine's requests itself, before they are ended here."""
SHUTDOWN_SECONDS = 10.0
"""How long the engine's processes may take to end by themselves, before they are killed."""
URGENT, BATCH = 0, 1
"""vLLM's `priority`: the smaller one first. Never the tenants' own."""


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
        prepare_process()
        await asyncio.to_thread(lambda: options.parsed(self.spec, self._usual_options()))

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
            raise LoadFailed(in_one_line(error)) from error
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
        state = await serving_layer(self._engine, args, tasks)
        self._calls = calls(state)
        self.slots = slots(self._engine.vllm_config)
        self.capacity = FULLS * self.slots
        self.cache_tokens = cache_tokens(self._engine.vllm_config)
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
        prepare_process()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        args = options.parsed(self.spec, self._usual_options())
        log = failure_log()
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
                raise LoadFailed(logged_cause(log) or in_one_line(error)) from error
            finally:
                random.seed()  # vLLM gave this process's generator the engine's seed, which is 0
                self.options = options.memory_options(engine_args)
        if engine_args.disable_log_stats:
            # Of the statistics that a logger switches on, only the scheduler's few counts are
            # wanted; those of each request and token would cost this process's one thread dear.
            self._engine.log_stats = self._engine.output_processor.log_stats = False
        self._cores = self._children()
        return args

    def _usual_options(self) -> dict[str, Any]:
        """What suits the GPU, and nothing where there is none (or no telling)."""
        found = [] if options.on_cpu() else gpus.facts(self.gpu)
        memory = min((each.memory for each in found), default=0)
        return profiles.engine_args(memory) if memory else {}

    def _tell(self, report: Report) -> None:
        self.report = report
        if self.on_report is not None:
            # Not here and now: an exception would end vLLM's own task.
            asyncio.get_running_loop().call_soon(self.on_report)

    def _environment(self, args: Any) -> dict[str, str]:
        """What the engine's processes must find in their environment when they are spawned."""
        if self.gpu is not None and not options.on_cpu():
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
        if options.on_cpu():
            # One process fewer between a request and its forward pass, and one import of torch.
            usual["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if options.on_cpu() and args.enforce_eager:
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
                    return refused(400, "This request cannot be streamed", param="stream")
                answer = read(await handler(request))
            except Refused as refusal:
                return refusal.answer
            except Exception as error:
                if self.gone():
                    raise EngineDied(self._last_words()) from error
                return answer_to(error)
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
                        strip_answer(event)
                        yield asked.chunk(event)
            except Refused:
                if self.gone():
                    raise EngineDied(self._last_words()) from None
                raise
            except Exception as error:
                if self.gone():
                    raise EngineDied(self._last_words()) from error
                raise Refused(answer_to(error)) from error

    async def _events(
        self, endpoint: str, body: dict[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        handler, request = self._prepared(endpoint, body, urgent=True)
        if not getattr(request, "stream", None):
            raise Refused(refused(400, "This request cannot be streamed", param="stream"))
        answer = await handler(request)
        if not hasattr(answer, "__aiter__"):
            raise Refused(read(answer))
        async with contextlib.aclosing(answer) as texts:
            async for text in texts:
                event = text.removeprefix("data: ").strip()
                if event == "[DONE]":
                    return
                yield unless_error(orjson.loads(event))

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
            raise Refused(refused(404, f"Unknown endpoint {endpoint}"))
        if call.handler is None:
            said = f"The model `{self.spec.name}` does not support {endpoint}"
            raise Refused(refused(400, said))
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

    def tokens_under_way(self) -> int | None:
        """By vLLM's own books, which have a request's prompt once its first token is there."""
        try:
            # A copy in one go, as this is asked from another thread.
            states = list(self._engine.output_processor.request_states.values())
            return sum(_tokens_of(state) for state in states if not state.is_prefilling)
        except AttributeError:  # unloaded by now, or of a version with other books
            return None

    def gone(self) -> bool:
        return self._dead or self._engine is None or bool(self._engine.errored)

    def _last_words(self) -> str:
        cause = logged_cause(failure_log(), since="encountered a fatal error")
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
        left = []
        for pid in self.pids():
            with contextlib.suppress(psutil.NoSuchProcess):
                left.append(psutil.Process(pid))
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


def _tokens_of(state: Any) -> int:
    """Done of a request by now. Of several answers to one prompt (`n`), the first has the prompt."""
    prompt = 0 if state.request_index else state.prompt_len
    return int(prompt + (state.detokenizer.num_output_tokens() if state.detokenizer else 0))


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
