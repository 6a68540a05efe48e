"""A model's layers run elsewhere, its ends and the draft here: the text is that of one machine."""

import contextlib
import gc
import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from models.base.errors import NestlingError, UsageError
from models.checkpoint.extract import extract
from models.checkpoint.folder import load_model, save_model
from models.decode.decoder import Decoder, open_decoder
from models.decode.sampling.params import SamplingParams
from models.elastic.granularity import Granularity
from models.packed.quantize import PackedLM, packed_bytes
from models.serve.hop import StagePeer
from models.serve.listen import Address
from models.serve.protocol import Chain
from models.serve.relay import Link
from models.serve.spread import SpreadLM, open_spread
from models.serve.stage import StageServer, open_stage, parse_layers
from models.serve.states import (
    MAX_ROWS,
    PROTOCOL,
    Lacks,
    StagePass,
    States,
    max_frame,
    rows_of,
    unpack_answer,
)

Start = Callable[..., AbstractContextManager[Any]]
Wait = Callable[[Callable[[], object]], None]
SAMPLED = SamplingParams(temperature=1.0, top_p=0.95)
WAYS = [SamplingParams(), SAMPLED]
PATIENCE = 120
"""Seconds that a busy machine may need."""
SIZE, WIDTH = 40, 32
PROMPT = "a text that three machines write"


@pytest.fixture(scope="module")
def stage(folder: Path, listen: Start) -> Start:
    """Start a stage of the family."""

    @contextlib.contextmanager
    def starts(layers: str, path: Path = folder, dtype: str = "fp32", **address: Any) -> Iterator[Any]:
        where = Address(port=0, **address)
        model = open_stage(path, layers, dtype)
        torch.set_num_threads(1)
        with listen(lambda on_ready: StageServer(model, where, 2**24, on_ready)) as (server, url):
            server.url = url.replace("http", "ws")
            yield server

    return starts


@pytest.fixture(scope="module")
def pair(stage: Start) -> Iterator[list[Any]]:
    """Two stages that are the whole model."""
    with stage("0-2") as first, stage("3") as second:
        yield [first, second]


