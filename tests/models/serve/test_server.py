"""The server says what `nestling generate` says, to however many clients at the same time."""

import json
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import openai
import pytest

from models.decode.decoder import Decoder, open_decoder
from models.decode.engine.request import new_request
from models.decode.sampling.params import SamplingParams
from models.decode.text import encode_prompt

Served = Any
"""What the fixture of conftest.py gives."""
Start = Callable[..., "AbstractContextManager[Served]"]
Passes = Any
Wait = Callable[[Callable[[], object]], None]
PATIENCE = 120
"""Seconds that a busy machine may need."""
PROMPTS = [f"{number} bottles of {'beer ' * (number % 7)}on the wall, " for number in range(200)]
SAMPLED: dict[str, Any] = {
    "temperature": 0.9,
    "top_p": 0.95,
    "top_k": 50,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
}


@pytest.mark.parametrize("num_clients", [1, 4, 16])
@pytest.mark.parametrize("num_prompts", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_greedy_text_is_that_of_generate_for_any_number_of_clients(
    num_clients: int, num_prompts: int, served: Served, decoder: Decoder
) -> None:
    prompts = PROMPTS[:num_prompts]
    with ThreadPoolExecutor(num_clients) as clients:
        theirs = list(clients.map(lambda prompt: served.text(prompt, max_tokens=24), prompts))
    assert theirs == [decoder.generate(prompt, max_new_tokens=24).text for prompt in prompts]


def test_sampled_text_with_a_seed_is_that_of_generate_with_coupled_noise(
    served: Served, folder: Path
) -> None:
    alone = open_decoder(folder, verifier="coupled", dtype="fp32", params=SamplingParams(**SAMPLED))

    def ask(seed: int) -> str:
        return str(served.text(PROMPTS[seed], max_tokens=24, seed=seed, **SAMPLED))

    with ThreadPoolExecutor(16) as clients:
        theirs = list(clients.map(ask, range(16)))
    ours = [alone.generate(PROMPTS[seed], max_new_tokens=24, seed=seed).text for seed in range(16)]
    assert theirs == ours


def test_members_are_models(served: Served, folder: Path) -> None:
    names = [model.id for model in served.openai.models.list()]
    assert names == ["tiny", "tiny:S", "tiny:D", "tiny:XL"]
    full, small, same = (served.text("once", model=name, max_tokens=16) for name in ("tiny", *names[1::2]))
    assert full == same != small


def test_the_official_client_streams_what_it_gets_at_once(served: Served) -> None:
    asked = {"model": "tiny", "prompt": "once", "max_tokens": 40, "seed": 7, "logprobs": 2}
    whole = served.openai.completions.create(**asked)
    *chunks, last = served.openai.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    choices = [chunk.choices[0] for chunk in chunks]
    assert "".join(choice.text for choice in choices) == whole.choices[0].text
    assert choices[-1].finish_reason == whole.choices[0].finish_reason == "length"
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.tokens or []]
    assert tokens == (whole.choices[0].logprobs and whole.choices[0].logprobs.tokens)
    assert last.usage is not None
    assert last.usage.completion_tokens == 40
    assert 1 <= last.usage.model_extra["tau"] <= 9


