"""What takes files and flags, fed with files in which one field or byte is changed.

Each case ends in success or in one line, within a minute, and changes none of the files that it reads.
"""

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tokenizers import Tokenizer

from models.checkpoint.folder import load_model, save_model
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.kernels.build import SOURCES, library
from train.cli import main

CONFIGS = Path(__file__).parents[3] / "configs"
SECONDS = 60
FEW, MANY = 12, 500
"""Cases of each fuzzer in the default suite, and in the slow one: 2,000 of all four."""
ODD: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 64, 257, 2**31, 2**63, 2**70, 0.5, -0.5, 1e-30, 1e30),
    *(
        math.nan,
        math.inf,
        "",
        "x",
        "0",
        "auto",
        "../..",
        "\N{REPLACEMENT CHARACTER}",
        "a" * 300,
        [],
        [1],
        [None],
    ),
    *([[1, 2], [3]], {}, {"a": 1}, {"content": "x"}),
)
"""Values that somebody's file has held in place of the right one."""

Change = Callable[[bytes], bytes]


def paths_in(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the fields of a nested value are; of long lists and tables only the first few entries."""
    entries: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        entries = [*value.items()][:40]
    elif isinstance(value, list):
        entries = [*enumerate(value)][:6]
    for key, inner in entries:
        yield (*above, key)
        yield from paths_in(inner, (*above, key))


def with_field(value: Any, path: tuple[Any, ...], new: Any, remove: bool) -> Any:
    """A copy in which one field is another, or gone."""
    first, *rest = path
    copy = dict(value) if isinstance(value, Mapping) else list(value)
    if rest:
        copy[first] = with_field(copy[first], tuple(rest), new, remove)
    elif remove:
        del copy[first]
    else:
        copy[first] = new
    return copy


@st.composite
def changed(draw: st.DrawFn, content: bytes, structured: bool = True) -> bytes:
    """The bytes of a file in which one thing is changed."""
    kind = draw(st.sampled_from(["field", "field", "field", "remove", "byte", "cut", "insert"]))
    if kind in ("field", "remove") and structured:
        value = json.loads(content)
        path = draw(st.sampled_from([*paths_in(value)]))
        return json.dumps(with_field(value, path, draw(st.sampled_from(ODD)), kind == "remove")).encode()
    place = draw(st.integers(0, len(content) - 1))
    if kind == "cut":
        return content[:place]
    byte = bytes([draw(st.integers(0, 255))])
    return content[:place] + byte + content[place + (kind != "insert") :]


def too_slow(*_: object) -> None:
    raise AssertionError(f"still at work after {SECONDS} seconds")


def check(words: list[str], inputs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Run a command: 0, or 1 or 2 and one line that is no defect of ours; the inputs stay as they are."""
    before = {path: path.read_bytes() for path in inputs}
    capsys.readouterr()
    previous = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(SECONDS)
    try:
        code = main(words)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if line.startswith("nestling: error: ")]
    assert "defect of nestling" not in said, said
    assert "Traceback" not in said, said
    # a recipe has a line for each thing that is wrong in it, anything else has one
    most = 9 if words[0] == "train" else 1
    assert code in (0, 1, 2), said
    assert bool(code) <= len(errors) <= bool(code) * most, said
    assert {path: path.read_bytes() for path in inputs} == before


def fuzz(num_cases: int) -> Callable[[Any], Any]:
    """Run a test on so many cases, which hypothesis does not shrink: each opens a model."""
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=num_cases, suppress_health_check=quiet, deadline=None)


SIZES = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, byte_level_tokenizer: Tokenizer) -> Path:
    """A family of two layers with a tokenizer of single bytes."""
    config = ElasticConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=256,
    )
    model = ElasticLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    family = {"S": Granularity(ffn=(0.5,)), "D": Granularity(layers=(0,)), "XL": FULL}
    path = tmp_path_factory.mktemp("fuzz") / "model"
    return save_model(path, model, tokenizer=byte_level_tokenizer, family=family)


@pytest.fixture(scope="module", autouse=True)
def compiled_before() -> None:
    """Compiling, once for a machine, is no part of the minute."""
    for name in SOURCES:
        library(name)


def generate(folder: Path, *more: str) -> list[str]:
    words = ["generate", str(folder), "--prompt", "a", "--max-new-tokens", "2", "--dtype", "fp32"]
    return [*words, "--draft", "none", *more]


