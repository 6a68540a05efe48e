"""Errors in OpenAI's shape: they name the field, and never repeat what a client sent."""

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from models.base.errors import NestlingError, UsageError
from models.serve.answers import error_body
from models.serve.job import Busy, Stopped

logger = logging.getLogger(__name__)


class UnknownModel(NestlingError):
    """There is no model of the name."""


class JsonResponse(Response):
    """JSON in ASCII, which can hold whatever a client sent."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the bytes."""
        return json.dumps(content).encode()


def add_errors(app: FastAPI) -> None:
    """Let every error have OpenAI's shape."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        problems = [_problem(each) for each in error.errors()]
        message = "; ".join(f"{name}: {text}" for name, text in problems[:5])
        return _refusal(400, message, param=problems[0][0])

    @app.exception_handler(UnknownModel)
    async def unknown(_: Request, error: UnknownModel) -> Response:
        return _refusal(404, str(error), param="model", code="model_not_found")

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> Response:
        body = error_body(str(error), kind="rate_limit_error", code="queue_full")
        return JsonResponse(body, status_code=429, headers={"Retry-After": str(error.retry_after)})

    @app.exception_handler(Stopped)
    async def stopped(_: Request, error: Stopped) -> Response:
        body = error_body(str(error), kind="server_error", code="stopping")
        return JsonResponse(body, status_code=503, headers={"Retry-After": "5"})

    @app.exception_handler(UsageError)
    async def refused(_: Request, error: UsageError) -> Response:
        message = str(error)
        named = re.match(r"--([a-z-]+)|([a-z_]+)=", message)
        param = named and (named[1] or named[2]).replace("-", "_")
        return _refusal(400, message.removeprefix("--"), param=param)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        return _refusal(error.status_code, f"{request.method} of this path: {error.detail}")

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        logger.error("a request failed", exc_info=error)
        return JsonResponse(error_body(message_of(error), kind="server_error"), status_code=500)


def _refusal(status: int, message: str, *, param: str | None = None, code: str | None = None) -> Response:
    body = error_body(message, kind="invalid_request_error", param=param, code=code)
    return JsonResponse(body, status_code=status)


def message_of(error: Exception) -> str:
    """Return what a client may know: of a defect nothing but its kind."""
    return str(error) if isinstance(error, NestlingError) else f"the server failed ({type(error).__name__})"


def _problem(error: Mapping[str, Any]) -> tuple[str, str]:
    """Return the field and what is wrong with it, without its value."""
    place = [str(part) for part in error["loc"] if part != "body"]
    field = place[0] if place and error["type"] != "json_invalid" else "body"
    message = "Unknown field" if error["type"] == "extra_forbidden" else str(error["msg"])
    return field, message
