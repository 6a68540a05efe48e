"""What stands before the routes: who may ask, how much they may send, and how long they may take.

Host             without a token only a loopback name: a web page that rebinds its name is refused
Authorization    the token, compared in constant time
Content-Type     JSON: what a web page may send across origins without asking first is refused
size, time       of a body
"""

import asyncio
import hashlib
import hmac
import json
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from models.serve.answers import error_body
from models.serve.metrics import Metrics

MAX_BODY = 8 * 2**20
BODY_SECONDS = 30.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")
OPEN_PATHS = ("/", "/health")
"""Paths that tell nothing of anybody's texts, and need no token."""


class _Refused(Exception):
    def __init__(self, status: int, message: str, **named: Any) -> None:
        super().__init__(message)
        self.status, self.body = status, error_body(message, kind="invalid_request_error", **named)


class Guard:
    """An ASGI application around another; it also counts responses.

    Args:
        app: what is guarded.
        metrics: counts.
        token: what clients must know; None asks for none.
        any_host: whether the server may be called by any name, not by loopback names only.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, token: str | None = None, *, any_host: bool = False
    ) -> None:
        self._app, self._metrics, self._any_host = app, metrics, any_host
        self._digest = None if token is None else _digest(token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "websocket":
            await self._guard_socket(scope, receive, send)
            return
        begun = whole = False

        async def counted(message: Message) -> None:
            nonlocal begun, whole
            if message["type"] == "http.response.start":
                begun = True
                self._metrics.responses[message["status"]] += 1
            await send(message)
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
            self._check(scope, headers)
            body = await _read(receive, headers) if scope["method"] == "POST" else None
            await self._app(scope, receive if body is None else _replay(body, receive), counted)
        except _Refused as refused:
            if not begun:
                await respond(counted, refused.status, refused.body)
        except Exception:
            # Starlette answers a defect, then raises it again, at which uvicorn closes the connection:
            # a client that reuses it would see a reset.
            if not whole:
                raise

    async def _guard_socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1").lower(): value for name, value in scope["headers"]}
        try:
            self._check(scope, headers)
            if "origin" in headers:  # a page of any origin may open a socket; devices have none
                raise _Refused(403, "Origin: no web page may open this", param="Origin")
        except _Refused as refused:
            self._metrics.responses[refused.status] += 1
            await send({"type": "websocket.close", "code": 1008, "reason": str(refused)[:100]})
        else:
            await self._app(scope, receive, send)

    def _check(self, scope: Scope, headers: Mapping[str, bytes]) -> None:
        if not self._any_host:
            host = headers.get("host", b"").decode("latin-1").rsplit("@", 1)[-1]
            name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
            if name.lower() not in LOOPBACK:
                raise _Refused(403, "Host must be localhost or 127.0.0.1", param="Host")
        if self._digest is not None and scope["path"] not in OPEN_PATHS:
            kind, _, token = headers.get("authorization", b"").decode("latin-1").partition(" ")
            right = hmac.compare_digest(_digest(token.strip()), self._digest)
            if not right or kind.lower() != "bearer":
                message = "Authorization must be Bearer and the token of the server"
                raise _Refused(401, message, param="Authorization", code="invalid_api_key")
        if scope.get("method") == "POST":
            kind = headers.get("content-type", b"").decode("latin-1").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise _Refused(415, "Content-Type must be application/json", param="Content-Type")


async def respond(
    send: Send, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> None:
    """Send a JSON response."""
    content = json.dumps(body).encode()
    named = {"content-type": "application/json", "content-length": str(len(content)), **(headers or {})}
    pairs = [(name.encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})


async def _read(receive: Receive, headers: Mapping[str, bytes]) -> bytes:
    too_large = _Refused(413, f"the body has more than {MAX_BODY} bytes; send less", param="body")
    length = headers.get("content-length", b"0")
    if length.isdigit() and int(length) > MAX_BODY:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Refused(400, "the body is not whole", param="body")
                part = message.get("body", b"")
                parts.append(part)
                size += len(part)
                if size > MAX_BODY:
                    raise too_large
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise _Refused(408, f"the body took more than {BODY_SECONDS:g} seconds", param="body") from None


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives a body that was read, then what follows it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _digest(token: str) -> bytes:
    """Return a hash: of equal length, so that the comparison takes the same time for any token."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
