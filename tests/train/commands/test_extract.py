"""`nestling extract`: a stock folder, proved equal; what cannot be is named and leaves nothing."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from models.bench.llama import is_installed, open_llama
from models.checkpoint.folder import load_model
from models.elastic.config import ElasticConfig
from models.elastic.granularity import Granularity
from train.cli import main

Fails = Callable[..., str]
SHAPE = ElasticConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
"""The shape of configs/tiny.yaml, as far as widths go."""


def test_a_member_comes_out_equal(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, results = tmp_path / "S", tmp_path / "extract.json"
    arguments = [str(model), "--granularity", "S", "--out", str(out), "--json", str(results)]
    assert main(["extract", *arguments]) == 0
    assert "106,944 of 217,536 parameters" in capsys.readouterr().out
    assert sum(weight.numel() for weight in load_model(out).model.parameters()) == 106_944
    written = json.loads(results.read_text())
    assert written["ids_equal"] is True
    assert written["granularity"] == "ffn=0.25"
    assert "command" in written["card"]


@pytest.mark.parametrize(
    ("granularity", "named"),
    [
        ("Q", "'Q'"),
        ("ffn=0", "ffn=0"),
        ("ffn=lots", "ffn=lots"),
        ("heads=0.3", "heads=0.3"),
        ("layers=0:9", "layer 9"),
        ("layers=2:1", "layers=2:1"),
        ("ffn=1:0.5", "ffn=1:0.5"),
        ("depth=2", "depth=2"),
    ],
)
def test_a_granularity_that_does_not_fit_is_named(
    granularity: str, named: str, model: Path, tmp_path: Path, fails: Fails
) -> None:
    out = tmp_path / "out"
    line = fails("extract", model, "--granularity", granularity, "--out", out, code=2)
    assert named in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("form", "said"),
    [("ragged", "with trust_remote_code=True"), ("padded", "wasted"), (None, "with trust_remote_code=True")],
)
def test_unequal_layers_come_out_equal(
    form: str | None, said: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, results = tmp_path / "mixed", tmp_path / "extract.json"
    flags = [] if form is None else ["--form", form]
    command = ["extract", str(model), "--granularity", "ffn=1:0.5:0.5", "--out", str(out), *flags]
    assert main([*command, "--json", str(results)]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    written = json.loads(results.read_text())
    assert written["ids_equal"] is True
    assert written["form"] == form or form is None
    assert (written["wasted_bytes"] > 0) == (form == "padded")
    assert main(["generate", str(out), "--prompt", "def", "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize(("dtype", "granularity"), [("int8", "S"), ("int4", "ffn=1:0.5:0.5")])
def test_a_folder_in_few_bits_is_proved_and_says_how_far_it_is(
    dtype: str,
    granularity: str,
    model: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("compressed_tensors", reason="needs the extra `compressed`")
    out, results = tmp_path / "small", tmp_path / "extract.json"
    command = ["extract", str(model), "--granularity", granularity, "--out", str(out), "--data", str(text)]
    assert main([*command, "--dtype", dtype, "--json", str(results)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"parameters in {dtype}" in told
    assert "beside the member in place: KL" in told
    written = json.loads(results.read_text())
    assert written["ids_equal"] is True
    assert written["dtype"] == dtype
    assert 0 < written["rounding"]["kl"] < 0.1
    assert written["rounding"]["text"] == str(text)
    assert "compressed-tensors" in (out / "README.md").read_text()
    assert main(["verify", str(out)]) == 0
    assert main(["generate", str(out), "--prompt", "def", "--max-new-tokens", "2"]) == 0


def test_a_folder_in_few_bits_needs_the_package_that_proves_it(
    model: Path, tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.checkpoint.compressed.importlib.util.find_spec", lambda _: None)
    command = ("extract", model, "--granularity", "S", "--dtype", "int8", "--out", tmp_path / "out")
    assert "pip install 'nestling[compressed]'" in fails(*command, code=2)
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_those_of_the_folder_in_few_bits(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="needs the extra `compressed`")
    out, results = tmp_path / "small", tmp_path / "extract.json"
    command = ["extract", str(model), "--budget", "bytes=300kB", "--data", str(text), "--out", str(out)]
    assert main([*command, "--dtype", "int4", "--json", str(results)]) == 0
    counted = json.loads(results.read_text())["search"]["best"]["costs"]["bytes"]
    assert counted <= 300_000
    assert 0 < (out / "model.safetensors").stat().st_size - counted < 20_000  # the names of tensors


def test_bytes_are_those_of_the_file_and_its_blocks(model: Path, text: Path, tmp_path: Path) -> None:
    out, results = tmp_path / "small.gguf", tmp_path / "extract.json"
    command = ["extract", str(model), "--budget", "bytes=100kB", "--data", str(text), "--out", str(out)]
    assert main([*command, "--format", "gguf", "--dtype", "q8_0", "--json", str(results)]) == 0
    written = json.loads(results.read_text())
    assert written["search"]["best"]["costs"]["bytes"] <= 100_000
    assert 0 < written["bytes"] - written["search"]["best"]["costs"]["bytes"] < 40_000  # keys and tokenizer
    assert all(
        layer.ffn % 32 == 0 for layer in Granularity.parse(written["granularity"]).resolve(SHAPE).layers
    )


def test_a_budget_chooses_the_member(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, results = tmp_path / "small", tmp_path / "extract.json"
    command = ["extract", str(model), "--budget", "params=0.6", "--data", str(text), "--out", str(out)]
    assert main([*command, "--json", str(results)]) == 0
    assert "chosen:" in capsys.readouterr().out
    written = json.loads(results.read_text())
    assert written["ids_equal"] is True
    assert written["search"]["best"]["granularity"] == written["granularity"]
    assert written["parameters"] <= 0.6 * 217_536
    assert load_model(out).provenance["granularity"] == written["granularity"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--granularity is missing"),
        (["--granularity", "ffn=1:0.5:0.5", "--form", "stock"], "--form stock"),
        (["--granularity", "S", "--form", "zip"], "--form zip"),
        (["--granularity", "S", "--form", "ragged", "--format", "gguf"], "--form ragged is for a folder"),
        (["--granularity", "S", "--form", "ragged", "--for", "mlx"], "--for mlx does not run"),
        (["--granularity", "S", "--for", "llama.cpp"], "add --format gguf"),
        (["--granularity", "S", "--for", "ollama"], "--for ollama"),
        (["--granularity", "heads=1:0.5:0.5", "--for", "sglang"], "--for sglang does not hold"),
        (["--granularity", "S", "--budget", "params=0.5"], "exclude each other"),
        (["--budget", "params=0.5"], "--data is missing"),
        (["--budget", "params"], "has no amount"),
        (["--budget", "params=0.5", "--data", "nowhere.txt"], "--data nowhere.txt"),
    ],
)
def test_a_budget_that_chooses_nothing_is_named(
    flags: list[str], named: str, model: Path, tmp_path: Path, fails: Fails
) -> None:
    assert named in fails("extract", model, *flags, "--out", tmp_path / "out", code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format_", ["hf", "gguf"])
@pytest.mark.parametrize(("what", "sizes"), [("S", ("418 KiB", "417 KiB")), ("D:XL", ("1.42 MiB",))])
def test_a_disk_without_room_is_said_first(
    format_: str,
    what: str,
    sizes: tuple[str, str],
    model: Path,
    text: Path,
    tmp_path: Path,
    fails: Fails,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("models.base.files.shutil.disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr("train.commands.pair.measure_pair", None)  # which would come later
    out = tmp_path / "new" / "S"
    member = ["--granularity", what] if ":" not in what else ["--pair", what, "--data", text]
    line = fails("extract", model, *member, "--out", out, "--format", format_, code=1)
    assert any(one in line for one in sizes), line
    assert "1000 B are free" in line
    assert not out.parent.exists()


KILLED = """
import os, signal, sys
from train.cli import main
import train.commands.export, train.commands.export_gguf

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

