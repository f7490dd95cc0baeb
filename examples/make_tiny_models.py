"""Makes the tiny models of the tests and of the demo; they answer noise, in the right shapes.

Real Hugging Face folders with random weights: nothing here trains, downloads or serves a model.

    python examples/make_tiny_models.py OUT_DIR

makes `tiny-chat-a`, `tiny-chat-b`, `tiny-embed` and `tiny-rerank`, about 1 MB each, in seconds.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TEXT_LIMIT = 1_000_000  # characters; more does not make a better tokenizer of 2,000 tokens
VOCABULARY = 2048
CONTEXT = 4096  # tokens
END, START_TURN, END_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

FALLBACK_TEXT = """
A batch is a file of requests that nobody waits for. The portal checks every line, keeps the good
ones in order, and hands them to a worker when a GPU is free. The worker keeps its engine full,
saves each answer as it comes, and a crash loses no line and doubles none. In the morning the
answers lie in a file beside the questions: {"custom_id": "1", "response": {"status_code": 200}}.
"""

CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\nTools, one JSON object a line:' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\nCall one as {"name": ..., "arguments": {...}}.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{- message.content }}
{%- elif message.content %}
{%- for part in message.content if part.type == 'text' %}{{- part.text }}{%- endfor %}
{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '\\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def texts() -> Iterator[str]:
    """The repository's own prose and code, then the built-in text, so that neither can be missing."""
    left = TEXT_LIMIT
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/*.py")]):
        text = path.read_text(encoding="utf-8", errors="replace")[:left]
        left -= len(text)
        yield text
    yield FALLBACK_TEXT


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer with a chat template, as Qwen's and Llama's are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, START_TURN, END_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TURN,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def sizes(tokenizer: Any, hidden: int) -> dict[str, Any]:
    """What all four configurations share. Heads of 32 are the smallest that vLLM's CPU has."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        # Ten times the usual spread: otherwise the scores of all tokens are about equal, and
        # rounding could decide which one is the likeliest.
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }


def make_qwen(tokenizer: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**sizes(tokenizer, 64)))


def make_llama(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**sizes(tokenizer, 128)))


def make_reranker(tokenizer: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForSequenceClassification

    return Qwen3ForSequenceClassification(Qwen3Config(**sizes(tokenizer, 64), num_labels=1))


def add_pooling(folder: Path) -> None:
    """Say, as Sentence Transformers does, that the last token's state is the embedding."""
    parts = ["Transformer", "Pooling", "Normalize"]
    modules = [
        {
            "idx": number,
            "name": str(number),
            "path": "" if number == 0 else f"{number}_{part}",
            "type": f"sentence_transformers.models.{part}",
        }
        for number, part in enumerate(parts)
    ]
    pooling = {"word_embedding_dimension": 64, "pooling_mode_lasttoken": True}
    (folder / "modules.json").write_text(json.dumps(modules))
    for part in modules[1:]:
        (folder / str(part["path"])).mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


MODELS: dict[str, tuple[int, Callable[[Any], Any], Callable[[Path], None] | None]] = {
    "tiny-chat-a": (1, make_qwen, None),
    "tiny-chat-b": (2, make_llama, None),
    "tiny-embed": (3, make_qwen, add_pooling),
    "tiny-rerank": (4, make_reranker, None),
}


def make_one(folder: Path, tokenizer: Any) -> None:
    """Write one model beside its place, then rename: a folder with the name is complete."""
    import torch

    seed, build, finish = MODELS[folder.name]
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(tokenizer)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        if finish:
            finish(part)
        part.chmod(0o755)  # mkdtemp makes private folders; a worker may be another user
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def make(out_dir: Path) -> dict[str, Path]:
    """Make the models that are not there yet; returns the folder of each, by name."""
    out_dir.mkdir(parents=True, exist_ok=True)
    folders = {name: out_dir / name for name in MODELS}
    missing = [folder for folder in folders.values() if not folder.is_dir()]
    if missing:
        tokenizer = make_tokenizer()
        for folder in missing:
            make_one(folder, tokenizer)
    return folders


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} OUT_DIR")
    for path in make(Path(sys.argv[1])).values():
        print(path)
