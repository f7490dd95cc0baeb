"""Whether a model fits a GPU: an estimate from the model's folder alone, before anything is loaded.

Pure but for reading the folder. What really happened on a kind of GPU is in `Measurement`.

On one GPU, in bytes:

    use     = utilization x (memory - reserved)                         vLLM's gpu_memory_utilization
    weights = sum of the tensors in the safetensors files               / (tensor x pipeline parallel)
    kv      = 2 x layers x kv heads x head dimension x bytes            for a token
    peak    = max(forward, sampler)
    forward = tokens x (4 hidden + 2 intermediate) x bytes              tokens of one step
    sampler = sequences x vocabulary x 38.4 + tokens x hidden x bytes
    fits    if kv x max_model_len <= use - weights - peak - fixed

`kv` is exact: 28.20 GiB held 184,832 tokens of Mistral-Small-24B. The 38.4 bytes, and `fixed`, come
from what vLLM 0.11 measured of itself on an H100 for seven models of five families: with
1,024 sequences the sampler's sorted copies of the logits are the peak, to 1 % (llm-d-planner's
docs/empirical-vllm-memory-results.md; Llama-3-8B with 256 sequences: vllm-project/vllm#10511). The
tests hold the estimate against those measurements.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from models_registry.profiles import LARGE, GpuProfile, engine_args

MIB, GIB = 1024**2, 1024**3
RESERVED = 450 * MIB
"""What the driver keeps of the memory that it reports: 316 to 614 MiB on seven kinds of cards."""
FIXED = int(0.65 * GIB)
"""CUDA graphs (0.1 to 1.0 GiB) and what PyTorch does not count (0.13 GiB)."""
FIXED_PARALLEL = int(0.45 * GIB)
"""More of the latter when GPUs talk to each other."""
SAMPLER_BYTES = 38.4
SHORT = 2048
"""Tokens of a request below which a model is of little use."""
MOST_HEADER = 100_000_000
"""Bytes of a safetensors header; the format's own bound."""
BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16}
BITS |= {"I16": 16, "U16": 16, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Bits of an element; what is not here has eight."""


class Unknown(Exception):
    """The folder does not say enough; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides how much memory a model needs."""

    weights: int
    """Bytes, as vLLM loads them."""
    hidden: int
    intermediate: int
    vocabulary: int
    layers: int
    """Those that keep keys and values of every token."""
    windowed: int
    """Those that keep them of the last `window` tokens."""
    window: int
    kv_heads: int
    kv_width: int
    """Values that a head keeps of a token, keys and values together."""
    context: int
    """The longest request, in tokens."""
    element: int
    """Bytes of a value in activations and the KV cache."""
    generates: bool = True
    """It samples tokens; an embedding model does not."""

    def kv_bytes(self, tokens: int, parallel: int = 1, element: int | None = None) -> int:
        """KV cache of one request of so many tokens, on each of so many GPUs."""
        heads = max(1, self.kv_heads // parallel)
        kept = self.layers * tokens + self.windowed * min(tokens, self.window)
        return kept * heads * self.kv_width * (element or self.element)


@dataclass(frozen=True, slots=True)
class Fit:
    """How a model does on a kind of GPU; bytes are on each GPU."""

    profile: GpuProfile
    weights: int
    needed: int
    """Of the GPU's memory at the least: for one request, of `SHORT` tokens if the model's are longer."""
    room: int
    """For the KV cache; negative if not even the weights fit."""
    tokens: int
    """Of full-length requests, that the KV cache holds."""
    longest: int
    """The longest request that fits, in tokens."""
    context: int

    @property
    def fits(self) -> bool:
        return self.longest >= self.context

    @property
    def words(self) -> str:
        """The verdict, for people."""
        if self.fits:
            return "fits"
        if self.longest > 0:
            return f"fits {self.profile.name} with max_model_len up to {self.longest:,}"
        has = self.profile.memory * MIB
        return f"does not fit: needs {_gb(self.needed)} GB, {self.profile.name} has {_gb(has)} GB"


def _gb(size: float) -> str:
    return f"{size / GIB:.1f}".removesuffix(".0")


# --- Reading a model's folder ---------------------------------------------------------------


def folder_of(source: str, revision: str = "") -> Path:
    """Where a registry entry's model is on this host; raises Unknown. Downloads nothing."""
    if source and Path(source).is_dir():
        return Path(source)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(source, revision=revision or None, local_files_only=True))
    except Exception as error:  # there is one for each way of not being a downloaded model
        raise Unknown(f"{source} is not on this host") from error


