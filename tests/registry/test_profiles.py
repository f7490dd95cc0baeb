"""GPU profiles: which one a GPU has, and what vLLM is told for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models_registry.profiles import PROFILES, GpuProfile, engine_args, profile_of, profiles_named

PRODUCTS = [
    # (as the driver says, MiB, the profile); names of which there are captures or listings
    ("NVIDIA GeForce RTX 3060", 12_288, "RTX 3060 12 GB"),
    ("NVIDIA GeForce RTX 3090", 24_576, "RTX 3090"),
    ("NVIDIA GeForce RTX 4070", 12_282, "RTX 4070"),
    ("NVIDIA GeForce RTX 4080", 16_376, "RTX 4080 16 GB"),
    ("NVIDIA GeForce RTX 4080 SUPER", 16_376, "RTX 4080 16 GB"),
    ("NVIDIA GeForce RTX 4090", 24_564, "RTX 4090"),
    ("NVIDIA GeForce RTX 5090", 32_607, "RTX 5090"),
    ("Tesla T4", 15_360, "T4"),
    ("NVIDIA A10", 23_028, "A10"),
    ("NVIDIA A10G", 23_028, "A10"),
    ("NVIDIA L4", 23_034, "L4"),
    ("NVIDIA L40S", 46_068, "L40S"),
    ("NVIDIA A100-SXM4-40GB", 40_960, "A100 40 GB"),
    ("NVIDIA A100-PCIE-40GB", 40_960, "A100 40 GB"),
    ("NVIDIA A100-SXM4-80GB", 81_920, "A100 80 GB"),
    ("NVIDIA A100 80GB PCIe", 81_920, "A100 80 GB"),
    ("NVIDIA H100 80GB HBM3", 81_559, "H100 80 GB"),
    ("NVIDIA H100 PCIe", 81_559, "H100 80 GB"),
    ("NVIDIA H200", 143_771, "H200"),
    ("NVIDIA B200", 183_359, "B200"),
]


@pytest.mark.parametrize(("kind", "memory", "name"), PRODUCTS)
def test_a_gpu_is_known_by_what_its_driver_says(kind: str, memory: int, name: str) -> None:
    assert profile_of(kind, memory).name == name
    assert profile_of(f"2 x {kind}", 2 * memory).name == name


def test_every_profile_is_that_of_a_product() -> None:
    assert {name for *_, name in PRODUCTS} == {profile.name for profile in PROFILES}


@pytest.mark.parametrize(
    ("kind", "memory"),
    [
        ("NVIDIA GeForce RTX 3060", 8_192),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16_376),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 16_376),
        ("NVIDIA H100 NVL", 95_830),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4_864),
        ("Some (new) GPU+", 50_000),
        ("", 24_576),
    ],
)
def test_one_that_is_not_known_is_what_it_says_of_itself(kind: str, memory: int) -> None:
    profile = profile_of(kind, memory, (8, 9))
    assert (profile.memory, profile.compute) == (memory, (8, 9))
    assert profile not in PROFILES
    assert profile.name == f"{kind or 'GPU'} ({memory / 1024:.0f} GB)"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("3060", ["RTX 3060 12 GB"]),
        ("a100", ["A100 40 GB", "A100 80 GB"]),
        ("A100 80", ["A100 80 GB"]),
        ("GeForce RTX 4090", ["RTX 4090"]),
        ("9999", []),
    ],
)
def test_profiles_are_found_by_words(text: str, names: list[str]) -> None:
    assert [profile.name for profile in profiles_named(text)] == names


@pytest.mark.parametrize(
    ("name", "fp8"),
    [(name, False) for name in ("T4", "RTX 3060 12 GB", "A100 80 GB")]
    + [(name, True) for name in ("RTX 4070", "L4", "H100 80 GB", "RTX 5090", "B200")],
)
def test_whether_they_compute_with_fp8_follows_from_their_generation(name: str, fp8: bool) -> None:
    (profile,) = [each for each in PROFILES if each.name == name]
    assert profile.fp8 is fp8


DEFAULTS = {
    "RTX 3060 12 GB": {"gpu-memory-utilization": 0.89, "max-num-seqs": 128},
    "RTX 4070": {"gpu-memory-utilization": 0.89, "max-num-seqs": 128},
    "RTX 4080 16 GB": {"gpu-memory-utilization": 0.92, "max-num-seqs": 128},
    "RTX 3090": {"gpu-memory-utilization": 0.92},
    "RTX 4090": {"gpu-memory-utilization": 0.92},
    "RTX 5090": {"gpu-memory-utilization": 0.92},
    "T4": {"gpu-memory-utilization": 0.91, "max-num-seqs": 128},
    "A10": {"gpu-memory-utilization": 0.92},
    "L4": {"gpu-memory-utilization": 0.92},
    "A100 40 GB": {"gpu-memory-utilization": 0.92},
    "L40S": {"gpu-memory-utilization": 0.92},
    "A100 80 GB": {"gpu-memory-utilization": 0.95},
    "H100 80 GB": {"gpu-memory-utilization": 0.95},
    "H200": {"gpu-memory-utilization": 0.95},
    "B200": {"gpu-memory-utilization": 0.95},
}


def test_each_has_its_default_engine_arguments() -> None:
    assert {each.name: engine_args(each.memory) for each in PROFILES} == DEFAULTS


@given(st.integers(1, 1_000_000))
def test_any_memory_has_defaults_that_leave_something(memory: int) -> None:
    share = engine_args(memory)["gpu-memory-utilization"]
    assert 0.5 <= share <= 0.95
    if memory > 2_560:
        assert (1 - share) * memory >= 1_279


@given(st.text(max_size=30), st.integers(1, 1_000_000))
def test_whatever_a_driver_says_has_a_profile(kind: str, memory: int) -> None:
    assert isinstance(profile_of(kind, memory), GpuProfile)