FILES = ["config.json", "generation_config.json", "nestling.json", "tokenizer_config.json"]


@pytest.mark.parametrize("num_cases", SIZES)
def test_any_model_folder_opens_or_is_refused_in_a_line(
    num_cases: int, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    weights = "model.safetensors"

    @fuzz(num_cases)
    @given(st.data())
    def any_folder(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([*FILES, *FILES, weights]))
        whole = (folder / name).read_bytes()
        (copy / name).write_bytes(data.draw(changed(whole, structured=name != weights)))
        check(generate(copy), [path for path in copy.iterdir() if path.is_file()], capsys)
        (copy / name).write_bytes(whole)

    any_folder()
    assert load_model(copy).members == []


@pytest.mark.parametrize("num_cases", SIZES)
def test_any_tokenizer_encodes_or_is_refused_in_a_line(
    num_cases: int, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    whole = (folder / "tokenizer.json").read_bytes()

    @fuzz(num_cases)
    @given(changed(whole))
    def any_tokenizer(content: bytes) -> None:
        (copy / "tokenizer.json").write_bytes(content)
        check(generate(copy), [path for path in copy.iterdir() if path.is_file()], capsys)

    any_tokenizer()


@pytest.mark.parametrize("num_cases", SIZES)
def test_any_file_of_prompts_is_continued_or_refused_in_a_line(
    num_cases: int, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "out.json"
    lines = [{"prompt": "a"}, {"turns": ["b", "c"]}, {"text": "\N{GRINNING FACE}" * 3}]
    words = ["generate", str(folder), "--prompts", str(file), "--max-new-tokens", "2", "--draft", "none"]

    @fuzz(num_cases)
    @given(st.data())
    def any_prompts(data: st.DataObject) -> None:
        texts = [json.dumps(line).encode() for line in lines]
        number = data.draw(st.integers(0, len(texts) - 1))
        texts[number] = data.draw(changed(texts[number]))
        file.write_bytes(data.draw(st.sampled_from([b"", b"\xef\xbb\xbf", b"\n"])) + b"\n".join(texts))
        check([*words, "--dtype", "fp32", "--json", str(out)], [file], capsys)

    any_prompts()


@pytest.mark.parametrize("num_cases", SIZES)
def test_any_recipe_is_read_or_refused_in_a_line(
    num_cases: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "run"
    whole = OmegaConf.to_container(OmegaConf.load(CONFIGS / "tiny.yaml"))

    @fuzz(num_cases)
    @given(st.data())
    def any_recipe(data: st.DataObject) -> None:
        content = data.draw(changed(json.dumps(whole).encode()))  # which is YAML, too
        file.write_bytes(content)
        check(["train", "--config", str(file), "--out", str(out), "--dry-run"], [file], capsys)
        assert not out.exists()

    any_recipe()


@pytest.mark.parametrize("num_cases", SIZES)
def test_any_receipt_is_repeated_or_refused_in_a_line(
    num_cases: int, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "S"
    assert main(["extract", str(folder), "--granularity", "S", "--out", str(out)]) == 0
    whole = (out / "receipt.json").read_bytes()

    @fuzz(num_cases)
    @given(changed(whole))
    def any_receipt(content: bytes) -> None:
        (out / "receipt.json").write_bytes(content)
        check(["verify", str(out)], [path for path in out.iterdir() if path.is_file()], capsys)

    any_receipt()


@pytest.mark.parametrize("num_cases", SIZES)
def test_any_table_of_latencies_is_taken_or_refused_in_a_line(
    num_cases: int, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, table = tmp_path / "text.txt", tmp_path / "table.json"
    text.write_text("a b c d e f g h " * 40)
    layers = [{"ffn": ffn, "groups": 2, "seconds": ffn / 1e5} for ffn in (16, 24, 32)]
    known = {"format": 1, "machine": "a phone", "dtype": "fp32", "shape": [32, 32, 2, 260], "ends": 1e-4}
    whole = json.dumps(known | {"layers": layers, "residual": 0.1}).encode()
    words = ["search", str(folder), "--budget", "latency=0.9", "--data", str(text), "--evaluations", "2"]

    @fuzz(num_cases)
    @given(changed(whole))
    def any_table(content: bytes) -> None:
        table.write_bytes(content)
        check([*words, "--num-tokens", "32", "--latency-table", str(table)], [table], capsys)

    any_table()