def test_the_official_client_chats_by_the_template(served: Served, decoder: Decoder) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    answer = served.openai.chat.completions.create(
        model="tiny", messages=messages, max_tokens=20, temperature=0, logprobs=True, top_logprobs=3
    )
    ours = decoder.generate(decoder.encode_chat(messages), max_new_tokens=20).text
    assert answer.choices[0].message.content == ours
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert len(content) == 20
    assert all(one.logprob == one.top_logprobs[0].logprob for one in content), "greedy takes the likeliest"
    stream = served.openai.chat.completions.create(
        model="tiny", messages=messages, max_tokens=20, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == ours


def test_choices_differ_and_the_first_is_that_of_one_alone(served: Served) -> None:
    one = served.complete(prompt="once", max_tokens=20, temperature=1, seed=3).json()
    four = served.complete(prompt="once", max_tokens=20, temperature=1, seed=3, n=4).json()
    texts = [choice["text"] for choice in four["choices"]]
    assert len(set(texts)) == 4
    assert texts[0] == one["choices"][0]["text"]
    assert four["usage"]["prompt_tokens"] == 4
    assert four["usage"]["completion_tokens"] == 80


def test_a_stop_text_ends_the_output_before_it(served: Served, decoder: Decoder) -> None:
    text = decoder.generate("stop", max_new_tokens=60).text
    stop = text[10:13]
    response = served.complete(prompt="stop", max_tokens=60, stop=["never there", stop]).json()
    assert response["choices"][0]["text"] == text[: text.index(stop)]
    assert response["choices"][0]["finish_reason"] == "stop"


def test_an_echo_scores_the_prompt_as_evaluation_harnesses_ask(served: Served, decoder: Decoder) -> None:
    import torch

    ids = decoder.tokenizer.encode("a prompt that is scored").ids
    response = served.complete(prompt=[ids, ids[:5]], max_tokens=1, logprobs=1, echo=True).json()
    first, second = (choice["logprobs"] for choice in response["choices"])
    with torch.inference_mode():
        logits_TV = decoder.folder.model(torch.tensor([ids]))[0]
    expected = logits_TV.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist()
    assert first["token_logprobs"][0] is None
    assert first["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-4)
    assert second["token_logprobs"][:5] == pytest.approx(first["token_logprobs"][:5], abs=1e-6)
    assert len(first["tokens"]) == len(first["top_logprobs"]) == len(first["text_offset"]) == len(ids) + 1


def test_a_prefix_that_two_prompts_share_is_read_once(decoder: Decoder, start: Start) -> None:
    system = "You are a very helpful assistant that answers in verse. "
    with start(decoder) as served:
        first = served.complete(prompt=system + "One?", max_tokens=8).json()
        second = served.complete(prompt=system + "Two?", max_tokens=8).json()
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == len(system)
        assert second["choices"][0]["text"] == decoder.generate(system + "Two?", max_new_tokens=8).text
        with ThreadPoolExecutor(8) as clients:  # eight at the same time: one of them reads it
            list(clients.map(lambda _: served.text("x" + system, max_tokens=4), range(8)))
        assert served.server.metrics.shared_tokens == len(system) * 8


def test_what_prompts_of_a_request_share_with_others_is_counted_for_each(
    decoder: Decoder, start: Start
) -> None:
    with start(decoder) as served:
        served.complete(prompt="a text that comes first", max_tokens=4)
        prompts = ["a text that comes first" + more for more in (" one", " two", " three")]
        usage = served.complete(prompt=prompts, max_tokens=4).json()["usage"]
        shared = served.server.metrics.shared_tokens
        assert usage["prompt_tokens_details"]["cached_tokens"] == shared > len(prompts[0])


def test_equal_prompts_of_a_request_are_drawn_apart(served: Served) -> None:
    answer = served.complete(prompt=["a text"] * 4, max_tokens=16, temperature=2.0, ignore_eos=True).json()
    assert len({choice["text"] for choice in answer["choices"]}) > 1
    seeded = served.complete(prompt=["a text"] * 2, max_tokens=16, temperature=2.0, seed=3).json()
    assert len({choice["text"] for choice in seeded["choices"]}) == 1


def test_more_texts_than_an_idle_server_takes_are_refused_for_good(decoder: Decoder, start: Start) -> None:
    with start(decoder, batch=1, queue=1) as served:
        refused = served.complete(prompt=["a"] * 3, max_tokens=2)
        assert refused.status_code == 400
        assert "3 texts are asked for (prompts x n), and 2 are the most" in refused.json()["error"]["message"]


def test_a_full_queue_is_told_with_the_time_to_come_back(
    decoder: Decoder, start: Start, passes: Passes, wait_until: Wait
) -> None:
    with start(decoder, batch=1, queue=1) as served:
        responses = [
            served.openai.completions.with_streaming_response.create(
                model="tiny", prompt="a", max_tokens=250, extra_body={"ignore_eos": True}, stream=True
            ).__enter__()
            for _ in range(2)
        ]
        refused = served.complete(prompt="b")
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        for response in responses:
            response.close()
        passes.let_all()
        wait_until(lambda: is_idle(served))
        assert served.text("b", max_tokens=4)


def test_a_full_queue_is_full_while_a_text_begins_too(
    decoder: Decoder, start: Start, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
) -> None:
    begins, may = threading.Event(), threading.Event()

    def held(*arguments: Any, **named: Any) -> Any:
        begins.set()
        assert may.wait(PATIENCE)
        return new_request(*arguments, **named)

    monkeypatch.setattr("models.serve.worker.new_request", held)
    with start(decoder, batch=1, queue=1) as served, ThreadPoolExecutor(2) as clients:
        first = clients.submit(served.text, "a", max_tokens=2)
        assert begins.wait(PATIENCE)
        second = clients.submit(served.text, "b", max_tokens=2)
        wait_until(lambda: len(served.server.worker._queue) == 1)
        assert served.complete(prompt="c").status_code == 429
        may.set()
        assert first.result()
        assert second.result()


def is_idle(served: Served) -> bool:
    """Return whether nothing is written or waits."""
    return not served.server.metrics.running and not served.server.metrics.queued


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_written_no_further(
    stream: bool, decoder: Decoder, start: Start, passes: Passes, wait_until: Wait
) -> None:
    with start(decoder) as served:
        worker, metrics = served.server.worker, served.server.metrics
        body = {"model": "tiny", "prompt": "a", "max_tokens": 250, "ignore_eos": True, "n": 16}
        request = served.http.build_request("POST", "/v1/completions", json={**body, "stream": stream})
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            lines = [f"{name}: {value}" for name, value in request.headers.items()]
            head = "\r\n".join(["POST /v1/completions HTTP/1.1", *lines, "", ""])
            connection.sendall(head.encode() + request.content)
            wait_until(lambda: metrics.running)
            passes.let(3)
            wait_until(lambda: metrics.tokens)
            assert connection.recv(12) == b"HTTP/1.1 200" if stream else True
        wait_until(lambda: worker._cancelled or metrics.cancelled)
        passes.let_all()
        wait_until(lambda: is_idle(served))
        assert metrics.tokens < 16 * 250
        assert metrics.cancelled == 16, "those that waited, too"
        assert served.text("b", max_tokens=4)


def test_a_text_without_room_in_the_memory_of_keys_and_values_waits_or_is_refused(
    decoder: Decoder, start: Start
) -> None:
    with start(decoder, kv_bytes=100 * 4 * 2 * 2 * 8 * 4) as served:  # a hundred tokens
        with ThreadPoolExecutor(4) as clients:
            texts = list(clients.map(lambda _: served.text("abc", max_tokens=60), range(4)))
        assert len(set(texts)) == 1
        refused = served.complete(prompt="abc", max_tokens=200)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "max_tokens"


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"prompt": "a", "model": "huge"}, 404, "model"),
        ({"prompt": "a" * 300}, 400, "prompt"),
        ({"prompt": 3}, 400, "prompt"),
        ({"prompt": [1, 10**9]}, 400, "prompt"),
        ({"prompt": "\ud800"}, 400, "prompt"),
        ({}, 400, "prompt"),
        ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens"),
        ({"prompt": "a", "max_tokens": "8"}, 400, "max_tokens"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature"),
        ({"prompt": "a", "temperature": 1e-300}, 400, "temperature"),
        ({"prompt": "a", "top_p": 0}, 400, "top_p"),
        ({"prompt": "a", "n": 10**6}, 400, "n"),
        ({"prompt": "a", "stop": [""]}, 400, "stop"),
        ({"prompt": "a", "frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"prompt": "a", "temprature": 0.5}, 400, "temprature"),
        ({"prompt": "a", "seed": 2**70}, 400, "seed"),
    ],
)
def test_a_bad_field_is_named_in_openais_shape(
    fields: dict[str, object], status: int, param: str, served: Served
) -> None:
    body = json.dumps({"model": "tiny", **fields}).encode()
    response = served.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == status
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_a_text_that_cannot_begin_is_told_so_and_others_go_on(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("models.serve.worker.new_request", fail)
        response = served.complete(prompt="a", max_tokens=2)
    assert (response.status_code, "MemoryError" in response.text) == (500, True)
    kept = response.extensions["network_stream"]
    again = served.complete(prompt="a", max_tokens=2)
    assert again.status_code == 200
    assert again.extensions["network_stream"] is kept, "the connection was closed"


def test_what_cannot_fit_is_refused_before_it_is_cut_into_tokens(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.serve.app._encode", lambda *_: pytest.fail("it was read"))
    monkeypatch.setattr("models.serve.app._encode_chat", lambda *_: pytest.fail("it was read"))
    long = "ab " * 200_000
    for fields in ({"prompt": long}, {"prompt": ["a", long]}):
        error = served.complete(**fields).json()["error"]
        assert error["param"] == "prompt"
        assert "600000 bytes, more than the context of 256 tokens holds" in error["message"]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": long}]
    response = served.http.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages"


def test_others_are_answered_while_a_long_prompt_is_read(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, answered = threading.Event(), threading.Event()

    def read(target: Any, tokenizer: Any, prompt: Any) -> list[int]:
        begun.set()
        assert answered.wait(PATIENCE), "nobody was answered meanwhile"
        return encode_prompt(target, tokenizer, prompt)

    monkeypatch.setattr("models.serve.app.encode_prompt", read)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(served.complete, prompt="ab", max_tokens=1)
        assert begun.wait(PATIENCE)
        for _ in range(3):
            assert served.http.get("/health").status_code == 200
        answered.set()
        assert long.result().status_code == 200


def test_the_official_client_raises_its_own_errors(served: Served) -> None:
    with pytest.raises(openai.NotFoundError):
        served.openai.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="begins with its user"):
        served.openai.chat.completions.create(model="tiny", messages=[{"role": "assistant", "content": "a"}])


def test_health_metrics_and_the_page(served: Served) -> None:
    served.text("a", max_tokens=4)
    assert served.http.get("/health").json() == {"status": "ok"}
    lines = served.http.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(values["nestling_tokens_total"]) >= 4
    assert float(values["nestling_time_to_first_token_seconds_count"]) >= 1
    page = served.http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "http" not in page.text.replace("http-equiv", ""), "the page asks no network for anything"


def test_texts_that_were_begun_are_finished_when_the_server_stops(
    decoder: Decoder, start: Start, passes: Passes, wait_until: Wait
) -> None:
    done = list[str]()
    with start(decoder) as served:

        def ask() -> None:
            done.append(served.text("drain", max_tokens=200, ignore_eos=True))

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: served.server.metrics.running)
        (listener,) = served.server.servers
        served.server.should_exit = True
        wait_until(lambda: not listener.is_serving())
        passes.let_all()
        thread.join(PATIENCE)
    assert done == [decoder.generate("drain", max_new_tokens=200, eos_token_id=()).text]
