"""A served teacher: a tiny server that tells what a model of ours says, as vLLM would, and its failures."""

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import torch
from rich.console import Console

from models.base.errors import NestlingError, UsageError
from models.checkpoint.folder import load_model
from train.cli import main
from train.data.module import TextData
from train.distill import endpoint as module
from train.distill.cache import CachedTeacher
from train.distill.endpoint import Endpoint, EndpointTeacher
from train.distill.forms import TopK
from train.distill.open import open_teacher
from train.recipe.recipe import Recipe, load_recipe
from train.run.fit import fit

QUIET = Console(quiet=True)
SMALL = "family={} model.hidden_size=32 model.intermediate_size=64 model.num_hidden_layers=1 dtype=fp32"
QUICK = "trainer.max_steps=2 trainer.batch_size=4 loss.ramp_start=0 data.sequence_length=16 distill.k=4"

Served = Callable[[Any], Any]


class Server:
    """Serves a model folder; `spoil` changes or withholds its answers from then on."""

    def __init__(self, folder: Path) -> None:
        opened = load_model(folder)
        assert opened.tokenizer is not None
        self.model, self.tokenizer = opened.model, opened.tokenizer
        self.spoil: Served = lambda answer: answer
        self.asked = 0
        self.left = 10**9
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                self._answer({"data": [{"id": "tiny"}]})

            def do_POST(self) -> None:
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked += 1
                if outer.asked > outer.left:
                    self.connection.close()
                    return
                self._answer(outer.spoil(outer.complete(question)))

            def _answer(self, answer: Any) -> None:
                code = answer.pop("code", 200) if isinstance(answer, dict) else 200
                body = json.dumps(answer).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def complete(self, question: dict[str, Any]) -> dict[str, Any]:
        assert question["echo"]
        assert question["return_tokens_as_token_ids"]
        choices = []
        for index, prompt in enumerate(question["prompt"]):
            ids = self.tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
            with torch.no_grad():
                logs_TV = self.model(torch.tensor([ids]))[0].log_softmax(-1)
            top = logs_TV.topk(question["logprobs"])
            told = [
                {f"token_id:{token}": log for token, log in zip(*pair, strict=True)}
                for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ]
            read = {"token_id:1": -50.0, "odd": -60.0}
            rows: list[Any] = [None, *[{**one, **read} for one in told]]
            tokens = [f"token_id:{token}" for token in (*ids, 0)]
            choices.append({"index": index, "logprobs": {"tokens": tokens, "top_logprobs": rows}})
        return {"choices": choices[::-1]}


