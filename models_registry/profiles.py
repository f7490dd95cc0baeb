"""What is known of GPUs by their names, and how vLLM is set up on one unless an entry says otherwise.

Facts and one rule; whether a model fits is in `models_registry/fit.py`. Where they are from:
memory is what NVML, and so nvidia-smi, reports (github.com: modal-labs/modal-client#2797 for T4, L4,
A10, L40S, A100, H100; utkuozdemir/nvidia_gpu_exporter/internal/captures for H200, 4080;
NVIDIA/TensorRT-LLM#10278 for B200, #910 for 4070; noonghunna/club-3090#1229 for 5090;
vllm-project/vllm#7553 for 4090; NVIDIA/k8s-device-plugin#471 for 3090;
geerlingguy/raspberry-pi-pcie-devices#790 for 3060), compute capability is developer.nvidia.com/cuda-gpus.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

GIB = 1024  # MiB
SPARE = 1280
"""MiB that are left to a display and to CUDA itself. vLLM does not start where less is free than it
is told to use, and a desktop alone takes half a GiB of a card (vllm-project/vllm#7553)."""
SMALL, LARGE = 20 * GIB, 70 * GIB
ALIKE = 0.05
"""Part of the memory by which two cards of one kind may differ: ECC on or off is more."""


@dataclass(frozen=True, slots=True)
class GpuProfile:
    """One kind of GPU."""

    name: str
    """As people call it."""
    product: str
    """As the driver calls it: a regular expression."""
    memory: int
    """MiB, as the driver counts it."""
    compute: tuple[int, int]
    """The compute capability."""

    @property
    def fp8(self) -> bool:
        """Tensor cores for FP8 weights, and kernels for an FP8 KV cache."""
        return self.compute >= (8, 9)


GEFORCE = r"NVIDIA GeForce RTX "
PROFILES = (
    GpuProfile("RTX 3060 12 GB", GEFORCE + "3060", 12_288, (8, 6)),
    GpuProfile("RTX 4070", GEFORCE + "4070( SUPER)?", 12_282, (8, 9)),
    GpuProfile("RTX 4080 16 GB", GEFORCE + "4080( SUPER)?", 16_376, (8, 9)),
    GpuProfile("RTX 3090", GEFORCE + "3090( Ti)?", 24_576, (8, 6)),
    GpuProfile("RTX 4090", GEFORCE + "4090", 24_564, (8, 9)),
    GpuProfile("RTX 5090", GEFORCE + "5090", 32_607, (12, 0)),
    GpuProfile("T4", "Tesla T4", 15_360, (7, 5)),
    GpuProfile("A10", "NVIDIA A10G?", 23_028, (8, 6)),
    GpuProfile("L4", "NVIDIA L4", 23_034, (8, 9)),
    GpuProfile("A100 40 GB", "NVIDIA A100-.*40GB", 40_960, (8, 0)),
    GpuProfile("L40S", "NVIDIA L40S", 46_068, (8, 9)),
    GpuProfile("A100 80 GB", "NVIDIA A100.*80GB.*", 81_920, (8, 0)),
    GpuProfile("H100 80 GB", "NVIDIA H100( 80GB HBM3| PCIe)", 81_559, (9, 0)),
    GpuProfile("H200", "NVIDIA H200( NVL)?", 143_771, (9, 0)),
    GpuProfile("B200", "NVIDIA B200", 183_359, (10, 0)),
)


def profile_of(kind: str, memory: int, compute: tuple[int, int] = (8, 0)) -> GpuProfile:
    """The profile of a GPU by its driver's name and MiB; of an unknown one what it says of itself.

    Names alone are not enough: there is an RTX 3060 with 8 GB, and laptops' cards have less. Of
    several GPUs ("2 x …", which have so much together) it is that of each.
    """
    if several := re.match(r"([1-9]\d?) x ", kind):
        kind, memory = kind[several.end() :], memory // int(several[1])
    for profile in PROFILES:
        alike = abs(memory - profile.memory) <= ALIKE * profile.memory
        if alike and re.fullmatch(profile.product, kind):
            return profile
    return GpuProfile(f"{kind or 'GPU'} ({memory / GIB:.0f} GB)", re.escape(kind), memory, compute)


def profiles_named(text: str) -> list[GpuProfile]:
    """The profiles whose name, or driver's name, has these words: "3060", "a100 80"."""
    words = text.lower().split()
    return [
        profile
        for profile in PROFILES
        if all(word in f"{profile.name} {profile.product}".lower() for word in words)
    ]


def engine_args(memory: int) -> dict[str, Any]:
    """vLLM's options for a GPU with so many MiB; what an entry says comes before them.

    The rest is left to vLLM, which has its own defaults by GPU (vllm/engine/arg_utils.py:
    get_batch_defaults). A KV cache in FP8 would hold twice the tokens, but changes answers: an
    entry may ask for it, a default may not.
    """
    most = 0.95 if memory >= LARGE else 0.92
    share = min(most, max(0.5, 1 - SPARE / memory))
    args: dict[str, Any] = {"gpu-memory-utilization": math.floor(share * 100) / 100}
    if memory < SMALL:
        # A GiB and more goes to the sampler of 256 requests (models_registry/fit.py), and the KV
        # cache that is left would not hold so many.
        args["max-num-seqs"] = 128
    return args
