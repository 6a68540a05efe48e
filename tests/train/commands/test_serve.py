"""`nestling serve` on the command line: what it refuses before it opens a model, and how it stops."""

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

RUN = "import sys; from nestling import main; sys.exit(main())"


def test_nothing_listens_beyond_loopback_without_tls_and_token(
    tmp_path: Path, fails: Callable[..., str]
) -> None:
    token = tmp_path / "token"
    token.write_text("a" * 32)
    for flags in ([], ["--token-file", token]):
        line = fails("serve", tmp_path, "--host", "0.0.0.0", *flags, code=2)
        assert "--host 0.0.0.0" in line
        assert "--cert" in line
        assert "--insecure" in line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--cert", "FILE"], "--key"),
        (["--token-file", "FILE"], "--token-file"),
        (["--token-file", "none"], "--token-file"),
        (["--port", "-1"], "--port"),
        (["--batch", "0"], "--batch"),
        (["--queue", "-1"], "--queue"),
        (["--kv-memory", "0"], "--kv-memory"),
        (["--gamma", "x"], "--gamma"),
        (["--name", ""], "--name"),
    ],
)
def test_a_wrong_flag_is_named_before_the_model_is_opened(
    flags: list[str], named: str, tmp_path: Path, fails: Callable[..., str]
) -> None:
    file = tmp_path / "short"
    file.write_text("short")
    assert named in fails(
        "serve", tmp_path, *(str(file) if flag == "FILE" else flag for flag in flags), code=2
    )


def test_a_port_that_is_taken_is_told(tmp_path: Path, fails: Callable[..., str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"--port {port}" in fails("serve", tmp_path, "--port", port, code=1)


@pytest.mark.slow  # starts Python once more
def test_a_sigterm_lets_texts_finish_and_ends_with_0(
    byte_level_family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTLING_NATIVE", "0")  # to compile takes longer than all the rest
    words = ["serve", str(byte_level_family), "--port", "0", "--draft", "none", "--name", "tiny"]
    command = [sys.executable, "-c", RUN, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://127.0.0.1:\d+", process.stdout.readline())
        assert found is not None
        body = {"model": "tiny", "prompt": "def ", "max_tokens": 200, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{found[0]}/v1/completions", json=body, timeout=300) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            *_, last = (line for line in lines if line)
        assert last == "data: [DONE]"
        assert process.wait(300) == 0
        assert process.stderr is not None
        assert process.stderr.read().strip() == "all texts are finished; stopped"
