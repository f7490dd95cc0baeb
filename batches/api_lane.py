"""`/v1/chat/completions`, `/v1/completions` and `/v1/embeddings`: somebody waits for the answer.

Parse, let the service put it before a worker, pass on what that says; as one JSON body or as
server-sent events.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Annotated, Any

from django.conf import settings
from django.http import HttpRequest, HttpResponse, HttpResponseBase, StreamingHttpResponse
from ninja import Field, Router, Schema
from pydantic import ConfigDict, StrictBool, StrictInt, StrictStr

from accounts.authentication import caller_of
from accounts.errors import ApiError, BadRequest, NotFound
from batches import lane
from batches.lane import Frame, Kind, Request
from batches.lines import MAX_INPUTS_A_REQUEST, answers_of, estimate_tokens, inputs_of
from batches.services import realtime
from batches.services.realtime import Call, ClientGone
from batches.services.validation import ENDPOINTS
from models_registry.models import Model, Task
from models_registry.queries import find_offered

lane_router = Router(tags=["Real time"])

MOST_ANSWERS = 128
"""Of one request: `n` times its prompts. OpenAI's limit for `n`."""
CLIENT_CLOSED = 499
"""As nginx calls it in its log; nobody reads this answer."""


Count = Annotated[StrictInt | None, Field(le=MOST_ANSWERS)]


class Asked(Schema):
    """What the portal itself looks at; all else goes to the engine as it came, to be judged there."""

    model_config = ConfigDict(extra="allow")
    model: Annotated[StrictStr, Field(min_length=1)]
    n: Count = None
    best_of: Count = None


class ChatIn(Asked):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_completion_tokens: Any = None
    max_tokens: Any = None
    stream: StrictBool | None = None
    stream_options: dict[str, Any] | None = None


class CompletionIn(Asked):
    prompt: StrictStr | list[Any]
    max_tokens: Any = None
    stream: StrictBool | None = None
    stream_options: dict[str, Any] | None = None


class EmbeddingsIn(Asked):
    input: StrictStr | list[Any]
    stream: Annotated[StrictBool | None, Field(description="Not possible here.")] = None


def _streamed_or_not(description: str) -> dict[str, Any]:
    """What the OpenAPI document says of an answer that is passed on as the engine gives it."""
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if description != "Embeddings":
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {"responses": {200: {"description": description, "content": content}}}


@lane_router.post(
    "/chat/completions", summary="Chat", openapi_extra=_streamed_or_not("A chat completion")
)
def create_chat_completion(request: HttpRequest, given: ChatIn) -> HttpResponseBase:
    return _answered(request, "/v1/chat/completions", given, stream=bool(given.stream))


@lane_router.post(
    "/completions", summary="Complete a prompt", openapi_extra=_streamed_or_not("A completion")
)
def create_completion(request: HttpRequest, given: CompletionIn) -> HttpResponseBase:
    return _answered(request, "/v1/completions", given, stream=bool(given.stream))


@lane_router.post("/embeddings", summary="Embed", openapi_extra=_streamed_or_not("Embeddings"))
def create_embeddings(request: HttpRequest, given: EmbeddingsIn) -> HttpResponseBase:
    if given.stream:
        raise BadRequest("Embeddings cannot be streamed.", param="stream", code="invalid_value")
    if inputs_of(given.input) > MAX_INPUTS_A_REQUEST:
        said = f"A request may embed {MAX_INPUTS_A_REQUEST:,} inputs."
        raise BadRequest(said, param="input", code="too_many_inputs")
    return _answered(request, "/v1/embeddings", given, stream=False)


def _answered(
    request: HttpRequest, endpoint: str, given: Asked, *, stream: bool
) -> HttpResponseBase:
    caller = caller_of(request, "inference")
    model = _model_of(find_offered(caller.organization, given.model), given.model, endpoint)
    body = given.model_dump()
    if answers_of(body) > MOST_ANSWERS:
        said = f"A real-time request may ask for {MOST_ANSWERS} answers; send more as a batch."
        raise BadRequest(said, param="n", code="invalid_value")
    call = realtime.begin(
        actor=caller,
        request=Request(
            id=request.id,  # type: ignore[attr-defined]
            model=model.name,
            endpoint=endpoint,
            body=request.body,
            stream=stream,
            seconds=settings.LANE_SECONDS,
        ),
        model=model,
        tokens=estimate_tokens(endpoint, body, len(request.body)),
        is_gone=_hung_up(request),
    )
    try:
        return _response(call)
    except BaseException:
        call.close()
        raise


def _model_of(model: Model | None, name: str, endpoint: str) -> Model:
    if model is None:
        said = f"The model {name[:64]!r} does not exist or is not offered to your organization."
        raise NotFound(said, param="model", code="model_not_found")
    if endpoint not in ENDPOINTS[Task(model.task)]:
        said = f"{model.name} is a {model.task} model: it does not answer {endpoint}."
        raise BadRequest(said, param="model", code="model_not_supported")
    return model


def _response(call: Call) -> HttpResponseBase:
    """Wait for the first event, or for the whole answer: until then errors have a status."""
    frames = call.frames()
    try:
        first = next(frame for frame in frames if frame.kind is not Kind.ALIVE)
    except ClientGone:
        first = lane.error(CLIENT_CLOSED, "The client has gone.")
    if first.kind is Kind.ANSWER:
        call.close()
        return _whole(first)
    response = StreamingHttpResponse(Events(call, chain([first], frames)))
    response["Content-Type"] = "text/event-stream; charset=utf-8"
    response["Cache-Control"] = "no-cache"
    response["X-Accel-Buffering"] = "no"  # nginx would hold events back
    return response


def _whole(answer: Frame) -> HttpResponse:
    response = HttpResponse(answer.data, status=_status(answer), content_type="application/json")
    if response.status_code == 503:
        response["Retry-After"] = "1"
    return response


def _status(frame: Frame) -> int:
    """Where a remote engine refuses the portal's own secret, that is no fault of the caller's key."""
    return 502 if frame.status in (401, 403) else frame.status


class Events:
    """The frames as server-sent events; closing it ends the request, wherever it is."""

    def __init__(self, call: Call, frames: Iterator[Frame]) -> None:
        self._call = call
        self._frames = frames

    def __iter__(self) -> Iterator[bytes]:
        try:
            for frame in self._frames:
                yield _event(frame)
                if frame.is_last:
                    return
        except ClientGone:
            return
        except ApiError as error:  # too late for a status
            yield _event(lane.error(error.status, error.message, code=error.code))

    def close(self) -> None:
        self._call.close()


def _event(frame: Frame) -> bytes:
    if frame.kind is Kind.ALIVE:  # a comment, so that proxies see that the line is not dead
        return b": working\n\n"
    data = b"[DONE]" if frame.kind is Kind.END else frame.data
    return b"data: " + data + b"\n\n"


def _hung_up(request: HttpRequest) -> Callable[[], bool]:
    """A look whether the client has closed the connection; never, where the server shows none.

    Writing to a client that does not read fails from here on after a while, which ends the request.
    """
    connection: socket.socket | None = request.META.get("gunicorn.socket")
    if connection is None:
        return lambda: False
    timeout = struct.pack("ll", lane.SILENCE_SECONDS, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)

    def look() -> bool:
        try:
            return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except ValueError:  # TLS of gunicorn's own, which cannot be peeked into
            return False
        except OSError:
            return True

    return look