def read(folder: Path, *, generates: bool = True) -> Shape:
    """What the model in a Hugging Face folder needs; raises Unknown."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise Unknown(f"{folder / 'config.json'}: {error}") from error
    if not isinstance(config, dict):
        raise Unknown(f"{folder / 'config.json'}: no object")
    return shape_of(config, weight_bytes(folder, config), generates=generates)


@lru_cache(maxsize=256)
def context_of(source: str, revision: str = "") -> int | None:
    """Tokens of the model's longest request, where its folder is on this host; else None.

    Remembered: pages ask it for every model.
    """
    try:
        config = json.loads((folder_of(source, revision) / "config.json").read_bytes())
        text = config.get("text_config") or config.get("llm_config") or config
        return _number(text, "max_position_embeddings", "n_positions")
    except (Unknown, OSError, ValueError, AttributeError):
        return None


def weight_bytes(folder: Path, config: Mapping[str, Any]) -> int:
    """Bytes of all tensors as vLLM loads them; raises Unknown.

    What is stored in 32 bits is loaded in 16, unless the checkpoint is a quantized one, whose
    32 bits are packed weights and scales.
    """
    files = [path for path in folder.glob("*.safetensors") if path.name in _indexed(folder, path)]
    if not files:
        raise Unknown(f"{folder} has no safetensors files")
    halve = "quantization_config" not in config
    return sum(_tensor_bytes(path, halve=halve) for path in files)


def _indexed(folder: Path, path: Path) -> Collection[str]:
    """The files that the folder's index names, if it has one: others are the same weights again."""
    index = folder / "model.safetensors.index.json"
    try:
        return set(json.loads(index.read_bytes())["weight_map"].values())
    except FileNotFoundError:
        return [path.name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unknown(f"{index} is no index") from error


def _tensor_bytes(path: Path, *, halve: bool) -> int:
    """From the header that begins the file: its length, then JSON (huggingface.co/docs/safetensors)."""
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > MOST_HEADER:
                raise Unknown(f"{path} is no safetensors file")
            header = json.loads(stream.read(length))
        tensors = [each for name, each in header.items() if name != "__metadata__"]
        return sum(_size(each, halve) for each in tensors)
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise Unknown(f"{path} is no safetensors file") from error


def _size(tensor: Mapping[str, Any], halve: bool) -> int:
    stored = "F16" if halve and tensor["dtype"] == "F32" else tensor["dtype"]
    return int(math.prod(tensor["shape"]) * BITS.get(stored, 8) // 8)


def shape_of(config: Mapping[str, Any], weights: int, *, generates: bool = True) -> Shape:
    """What the `config.json` says, for so many bytes of weights; raises Unknown.

    Models that see keep those of their language part in `text_config`.
    """
    text = config.get("text_config") or config.get("llm_config") or config
    hidden, heads = (
        _number(text, "hidden_size", "n_embd"),
        _number(text, "num_attention_heads", "n_head"),
    )
    layers, windowed = _layers(text)
    kv_heads, kv_width = _kept(text, hidden, heads)
    return Shape(
        weights=weights,
        hidden=hidden,
        intermediate=_number(text, "intermediate_size", "ffn_dim", "n_inner", default=4 * hidden),
        vocabulary=_number(text, "vocab_size"),
        layers=layers,
        windowed=windowed,
        window=_number(text, "sliding_window", default=0),
        kv_heads=kv_heads,
        kv_width=kv_width,
        context=_number(text, "max_position_embeddings", "n_positions", default=4096),
        element=2,
        generates=generates,
    )


def _number(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if type(value) is int and value > 0:
            return value
    if default is None:
        raise Unknown(f"config.json has no {names[0]}")
    return default


def _layers(text: Mapping[str, Any]) -> tuple[int, int]:
    """How many layers keep every token, and how many only a window of them.

    Others (linear attention, Mamba) keep a state whose size no token changes: left out.
    """
    total = _number(text, "num_hidden_layers", "n_layer")
    kinds = text.get("layer_types")
    if isinstance(kinds, list) and kinds:
        return kinds.count("full_attention"), kinds.count("sliding_attention")
    if _number(text, "sliding_window", default=0) and text.get("use_sliding_window", True):
        return 0, total
    return total, 0


def _kept(text: Mapping[str, Any], hidden: int, heads: int) -> tuple[int, int]:
    """KV heads, and what each keeps of a token.

    Multi-head latent attention (DeepSeek) keeps one compressed vector and one rotary key.
    """
    if text.get("kv_lora_rank"):
        return 1, _number(text, "kv_lora_rank") + _number(text, "qk_rope_head_dim", default=64)
    width = _number(text, "head_dim", default=hidden // heads)
    return _number(text, "num_key_value_heads", default=heads), 2 * width


# --- Estimating -----------------------------------------------------------------------------


def estimate(shape: Shape, profile: GpuProfile, entry: Mapping[str, Any] | None = None) -> Fit:
    """How the model does on this kind of GPU, with an entry's engine_args over the defaults."""
    given = {name.lstrip("-").replace("_", "-"): value for name, value in (entry or {}).items()}
    args = engine_args(profile.memory) | given
    tensor = _whole(args, "tensor-parallel-size", 1)
    gpus = tensor * _whole(args, "pipeline-parallel-size", 1)
    memory = profile.memory * MIB
    share = _share(args)
    weights = shape.weights // gpus
    spent = weights + peak(shape, profile, args) + FIXED + (FIXED_PARALLEL if gpus > 1 else 0)
    room = int(share * (memory - RESERVED)) - spent
    context = _whole(args, "max-model-len", shape.context)
    element = 1 if "8" in str(args.get("kv-cache-dtype", "")) else shape.element
    pipeline = gpus // tensor

    def kv(tokens: int) -> int:
        return shape.kv_bytes(tokens, tensor, element) // pipeline

    longest = _longest(kv, room, context)
    needed = int((spent + kv(min(context, SHORT))) / share) + RESERVED
    tokens = room * context // kv(context) if room > 0 and kv(context) else 0
    return Fit(profile, weights, needed, room, tokens, longest, context)


def peak(shape: Shape, profile: GpuProfile, args: Mapping[str, Any]) -> int:
    """Bytes of activations at their highest, on each GPU: in a full step, or while sampling."""
    large = profile.memory >= LARGE
    tokens = _whole(args, "max-num-batched-tokens", 16_384 if large else 8_192)
    # vLLM's own, but for A100s, which it treats as smaller than they are.
    sequences = _whole(args, "max-num-seqs", 1_024 if large and profile.compute > (8, 0) else 256)
    tensor = _whole(args, "tensor-parallel-size", 1)
    forward = tokens * (4 * shape.hidden + 2 * shape.intermediate // tensor) * shape.element
    if not shape.generates:
        return forward
    kept = tokens * shape.hidden * shape.element
    return max(forward, int(sequences * shape.vocabulary * SAMPLER_BYTES) + kept)


def _longest(kv: Callable[[int], int], room: int, context: int) -> int:
    """The longest request, of at most `context` tokens, whose KV cache has room (by bisection)."""
    if room <= 0 or kv(1) > room:
        return 0
    low, high = 1, context
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if kv(middle) <= room else (low, middle - 1)
    return low


def _whole(args: Mapping[str, Any], name: str, default: int) -> int:
    """An option that is a number; anything else is for vLLM to refuse, or to find out by itself."""
    value = args.get(name)
    return value if type(value) is int and value > 0 else default


def _share(args: Mapping[str, Any]) -> float:
    value = args.get("gpu-memory-utilization")
    return float(value) if isinstance(value, int | float) and 0 < value <= 1 else 0.92