@pytest.fixture
def server(teacher_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "PAUSE", 0.0)
    one = Server(teacher_folder)
    thread = threading.Thread(target=one.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield one
    one.server.shutdown()
    one.server.server_close()


def make_recipe(server: Server, teacher: Path, text: Path, *words: str) -> Recipe:
    given = [f"loss.teacher={server.url}", f"data.tokenizer={teacher}", f"data.source={text}"]
    given += [
        f"data.cache_dir={text.parent / 'data'}",
        "tracking.wandb=disabled",
        "tracking.tensorboard=false",
    ]
    return load_recipe(overrides=[*SMALL.split(), *QUICK.split(), *given, *words])


def test_it_tells_what_the_model_tells(server: Server, teacher_folder: Path, text: Path) -> None:
    """As top-k records of the same model do, up to one step of a log-probability."""
    opened = open_teacher(make_recipe(server, teacher_folder, text), "fp32")
    assert isinstance(opened, EndpointTeacher)
    tokens_BT = torch.randint(0, 256, (2, 16))
    with torch.no_grad():
        theirs = TopK(k=4, vocab_size=opened.form.vocab_size).encode(
            server.model(tokens_BT).flatten(0, 1), torch.zeros(32).numpy()
        )
    ours = opened.records(tokens_BT).reshape(-1)
    assert (ours["ids"] == theirs["ids"]).all()
    assert abs(ours["logs"].astype(int) - theirs["logs"].astype(int)).max() <= 1


def test_a_student_learns_from_it_with_and_without_a_cache_alike(
    server: Server, teacher_folder: Path, text: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(server, teacher_folder, text)
    online = load_model(fit(recipe, tmp_path / "online", console=QUIET)).model
    kept = make_recipe(server, teacher_folder, text, f"distill.cache={tmp_path / 'cache'}")
    cached = load_model(fit(kept, tmp_path / "cached", console=QUIET)).model
    for ours, theirs in zip(cached.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    server.asked = 0
    fit(kept, tmp_path / "again", console=QUIET)
    assert server.asked == 0, "once a cache is whole, its server need not run"


def test_one_that_stops_answering_is_told_in_a_line_and_nothing_is_lost(
    server: Server, teacher_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.distill.cache.SHARD_TOKENS", 8 * 16)
    recipe = make_recipe(server, teacher_folder, text, f"distill.cache={tmp_path / 'cache'}")
    data = TextData(recipe).prepare()
    server.left = 6
    with pytest.raises(NestlingError, match=rf"{server.url}: does not answer .*what was made stays"):
        prepare(recipe, data)
    made = sorted((tmp_path / "cache").glob("*.bin"))
    assert made
    server.left, server.asked = 10**9, 0
    prepare(recipe, data)
    assert len(sorted((tmp_path / "cache").glob("*.bin"))) > len(made)
    assert server.asked < -(-len(data.train_rows) // 4) + 1, "what was there is not asked again"


def prepare(recipe: Recipe, data: TextData) -> None:
    opened = open_teacher(recipe, "fp32")
    assert isinstance(opened, CachedTeacher)
    opened.prepare(data, None)


def without_logprobs(answer: Any) -> Any:
    return {"choices": [{"index": 0, "text": "hello"}]}


def fewer(answer: Any) -> Any:
    for choice in answer["choices"]:
        told = choice["logprobs"]["top_logprobs"]
        choice["logprobs"]["top_logprobs"] = [one and dict([*one.items()][:2]) for one in told]
    return answer


def without_echo(answer: Any) -> Any:
    for choice in answer["choices"]:
        choice["logprobs"]["top_logprobs"] = choice["logprobs"]["top_logprobs"][-1:]
    return answer


def of(**changes: Any) -> Served:
    """Return a spoiler that puts other values into the logprobs of each row."""

    def spoil(answer: Any) -> Any:
        for choice in answer["choices"]:
            choice["logprobs"] |= changes
        return answer

    return spoil


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (of(top_logprobs=None), r"answers without choices\[\]\.logprobs"),
        (of(top_logprobs=[["a", -1.0]] * 17), "tells 0 tokens of a position"),
        (of(top_logprobs=[{f"token_id:{n}": None for n in range(4)}] * 17), "tells 0 tokens of a position"),
        (of(top_logprobs=[{f"token_id:{n}": 0.25 for n in range(4)}] * 17), "tells 0 tokens of a position"),
        (of(tokens=["token_id:7"] * 17), "was asked about tokens 0, 0, 0, 0, ... and tells of 7, 7, 7"),
        (without_logprobs, r"answers without choices\[\]\.logprobs"),
        (lambda _: [], "answers without choices"),
        (lambda _: {"code": 400, "error": {"message": "too long"}}, "refuses .400 .*too long"),
        (lambda _: {"code": 500}, "does not answer .500"),
        (fewer, "tells 2 tokens of a position, distill.k=4; set that to 2"),
        (without_echo, "tells of 1 of 17 positions"),
    ],
)
def test_an_answer_of_another_shape_is_told_in_a_line(
    server: Server, teacher_folder: Path, text: Path, spoil: Served, named: str
) -> None:
    opened = open_teacher(make_recipe(server, teacher_folder, text), "fp32")
    assert isinstance(opened, EndpointTeacher)
    server.spoil = spoil
    with pytest.raises(NestlingError, match=rf"loss\.teacher={server.url}: {named}"):
        opened.records(torch.zeros(1, 16, dtype=torch.int64))


def test_a_server_that_lists_no_models_as_it_should_serves_nothing(
    server: Server, teacher_folder: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[Any] = [{"data": None}, {"data": ["tiny"]}, []]
    for answer in answers:
        monkeypatch.setattr(Endpoint, "ask", lambda *_, answer=answer: answer)
        with pytest.raises(UsageError, match=r"serves nothing; set distill\.model"):
            open_teacher(make_recipe(server, teacher_folder, text), "fp32")


def test_an_error_that_breaks_off_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hangs(BytesIO):
        def read(self, *_: Any) -> bytes:
            raise TimeoutError("timed out")

        read1 = read

    def fail(request: Any, timeout: float) -> Any:
        raise HTTPError(request.full_url, 500, "Internal Server Error", Message(), Hangs())

    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setattr("urllib.request.urlopen", fail)
    with pytest.raises(NestlingError, match=r"does not answer .500 Internal Server Error"):
        Endpoint("http://nowhere", 5.0).ask("models")


def test_an_answer_that_drips_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Drips(BytesIO):
        def read1(self, *_: Any) -> bytes:
            return b" "

    seconds = itertools.count()
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Drips())
    monkeypatch.setattr("time.monotonic", lambda: float(next(seconds)))
    with pytest.raises(
        NestlingError, match=r"does not answer .its answer takes longer than distill\.timeout"
    ):
        Endpoint("http://nowhere", 5.0).ask("models")
    assert next(seconds) == module.TRIES * 7, "the start and six parts of each try"


def test_tokens_may_be_told_as_texts(server: Server, teacher_folder: Path, text: Path) -> None:
    opened = open_teacher(make_recipe(server, teacher_folder, text), "fp32")
    assert isinstance(opened, EndpointTeacher)
    tokenizer = server.tokenizer
    letters = {letter: tokenizer.encode(letter).ids[0] for letter in "abcd"}
    told: list[Any] = [None, {letter: -float(number + 1) for number, letter in enumerate(letters)}]
    server.spoil = lambda _: {"choices": [{"index": 0, "logprobs": {"tokens": [], "top_logprobs": told}}]}
    records = opened.records(torch.zeros(1, 1, dtype=torch.int64))
    assert records["ids"][0, 0].tolist() == [*letters.values()]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["data.tokenizer=bpe"], "set data.tokenizer to that of its model"),
        (["distill.form=all"], "tells its most likely tokens alone"),
        (["loss.temperature=2"], "tells its probabilities at 1"),
        (["distill.model=huge"], "serves tiny; set distill.model"),
    ],
)
def test_what_it_cannot_do_is_refused(
    server: Server, teacher_folder: Path, text: Path, words: list[str], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        open_teacher(make_recipe(server, teacher_folder, text, *words), "fp32")


def test_another_tokenizer_is_refused(server: Server, teacher_folder: Path, text: Path) -> None:
    server.spoil = lambda answer: {
        "choices": [{**answer["choices"][0], "logprobs": {"tokens": ["token_id:5"] * 9, "top_logprobs": []}}]
    }
    with pytest.raises(UsageError, match=r"cuts a text into other tokens than data\.tokenizer"):
        open_teacher(make_recipe(server, teacher_folder, text), "fp32")


def test_a_server_that_is_not_there_is_told_by_the_command(
    teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.chdir(tmp_path)
    words = ["distill", "http://127.0.0.1:9/v1", f"data.tokenizer={teacher_folder}", "--out", "run"]
    assert main(words) == 1
    assert "loss.teacher=http://127.0.0.1:9/v1: does not answer" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_url_that_cannot_be_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.0)
    for url in ("http://[::1/v1", "http://"):
        with pytest.raises(NestlingError, match="does not answer"):
            Endpoint(url, 1.0).ask("models")


def test_an_endpoint_sends_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def refuse(request: Any, timeout: float) -> Any:
        seen.append((request.get_header("Authorization"), timeout))
        raise OSError("no")

    monkeypatch.setenv("OPENAI_API_KEY", "k\r\n")
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(NestlingError):
        Endpoint("http://nowhere", 5.0).ask("models")
    assert seen == [("Bearer k", 5.0)] * 3
    monkeypatch.setenv("OPENAI_API_KEY", "sec\nret")
    with pytest.raises(NestlingError, match="OPENAI_API_KEY has characters") as error:
        Endpoint("http://nowhere", 5.0).ask("models")
    assert "ret" not in str(error.value)
