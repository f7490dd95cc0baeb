"""The estimate of what a model needs, held against what vLLM measured of itself on real GPUs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models_registry import fit
from models_registry.fit import GIB, Shape, Unknown, estimate, peak, read, shape_of
from models_registry.profiles import PROFILES, GpuProfile

GPU = {profile.name: profile for profile in PROFILES}
H100 = GPU["H100 80 GB"]

# Facts of the models' public config.json files.
QWEN3_06B: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "vocab_size": 151_936,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "sliding_window": None,
    "use_sliding_window": False,
}
QWEN3_8B = QWEN3_06B | {
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
}
QWEN3_32B = QWEN3_06B | {
    "hidden_size": 5120,
    "intermediate_size": 25_600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
}
LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "vocab_size": 128_256,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
GPT_OSS_20B: dict[str, Any] = {
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "vocab_size": 201_088,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131_072,
}
MISTRAL_SMALL = {
    "text_config": LLAMA_8B
    | {
        "hidden_size": 5120,
        "intermediate_size": 32_768,
        "vocab_size": 131_072,
        "num_hidden_layers": 40,
        "head_dim": 128,
    },
    "vision_config": {"hidden_size": 1024},
}
DEEPSEEK_V2_LITE = LLAMA_8B | {
    "hidden_size": 2048,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}
QWEN3_235B = QWEN3_06B | {
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
}


def shape(config: dict[str, Any], gib: float = 1.0, **options: Any) -> Shape:
    return shape_of(config, int(gib * GIB), **options)


# --- Against measurements -------------------------------------------------------------------

# "torch peak memory increase" of vLLM 0.11 on an H100 (8,192 tokens a step, 1,024 sequences):
# llm-d-incubation/llm-d-planner, docs/empirical-vllm-memory-results.md; the last one, with 256
# sequences, is vllm-project/vllm#10511.
PEAKS = [
    (QWEN3_06B, 1, 1024, 5.56),
    (QWEN3_32B, 1, 1024, 5.64),
    (QWEN3_32B, 2, 1024, 5.64),
    (LLAMA_8B, 1, 1024, 4.76),
    (LLAMA_70B, 2, 1024, 4.84),
    (GPT_OSS_20B, 1, 1024, 7.38),
    (LLAMA_8B, 1, 256, 1.26),
]


@pytest.mark.parametrize(("config", "parallel", "sequences", "measured"), PEAKS)
def test_the_peak_is_what_vllm_measured(
    config: dict[str, Any], parallel: int, sequences: int, measured: float
) -> None:
    args = {
        "max-num-batched-tokens": 8192,
        "max-num-seqs": sequences,
        "tensor-parallel-size": parallel,
    }
    assert peak(shape(config), H100, args) / GIB == pytest.approx(measured, rel=0.02)


# "Available KV cache memory" on the same GPU, with gpu_memory_utilization=0.9.
ROOMS = [
    (QWEN3_06B, 1.12, 1, 64.45),
    (QWEN3_32B, 61.03, 1, 4.45),
    (QWEN3_32B, 61.18, 2, 34.49),
    (LLAMA_8B, 14.99, 1, 51.38),
    (LLAMA_70B, 67.76, 2, 32.00),
    (GPT_OSS_20B, 13.47, 1, 50.28),
]


@pytest.mark.parametrize(("config", "gib", "parallel", "measured"), ROOMS)
def test_the_room_for_the_cache_is_what_vllm_measured(
    config: dict[str, Any], gib: float, parallel: int, measured: float
) -> None:
    """Up to 1 GiB, which is by how much CUDA graphs differ between models."""
    args = {
        "gpu_memory_utilization": 0.9,
        "max_num_batched_tokens": 8192,
        "tensor_parallel_size": parallel,
        "max_model_len": 16_000,
    }
    found = estimate(shape(config, gib), H100, args)
    assert found.room / GIB == pytest.approx(measured, abs=1.0)


@pytest.mark.parametrize(
    ("config", "parallel", "gib", "tokens"),
    [
        (MISTRAL_SMALL, 1, 28.20, 184_832),  # llm-d-planner, as above
        (QWEN3_235B, 4, 8.11, 178_880),  # vllm-project/vllm#21348
    ],
)
def test_the_cache_holds_the_tokens_that_vllm_says(
    config: dict[str, Any], parallel: int, gib: float, tokens: int
) -> None:
    assert gib * GIB / shape(config).kv_bytes(1, parallel) == pytest.approx(tokens, rel=0.015)


# --- What a config says ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "bytes_a_token"),
    [
        (QWEN3_06B, 28 * 2 * 8 * 128 * 2),
        (QWEN3_8B, 147_456),
        (LLAMA_8B, 131_072),  # no head_dim: hidden by heads
        (MISTRAL_SMALL, 163_840),
        (DEEPSEEK_V2_LITE, 27 * (512 + 64) * 2),
        ({**QWEN3_06B, "layer_types": ["linear_attention"] * 21 + ["full_attention"] * 7}, 28_672),
        ({**LLAMA_8B, "num_key_value_heads": None}, 524_288),
    ],
)
def test_the_cache_of_a_token_follows_from_the_config(
    config: dict[str, Any], bytes_a_token: int
) -> None:
    assert shape(config).kv_bytes(1000) == 1000 * bytes_a_token


def test_a_window_bounds_what_its_layers_keep() -> None:
    a_layer = 2 * 8 * 64 * 2
    assert shape(GPT_OSS_20B).kv_bytes(100) == 24 * 100 * a_layer
    assert shape(GPT_OSS_20B).kv_bytes(10_000) == 12 * (10_000 + 128) * a_layer
    mistral = shape(LLAMA_8B | {"sliding_window": 4096})
    assert mistral.kv_bytes(8192) == mistral.kv_bytes(4096)


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("value", [None, 0, -1, "many", [], True, 1.5])
def test_a_config_that_says_too_little_is_told(name: str, value: Any) -> None:
    with pytest.raises(Unknown, match=f"config.json has no {name}"):
        shape(LLAMA_8B | {name: value})


def test_gpt_2s_names_are_known() -> None:
    gpt2 = {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50_257, "n_positions": 1024}
    found = shape(gpt2)
    assert (found.intermediate, found.context, found.kv_bytes(1)) == (3072, 1024, 36_864)


# --- The estimate ---------------------------------------------------------------------------


def test_a_model_that_is_too_large_is_told_how_much_it_needs() -> None:
    found = estimate(shape(QWEN3_8B, 15.27), GPU["RTX 3060 12 GB"])
    assert (found.fits, found.longest, found.tokens) == (False, 0, 0)
    assert found.words == "does not fit: needs 19.5 GB, RTX 3060 12 GB has 12 GB"


def test_a_model_whose_full_context_is_too_long_is_told_a_shorter_one() -> None:
    found = estimate(shape(QWEN3_8B, 15.27), GPU["RTX 4090"])
    assert found.words == f"fits RTX 4090 with max_model_len up to {found.longest:,}"
    assert 20_000 < found.longest < 40_960
    again = estimate(shape(QWEN3_8B, 15.27), GPU["RTX 4090"], {"max_model_len": found.longest})
    assert (again.fits, again.words) == (True, "fits")
    longer = {"max-model-len": found.longest + 1}
    assert not estimate(shape(QWEN3_8B, 15.27), GPU["RTX 4090"], longer).fits


def test_what_it_needs_is_what_would_be_enough() -> None:
    args = {"gpu-memory-utilization": 0.9, "max-num-seqs": 256, "max-model-len": fit.SHORT}
    model = shape(LLAMA_8B, 14.99)
    need = estimate(model, GPU["RTX 3090"], args).needed
    enough = GpuProfile("just enough", "", need // fit.MIB + 1, (8, 6))
    less = GpuProfile("a little less", "", need // fit.MIB - 64, (8, 6))
    assert estimate(model, enough, args).fits
    assert not estimate(model, less, args).fits


def test_an_entrys_arguments_count() -> None:
    model, gpu = shape(LLAMA_8B, 14.99), GPU["RTX 3090"]
    usual = estimate(model, gpu)
    assert estimate(model, gpu, {"kv_cache_dtype": "fp8"}).tokens == pytest.approx(
        2 * usual.tokens, abs=2
    )
    assert estimate(model, gpu, {"max_num_seqs": 64}).room > usual.room
    assert estimate(model, gpu, {"gpu_memory_utilization": 0.5}).longest == 0
    two = estimate(model, gpu, {"tensor_parallel_size": 2})
    assert (two.weights, two.fits) == (usual.weights // 2, True)
    assert estimate(model, gpu, {"pipeline_parallel_size": 2}).weights == usual.weights // 2
    odd = {"max_model_len": "auto", "gpu_memory_utilization": "most", "max_num_seqs": None}
    assert estimate(model, gpu, odd).context == usual.context


def test_a_model_that_embeds_needs_no_sampler() -> None:
    gpu = GPU["RTX 3060 12 GB"]
    samples, embeds = shape(QWEN3_06B, 1.12), shape(QWEN3_06B, 1.12, generates=False)
    assert estimate(embeds, gpu).room > estimate(samples, gpu).room


SHAPES = st.builds(
    Shape,
    weights=st.integers(0, 10**12),
    hidden=st.integers(1, 20_000),
    intermediate=st.integers(1, 80_000),
    vocabulary=st.integers(1, 300_000),
    layers=st.integers(0, 100),
    windowed=st.integers(0, 100),
    window=st.integers(0, 8_192),
    kv_heads=st.integers(1, 64),
    kv_width=st.integers(1, 1024),
    context=st.integers(1, 2_000_000),
    element=st.just(2),
    generates=st.booleans(),
)


@given(SHAPES, st.sampled_from(PROFILES), st.sampled_from([1, 2, 8]))
def test_the_longest_request_is_the_longest_that_fits(
    model: Shape, gpu: GpuProfile, parallel: int
) -> None:
    found = estimate(model, gpu, {"tensor_parallel_size": parallel})
    assert 0 <= found.longest <= model.context
    assert found.tokens >= 0
    if found.longest:
        assert model.kv_bytes(found.longest, parallel) <= found.room
    if found.longest < model.context:
        assert model.kv_bytes(found.longest + 1, parallel) > found.room


@given(SHAPES)
def test_more_memory_never_fits_less(model: Shape) -> None:
    sizes = [GpuProfile(str(memory), "", memory, (8, 0)) for memory in range(8_000, 70_000, 4_000)]
    longest = [estimate(model, gpu, {"max_num_seqs": 128}).longest for gpu in sizes]
    assert longest == sorted(longest)


# --- Reading a folder -----------------------------------------------------------------------


def stored(folder: Path, name: str, **tensors: tuple[str, list[int]]) -> Path:
    """A file as safetensors are written, with zeros for values."""
    size, header = 0, {"__metadata__": {"format": "pt"}}
    for tensor, (dtype, dims) in tensors.items():
        count = fit._size({"dtype": dtype, "shape": dims}, False)
        header[tensor] = {"dtype": dtype, "shape": dims, "data_offsets": [size, size + count]}
        size += count
    text = json.dumps(header).encode()
    (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    return folder / name


def test_weights_are_summed_over_the_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_06B))
    stored(tmp_path, "model-1-of-2.safetensors", a=("BF16", [10, 20]), b=("F8_E4M3", [7]))
    stored(tmp_path, "model-2-of-2.safetensors", c=("F16", [3]))
    assert read(tmp_path).weights == 400 + 7 + 6


def test_what_is_stored_in_32_bits_is_loaded_in_16_but_not_packed_weights(tmp_path: Path) -> None:
    stored(tmp_path, "model.safetensors", a=("F32", [10]), b=("I32", [10]))
    assert fit.weight_bytes(tmp_path, {}) == 20 + 40
    assert fit.weight_bytes(tmp_path, {"quantization_config": {}}) == 40 + 40


def test_the_same_weights_in_another_form_are_not_counted(tmp_path: Path) -> None:
    stored(tmp_path, "model-1.safetensors", a=("F16", [10]))
    stored(tmp_path, "consolidated.safetensors", a=("F16", [10]))
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fit.weight_bytes(tmp_path, {}) == 20


def test_real_safetensors_are_read_as_their_library_reads_them(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    library = pytest.importorskip("safetensors.numpy")
    tensors = {
        "a": numpy.zeros((3, 4), dtype="float16"),
        "b": numpy.zeros(5, dtype="int64"),
        "empty": numpy.zeros((0, 4), dtype="float16"),
        "scalar": numpy.zeros((), dtype="uint8"),
    }
    library.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "np"})
    assert fit.weight_bytes(tmp_path, {}) == sum(each.nbytes for each in tensors.values())


BROKEN = [
    b"",
    b"\x05\0\0\0\0\0\0\0",
    b"\xff" * 9,
    b"\x02\0\0\0\0\0\0\0[]",
    b"\x09\0\0\0\0\0\0\0" + b'{"a": 5} ',
    b"\x0b\0\0\0\0\0\0\0" + b'{"a": "x"} ',
    (30).to_bytes(8, "little") + b'{"a":{"dtype":"F16","shape":9}}'[:30],
    (34).to_bytes(8, "little") + b'{"a":{"dtype":"F16","shape":["9"]}}'[:34],
]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(Unknown, match="is no safetensors file"):
        fit.weight_bytes(tmp_path, {})


@pytest.mark.parametrize(
    "index", ["", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": []}}']
)
def test_a_broken_index_is_told(tmp_path: Path, index: str) -> None:
    stored(tmp_path, "model.safetensors", a=("F16", [1]))
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(Unknown, match="is no index"):
        fit.weight_bytes(tmp_path, {})


@pytest.mark.parametrize("config", [None, "", "[]", "{"])
def test_a_folder_without_a_config_is_told(tmp_path: Path, config: str | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(Unknown, match=r"config\.json"):
        read(tmp_path)


def test_a_folder_without_weights_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    with pytest.raises(Unknown, match="has no safetensors files"):
        read(tmp_path)


@pytest.mark.parametrize("source", ["acme/not-downloaded", "/no/such/folder", "", "a b\0c"])
def test_a_model_that_is_not_here_is_told(source: str) -> None:
    with pytest.raises(Unknown, match="is not on this host"):
        fit.folder_of(source)
