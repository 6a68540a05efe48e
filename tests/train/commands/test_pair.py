"""`nestling extract --pair`: two folders that transformers runs together, and what is said of them."""

import contextlib
import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.bench.llama import is_installed
from models.checkpoint.launch import launch_lines
from models.decode.sampling.params import SamplingParams
from models.measure.pairing import PairCosts
from train.cli import main

Fails = Callable[..., str]


@pytest.fixture
def extract_pair(model: Path, text: Path, tmp_path: Path) -> Callable[..., Path]:
    def run(*flags: str) -> Path:
        out = tmp_path / "pair"
        command = ["extract", str(model), "--data", str(text), "--out", str(out), *flags]
        assert main(command) == 0
        return out

    return run


@pytest.mark.parametrize("pair", ["D:XL", "ffn=1:0.5,layers=0:1:full"])
def test_the_line_for_transformers_writes_what_the_target_writes(
    pair: str, extract_pair: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = extract_pair("--pair", pair)
    said = " ".join(capsys.readouterr().out.split())
    assert "tokens a round" in said or "no draft on this machine" in said
    fields = json.loads((out / "pair.json").read_text())
    settings = json.loads((out / "draft" / "generation_config.json").read_text())
    engine = fields["engines"]["transformers"]
    assert settings["num_assistant_tokens"] == engine["num_tokens"]
    assert settings["num_assistant_tokens_schedule"] == "constant"
    python, flag, code = shlex.split(engine["command"])
    assert (python, flag) == ("python", "-c")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    target: Any = AutoModelForCausalLM.from_pretrained(out / "target")
    tokenizer: Any = AutoTokenizer.from_pretrained(out / "target")
    asked = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
    plain = tokenizer.decode(target.generate(**asked, max_new_tokens=64, do_sample=False)[0])
    assert printed.getvalue() == plain + "\n"


def test_it_says_how_the_two_run_together(extract_pair: Callable[..., Path]) -> None:
    out = extract_pair("--pair", "D:XL")
    fields = json.loads((out / "pair.json").read_text())
    assert {"vllm", "sglang", "transformers", "mlx"} == fields["engines"].keys()
    assert "probabilistic" in fields["engines"]["vllm"]["command"]
    assert "STANDALONE" in fields["engines"]["sglang"]["command"]
    assert {*fields["alpha"]} == {"greedy", "sampled", "sample_and_match"}
    assert all(0 <= value <= 1 for value in fields["alpha"].values())
    assert fields["c"] > 0
    assert len(fields["draft"]["sha256"]) == 64
    assert "hardware" in fields["card"]


def test_unequal_layers_are_told_to_engines_that_need_it() -> None:
    lines = launch_lines(
        Path("t"), Path("d"), dict.fromkeys(("vllm", "sglang", "transformers", "mlx"), 3), ragged=True
    )
    assert "--trust-remote-code" in str(lines["vllm"].command)
    assert "trust_remote_code=True" in str(lines["transformers"].command)
    assert lines["mlx"].command is None
    assert lines["sglang"].command is None
    plain = launch_lines(Path("a b"), Path('d"'), dict.fromkeys(("vllm", "sglang", "transformers", "mlx"), 3))
    for line in plain.values():
        assert line.command is not None
        assert "a b" in " ".join(shlex.split(line.command))
    words = shlex.split(str(plain["vllm"].command))
    assert json.loads(words[-1])["model"] == 'd"'


def test_a_draft_that_costs_as_much_as_the_target_never_pays() -> None:
    costs = PairCosts(c=1.0, v={1: 1.0, 2: 1.5, 3: 2.0})
    assert costs.best(0.9)[1] < 1
    assert costs.break_even() is None
    cheap = PairCosts(c=0.1, v={1: 1.0, 2: 1.0, 3: 1.0})
    threshold = cheap.break_even()
    assert threshold is not None
    assert cheap.best(threshold)[1] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--pair", "XL:D"], "a draft is smaller, write D:XL"),
        (["--pair", "D:D"], "a draft is smaller, name a smaller draft"),
        (["--pair", "D"], "names one member"),
        (["--pair", "D:Q"], "'Q'"),
        (["--pair", "D:XL", "--granularity", "S"], "exclude each other"),
        (
            ["--pair", "heads=0.5:1:1:XL", "--for", "sglang"],
            "does not hold the unequal layers of heads",
        ),
        (
            ["--pair", "D:XL", "--latency-table", "t.json"],
            "--latency-table t.json counts in --budget",
        ),
    ],
)
def test_what_is_no_pair_is_named(
    flags: list[str], named: str, model: Path, text: Path, tmp_path: Path, fails: Fails
) -> None:
    out = tmp_path / "out"
    assert named in fails("extract", model, "--data", text, "--out", out, *flags, code=2)
    assert not out.exists()


def test_a_pair_needs_a_text_and_a_place(model: Path, text: Path, tmp_path: Path, fails: Fails) -> None:
    assert "--data is missing" in fails("extract", model, "--pair", "D:XL", "--out", tmp_path / "o", code=2)
    (tmp_path / "thesis.tex").write_text("years of work")
    command = ("extract", model, "--pair", "D:XL", "--data", text, "--out", tmp_path)
    assert "not ours to replace" in fails(*command, code=2)
    assert "not ours to replace" in fails(*command, "--force", code=2)


def test_an_extraction_is_replaced_with_force_only(model: Path, tmp_path: Path, fails: Fails) -> None:
    out = tmp_path / "S"
    command = ("extract", model, "--granularity", "S", "--out", out)
    assert main([*map(str, command)]) == 0
    assert "exists; add --force" in fails(*command, code=2)
    assert main([*map(str, command), "--force"]) == 0


@pytest.mark.skipif(not is_installed(), reason="needs the extra `llama`")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_llama_cpp_runs_the_pair_of_files(extract_pair: Callable[..., Path]) -> None:
    from models.bench.llama import LlamaEngine, Llamas

    out = extract_pair("--pair", "D:XL", "--format", "gguf")
    fields = json.loads((out / "pair.json").read_text())
    assert "--spec-type draft-simple" in fields["engines"]["llama.cpp"]["command"]
    tokens = [3, 60, 21, 21, 5]
    drafted, plain = (
        LlamaEngine(llamas=Llamas(out / "target.gguf", 40, draft), params=SamplingParams(temperature=0.0))
        for draft in (out / "draft.gguf", None)
    )
    ids = drafted.decode(tokens, max_new_tokens=12, seed=0).ids
    assert ids == plain.decode(tokens, max_new_tokens=12, seed=0).ids
