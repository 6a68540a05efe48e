"""`nestling generate`: text as it comes, the same whatever drafts; mistakes in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.base.errors import NestlingError
from models.checkpoint.folder import load_model, save_model
from models.decode.decoder import Decoder
from models.elastic.config import ElasticConfig
from models.elastic.model import ElasticLM
from models.kernels.build import library
from train.cli import main

PROMPT = "def main(arguments):\n"
Fails = Callable[..., str]


@pytest.fixture
def generate(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[dict[str, Any], str, str]]:
    """Runs the command in fp32; gives what it wrote to JSON, stdout and stderr."""

    def run(*arguments: object) -> tuple[dict[str, Any], str, str]:
        results = tmp_path / "generate.json"
        words = ["generate", model, "--prompt", PROMPT, "--dtype", "fp32", "--json", results, *arguments]
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0
        written = capsys.readouterr()
        return json.loads(results.read_text()), written.out, written.err

    return run


def other_model(like: Path, out: Path, *, vocab_size: int = 0, layers: int = 3) -> Path:
    """A model folder with random weights; with the same tokenizer if it has the same vocabulary."""
    folder = load_model(like)
    ours = folder.model.config
    config = ElasticConfig(
        vocab_size=vocab_size or ours.vocab_size,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = ElasticLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return save_model(out, model, tokenizer=None if vocab_size else folder.tokenizer)


def test_one_token_alone_has_a_report(generate: Any) -> None:
    for draft in ("auto", "D", "none"):
        results, _, _ = generate("--draft", draft, "--max-new-tokens", "1")
        assert len(results["ids"]) == 1


def test_the_text_is_shown_and_the_figures_follow_on_stderr(generate: Any) -> None:
    results, out, err = generate("--draft", "D", "--gamma", "3", "--max-new-tokens", "20")
    assert out == results["text"] + "\n"
    assert len(results["ids"]) <= 20
    assert "\x1b" not in out + err
    for figure in ("tokens/s", "tau", "alpha", "draft D, gamma 3", "fp32"):
        assert figure in err
    assert results.keys() >= {"text", "ids", "tokens_per_second", "tau", "alpha", "card", "prompt", "dtype"}
    assert results["card"]["dtypes"] == {"model": "fp32"}


def test_greedy_ids_do_not_depend_on_the_draft(generate: Any, model: Path, tmp_path: Path) -> None:
    stranger = other_model(model, tmp_path / "stranger", layers=1)
    plain, _, err = generate("--draft", "none", "--max-new-tokens", "30")
    assert "draft none ·" in err
    assert plain["tau"] == 1.0
    assert "draft D, gamma 0 ·" in generate("--draft", "D", "--gamma", "0", "--max-new-tokens", "2")[2]
    for draft in ("S", "D", "auto", "lookup", "full", "ffn=0.5,layers=0:2", stranger):
        drafted, _, _ = generate("--draft", draft, "--max-new-tokens", "30")
        assert drafted["ids"] == plain["ids"], draft
        assert drafted["gamma"] == "auto"


def test_gamma_follows_the_clock_only_where_the_text_does_not_depend_on_it(generate: Any) -> None:
    def gamma(*flags: str) -> object:
        return generate("--max-new-tokens", "8", *flags)[0]["gamma"]

    warm = ("--temperature", "1")
    assert gamma("--draft", "D") == "auto"
    assert gamma("--draft", "D", *warm, "--verifier", "coupled") == "auto"
    assert gamma("--draft", "D", *warm) == 4
    assert gamma("--draft", "D", *warm, "--gamma", "auto") == "auto"
    assert gamma("--draft", "auto", *warm) == "auto"
    assert gamma("--draft", "lookup", "--gamma", "3") == 3
    assert gamma("--draft", "none", "--gamma", "auto") == 0


def test_the_report_tells_what_a_request_cost(generate: Any) -> None:
    results, _, err = generate("--draft", "S@int8", "--max-new-tokens", "40")
    assert results["plain_seconds"] > 0
    assert results["v"]["1"] == 1.0
    assert results["c"]["S@int8"] > 0
    assert results["speedup"] > 0
    assert results["predicted_speedup"] > 0
    assert results["kv_bytes"] > 0
    assert results["draft_extra_bytes"] > 0
    assert (results["dtype"], results["draft_dtype"]) == ("fp32", "int8")
    assert {row["draft"] for row in results["choices"]} == {"S@int8", "none"}
    assert "x plain" in err
    assert "draft S@int8" in err


def test_copying_joins_the_best_draft(generate: Any) -> None:
    _, _, err = generate("--draft", "auto", "--max-new-tokens", "8")
    assert "or lookup, gamma auto" in err
    _, _, err = generate("--draft", "auto", "--max-new-tokens", "8", "--gamma", "2")
    assert "lookup" not in err


def test_the_best_draft_is_chosen_only_for_greedy_text(generate: Any) -> None:
    greedy, _, _ = generate("--max-new-tokens", "4")
    sampled, _, _ = generate("--max-new-tokens", "4", "--temperature", "1")
    assert greedy["draft"] in {"S", "D", "none"}
    assert sampled["draft"] == "none"


def test_a_seed_gives_the_same_sample_again(generate: Any) -> None:
    flags = ["--temperature", "1", "--draft", "D", "--top-k", "50", "--top-p", "0.9"]
    first, again, other = (generate(*flags, "--seed", seed)[0]["ids"] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_coupled_text_does_not_depend_on_the_draft(generate: Any) -> None:
    flags = [
        "--verifier",
        "coupled",
        "--temperature",
        "0.9",
        "--min-p",
        "0.02",
        "--repetition-penalty",
        "1.2",
    ]
    plain, _, _ = generate(*flags, "--draft", "none")
    assert (plain["verifier"], plain["min_p"], plain["repetition_penalty"]) == ("coupled", 0.02, 1.2)
    drafted, _, _ = generate(*flags, "--draft", "D", "--gamma", "3")
    assert drafted["ids"] == plain["ids"]
    assert drafted["drafted"] > 0
    assert generate(*flags, "--draft", "none", "--seed", "1")[0]["ids"] != plain["ids"]


def test_a_penalty_changes_greedy_text(generate: Any) -> None:
    plain, _, _ = generate("--draft", "none", "--max-new-tokens", "30")
    penalised, _, _ = generate("--draft", "D", "--max-new-tokens", "30", "--repetition-penalty", "2")
    assert penalised["ids"] != plain["ids"]
    assert len(set(penalised["ids"])) > len(set(plain["ids"]))


def test_a_stop_string_ends_the_text_before_it(generate: Any) -> None:
    whole = generate("--draft", "none", "--max-new-tokens", "40")[0]["text"]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    results, out, _ = generate("--draft", "S", "--max-new-tokens", "40", "--stop", stop)
    assert results["text"] == whole[: whole.index(stop)]
    assert out == results["text"] + "\n"
    assert results["finish_reason"] == "stop"


def test_a_folder_without_measurements_decodes_plainly_and_says_why(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = other_model(model, tmp_path / "bare")
    assert main(["generate", str(bare), "--prompt", "x", "--max-new-tokens", "3"]) == 0
    assert "draft none (no member of this folder was ever measured)" in capsys.readouterr().err


@pytest.mark.skipif(library() is None, reason="needs a C compiler")
def test_a_large_folder_without_measurements_is_told_a_draft_that_needs_none(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.decode.tune.resolve.LARGE", 1)
    bare = other_model(model, tmp_path / "bare")
    words = ["generate", str(bare), "--prompt", "x", "--max-new-tokens", "3"]
    assert main(words) == 0
    assert "--draft full@q4_0" in capsys.readouterr().err
    assert main([*words, "--draft", "full@q4_0"]) == 0
    assert "draft full@q4_0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--draft", "Q"], "--draft Q"),
        (["--draft", "nowhere/model"], "--draft nowhere/model"),
        (["--draft", "layers=0:9"], "layer 9"),
        (["--temperature", "-1"], "--temperature"),
        (["--top-k", "-1"], "--top-k"),
        (["--top-p", "0"], "--top-p"),
        (["--min-p", "2"], "--min-p"),
        (["--repetition-penalty", "0"], "--repetition-penalty"),
        (["--verifier", "tree"], "--verifier"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--draft", "D", "--gamma", "-1"], "--gamma must be 0 or more, or auto, got -1"),
        (["--draft", "D", "--gamma", "many"], "--gamma 'many' is no number; give 0 or more, or auto"),
        (["--stop", ""], "--stop"),
        (["--dtype", "float8"], "float8"),
        (["--prompt", "word " * 200], "--prompt"),
        (["--prompt", "half a pair \ud800"], "--prompt"),
    ],
)
def test_a_value_that_cannot_be_is_named(
    flags: list[str], named: str, model: Path, tmp_path: Path, fails: Fails
) -> None:
    results = tmp_path / "results.json"
    line = fails("generate", model, "--prompt", "x", *flags, "--json", results, code=2)
    assert named in line
    assert not results.exists()


def test_a_draft_larger_than_its_target_is_refused(model: Path, tmp_path: Path, fails: Fails) -> None:
    larger = other_model(model, tmp_path / "larger", layers=12)
    line = fails("generate", model, "--prompt", "x", "--draft", larger, code=2)
    assert "--draft" in line
    assert "217,536" in line


def test_a_draft_of_another_vocabulary_is_refused(model: Path, tmp_path: Path, fails: Fails) -> None:
    other = other_model(model, tmp_path / "other", vocab_size=300, layers=1)
    assert "vocabulary" in fails("generate", model, "--prompt", "x", "--draft", other, code=2)
    same_size = other_model(model, tmp_path / "same", layers=1)
    path = same_size / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(tokenizer))
    assert "vocabulary" in fails("generate", model, "--prompt", "x", "--draft", same_size, code=2)


def test_a_model_without_a_tokenizer_is_named(model: Path, tmp_path: Path, fails: Fails) -> None:
    mute = other_model(model, tmp_path / "mute", vocab_size=300)
    assert "tokenizer.json" in fails("generate", mute, "--prompt", "x", code=1)


@pytest.mark.parametrize("draft", ["none", "D", "lookup"])
def test_a_text_of_a_later_batch_draws_its_own_random_numbers(
    generate: Any, model: Path, tmp_path: Path, draft: str
) -> None:
    file = write_prompts(tmp_path / "prompts.jsonl", *[PROMPT] * 5)
    sampled = ["--temperature", "1", "--draft", draft, "--gamma", "2", "--max-new-tokens", "12"]
    texts = []
    for batch_size in ("2", "5"):
        out = tmp_path / f"{batch_size}.json"
        words = ["generate", str(model), "--prompts", str(file), "--dtype", "fp32", "--json", str(out)]
        assert main([*words, *sampled, "--batch-size", batch_size]) == 0
        texts.append([tuple(row["ids"]) for row in json.loads(out.read_text())["results"]])
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 5
    assert list(texts[0][0]) == generate(*sampled)[0]["ids"]


@pytest.mark.parametrize("draft", ["none", "D", "lookup"])
def test_many_prompts_are_continued_as_each_is_alone(
    generate: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], draft: str
) -> None:
    prompts = [PROMPT, "import ", "class Node:\n"]
    file, out = tmp_path / "prompts.jsonl", tmp_path / "many.json"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    common = ["--draft", draft, "--gamma", "2", "--max-new-tokens", "12"]
    words = ["generate", str(model), "--prompts", str(file), "--batch-size", "2", "--dtype", "fp32"]
    assert main([*words, *common, "--json", str(out)]) == 0
    shown = capsys.readouterr().out
    many = json.loads(out.read_text())
    assert [row["prompt"] for row in many["results"]] == prompts
    assert (many["batch_size"], many["draft"]) == (2, draft)
    alone, _, _ = generate(*common)
    assert many["results"][0]["ids"] == alone["ids"]
    for row in many["results"]:
        assert row["prompt"] + row["text"] in shown


def test_one_prompt_or_a_file_of_them(model: Path, tmp_path: Path, fails: Fails) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n')
    both = ["--prompt", "a", "--prompts", file]
    assert "--prompt TEXT or --prompts FILE" in fails("generate", model, *both, code=2)
    assert "--prompt TEXT or --prompts FILE" in fails("generate", model, code=2)
    assert "--batch-size" in fails("generate", model, "--prompts", file, "--batch-size", "0", code=2)
    assert "does not exist" in fails("generate", model, "--prompts", tmp_path / "none.jsonl", code=2)


# ---------------------------------------------------------------- files of prompts


def write_prompts(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def test_a_prompt_beyond_the_context_is_named_before_the_first_is_decoded(
    model: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Decoder, "generate_batch", None)
    prompts = write_prompts(tmp_path / "p.jsonl", "def a", "x " * 500, "def b", "y " * 500)
    out = tmp_path / "out.json"
    line = fails("generate", model, "--prompts", prompts, "--draft", "none", "--json", out, code=2)
    assert f"--prompts {prompts}, line 2 has" in line
    assert "so are 1 more, as in line 4" in line
    assert not out.exists()


def test_what_was_decoded_is_written_when_a_later_batch_fails(
    model: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = Decoder.generate_batch, []

    def break_at_the_third(self: Decoder, prompts: list[str], **options: Any) -> Any:
        calls.append(prompts)
        if len(calls) == 3:
            raise NestlingError("the machine is on fire")
        return whole(self, prompts, **options)

    monkeypatch.setattr(Decoder, "generate_batch", break_at_the_third)
    prompts = write_prompts(tmp_path / "p.jsonl", *(f"def a{number}" for number in range(6)))
    out = tmp_path / "out.json"
    words = ("--batch-size", 2, "--max-new-tokens", 2, "--draft", "none", "--json", out)
    assert "on fire" in fails("generate", model, "--prompts", prompts, *words, code=1)
    results = json.loads(out.read_text())
    assert [one["prompt"] for one in results["results"]] == [f"def a{number}" for number in range(4)]
    assert results["num_prompts"] == 6
