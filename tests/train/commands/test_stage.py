"""`nestling stage` and `nestling generate --stages` on the command line."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from models.decode.decoder import open_decoder
from train.cli import main


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--spares", "127.0.0.1:1"], "--spares has an effect with --stages only"),
        (["--timeout", "1"], "--timeout has an effect with --remote or --stages only"),
        (["--stages", "127.0.0.1:1", "--timeout", "0"], "--timeout must be above 0"),
        (["--stages", "127.0.0.1:1", "--draft", "S"], "--draft has no effect with --stages"),
        (["--stages", "127.0.0.1:1", "--window", "2"], "--window has an effect with --remote only"),
        (["--stages", "127.0.0.1:1", "--remote", "ws://127.0.0.1:1"], "two ways to decode elsewhere"),
        (["--stages", "127.0.0.1:1,,"], "is no address"),
        (["--stages", "stage.example:1", "--spares", "ws://stage.example:1"], "is not encrypted"),
    ],
)
def test_flags_that_do_not_go_together_are_told_before_any_work(
    flags: list[str], named: str, fails: Callable[..., str]
) -> None:
    assert named in fails("generate", "some/model", "--prompt", "a", *flags, code=2)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--layers", "1:3"], "--layers 1:3 are no consecutive layers"),
        (["--layers", "0", "--kv-memory", "0"], "--kv-memory must be at least 1"),
        (["--layers", "0", "--host", "0.0.0.0"], "can be reached from other machines"),
        (["--layers", "0", "--token-file", "none"], "--token-file none does not exist"),
        (["--layers", "0", "--port", "0"], "some/model does not exist"),
    ],
)
def test_a_stage_that_cannot_be_is_told(flags: list[str], named: str, fails: Callable[..., str]) -> None:
    assert named in fails("stage", "some/model", *flags, code=2)


def test_a_text_goes_through_a_stage_of_another_process(
    byte_level_family: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    words = [sys.executable, "-c", "import sys, nestling; sys.exit(nestling.main())", "stage"]
    words += [str(byte_level_family), "--layers", "0-3", "--port", "0", "--dtype", "fp32"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"layers 0-3 of 4, fp32, at (\S+)\n", line)
            assert found, (line, process.stderr and process.stderr.read())
            results = tmp_path / "results.json"
            flags = ["--stages", found[1], "--prompt", "a", "--max-new-tokens", "9", "--json", str(results)]
            flags += ["--timeout", "120"]  # a busy machine may need some
            assert main(["generate", str(byte_level_family), *flags]) == 0
            error = fails("generate", str(byte_level_family), *flags, "--dtype", "bf16", code=1)
            assert "dtype: MODEL has bf16, the stage fp32; give --dtype fp32" in error
        finally:
            process.terminate()
            process.communicate()
    assert process.returncode == 0
    fields = json.loads(results.read_text())
    right = open_decoder(byte_level_family, draft="none", dtype="fp32").generate("a", max_new_tokens=9)
    assert fields["ids"] == right.ids
    assert fields["verifier"] == "coupled"
