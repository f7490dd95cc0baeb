"""What vLLM's handlers return, raise and stream, as answers with OpenAI's keys."""

from __future__ import annotations

from typing import Any

import orjson

from worker.engines.base import Answer, Refused, Usage
from worker.engines.streaming import encoded
from worker.engines.vllm.failures import in_one_line

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


def read(response: Any) -> Answer:
    """An Answer from what a handler returned: its model, its error, or a finished HTTP response."""
    if hasattr(response, "model_dump"):
        error = getattr(response, "error", None)
        if error is not None and not hasattr(response, "usage"):
            return refused(int(error.code), error.message, param=error.param)
        return _success(response.model_dump(mode="json", by_alias=True, warnings="none"))
    raw = getattr(response, "body", None)
    if raw is None or "json" not in (response.media_type or ""):
        return refused(400, "This answer would not be JSON; ask for another `encoding_format`")
    body = orjson.loads(raw)
    if response.status_code >= 400:
        given = body.get("error") or {}
        return refused(response.status_code, given.get("message", ""), param=given.get("param"))
    return _success(body)


def _success(body: dict[str, Any]) -> Answer:
    strip_answer(body)
    return Answer(200, encoded(body), Usage.of(body.get("usage")))


def unless_error(event: dict[str, Any]) -> dict[str, Any]:
    """The event of a stream; raises `Refused` if it says that there are no more."""
    if error := event.get("error"):
        raise Refused(refused(int(error["code"]), error["message"], param=error["param"]))
    return event


def strip_answer(body: dict[str, Any]) -> None:
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


def answer_to(error: Exception) -> Answer:
    """What vLLM's own server would answer to an exception, but never 5xx for a bad body."""
    if type(error).__name__ == "EngineGenerateError" and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the wrapper has no message
    response = _vllm_error(error)
    status = int(response.error.code)
    if isinstance(error, NotImplementedError | RecursionError):
        status = 400
    message = response.error.message
    if callable(getattr(error, "errors", None)):  # pydantic: without the input and its web address
        message = in_one_line(error)
    return refused(status, message or type(error).__name__, param=response.error.param)


def _vllm_error(error: Exception) -> Any:
    try:
        from vllm.entrypoints.serve import create_error_response
    except ImportError:
        from vllm.entrypoints.serve.utils.error_response import create_error_response
    return create_error_response(error)


def refused(status: int, message: str, *, param: str | None = None) -> Answer:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": param, "code": None}
    return Answer(status, encoded({"error": error}))
