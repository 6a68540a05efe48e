"""Who may ask: with a token only who knows it, and it takes as long to refuse any other."""

import hmac
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest

from models.base.errors import UsageError
from models.decode.decoder import Decoder
from models.serve.server import Address

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


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.7", "::", "example.org"])
def test_beyond_loopback_tls_and_a_token_are_asked_for(host: str) -> None:
    with pytest.raises(UsageError, match="--token-file"):
        Address(host=host)
    Address(host=host, insecure=True)
