"""vLLM's own OpenAI serving layer: the handlers that its server would call, and what the engine can hold."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Call:
    """How one endpoint is asked: the body's parser, and the handler that vLLM made (or none)."""

    parse: Callable[[dict[str, Any]], Any]
    handler: Callable[[Any], Awaitable[Any]] | None


async def serving_layer(engine: Any, args: Any, tasks: Any) -> Any:
    """The object on which vLLM's own server keeps its handlers."""
    from starlette.datastructures import State

    try:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    except ImportError:
        from vllm.entrypoints.openai.api_server import init_app_state

    state = State()
    await init_app_state(engine, state, args, tasks)
    return state


def calls(state: Any) -> dict[str, Call]:
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


def slots(config: Any) -> int:
    """How many requests it can run at once, on all data-parallel ranks."""
    return int(config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size)


def cache_tokens(config: Any) -> int:
    """Tokens of KV cache, of all data-parallel ranks. Where it could not hold even one request of
    the greatest length, the model keeps none (an encoder), and vLLM has made up the number."""
    cache = config.cache_config
    tokens = (cache.num_gpu_blocks or 0) * (cache.block_size or 0)
    return int(tokens) if tokens >= config.model_config.max_model_len else 0