@pytest.fixture(scope="module")
def member(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the client has: the draft alone, cut out."""
    out = tmp_path_factory.mktemp("client") / "D"
    extract(load_model(folder), Granularity(layers=(0, 1)), out)
    return out


def alone(folder: Path, params: SamplingParams, prompt: str = PROMPT, size: int = SIZE) -> list[int]:
    decoder = open_decoder(folder, draft="none", params=params, verifier="coupled", dtype="fp32")
    return decoder.generate(prompt, seed=3, max_new_tokens=size).ids


def spread(
    member: Path, urls: list[str], params: SamplingParams = WAYS[0], dtype: str = "fp32", **settings: Any
) -> Decoder:
    return open_spread(member, urls, params=params, dtype=dtype, timeout=PATIENCE, **settings)


def text_of(decoder: Decoder, prompt: str = PROMPT, size: int = SIZE) -> list[int]:
    return decoder.generate(prompt, seed=3, max_new_tokens=size).ids


@pytest.fixture
def assert_nothing_is_left(wait_until: Wait) -> Callable[..., None]:
    """Wait until stages have heard each `bye`."""

    def look(*stages: Any) -> None:
        gc.collect()
        wait_until(lambda: not any(one.stage.sessions for one in stages))

    return look


@pytest.mark.parametrize("params", WAYS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("gamma", [0, 3, None])
@pytest.mark.parametrize("rtt", [0.0, 0.005])
def test_the_text_is_that_of_one_machine_with_and_without_a_draft(
    params: SamplingParams,
    gamma: int | None,
    rtt: float,
    pair: list[Any],
    member: Path,
    folder: Path,
    relayed: Start,
    assert_nothing_is_left: Callable[..., None],
) -> None:
    with ExitStack() as stack:
        link = Link(rtt=rtt, jitter=rtt)
        urls = [stack.enter_context(relayed(one.url, link))[0] if rtt else one.url for one in pair]
        decoder = spread(member, urls, params, gamma=gamma)
        result = decoder.generate(PROMPT, seed=3, max_new_tokens=SIZE)
        assert_nothing_is_left(*pair)
    assert result.ids == alone(folder, params)
    if gamma is not None:  # else the clock decides
        assert (result.report.drafted > 0) == (gamma > 0)


@pytest.mark.slow
@pytest.mark.parametrize("params", WAYS, ids=["greedy", "sampled"])
def test_the_text_is_that_of_one_machine_over_100_ms(
    params: SamplingParams, pair: list[Any], member: Path, folder: Path, relayed: Start
) -> None:
    with relayed(pair[0].url, Link(rtt=0.1)) as (one, _), relayed(pair[1].url, Link(rtt=0.1)) as (two, _):
        for gamma in (0, 8):
            assert text_of(spread(member, [one, two], params, gamma=gamma)) == alone(folder, params)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_the_text_is_the_same_in_any_dtype_of_the_weights(
    dtype: str, stage: Start, member: Path, folder: Path
) -> None:
    decoder = open_decoder(folder, draft="none", params=SAMPLED, verifier="coupled", dtype=dtype)
    right = decoder.generate(PROMPT, seed=3, max_new_tokens=SIZE).ids
    with stage("0", dtype=dtype) as first, stage("1-3", dtype=dtype) as second:
        decoder = spread(member, [first.url, second.url], SAMPLED, dtype=dtype)
        assert text_of(decoder) == right


def test_torchs_passes_are_split_as_compiled_ones_are(folder: Path) -> None:
    model = load_model(folder, dtype=torch.float32).model
    ids, cache = [5, 7, 9, 200, 3], model.new_cache(8)
    with torch.inference_mode():
        states = model.run_layers(model.embed(ids), cache, 2)
        found = model.score(states, model.model.norm)
        torch.testing.assert_close(found, model(torch.tensor([ids]))[0, -2:], rtol=0, atol=1e-6)


def test_a_stage_packs_its_own_layers_and_keeps_their_keys_and_values_alone(folder: Path) -> None:
    whole, part = (
        open_decoder(folder, draft="none", dtype="fp32").folder.model,
        open_stage(folder, "1-2", "fp32"),
    )
    assert isinstance(whole, PackedLM)
    if whole.decode_step is None:
        pytest.skip("nothing is packed where nothing is compiled")
    layers = [weight for name, weight in whole.named_parameters() if re.search(r"layers\.[12]\.", name)]
    share = sum(weight.nbytes for weight in layers)
    assert packed_bytes(part.layers) <= 1.1 * share
    assert part.layers.new_cache(10).num_bytes * 2 == whole.new_cache(10).num_bytes


def test_many_texts_and_a_conversation_go_through_stages_too(
    pair: list[Any], member: Path, folder: Path
) -> None:
    decoder = spread(member, [one.url for one in pair], gamma=2)
    prompts = ["one", "another", "b" * 100]
    found = decoder.generate_batch(prompts, max_new_tokens=10)
    assert [one.ids for one in found] == [alone(folder, WAYS[0], prompt, 10) for prompt in prompts]


def test_a_prompt_longer_than_a_frame_is_sent_in_parts(
    pair: list[Any], member: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.serve.hop.MAX_ROWS", 7)
    prompt = "long " * 30
    decoder = spread(member, [one.url for one in pair])
    pieces = decoder.stream(prompt, seed=3, max_new_tokens=SIZE)
    next(pieces)
    for one in pair:  # which forget the text: they are sent all of it
        for text in one.stage.sessions.values():
            text.cache.rewind(3)
    assert pieces.finish().ids == alone(folder, WAYS[0], prompt)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("cut_after", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 16])
def test_a_stages_connection_may_be_cut_after_any_message(
    cut_after: int,
    which: int,
    pair: list[Any],
    member: Path,
    folder: Path,
    relayed: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("models.serve.peer.FIRST_PAUSE", 0.001)
    urls = [one.url for one in pair]
    with relayed(urls[which], Link(cut_after=cut_after, cuts=3)) as (urls[which], relay):
        found = text_of(spread(member, urls, SAMPLED, gamma=2), size=12)
        assert found == alone(folder, SAMPLED, size=12)
        assert relay.num_connections >= 2


@pytest.mark.parametrize("where", ["the same address", "a spare one"])
def test_a_stage_that_dies_in_mid_text_is_replaced(
    where: str,
    pair: list[Any],
    stage: Start,
    member: Path,
    folder: Path,
    relayed: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("models.serve.peer.FIRST_PAUSE", 0.001)
    with ExitStack() as stack:
        second = stack.enter_context(contextlib.ExitStack())
        dying = second.enter_context(stage("3"))
        spare = stack.enter_context(stage("3"))
        url, relay = stack.enter_context(relayed(dying.url, Link()))
        spares = [spare.url] if where == "a spare one" else []
        decoder = spread(member, [pair[0].url, url], SAMPLED, spares=spares, gamma=2)
        pieces = decoder.stream(PROMPT, seed=3, max_new_tokens=SIZE)
        for _ in range(5):
            next(pieces)
        dying.force_exit = True
        second.close()
        if not spares:
            relay._port = int(spare.url.rpartition(":")[2])
        assert pieces.finish().ids == alone(folder, SAMPLED)
        assert pieces.result().report.finish_reason == "length"


def test_a_cut_connection_leads_back_to_the_stage_that_has_the_text(
    pair: list[Any],
    stage: Start,
    member: Path,
    folder: Path,
    relayed: Start,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("models.serve.peer.FIRST_PAUSE", 0.001)
    with stage("3") as spare, relayed(pair[1].url, Link(cut_after=9, cuts=2)) as (url, _):
        decoder, asked = spread(member, [pair[0].url, url], SAMPLED, spares=[spare.url], gamma=2), []
        monkeypatch.setattr(spare.stage, "open", lambda *arguments: asked.append(arguments))
        assert text_of(decoder) == alone(folder, SAMPLED)
        assert asked == []


def test_a_stage_that_stays_away_is_told_with_what_to_do(pair: list[Any], stage: Start, member: Path) -> None:
    with stage("3") as dying:
        decoder = spread(member, [pair[0].url, dying.url])
        pieces = decoder.stream(PROMPT, seed=3, max_new_tokens=SIZE)
        next(pieces)
        dying.force_exit = True
    model = decoder.folder.model
    assert isinstance(model, SpreadLM)
    object.__setattr__(model._routes[1].peers[0], "timeout", 0.1)
    with pytest.raises(NestlingError, match=rf"--stages {dying.url}: no server answers .* start it"):
        pieces.finish()


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        (["0-1", "3"], "layers 0-1, 3: 2 are missing before 3"),
        (["0-2", "2-3"], "layers 0-2, 2-3: 2 comes twice or late"),
        (["2-3", "0-1"], "layers 2-3, 0-1: 0-1 are missing before 2"),
        (["0-1", "2"], "layers 0-1, 2: 3 are missing at the end"),
        (["0-3", "0-3"], "layers 0-3, 0-3: 0 comes twice or late"),
    ],
)
def test_layers_that_are_missing_or_come_twice_are_named_before_the_first_token(
    layers: list[str], named: str, stage: Start, member: Path
) -> None:
    with ExitStack() as stack:
        urls = [stack.enter_context(stage(one)).url for one in layers]
        with pytest.raises(UsageError, match=named):
            spread(member, urls)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("0:2", "no consecutive layers"),
        ("3-1", "no consecutive layers"),
        ("x", "no consecutive layers"),
        ("", "no consecutive layers"),
        ("0-4", "has the layers 0-3"),
        ("0-999999999", "no consecutive layers"),
    ],
)
def test_layers_that_no_stage_can_have_are_refused(text: str, named: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=named):
        open_stage(folder, text)
    assert parse_layers("1-3") == (1, 3)


@pytest.fixture(scope="module")
def other(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same ends with other layers."""
    opened = load_model(folder)
    with torch.no_grad():
        dict(opened.model.named_parameters())["model.layers.3.mlp.up_proj.weight"].add_(1)
    path = tmp_path_factory.mktemp("other") / "model"
    return save_model(path, opened.model, tokenizer=opened.tokenizer, family=opened.family)


def test_what_differs_is_named_with_both_values(
    pair: list[Any], stage: Start, member: Path, folder: Path, other: Path, tmp_path: Path
) -> None:
    urls = [one.url for one in pair]
    with stage("3", other) as strange:
        with pytest.raises(NestlingError, match=r"weights: ws://\S+ has \w+, ws://\S+ \w+; all must"):
            spread(member, [urls[0], strange.url])
        with pytest.raises(NestlingError, match="weights: "):
            spread(member, urls, spares=[strange.url])
    with pytest.raises(NestlingError, match=r"dtype: MODEL has bf16, the stage fp32; give --dtype fp32"):
        spread(member, urls, dtype="bf16")
    opened = load_model(folder)
    assert opened.tokenizer is not None
    with torch.no_grad():
        opened.model.model.embed_tokens.weight += 1
    ends = save_model(tmp_path / "ends", opened.model, tokenizer=opened.tokenizer)
    with pytest.raises(NestlingError, match=r"ends: MODEL has \w+, the stage \w+"):
        spread(ends, urls)
    opened.tokenizer.add_special_tokens(["Z"])
    cuts = save_model(tmp_path / "cuts", load_model(folder).model, tokenizer=opened.tokenizer)
    with pytest.raises(NestlingError, match=r"tokenizer: MODEL has \w+, the stage \w+"):
        spread(cuts, urls)


def test_a_stage_that_comes_back_with_another_model_is_not_believed(
    pair: list[Any], stage: Start, member: Path, other: Path, relayed: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.serve.peer.FIRST_PAUSE", 0.001)
    with ExitStack() as stack:
        strange = stack.enter_context(stage("3", other))
        first = stack.enter_context(ExitStack())
        dying = first.enter_context(stage("3"))
        url, relay = stack.enter_context(relayed(dying.url, Link()))
        pieces = spread(member, [pair[0].url, url]).stream(PROMPT, max_new_tokens=SIZE)
        next(pieces)
        dying.force_exit = True
        first.close()
        relay._port = int(strange.url.rpartition(":")[2])
        with pytest.raises(NestlingError, match="has another model than it had before"):
            pieces.finish()


def test_no_message_waits_for_a_larger_packet(pair: list[Any]) -> None:
    where = socket.IPPROTO_TCP, socket.TCP_NODELAY
    with opened(pair[0]) as client:
        assert "session" in json.loads(client.recv(PATIENCE))
        assert client.socket.getsockopt(*where)
        name = client.socket.getsockname()
        (ours,) = (one for one in [*pair[0].server_state.connections] if one.client == name)
        assert ours.transport.get_extra_info("socket").getsockopt(*where)
        client.send("bye")


def test_a_token_is_asked_for_and_no_web_page_may_open_a_socket(
    pair: list[Any], stage: Start, member: Path
) -> None:
    token = "0123456789abcdef"
    with stage("3", token=token) as guarded:
        urls = [pair[0].url, guarded.url]
        for wrong in (None, "0123456789abcdeX"):
            with pytest.raises(NestlingError, match=r"the server refuses \(403\)"):
                spread(member, urls, token=wrong)
        assert text_of(spread(member, urls, token=token), size=2)
    with pytest.raises(InvalidStatus):
        connect(
            f"{pair[0].url}/v1/stage",
            additional_headers={"Origin": "http://localhost"},
            open_timeout=None,
        ).close()


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("", "is no address"),
        ("somewhere", "is no address"),
        ("ws://stage.example:1", "is not encrypted"),
        ("http://127.0.0.1:1", "is no address"),
        ("127.0.0.1:99999", "is no address"),
        ("127.0.0.1:0", "is no address"),
    ],
)
def test_an_address_that_is_none_is_refused(address: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        StagePeer.parse(address)
    assert StagePeer.parse("stage.example:1").url == "wss://stage.example:1"


@contextlib.contextmanager
def opened(stage: Any, **changes: Any) -> Iterator[ClientConnection]:
    """A connection to a stage, with a text of 20 positions."""
    with connect(f"{stage.url}/v1/stage", open_timeout=None, close_timeout=1) as client:
        client.send(json.dumps({"protocol": PROTOCOL, "positions": 20} | changes))
        yield client


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"protocol": 2}, "protocol: the client has 2, the stage 1"),
        ({"positions": 257}, "positions: 257 are more than the context of 256"),
        ({"positions": -1}, "positions: "),
        ({"positions": "x"}, "positions: "),
        ({"session": 1}, "session: "),
        ({"model": "/etc/passwd"}, "model: "),
    ],
)
def test_an_opening_that_cannot_be_names_its_field(
    changes: dict[str, Any], named: str, pair: list[Any], assert_nothing_is_left: Callable[..., None]
) -> None:
    with opened(pair[0], **changes) as client:
        assert json.loads(client.recv(PATIENCE))["error"].startswith(named)
    assert_nothing_is_left(pair[0])