train.commands.export.compare_with_stock = train.commands.export_gguf.check_gguf = die
main(sys.argv[1:])
"""


@pytest.mark.parametrize("format_", ["hf", "gguf"])
def test_a_kill_in_the_middle_leaves_nothing_that_the_next_one_does_not_clear(
    format_: str, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "S"
    command = ["extract", str(model), "--granularity", "S", "--out", str(out), "--format", format_]
    other = tmp_path / ".S2.0a0a0a0a.partial"  # of another extraction
    other.write_text("")
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = {path.name for path in tmp_path.iterdir()} - {other.name}
    assert len(left) == 1
    assert left.pop().endswith(".partial")
    assert main(command) == 0
    written = {"S", "S.receipt.json"} if format_ == "gguf" else {"S"}
    assert {path.name for path in tmp_path.iterdir()} == {other.name, *written}


@pytest.mark.parametrize("format_", ["hf", "gguf"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_in_the_middle_leaves_nothing(
    number: int, code: int, format_: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(number)
    if before == signal.SIG_IGN:
        pytest.skip("the signal is ignored here, as in what a shell runs in the background")

    def interrupt(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr("train.commands.export.compare_with_stock", interrupt)
    monkeypatch.setattr("train.commands.export_gguf.check_gguf", interrupt)
    command = ["extract", str(model), "--granularity", "S", "--out", str(tmp_path / "S"), "--format", format_]
    assert main(command) == code
    assert signal.getsignal(number) == before
    assert list(tmp_path.iterdir()) == []


def test_tokens_that_transformers_cuts_otherwise_are_told_and_a_tokenizer_it_refuses_is_named(
    model: Path, tmp_path: Path, fails: Fails, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = tmp_path / "model", tmp_path / "S"
    shutil.copytree(model, other)
    path = other / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "additional_special_tokens": ["girl"]}))
    command = ["extract", str(other), "--granularity", "S", "--out", str(out)]
    assert main(command) == 0
    assert "cuts texts into other tokens" in " ".join(capsys.readouterr().out.split())
    assert main(["verify", str(out)]) == 0
    path.write_text(json.dumps({**settings, "tokenizer_class": "GemmaTokenizer"}))
    line = fails(*command, "--force", code=1)
    assert f"{out / 'tokenizer_config.json'} does not open in transformers" in line


def test_a_folder_that_is_not_ours_is_left_alone(model: Path, tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert str(tmp_path) in fails("extract", model, "--granularity", "S", "--out", tmp_path, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_family_is_never_replaced_by_its_member(model: Path, fails: Fails) -> None:
    before = (model / "model.safetensors").read_bytes()
    assert str(model) in fails("extract", model, "--granularity", "S", "--out", model, code=2)
    assert (model / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("dtype", "written"), [(None, "fp32"), ("f16", "fp16"), ("int8", "int8"), ("q4_0", "int4")]
)
def test_a_member_comes_out_as_one_file(
    dtype: str | None, written: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, results = tmp_path / "new" / "S.gguf", tmp_path / "extract.json"
    arguments = [str(model), "--granularity", "S", "--out", str(out), "--json", str(results)]
    asked = [] if dtype is None else ["--dtype", dtype]
    for force in ([], ["--force"]):  # the second time it replaces its own file
        assert main(["extract", *arguments, "--format", "gguf", *asked, *force]) == 0
    assert main(["extract", *arguments, "--format", "gguf", *asked]) == 2
    told = capsys.readouterr().out
    assert f"106,944 of 217,536 parameters in {written}, {out.stat().st_size:,} bytes" in " ".join(
        told.split()
    )
    found = json.loads(results.read_text())
    assert {
        name: found[name] for name in ("granularity", "format", "dtype", "parameters", "bytes", "pre")
    } == {
        "granularity": "ffn=0.25",
        "format": "gguf",
        "dtype": written,
        "parameters": 106_944,
        "bytes": out.stat().st_size,
        "pre": "gpt-2",
    }
    assert sorted(path.name for path in out.parent.iterdir()) == ["S.gguf", "S.gguf.receipt.json"]
    rounding, checks = found["rounding"], [one["check"] for one in found["checks"]]
    assert checks == [
        "tensors",
        *(["greedy ids", "logits"] if written == "fp32" else []),
        "tokens of texts",
    ]
    assert rounding["text"] == "its own greedy text"
    assert 0 <= rounding["kl"] < {"fp32": 1e-9, "fp16": 1e-4, "int8": 1e-3, "int4": 0.5}[written]
    assert 0.5 < rounding["alpha"] <= 1
    assert f"alpha {rounding['alpha']:.4f}" in " ".join(told.split())
    assert main(["verify", str(out)]) == 0


@pytest.mark.parametrize(
    ("arguments", "named", "code"),
    [
        (["--granularity", "ffn=0.2", "--dtype", "int8"], "--dtype int8", 2),
        (["--granularity", "S", "--dtype", "q4_k_m"], "--dtype q4_k_m", 2),
        (["--granularity", "S", "--format", "onnx"], "--format onnx", 2),
        (["--granularity", "S", "--format", "hf"], "add --format gguf", 2),
        (["--granularity", "S", "--format", "hf", "--dtype", "bf16"], "add --format gguf", 2),
    ],
)
def test_what_a_file_cannot_hold_is_named_and_leaves_nothing(
    arguments: list[str], named: str, code: int, model: Path, tmp_path: Path, fails: Fails
) -> None:
    out = tmp_path / "S.gguf"
    assert named in fails("extract", model, "--format", "gguf", "--out", out, *arguments, code=code)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_replaced_loses_its_receipt_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or an end between the two would leave the new file beside what was said of the old one."""
    out = tmp_path / "S.gguf"
    command = ["extract", str(model), "--granularity", "S", "--out", str(out), "--format", "gguf"]
    assert main(command) == 0
    receipt = next(path for path in tmp_path.iterdir() if path != out)
    monkeypatch.setattr("train.commands.export_gguf.write_receipt", lambda *_, **__: 1 / 0)
    assert main([*command, "--force"]) == 1
    assert out.exists()
    assert not receipt.exists()


