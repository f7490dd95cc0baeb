"""What to change when a model did not get the memory it needs, by vLLM's own words.

Pure text and numbers: nothing here loads a model. The words are those of vLLM 0.26 to 0.33 and of
torch; option names are written as on vLLM's command line, without the dashes before them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

MOST_TRIES = 10
"""Loads after which the ladder is at its end, whatever could still be tried; each takes a minute."""
SEQUENCES, SHARE, LENGTH = "max-num-seqs", "gpu-memory-utilization", "max-model-len"
CACHE_TYPE, CACHE_BYTES = "kv-cache-dtype", "kv-cache-memory-bytes"
OPTIONS = (SEQUENCES, SHARE, LENGTH, CACHE_TYPE, CACHE_BYTES)
USUAL = {SEQUENCES: 256, SHARE: 0.92}
"""vLLM's own, where an engine did not come far enough to say."""
FEWEST_SEQUENCES = 8
HIGHEST_SHARE, LOWEST_SHARE, LESS_SHARE = 0.97, 0.4, 0.05
SPARE_SHARE = 0.02
"""Kept free of what others leave: what they hold moves."""
SHORTEST = 2048
"""Tokens of context below which a chat model is of no use."""


class Trouble(Enum):
    """What there was no memory for."""

    TAKEN = "other processes hold the memory"
    MOVED = "what other processes hold changed during the load"
    LENGTH = "one request of the full length"
    CACHE = "any KV cache"
    WEIGHTS = "the weights"
    WORK = "the work beside weights and KV cache"
    GPUS = "parallel sizes of more GPUs than the worker has"


HELD_BY_OTHERS = frozenset({Trouble.TAKEN, Trouble.WEIGHTS, Trouble.WORK})
"""Troubles that another process, also a sleeping engine of ours, may be to blame for."""
_WORDS: tuple[tuple[str, Trouble], ...] = (
    (r"GiB\) on startup is less than", Trouble.TAKEN),
    (r"Error in memory profiling", Trouble.MOVED),
    (r"larger than the available KV cache memory", Trouble.LENGTH),
    (r"No available memory for the cache blocks|Cannot auto-fit max_model_len", Trouble.CACHE),
    (r"Failed to load model - not enough GPU memory", Trouble.WEIGHTS),
    (r"out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED", Trouble.WORK),
    (r"World size \(\d+\) is larger than the number of available GPUs", Trouble.GPUS),
)
_FREE = re.compile(r"\((\d+\.?\d*)/(\d+\.?\d*) GiB\) on startup")
_ESTIMATE = re.compile(r"estimated maximum model length is (\d+)")


def trouble_of(said: str) -> Trouble | None:
    """What kind of memory trouble a message tells of; None for anything else."""
    return next((it for words, it in _WORDS if re.search(words, said, re.IGNORECASE)), None)


def named(option: str) -> str:
    """An option's name, however the entry spells it."""
    return option.lstrip("-").replace("_", "-")


@dataclass
class Ladder:
    """One model's way down on one kind of GPU.

    A stated `gpu-memory-utilization` is never raised and a stated `kv-cache-dtype` never changed. A
    stated `max-model-len` is a promise to users: a quantized cache is tried before it is lowered.
    """

    stated: Collection[str]
    """Options that the registry entry states."""
    settled: dict[str, Any] = field(default_factory=dict)
    """Options as they were changed so far."""
    can_quantize: bool = False
    """Whether the GPU can keep its KV cache in fp8."""
    lasting: bool = True
    """Whether it was the model that asked too much, and not others who hold memory just now."""
    tries: int = 0
    said: str = ""
    """The last message about memory."""
    fits_not: bool = False
    """Nothing is left to change, and the model alone is to blame."""

    def step(self, said: str, running: Mapping[str, Any]) -> bool:
        """Change what should help against the message; False where nothing does.

        `running` are the options that the engine had, its own defaults too, as far as known.
        """
        self.tries += 1
        trouble = trouble_of(said)
        if trouble is None and not self._undo_quantizing():
            return False  # not a matter of memory
        self.said = said if trouble else self.said
        now = USUAL | self.settled | dict(running)
        changes = None if self.tries >= MOST_TRIES else self._changes(now)
        self.fits_not = changes is None and self.lasting
        self.settled = self.settled | (changes or {})  # another one: engines keep what they got
        return changes is not None

    def _changes(self, running: Mapping[str, Any]) -> dict[str, Any] | None:
        trouble = trouble_of(self.said)
        if trouble in (Trouble.TAKEN, Trouble.MOVED):
            self.lasting = False
        if trouble is Trouble.MOVED:
            return {}
        if trouble is Trouble.TAKEN:
            return _what_is_left(self.said, running)
        if trouble is Trouble.LENGTH:
            return self._more_share(running) or self._shorter()
        if trouble is Trouble.CACHE:
            return self._more_share(running) or fewer(running)
        if trouble is Trouble.WORK:
            return less(running)
        return None  # nothing makes weights smaller, or GPUs more

    def _more_share(self, running: Mapping[str, Any]) -> dict[str, Any] | None:
        """Once, and not of what the operator gave or what was lowered on the way."""
        fixed = {*self.stated, *self.settled}
        if {SHARE, CACHE_BYTES} & fixed or CACHE_BYTES in running:
            return None
        return {SHARE: HIGHEST_SHARE} if running[SHARE] < HIGHEST_SHARE else None

    def _shorter(self) -> dict[str, Any] | None:
        estimate = _ESTIMATE.search(self.said)
        length = int(estimate[1]) if estimate else 0
        shorter = {LENGTH: length} if length >= SHORTEST else None
        quantized = {CACHE_TYPE: "fp8"} if self._may_quantize else None
        return quantized or shorter if LENGTH in self.stated else shorter or quantized

    @property
    def _may_quantize(self) -> bool:
        return self.can_quantize and CACHE_TYPE not in {*self.stated, *self.settled}

    def _undo_quantizing(self) -> bool:
        """Some models' attention cannot read an fp8 cache: vLLM says so in many ways."""
        if not self.said or CACHE_TYPE not in self.settled:
            return False
        self.can_quantize = False
        self.settled = {name: it for name, it in self.settled.items() if name != CACHE_TYPE}
        return True


def _what_is_left(said: str, running: Mapping[str, Any]) -> dict[str, Any] | None:
    """The part of the GPU that vLLM found free, if that is worth a load."""
    found = _FREE.search(said)
    free, total = (float(each) for each in found.groups()) if found else (0.0, 1.0)
    share = math.floor(100 * (free / total - SPARE_SHARE)) / 100
    return {SHARE: share} if LOWEST_SHARE <= share < running[SHARE] else None


def less(running: Mapping[str, Any]) -> dict[str, Any] | None:
    """Half the requests at once, and more of the GPU for them; None where it would be too few."""
    half = fewer(running)
    share = round(running.get(SHARE, USUAL[SHARE]) - LESS_SHARE, 2)
    if half is None or share < LOWEST_SHARE:
        return None
    return half if CACHE_BYTES in running else half | {SHARE: share}


def fewer(running: Mapping[str, Any]) -> dict[str, Any] | None:
    """Half the requests at once; None where that would be too few."""
    half = int(running.get(SEQUENCES, USUAL[SEQUENCES])) // 2
    return {SEQUENCES: half} if half >= FEWEST_SEQUENCES else None
