"""A device drafts, a server verifies: the text is that of one machine, whatever happens on the way."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from models.base.errors import NestlingError, UsageError
from models.checkpoint.extract import extract
from models.checkpoint.folder import load_model
from models.decode.decoder import Decoder, open_decoder
from models.decode.engine.engine import stream
from models.decode.engine.generation_config import GenerationConfig
from models.decode.sampling.params import SamplingParams
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.serve.listen import Address
from models.serve.protocol import MAX_GAMMA, PROTOCOL, Chain, Reply, Round, WireError, tokenizer_digest
from models.serve.relay import Link
from models.serve.remote import Remote, stream_remote

Start = Callable[..., "AbstractContextManager[Any]"]
Wait = Callable[[Callable[[], object]], None]
PATIENCE = 120
"""Seconds that a busy machine may need."""
WAYS = [SamplingParams(), SamplingParams(temperature=1.0, top_p=0.95)]
SIZE = 60


@pytest.fixture(scope="module")
def verifying(decoder: Decoder, start: Start) -> Iterator[Any]:
    with start(decoder, verifies=True) as served:
        yield served


@pytest.fixture(scope="module")
def member(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ElasticLM:
    """What the device has: the draft alone, cut out."""
    out = tmp_path_factory.mktemp("device") / "D"
    extract(load_model(folder), Granularity(layers=(0, 1)), out)
    return open_decoder(out, dtype="fp32").folder.model


def config_of(params: SamplingParams, seed: int = 3) -> GenerationConfig:
    return GenerationConfig(
        params=params, seed=seed, verifier="coupled", max_new_tokens=SIZE, eos_token_ids=()
    )


def alone(decoder: Decoder, ids: list[int], config: GenerationConfig) -> list[int]:
    return [token.id for token in stream(decoder.folder.model, ids, config)]


def far(url: str, **settings: Any) -> Remote:
    """A server, for which a device waits as long as a busy machine may need."""
    return Remote(url=url, timeout=PATIENCE, **settings)


def split(
    remote: Remote, member: ElasticLM, decoder: Decoder, ids: list[int], config: GenerationConfig
) -> Any:
    tokens = stream_remote(remote, member, decoder.tokenizer, ids, config)
    return [token.id for token in tokens], tokens.report


def ws(served: Any) -> str:
    return str(served.url.replace("http", "ws"))


@pytest.mark.parametrize("params", WAYS, ids=["greedy", "sampled"])
@pytest.mark.parametrize(("gamma", "window"), [(1, 1), (4, 1), (3, 3), (0, 1), (8, 2)])
def test_the_text_is_that_of_one_machine_for_any_block_and_window(
    params: SamplingParams,
    gamma: int,
    window: int,
    verifying: Any,
    member: ElasticLM,
    decoder: Decoder,
    wait_until: Wait,
) -> None:
    ids = decoder.tokenizer.encode("a text that two machines write").ids
    remote = far(ws(verifying), gamma=gamma, window=window)
    found, report = split(remote, member, decoder, ids, config_of(params))
    assert found == alone(decoder, ids, config_of(params))
    assert report.num_tokens == SIZE
    assert report.finish_reason == "length"
    if gamma:
        assert 0 < report.accepted <= report.drafted
    wait_until(lambda: verifying.server.verifier.sessions == {})  # a text that is whole leaves nothing


@pytest.mark.parametrize("params", WAYS, ids=["greedy", "sampled"])
def test_the_text_is_the_same_over_a_far_network(
    params: SamplingParams, verifying: Any, member: ElasticLM, decoder: Decoder, relayed: Start
) -> None:
    ids = decoder.tokenizer.encode("far").ids
    with relayed(ws(verifying), Link(rtt=0.02, jitter=0.01, rate=1e6)) as (url, _):
        found, _ = split(far(url, window=4), member, decoder, ids, config_of(params))
    assert found == alone(decoder, ids, config_of(params))


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("cut_after", [1, 2, 3, 4, 5, 6, 7, 8, 12, 17])
def test_a_connection_may_be_cut_after_any_message(
    cut_after: int,
    window: int,
    verifying: Any,
    member: ElasticLM,
    decoder: Decoder,
    relayed: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("models.serve.peer.FIRST_PAUSE", 0.001)
    ids = decoder.tokenizer.encode("cut").ids
    config = config_of(WAYS[1])
    with relayed(ws(verifying), Link(cut_after=cut_after, cuts=2)) as (url, relay):
        found, _ = split(far(url, window=window), member, decoder, ids, config)
    assert found == alone(decoder, ids, config)
    if window == 1:  # each message waits for the one before
        assert relay.num_connections == 3
    else:  # two rounds on their way may be one block, so that a cut comes later
        assert relay.num_connections in (2, 3)


def test_another_server_of_the_model_goes_on_with_the_text(
    member: ElasticLM, decoder: Decoder, start: Start
) -> None:
    ids, config = decoder.tokenizer.encode("moved").ids, config_of(WAYS[1])
    found, urls = list[int](), list[str]()
    with start(decoder, verifies=True) as first, start(decoder, verifies=True) as second:
        urls += [ws(first), ws(second)]
        remote = far(urls[0])
        object.__setattr__(remote, "connect", lambda *where: replace(remote, url=urls[0]).connect(*where))
        tokens = stream_remote(remote, member, decoder.tokenizer, ids, config)
        found += [next(tokens).id for _ in range(20)]
        urls[0] = urls[1]
        first.server.should_exit = True
        first.server.force_exit = True
        found += [token.id for token in tokens]
    assert found == alone(decoder, ids, config)


def opening(decoder: Decoder, ids: list[int], **changes: Any) -> str:
    """What a device says first."""
    asked = {
        "protocol": PROTOCOL,
        "tokenizer": tokenizer_digest(decoder.tokenizer),
        "vocab_size": 257,
        "prompt_ids": ids,
        "max_tokens": 30,
        "seed": 0,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "eos_token_ids": [],
    }
    return json.dumps(asked | changes)


def opened(served: Any, **settings: Any) -> ClientConnection:
    """A connection to a server that verifies."""
    url = f"{ws(served)}/v1/verify"
    connection: ClientConnection = connect(url, open_timeout=None, close_timeout=1, **settings)
    return connection


def answer_of(socket: ClientConnection) -> Reply:
    frame = socket.recv(PATIENCE)
    assert isinstance(frame, bytes), frame
    return Reply.unpack(frame)


def test_a_round_that_comes_twice_is_computed_once(verifying: Any, decoder: Decoder) -> None:
    ids = decoder.tokenizer.encode("twice").ids
    with opened(verifying) as socket:
        socket.send(opening(decoder, ids))
        text = [*ids, *json.loads(socket.recv(PATIENCE))["committed_ids"]]
        right = alone(decoder, ids, replace(config_of(WAYS[0], seed=0), max_new_tokens=30))
        block = Round(0, len(text), Chain(text).digests[-1], [right[1], right[2], (right[3] + 1) % 257])
        replies = []
        for _ in range(3):
            socket.send(block.pack())
            replies.append(answer_of(socket))
        assert replies[0] == replies[1] == replies[2]
        assert replies[0].accepted == 2
        assert list(replies[0].ids) == [right[3]]
        socket.send("bye")


def test_messages_are_small() -> None:
    assert len(Round(1, 1000, bytes(8), range(8)).pack()) <= 64
    assert len(Reply(1, 1000, 8, 0, 1009, bytes(8), [5]).pack()) <= 40


FRAMES = st.one_of(
    st.binary(max_size=80),
    st.builds(
        lambda *fields: Round(*fields).pack(),
        st.integers(0, 2**32 - 1),
        st.one_of(st.integers(0, 40), st.integers(0, 2**32 - 1)),
        st.one_of(st.just(bytes(8)), st.binary(min_size=8, max_size=8)),
        st.lists(st.one_of(st.integers(0, 256), st.integers(0, 2**32 - 1)), max_size=70),
    ),
    st.text(max_size=20),
)
OPENINGS: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    st.sampled_from(
        ["protocol", "tokenizer", "vocab_size", "session", "prompt_ids", "committed_ids", "seed"]
    ),
    st.sampled_from([None, -1, 0, 1, 2**70, "", "x", [], [1], [10**9], ["a"], [1] * 300, {}]),
    max_size=2,
)


@pytest.mark.parametrize(
    "num_cases", [pytest.param(25, id="few"), pytest.param(10_000, id="many", marks=pytest.mark.slow)]
)
def test_any_frames_are_answered_or_refused(
    num_cases: int, verifying: Any, decoder: Decoder, wait_until: Wait
) -> None:
    ids = decoder.tokenizer.encode("fuzz").ids

    @settings(max_examples=num_cases, suppress_health_check=[*HealthCheck], deadline=None)
    @given(OPENINGS, st.lists(FRAMES, max_size=6))
    def any_frames(changes: dict[str, Any], frames: list[bytes | str]) -> None:
        with contextlib.suppress(ConnectionClosed), opened(verifying) as socket:
            socket.send(opening(decoder, ids, **changes))
            if "error" in json.loads(socket.recv(PATIENCE)):
                return
            for frame in frames:
                socket.send(frame)
                answer = socket.recv(PATIENCE) if frame != "bye" else b""
                assert isinstance(answer, bytes) or "error" in json.loads(answer)
            socket.send("bye")

    any_frames()
    verifier, worker = verifying.server.verifier, verifying.server.worker
    wait_until(lambda: all(one.owner is None for one in [*verifier.sessions.values()]))
    for session in [*verifier.sessions.values()]:  # of those whose client was refused after three strikes
        verifier.sessions.end(session)
    wait_until(lambda: not worker._tasks and not worker._new_tasks)
    assert verifying.text("well", max_tokens=4)


@pytest.mark.parametrize("first", [b"\x00", "[]", "", "x"])
def test_a_connection_that_begins_otherwise_is_told_so(first: bytes | str, verifying: Any) -> None:
    with opened(verifying) as socket:
        socket.send(first)
        assert json.loads(socket.recv(PATIENCE))["error"].startswith("open: ")


def test_a_session_that_nobody_comes_back_for_is_freed(
    verifying: Any, decoder: Decoder, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
) -> None:
    monkeypatch.setattr("models.serve.sockets.LEASE", -1.0)
    with opened(verifying) as socket:
        socket.send(opening(decoder, [1, 2, 3]))
        assert json.loads(socket.recv(PATIENCE))["session"] in verifying.server.verifier.sessions
    wait_until(lambda: not verifying.server.verifier.sessions)


def test_a_device_that_leaves_before_it_is_answered_leaves_nothing_for_longer_than_its_lease(
    decoder: Decoder, start: Start, passes: Any, wait_until: Wait
) -> None:
    with start(decoder, verifies=True) as served:
        sessions = served.server.verifier.sessions
        with opened(served) as socket:
            socket.send(opening(decoder, [1, 2, 3]))
            wait_until(lambda: served.server.worker._tasks)
        passes.let_all()
        wait_until(lambda: [session.owner for session in [*sessions.values()]] == [None])


def test_a_text_waits_at_rest_while_sessions_have_the_memory(decoder: Decoder, start: Start) -> None:
    each = decoder.folder.model.new_cache(1).num_bytes
    with start(decoder, verifies=True, kv_bytes=40 * each) as served, ThreadPoolExecutor(1) as pool:
        worker, looks, waits = served.server.worker, list[int](), threading.Event()
        has_room = worker._has_room

        def look(job: Any) -> bool:
            looks.append(1)
            waits.set()
            return bool(has_room(job))

        worker._has_room = look
        with opened(served) as socket:
            socket.send(opening(decoder, [1, 2, 3]))
            assert "session" in json.loads(socket.recv(PATIENCE))
            text = pool.submit(served.text, "abc", max_tokens=20)
            assert waits.wait(PATIENCE)
            for _ in range(10):
                assert served.http.get("/health").status_code == 200
            assert len(looks) == 1
            assert not text.done()
            socket.send("bye")
            assert text.result(PATIENCE)
        assert len(looks) <= 3


def test_what_differs_is_named_with_both_values(verifying: Any, member: ElasticLM, decoder: Decoder) -> None:
    other = type(decoder.tokenizer).from_str(decoder.tokenizer.to_str())
    other.add_tokens(["another"])
    tokens = stream_remote(far(ws(verifying)), member, other, [1, 2], config_of(WAYS[0]))
    with pytest.raises(NestlingError, match=r"tokenizer: the client has \w+, the server \w+"):
        next(tokens)


def test_a_server_that_is_away_is_told_and_a_token_is_asked_for(
    member: ElasticLM, decoder: Decoder, start: Start
) -> None:
    away = Remote(url="ws://127.0.0.1:9", timeout=0.2)
    with pytest.raises(NestlingError, match="no server answers"):
        next(stream_remote(away, member, decoder.tokenizer, [1], config_of(WAYS[0])))
    with start(decoder, verifies=True, address=Address(port=0, token="0123456789abcdef")) as served:
        with pytest.raises(NestlingError, match="refuses"):
            next(stream_remote(far(ws(served)), member, decoder.tokenizer, [1], config_of(WAYS[0])))
        known = far(ws(served), token="0123456789abcdef")
        assert next(stream_remote(known, member, decoder.tokenizer, [1], config_of(WAYS[0])))
    with pytest.raises(UsageError, match="not encrypted"):
        Remote(url="ws://example.org")


def test_no_web_page_may_open_a_socket(verifying: Any) -> None:
    with pytest.raises(InvalidStatus):
        opened(verifying, additional_headers={"Origin": "http://localhost"}).close()


def test_a_frame_that_is_none_is_refused() -> None:
    for frame in (b"", b"\1", b"\2" * 30, Round(1, 1, bytes(8), [0] * (MAX_GAMMA + 1)).pack()):
        with pytest.raises(WireError):
            Round.unpack(frame)
        with pytest.raises(WireError):
            Reply.unpack(frame[:20])
