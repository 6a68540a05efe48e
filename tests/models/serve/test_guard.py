"""Who may ask: with a token only who knows it, and it takes as long to refuse any other."""

import hmac
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.base.errors import NestlingError, UsageError
from models.decode.decoder import Decoder
from models.decode.engine.engine import stream
from models.decode.engine.generation_config import GenerationConfig
from models.serve.listen import Address
from models.serve.remote import Remote, stream_remote

TOKEN = "0123456789abcdef"
Start = Callable[..., "AbstractContextManager[Any]"]


def test_with_a_token_only_who_knows_it_is_answered(
    decoder: Decoder, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = list[tuple[int, int]]()
    real = hmac.compare_digest

    def compare(ours: bytes, theirs: bytes) -> bool:
        compared.append((len(ours), len(theirs)))
        return real(ours, theirs)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    with start(decoder, address=Address(port=0, token=TOKEN)) as served:
        for given in (None, "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer é"):
            headers = {} if given is None else {"authorization": given.encode()}
            response = served.http.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert set(compared) == {(32, 32)}, "hashes of equal length, whatever was given"
        right = {"authorization": f"Bearer {TOKEN}"}
        assert served.http.get("/v1/models", headers=right).status_code == 200
        assert served.http.get("/health").status_code == 200
        assert served.http.get("/").status_code == 200
        assert served.http.get("/metrics").status_code == 401


def test_a_body_may_not_be_larger_than_the_bound(served: Any) -> None:
    def parts() -> Any:
        yield from [b" " * 2**20] * 20  # without a length

    headers = {"content-type": "application/json"}
    try:
        status = served.http.post("/v1/completions", content=parts(), headers=headers).status_code
    except httpx.HTTPError:  # the server closes while we send
        return
    assert status == 413


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for this machine that nobody signed but itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command = ["openssl", *words.split(), *names, "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def test_over_tls_a_device_trusts_a_certificate_that_it_was_given(
    certificate: tuple[Path, Path], decoder: Decoder, start: Start
) -> None:
    cert, key = certificate
    with start(decoder, verifies=True, address=Address(port=0, cert=cert, key=key, token=TOKEN)) as served:
        assert served.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(cert))
        response = httpx.get(f"{served.url}/health", verify=context)
        assert response.status_code == 200
        config = GenerationConfig(max_new_tokens=8, eos_token_ids=())
        known = Remote(url=served.url.replace("https", "wss"), token=TOKEN, ca=cert, timeout=120)
        tokens = stream_remote(known, decoder.folder.model, decoder.tokenizer, [1, 2], config)
        ours = stream(decoder.folder.model, [1, 2], config)
        assert [token.id for token in tokens] == [token.id for token in ours]
        unknown = replace(known, ca=None, timeout=0.1)
        with pytest.raises(NestlingError, match="no server answers"):
            next(stream_remote(unknown, decoder.folder.model, decoder.tokenizer, [1], config))


def test_over_tls_no_ticket_follows_the_handshake(
    certificate: tuple[Path, Path], decoder: Decoder, start: Start
) -> None:
    """Clients that read in a thread of their own hung in one connection of a hundred while it came."""
    cert, key = certificate
    context = ssl.create_default_context(cafile=str(cert))
    with (
        start(decoder, address=Address(port=0, cert=cert, key=key, token=TOKEN)) as served,
        socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=60) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        secure.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert secure.recv(64).startswith(b"HTTP/1.1 200")
        assert secure.version() == "TLSv1.3"
        assert secure.session is not None
        assert not secure.session.has_ticket


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "::", "example.org"])
def test_beyond_loopback_tls_and_a_token_are_asked_for(host: str) -> None:
    with pytest.raises(UsageError, match="--token-file"):
        Address(host=host)
    Address(host=host, insecure=True)