def test_a_file_that_is_not_ours_is_left_alone(model: Path, tmp_path: Path, fails: Fails) -> None:
    (tmp_path / "thesis.gguf").write_text("years of work")
    for out, named in ((tmp_path / "thesis.gguf", "not ours"), (tmp_path, "is a folder")):
        assert named in fails(
            "extract", model, "--granularity", "S", "--format", "gguf", "--out", out, code=2
        )
    assert (tmp_path / "thesis.gguf").read_text() == "years of work"


def test_a_model_without_a_tokenizer_or_with_another_kind_is_named(
    model: Path, tmp_path: Path, fails: Fails
) -> None:
    folder, out = tmp_path / "model", tmp_path / "S.gguf"
    shutil.copytree(model, folder)
    command = ("extract", folder, "--granularity", "S", "--format", "gguf", "--out", out)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"use_regex": true', '"use_regex": false'))
    line = fails(*command, code=1)
    assert str(folder) in line
    assert "cuts words" in line
    tokenizer.unlink()
    assert "tokenizer.json" in fails(*command, code=1)
    assert not out.exists()


@pytest.mark.skipif(not is_installed(), reason="needs the extra `llama`")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@torch.no_grad()
def test_llama_cpp_writes_what_generate_writes(model: Path, tmp_path: Path) -> None:
    folder, file, results = tmp_path / "S", tmp_path / "S.gguf", tmp_path / "results.json"
    for out, format_ in ((folder, "hf"), (file, "gguf")):
        assert (
            main(["extract", str(model), "--granularity", "S", "--out", str(out), "--format", format_]) == 0
        )
    prompt = "def area(x):  # 12\n"
    arguments = ["--prompt", prompt, "--max-new-tokens", "48", "--dtype", "fp32", "--json", str(results)]
    assert main(["generate", str(folder), *arguments]) == 0
    ours = json.loads(results.read_text())["ids"]
    assert len(ours) == 48
    llama = open_llama(file, 64, type_k=0, type_v=0)  # fp32 keys and values, as ours
    prompt_ids = llama.tokenize(prompt.encode(), special=True)
    assert prompt_ids == Tokenizer.from_file(str(model / "tokenizer.json")).encode(prompt).ids
    theirs = llama.generate(prompt_ids, temp=0.0, repeat_penalty=1.0)
    assert list(itertools.islice(theirs, 48)) == ours