def test_a_stage_without_memory_is_busy_and_a_text_that_never_fits_is_refused(
    folder: Path, listen: Start, assert_nothing_is_left: Callable[..., None]
) -> None:
    model = open_stage(folder, "0-1", "fp32")
    each = model.layers.new_cache(1).num_bytes
    with listen(lambda ready: StageServer(model, Address(port=0), 30 * each, ready)) as (server, url):
        server.url = url.replace("http", "ws")
        with opened(server) as first:
            assert "session" in json.loads(first.recv(PATIENCE))
            with opened(server) as second:
                assert json.loads(second.recv(PATIENCE))["error"].startswith("busy: no memory")
            with opened(server, positions=31) as second:
                assert "more --kv-memory" in json.loads(second.recv(PATIENCE))["error"]
            first.send("bye")
        assert_nothing_is_left(server)


def pass_of(number: int, rows: torch.Tensor, chain: Chain, num_last: int = 1) -> bytes:
    return StagePass(number, len(chain.digests) - 1, chain.digests[-1], num_last, rows_of(rows)).pack(WIDTH)


def answer_of(client: ClientConnection) -> States | Lacks:
    frame = client.recv(PATIENCE)
    assert isinstance(frame, bytes), frame
    return unpack_answer(frame, WIDTH)


