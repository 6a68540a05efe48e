"""Bodies, headers and connections as no client should send them: no crash, no 500, the next is answered."""

import json
import math
import socket
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.base.processor import peak_memory_bytes

Served = Any
Wait = Callable[[Callable[[], object]], None]
FEW, MANY = 200, 10_000
MOST_GROWTH = 200 * 2**20
"""Bytes that the process may grow by in the slow run, hypothesis' own books included."""
ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 17, 257, 2**31, 2**63, 2**70, 0.5, -0.5, 1e-300, 1e300),
    *(
        math.nan,
        math.inf,
        "",
        "x",
        "tiny",
        "tiny:S",
        "\ud800",
        "\0",
        "é" * 300,
        [],
        [0],
        [256],
        [257],
        [None],
    ),
    *([[1, 2], [3]], [[]], ["a", 1], {}, {"a": 1}, {"include_usage": True}, [{}], [{"role": "user"}]),
    *(
        [{"role": "user", "content": "a"}],
        [{"role": "assistant", "content": [{"type": "text", "text": "b"}]}],
    ),
)
"""Values in place of the right one."""
COMPLETION = {
    "model": "tiny",
    "prompt": "a",
    "max_tokens": 2,
    "temperature": 1,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "n": 2,
    "seed": 1,
    "stop": ["b"],
    "ignore_eos": True,
    "stream": False,
    "stream_options": {"include_usage": True},
    "logprobs": 2,
    "echo": True,
    "user": "me",
    "best_of": 2,
    "suffix": "",
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
}
CHAT = {
    name: value for name, value in COMPLETION.items() if name not in ("prompt", "echo", "suffix", "best_of")
}
CHAT |= {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2}
BODIES = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path, and a body in which a few things are other than they should be."""
    path = draw(st.sampled_from([*BODIES]))
    body: dict[str, Any] = dict(BODIES[path])
    for name in draw(st.lists(st.sampled_from([*body]), max_size=8, unique=True)):
        del body[name]
    for name in draw(st.lists(st.sampled_from([*BODIES[path], "other", ""]), max_size=2, unique=True)):
        body[name] = draw(st.sampled_from(ODD))
    content = json.dumps(body).encode()
    kind = draw(st.sampled_from(["whole"] * 6 + ["cut", "byte", "deep", "none"]))
    place = draw(st.integers(0, len(content) - 1))
    if kind == "cut":
        content = content[:place]
    elif kind == "byte":
        content = content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :]
    elif kind == "deep":
        content = b"[" * draw(st.integers(1, 200_000))
    elif kind == "none":
        content = b""
    return path, content


HEADERS = st.dictionaries(
    st.sampled_from(["content-type", "host", "authorization", "content-length", "accept", "x-other"]),
    st.sampled_from(
        ["", "application/json", "text/plain", "localhost", "evil.example", "Bearer x", "-1", "é"]
    ),
    max_size=2,
)
METHODS = st.sampled_from(["POST"] * 8 + ["GET", "PUT", "HEAD", "OPTIONS", "DELETE"])


@pytest.mark.parametrize(
    "num_cases",
    [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)],
)
def test_any_request_is_answered_or_refused_in_openais_shape(
    num_cases: int, served: Served, wait_until: Wait
) -> None:
    before = peak_memory_bytes()
    plain = {"content-type": "application/json"}

    @settings(max_examples=num_cases, suppress_health_check=[*HealthCheck], deadline=None)
    @given(bodies(), HEADERS, METHODS)
    def any_request(body: tuple[str, bytes], headers: dict[str, str], method: str) -> None:
        path, content = body
        raw = {name: value.encode() for name, value in (plain | headers).items()}
        try:
            response = served.http.request(method, path, content=content, headers=raw)
        except (httpx.HTTPError, ValueError):  # refused by the client, or cut by what the headers promise
            return
        assert response.status_code < 500, response.text
        if response.status_code >= 400 and "json" in response.headers.get("content-type", ""):
            error = response.json()["error"] if method != "HEAD" else {"message": "-", "type": "-"}
            assert error["message"]
            assert error["type"]

    any_request()
    assert_well(served, wait_until)
    if num_cases == MANY:
        assert peak_memory_bytes() - before < MOST_GROWTH


@pytest.mark.parametrize(
    "num_cases",
    [pytest.param(FEW // 6, id="few"), pytest.param(MANY // 10, id="many", marks=pytest.mark.slow)],
)
def test_connections_may_be_cut_anywhere(num_cases: int, served: Served, wait_until: Wait) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    body = json.dumps({**COMPLETION, "max_tokens": 200, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    whole = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    @settings(max_examples=num_cases, suppress_health_check=[*HealthCheck], deadline=None)
    @given(st.integers(0, len(whole)), st.integers(0, 400), st.booleans())
    def any_cut(num_sent: int, num_read: int, reset: bool) -> None:
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(whole[:num_sent])
            if num_sent == len(whole) and num_read:
                connection.recv(num_read)
            if reset:  # without a word
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    any_cut()
    assert_well(served, wait_until)


def assert_well(served: Served, wait_until: Wait) -> None:
    """Nothing is left once all was read that was sent, and the next request is answered."""
    worker = served.server.worker

    def is_idle() -> bool:
        return not (
            worker._live or worker._queue or worker._prefixes.num_live_bytes or len(worker._scheduler)
        )

    wait_until(is_idle)
    assert served.text("well", max_tokens=4)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "localhost.evil.example:80"}, 403),
        ({"host": "LOCALHOST:1"}, 200),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"content-length": str(2**40)}, 413),
    ],
)
def test_what_a_web_page_could_send_is_refused(headers: dict[str, str], status: int, served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1}).encode()
    named = {"host": host, "content-type": "application/json", "content-length": str(len(body)), **headers}
    lines = [f"{name}: {value}" for name, value in named.items()]
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall("\r\n".join(["POST /v1/completions HTTP/1.1", *lines, "", ""]).encode() + body)
        assert connection.recv(12).endswith(str(status).encode())
