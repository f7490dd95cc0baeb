"""What is changed when a model lacks memory: vLLM's and torch's own messages, word for word.

Taken from vLLM 0.32's source and from reports of versions 0.26 to 0.33, with figures filled in.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from worker.engines.ladder import MOST_TRIES, Ladder, Trouble, trouble_of

SEE = "See https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
TRY = (
    "Try increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU backend) "
    f"or decreasing `max_model_len` when initializing the engine. {SEE}"
)
TORCH = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 50.00 MiB. GPU 0 has a total "
    "capacity of 23.56 GiB of which 21.75 MiB is free. Including non-PyTorch memory, this process "
    "has 23.50 GiB memory in use. Of the allocated memory 22.88 GiB is allocated by PyTorch, with "
    "24.00 MiB allocated in private pools (e.g., CUDA Graphs), and 275.38 MiB is reserved by "
    "PyTorch but unallocated."
)
WEIGHTS = (
    "Failed to load model - not enough GPU memory. Try lowering --gpu-memory-utilization to free "
    "memory for weights, increasing --tensor-parallel-size, or using --quantization. See "
    "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more tips. (original "
    "error: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 23.52 "
    "GiB of which 1.12 GiB is free.)"
)
FEW_GPUS = (
    "Value error, World size (2) is larger than the number of available GPUs (1) in this node. If "
    "this is intentional and you are using:\n- ray, set '--distributed-executor-backend ray'.\n"
    "- multiprocessing, set '--nnodes' appropriately."
)
SAMPLER = (
    "RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy requests. "
    "Please try lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine."
)
CACHE = (
    "ValueError: No available memory for the cache blocks. Try increasing "
    "`gpu_memory_utilization` when initializing the engine (this flag also controls CPU memory "
    f"reservation on the CPU backend, despite its name). {SEE}"
)


def length(estimate: int | None, *, words: str = "model's max seq len") -> str:
    estimated = (
        f"Based on the available memory, the estimated maximum model length is {estimate}. "
        if estimate
        else ""
    )
    return (
        f"ValueError: To serve at least one request with the {words} (131072), (16.0 GiB KV cache "
        "is needed, which is larger than the available KV cache memory (7.5 GiB). "
        f"{estimated}{TRY}"
    )


def taken(free: float, total: float = 79.11) -> str:
    return (
        f"ValueError: Free memory on device cuda:0 ({free}/{total} GiB) on startup is less than "
        "desired GPU memory utilization (0.92, 72.78 GiB). Decrease GPU memory utilization or "
        "reduce GPU memory used by other processes."
    )


CPU_TAKEN = (
    "ValueError: Available memory on node 0 (11.2/23.59 GiB) on startup is less than desired CPU "
    "memory utilization (0.92, 21.7 GiB). On the CPU backend, the `--gpu-memory-utilization` flag "
    "controls the fraction of CPU memory reserved (despite its name)."
)
MOVED = (
    "AssertionError: Error in memory profiling. Initial free memory 70.1 GiB, current free memory "
    "75.3 GiB. This happens when other processes sharing the same container release GPU memory "
    "while vLLM is profiling during initialization."
)
GPU = {"max-num-seqs": 256, "gpu-memory-utilization": 0.92, "kv-cache-dtype": "auto"}


def after(ladder: Ladder, *messages: str, **options: Any) -> dict[str, Any]:
    """What it settled on after vLLM has said all this, each time with the options changed so far."""
    for said in messages:
        assert ladder.step(said, GPU | options | ladder.settled), said
    return ladder.settled


@pytest.mark.parametrize(
    ("said", "trouble"),
    [
        (taken(40.0), Trouble.TAKEN),
        (CPU_TAKEN, Trouble.TAKEN),
        (MOVED, Trouble.MOVED),
        (length(61440), Trouble.LENGTH),
        (length(61440, words="models's max seq len"), Trouble.LENGTH),
        (CACHE, Trouble.CACHE),
        (
            "ValueError: Cannot auto-fit max_model_len: not enough GPU memory available to serve "
            "even a single token. Try increasing `gpu_memory_utilization`.",
            Trouble.CACHE,
        ),
        (WEIGHTS, Trouble.WEIGHTS),
        (TORCH, Trouble.WORK),
        (SAMPLER, Trouble.WORK),
        ("torch.cuda.OutOfMemoryError: CUDA out of memory.", Trouble.WORK),
        ("RuntimeError: CUDA driver error: out of memory", Trouble.WORK),
        (
            "RuntimeError: CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:163",
            Trouble.WORK,
        ),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", Trouble.WORK),
        (f"the engine of m died: RuntimeError: Worker failed with error '{TORCH}'", Trouble.WORK),
        (FEW_GPUS, Trouble.GPUS),
        ("OSError: m is not a local folder and is not a valid model identifier", None),
        ("ValueError: max_num_seqs must be at least 1", None),
        ("", None),
    ],
)
def test_memory_trouble_is_known_by_vllms_words(said: str, trouble: Trouble | None) -> None:
    assert trouble_of(said) is trouble


@pytest.mark.parametrize("said", [TORCH, SAMPLER])
def test_out_of_memory_beside_the_cache_halves_the_requests_and_leaves_more_free(
    said: str,
) -> None:
    ladder = Ladder(stated=())
    assert after(ladder, said) == {"max-num-seqs": 128, "gpu-memory-utilization": 0.87}
    assert after(ladder, said, said) == {"max-num-seqs": 32, "gpu-memory-utilization": 0.77}
    assert (ladder.lasting, ladder.fits_not) == (True, False)


def test_halving_begins_at_what_the_engine_had() -> None:
    assert after(Ladder(stated=()), SAMPLER, **{"max-num-seqs": 1024})["max-num-seqs"] == 512


def test_with_options_unknown_vllms_usual_ones_are_taken() -> None:
    ladder = Ladder(stated=())
    assert ladder.step(TORCH, {})
    assert ladder.settled == {"max-num-seqs": 128, "gpu-memory-utilization": 0.87}


def test_it_ends_where_too_few_requests_would_be_left() -> None:
    ladder = Ladder(stated=())
    after(ladder, *[SAMPLER] * 5)
    assert ladder.settled["max-num-seqs"] == 8
    assert not ladder.step(SAMPLER, GPU | ladder.settled)
    assert ladder.fits_not


def test_no_room_for_any_cache_takes_more_of_the_gpu_then_fewer_requests() -> None:
    ladder = Ladder(stated=())
    assert after(ladder, CACHE) == {"gpu-memory-utilization": 0.97}
    assert after(ladder, CACHE) == {"gpu-memory-utilization": 0.97, "max-num-seqs": 128}


def test_a_stated_share_of_the_gpu_is_never_raised() -> None:
    stated = {"gpu-memory-utilization"}
    half = {"gpu-memory-utilization": 0.5}
    assert after(Ladder(stated=stated), CACHE, **half) == {"max-num-seqs": 128}
    assert after(Ladder(stated=stated), length(61440), **half) == {"max-model-len": 61440}


def test_a_cache_of_stated_size_makes_the_share_meaningless() -> None:
    fixed = {"kv-cache-memory-bytes": 2**30}
    assert after(Ladder(stated=()), length(9344), **fixed) == {"max-model-len": 9344}
    assert after(Ladder(stated=()), TORCH, **fixed) == {"max-num-seqs": 128}


def test_a_share_that_was_lowered_is_not_raised_again() -> None:
    ladder = Ladder(stated=())
    assert after(ladder, TORCH, length(40960)) == {
        "max-num-seqs": 128,
        "gpu-memory-utilization": 0.87,
        "max-model-len": 40960,
    }


def test_too_long_a_context_is_cut_to_what_vllm_says_fits() -> None:
    ladder = Ladder(stated=())
    assert after(ladder, length(40960)) == {"gpu-memory-utilization": 0.97}
    assert after(ladder, length(61440)) == {
        "gpu-memory-utilization": 0.97,
        "max-model-len": 61440,
    }


def test_before_a_stated_length_is_cut_the_cache_is_quantized() -> None:
    ladder = Ladder(stated={"max-model-len"}, can_quantize=True)
    assert after(ladder, length(40960), length(61440)) == {
        "gpu-memory-utilization": 0.97,
        "kv-cache-dtype": "fp8",
    }
    assert after(ladder, length(122880))["max-model-len"] == 122880


def test_a_stated_length_is_cut_at_once_where_the_gpu_has_no_fp8() -> None:
    ladder = Ladder(stated={"max-model-len", "gpu-memory-utilization"})
    assert after(ladder, length(61440)) == {"max-model-len": 61440}


def test_a_length_of_no_use_is_not_settled_for() -> None:
    ladder = Ladder(stated={"gpu-memory-utilization"}, can_quantize=True)
    assert after(ladder, length(1500)) == {"kv-cache-dtype": "fp8"}
    assert after(ladder, length(3000))["max-model-len"] == 3000
    for said in (length(1500), length(None)):
        without = Ladder(stated={"gpu-memory-utilization"})
        assert not without.step(said, GPU)
        assert without.fits_not


def test_a_stated_cache_type_is_kept() -> None:
    stated = {"max-model-len", "kv-cache-dtype", "gpu-memory-utilization"}
    ladder = Ladder(stated=stated, can_quantize=True)
    assert after(ladder, length(61440)) == {"max-model-len": 61440}


def test_where_a_quantized_cache_does_not_work_the_ladder_goes_on_without() -> None:
    ladder = Ladder(stated={"max-model-len", "gpu-memory-utilization"}, can_quantize=True)
    assert after(ladder, length(61440)) == {"kv-cache-dtype": "fp8"}
    refusal = "ValueError: No valid attention backend found for cuda with kv_cache_dtype=fp8"
    assert ladder.step(refusal, GPU | ladder.settled)
    assert ladder.settled == {"max-model-len": 61440}


@pytest.mark.parametrize("said", [WEIGHTS, FEW_GPUS])
def test_weights_that_do_not_fit_and_gpus_that_are_too_few_end_it_at_once(said: str) -> None:
    ladder = Ladder(stated=(), can_quantize=True)
    assert not ladder.step(said, GPU)
    assert (ladder.settled, ladder.fits_not, ladder.said) == ({}, True, said)


def test_what_others_leave_is_taken_for_this_time() -> None:
    ladder = Ladder(stated=())
    assert after(ladder, taken(60.0)) == {"gpu-memory-utilization": 0.73}
    assert not ladder.lasting
    assert after(Ladder(stated=()), CPU_TAKEN) == {"gpu-memory-utilization": 0.45}


def test_a_gpu_that_others_fill_is_not_said_to_be_too_small() -> None:
    ladder = Ladder(stated=())
    assert not ladder.step(taken(20.0), GPU)
    assert not ladder.fits_not
    again = Ladder(stated=())
    after(again, taken(60.0))
    assert not again.step(WEIGHTS, GPU | again.settled)
    assert not again.fits_not


def test_a_load_that_others_disturbed_is_tried_again_as_it_was() -> None:
    ladder = Ladder(stated=())
    assert after(ladder, MOVED) == {}
    assert not ladder.lasting


def test_what_has_nothing_to_do_with_memory_is_not_its_business() -> None:
    ladder = Ladder(stated=(), settled={"max-num-seqs": 64, "kv-cache-dtype": "fp8"})
    assert not ladder.step("OSError: no such folder", GPU)
    assert not ladder.fits_not
    assert ladder.settled == {"max-num-seqs": 64, "kv-cache-dtype": "fp8"}


@pytest.mark.parametrize("said", [TORCH, SAMPLER, CACHE, MOVED, taken(60.0), length(61440)])
@pytest.mark.parametrize("stated", [(), ("max-model-len",), ("gpu-memory-utilization",)])
def test_whatever_vllm_repeats_the_ladder_ends(said: str, stated: tuple[str, ...]) -> None:
    ladder = Ladder(stated=stated, can_quantize=True)
    steps = 0
    while ladder.step(said, GPU | ladder.settled):
        steps += 1
        assert steps < MOST_TRIES
    assert ladder.fits_not == ladder.lasting


def test_the_installed_vllm_still_says_it_in_these_words() -> None:
    """A version that words it otherwise would make the ladder blind; nothing is imported of it."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed")
    root = Path(found.origin).parent
    for file, words in {
        "v1/core/kv_cache_utils.py": [
            "No available memory for the cache blocks",
            "the estimated maximum model length is {estimated_max_len}",
            "Cannot auto-fit max_model_len",
        ],
        "v1/worker/utils.py": ["GiB) on startup ", "is less than desired GPU memory utilization"],
        "config/parallel.py": ["is larger than the number of ", "available GPUs ("],
        "v1/worker/gpu_worker.py": ["Error in memory profiling. "],
        "v1/worker/gpu_model_runner.py": [
            "Failed to load model - not enough GPU memory. ",
            "CUDA out of memory occurred when warming up sampler with ",
        ],
    }.items():
        text = (root / file).read_text()
        assert [each for each in words if each not in text] == [], file