def test_a_pass_that_comes_twice_gives_the_same_bits_and_one_that_follows_nothing_is_told(
    pair: list[Any], assert_nothing_is_left: Callable[..., None]
) -> None:
    generator = torch.Generator().manual_seed(0)
    with opened(pair[0]) as client:
        client.recv(PATIENCE)
        first, second = torch.randn(2, 3, WIDTH, generator=generator)
        chain, answers = Chain(), []
        for frame in [pass_of(1, first, chain)] * 2:
            client.send(frame)
            answers.append(client.recv(PATIENCE))
        assert answers[0] == answers[1]
        for row in first:
            chain.add(rows_of(row))
        client.send(pass_of(2, second, chain, num_last=0))
        empty = answer_of(client)
        assert isinstance(empty, States)
        assert empty.rows == b""
        chain.add(b"another")
        client.send(pass_of(3, second, chain))
        assert answer_of(client) == Lacks(3, 6)
        client.send("bye")
    assert_nothing_is_left(pair[0])


def test_states_that_are_no_numbers_are_refused_and_the_text_goes_on(pair: list[Any]) -> None:
    with opened(pair[0]) as client:
        client.recv(PATIENCE)
        for bad in (torch.nan, torch.inf):
            client.send(pass_of(1, torch.full((1, WIDTH), bad), Chain()))
            assert json.loads(client.recv(PATIENCE))["error"].startswith("states: ")
        client.send(pass_of(2, torch.ones(1, WIDTH), Chain()))
        assert isinstance(answer_of(client), States)
        client.send(pass_of(2, torch.ones(21, WIDTH), Chain()))
        assert "base: the text has 20 positions" in str(client.recv(PATIENCE))
        with pytest.raises(ConnectionClosed):  # it was the third that is none
            client.recv(PATIENCE)