def damage_nothing(folder: Path) -> None:
    shutil.rmtree(folder)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def write_rubbish(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"rubbish")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def become_foreign(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def claim_other_shape(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 128}))


def break_family(folder: Path) -> None:
    (folder / "nestling.json").write_text('{"format": 1, "family": []}')


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "named", "code"),
    [
        (damage_nothing, "does not exist", 2),
        (empty, "config.json", 1),
        (truncate_weights, "model.safetensors", 1),
        (write_rubbish, "model.safetensors", 1),
        (remove_weights, "model.safetensors", 1),
        (become_foreign, "gpt2", 1),
        (break_config, "config.json", 1),
        (claim_other_shape, "do not fit the configuration", 1),
        (break_family, "nestling.json", 1),
        (break_tokenizer, "tokenizer.json", 1),
    ],
)
def test_a_missing_damaged_or_foreign_folder_is_named(
    damage: Callable[[Path], None],
    named: str,
    code: int,
    model: Path,
    tmp_path: Path,
    text: Path,
    fails: Fails,
) -> None:
    folder, out, results = tmp_path / "model", tmp_path / "out", tmp_path / "results.json"
    shutil.copytree(model, folder)
    damage(folder)
    for command in (
        ("extract", folder, "--granularity", "S", "--out", out),
        ("generate", folder, "--prompt", "def", "--json", results),
        ("evaluate", folder, "--data", text, "--json", results),
    ):
        line = fails(*command, code=code)
        assert named in line
        assert str(folder) in line
    assert not out.exists()
    assert not results.exists()