RIGHT = pass_of(1, torch.ones(2, WIDTH), Chain())


@st.composite
def frames(draw: st.DrawFn) -> bytes | str:
    """A frame that is wrong somewhere, perhaps."""
    kind = draw(st.sampled_from(["bytes", "text", "changed", "cut", "more"]))
    if kind == "bytes":
        return draw(st.binary(max_size=400))
    if kind == "text":
        return draw(st.text(max_size=20))
    place = draw(st.integers(0, len(RIGHT) - 1))
    if kind == "cut":
        return RIGHT[:place]
    if kind == "more":
        return RIGHT + draw(st.binary(min_size=1, max_size=max_frame(WIDTH) + 100 - len(RIGHT)))
    return RIGHT[:place] + draw(st.binary(min_size=1, max_size=4)) + RIGHT[place + 1 :]


@pytest.mark.parametrize(
    "num_cases", [pytest.param(25, id="few"), pytest.param(10_000, id="many", marks=pytest.mark.slow)]
)
def test_any_frames_of_a_client_are_answered_or_refused(num_cases: int, pair: list[Any]) -> None:
    openings: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
        st.sampled_from(["protocol", "positions", "session", "other"]),
        st.sampled_from([None, -1, 0, 1, 2**70, "", "x", [], {}, 1.5]),
        max_size=1,
    )

    @settings(max_examples=num_cases, suppress_health_check=[*HealthCheck], deadline=None)
    @given(openings, st.lists(frames(), max_size=6))
    def any_frames(changes: dict[str, Any], given: list[bytes | str]) -> None:
        with contextlib.suppress(ConnectionClosed), opened(pair[0], **changes) as client:
            if "session" not in json.loads(client.recv(PATIENCE)):
                return
            for frame in given:
                client.send(frame)
                answer = client.recv(PATIENCE) if frame != "bye" else b""
                assert isinstance(answer, bytes) or "error" in json.loads(answer)
            client.send("bye")

    any_frames()
    for session in list(pair[0].stage.sessions.values()):  # of those who were refused after three strikes
        pair[0].stage.sessions.end(session)


@pytest.mark.parametrize("frame", [b"", b"\1", b"\5" * 9 + b"x", b"\4\2" + bytes(18), b"\4\1" + bytes(19)])
def test_an_answer_that_is_none_is_not_believed(frame: bytes) -> None:
    with pytest.raises(NestlingError, match="the stage sent"):
        unpack_answer(frame, WIDTH)


def test_a_frame_has_a_bound() -> None:
    assert max_frame(8192) < 2**23 + 100
    rows = bytes(4 * WIDTH * (MAX_ROWS + 1))
    with pytest.raises(NestlingError, match="rows: from 1 to"):
        StagePass.unpack(StagePass(1, 0, bytes(8), 1, rows).pack(WIDTH), WIDTH)


def test_nothing_listens_beyond_loopback_without_tls_and_token_here_either() -> None:
    with pytest.raises(UsageError, match="can be reached from other machines"):
        replace(Address(), host="0.0.0.0")
