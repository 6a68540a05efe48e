"""Model folders: round trips, foreign folders, and every damage named in one line."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer
from transformers.utils import logging

from models.base.errors import NestlingError, UsageError
from models.checkpoint.extract import extract, verify_extraction
from models.checkpoint.folder import Member, load_model, save_model
from models.checkpoint.huggingface import load_stock, to_hugging_face
from models.checkpoint.weights import check_tensors, weights_of
from models.elastic.config import ElasticConfig
from models.elastic.granularity import DEFAULT_FAMILY, FULL, Granularity
from models.elastic.model import ElasticLM
from tests.models.checkpoint.test_gemma3 import GEMMA3

FAMILY = {"S": Granularity(ffn=(0.25,)), "draft": Granularity(layers=(0, 1)), "XL": FULL}
MEMBER = Member(name="S", granularity="ffn=0.25", parameters=9, loss=1.5, alpha=0.8)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "mistral": {"num_attention_heads": 6},
    "smollm3": {"no_rope_layers": (1, 0, 1, 1)},
    "gemma3_text": GEMMA3,
}
PROVENANCE = {"commit": "abc", "data": {"hash": "123"}}


def byte_tokenizer(num_tokens: int = 64) -> Tokenizer:
    """Every token is one byte; the first is the end of a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: num_tokens - 1]
    letters += [f"never met {index}" for index in range(len(letters) + 1, num_tokens)]
    vocabulary = {"<|endoftext|>": 0} | {letter: index + 1 for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture
def folder(tiny_model: ElasticLM, tmp_path: Path) -> Path:
    return save_model(
        tmp_path / "model",
        tiny_model,
        tokenizer=byte_tokenizer(),
        family=FAMILY,
        members=[MEMBER],
        provenance=PROVENANCE,
    )


def test_a_saved_model_comes_back_whole(tiny_model: ElasticLM, folder: Path) -> None:
    opened = load_model(folder)
    assert opened.model.config == tiny_model.config
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(opened.model.state_dict()[name], tensor), name
    assert opened.model.lm_head.weight is opened.model.model.embed_tokens.weight
    assert not opened.model.training
    assert opened.tokenizer is not None
    assert opened.tokenizer.encode("A5").ids == byte_tokenizer().encode("A5").ids
    assert (opened.family, opened.members, opened.provenance) == (FAMILY, [MEMBER], PROVENANCE)
    assert all(parameter.requires_grad for parameter in opened.model.parameters())


def test_a_path_need_not_be_utf8(tiny_model: ElasticLM, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9")
    folder.rename(path)
    opened = load_model(path)
    save_model(path, opened.model, tokenizer=opened.tokenizer, provenance={"data": str(path)})
    assert load_model(path).provenance == {"data": str(path)}
    tokens_BT = torch.arange(64)[None]
    torch.testing.assert_close(load_stock(path)(tokens_BT).logits, tiny_model(tokens_BT))


def test_the_rotary_table_of_a_loaded_model_is_the_original(tiny_model: ElasticLM, folder: Path) -> None:
    tokens_BT = torch.arange(64)[None]
    assert torch.equal(load_model(folder).model(tokens_BT), tiny_model(tokens_BT))


def test_a_tied_head_is_stored_once(folder: Path) -> None:
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_others_may_read_the_weights_as_they_may_the_other_files(folder: Path) -> None:
    modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_nothing_on_disk_is_a_pickle(folder: Path) -> None:
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_an_elastic_folder_is_a_stock_model(tiny_model: ElasticLM, folder: Path) -> None:
    stock = load_stock(folder)
    tokens_BT = torch.arange(64)[None]
    assert torch.equal(stock(tokens_BT).logits.argmax(-1), tiny_model(tokens_BT).argmax(-1))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_transformers_reads_the_same_tokenizer_for_every_architecture(
    tiny_model: ElasticLM, tmp_path: Path, kind: str
) -> None:
    config = dataclasses.replace(tiny_model.config, eos_token_id=0, bos_token_id=0, **ARCHITECTURES[kind])
    save_model(tmp_path / "m", ElasticLM(config), tokenizer=byte_tokenizer())
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "1 + 2 = 3;  A\n"
    assert theirs(text)["input_ids"] == byte_tokenizer().encode(text).ids
    assert (theirs.eos_token_id, theirs.model_max_length) == (0, config.max_position_embeddings)


def test_transformers_does_not_suspect_a_large_vocabulary_of_an_old_mistral_fault(
    tiny_config: ElasticConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = dataclasses.replace(tiny_config, vocab_size=100_001, **ARCHITECTURES["mistral"])
    save_model(tmp_path / "m", ElasticLM(config), tokenizer=byte_tokenizer(config.vocab_size))
    logger = logging.get_logger("transformers")
    logger.addHandler(caplog.handler)  # its messages do not propagate
    AutoTokenizer.from_pretrained(tmp_path / "m")
    logger.removeHandler(caplog.handler)
    assert caplog.text == ""


def test_a_model_can_be_opened_in_another_dtype(folder: Path) -> None:
    opened = load_model(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in opened.model.parameters()} == {torch.bfloat16}
    save_model(folder, opened.model)
    assert load_model(folder).model.lm_head.weight.dtype == torch.bfloat16
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_stock_folder_opens_with_the_default_family(tiny_model: ElasticLM, tmp_path: Path) -> None:
    to_hugging_face(tiny_model).save_pretrained(tmp_path)
    opened = load_model(tmp_path)
    assert opened.model.config == tiny_model.config
    assert (opened.family, opened.members, opened.tokenizer) == (dict(DEFAULT_FAMILY), [], None)


def test_a_sharded_stock_folder_opens(tiny_model: ElasticLM, tmp_path: Path) -> None:
    to_hugging_face(tiny_model).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(load_model(tmp_path).model.state_dict()[name], tensor), name


def test_stored_frequencies_and_an_equal_tied_head_are_let_pass(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path)
    load_model(folder)


def test_a_failed_save_leaves_the_old_model(tiny_model: ElasticLM, folder: Path) -> None:
    with pytest.raises(TypeError):
        save_model(folder, tiny_model, provenance={"not": object()})
    assert load_model(folder).provenance == PROVENANCE
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_loaded_model_may_be_saved_over_itself(folder: Path) -> None:
    opened = load_model(folder)
    save_model(folder, opened.model, family=opened.family, like=folder)
    assert load_model(folder).tokenizer is not None


def test_a_family_that_does_not_fit_is_refused_before_anything_is_written(
    tiny_model: ElasticLM, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="keeps layer 9"):
        save_model(tmp_path / "model", tiny_model, family={"S": Granularity(layers=(9,))})
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    tiny_model: ElasticLM, tmp_path: Path
) -> None:
    with pytest.raises(NestlingError, match="ids up to 64, but vocab_size=64"):
        save_model(tmp_path / "model", tiny_model, tokenizer=byte_tokenizer(65))
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_no_folder_is_a_usage_error(folder: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_model(folder / "typo")
    with pytest.raises(UsageError, match="is a file"):
        load_model(folder / "config.json")


def change_json(name: str, **changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return damage


def write(name: str, content: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(content)

    return damage


def remove(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()

    return damage


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_the_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20])


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index(weight_map: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        write("model.safetensors.index.json", json.dumps({"weight_map": weight_map}))(folder)

    return damage


NORM = "model.norm.weight"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (remove("config.json"), r"config\.json is missing"),
    "config is not JSON": (write("config.json", "{"), r"config\.json is not JSON"),
    "config is a list": (write("config.json", "[]"), r"config\.json holds a list"),
    "foreign": (change_json("config.json", model_type="gpt2"), r"config\.json: model_type='gpt2'"),
    "impossible": (change_json("config.json", num_key_value_heads=3), r"config\.json: .*num_key_value"),
    "no weights": (remove("model.safetensors"), r"has no model\.safetensors"),
    "pickle": (pickle_only, r"as a pickle \(pytorch_model\.bin\)"),
    "truncated": (truncate, r"model\.safetensors is damaged"),
    "cut header": (cut_the_header, r"model\.safetensors is damaged"),
    "empty weights": (write("model.safetensors", ""), r"model\.safetensors is damaged"),
    "missing tensor": (change_tensors(lambda it: it.pop(NORM)), rf"missing: {NORM}"),
    "extra tensor": (change_tensors(lambda it: it.update(odd=it[NORM] + 1)), "not of this model: odd"),
    "shape": (
        change_tensors(lambda it: it.update({NORM: torch.ones(31)})),
        rf"of another shape: {NORM} \[31\] instead of \[32\]",
    ),
    "integers": (
        change_tensors(lambda it: it.update({NORM: torch.ones(32, dtype=torch.int8)})),
        rf"not floating point: {NORM} \(torch.int8\)",
    ),
    "not a number": (
        change_tensors(lambda it: it[NORM].fill_(float("nan"))),
        rf"not finite \(nan or infinity\): {NORM}",
    ),
    "infinity in bf16": (
        change_tensors(lambda it: it.update({NORM: torch.full((32,), float("-inf"), dtype=torch.bfloat16)})),
        rf"not finite \(nan or infinity\): {NORM}",
    ),
    "another head": (
        change_tensors(lambda it: it.update({"lm_head.weight": torch.ones(64, 32)})),
        r"lm_head\.weight differs from model\.embed_tokens\.weight",
    ),
    "more layers": (
        change_json("config.json", num_hidden_layers=5),
        r"missing: model\.layers\.4.*and \d+ more",
    ),
    "shard missing": (index({"a": "model-00001.safetensors"}), r"model-00001\.safetensors is missing"),
    "index empty": (index(None), "has no weight_map"),
    "index outside": (index({"a": "../secret.safetensors"}), "points outside its folder"),
    "tokenizer": (write("tokenizer.json", "{}"), r"tokenizer\.json is not a tokenizer"),
    "tokenizer too large": (
        lambda folder: byte_tokenizer(100).save(str(folder / "tokenizer.json")),
        r"tokenizer\.json has token ids up to 99, but vocab_size=64",
    ),
    "family is not JSON": (write("nestling.json", "nope"), r"nestling\.json is not JSON"),
    "newer format": (change_json("nestling.json", format=3), r"nestling\.json: format=3 is not 1 or 2"),
    "no family": (change_json("nestling.json", family=None), r"nestling\.json: family=None"),
    "odd granularity": (change_json("nestling.json", family={"S": "tiny"}), r"nestling\.json: .*'tiny'"),
    "unfit granularity": (
        change_json("nestling.json", family={"S": "layers=7"}),
        r"nestling\.json: .*keeps layer 7",
    ),
    "odd member": (
        change_json("nestling.json", members=[{"nom": 1}]),
        r"nestling\.json: member \{'nom': 1\}",
    ),
    "member of wrong kind": (
        change_json("nestling.json", members=[{"name": "S", "granularity": "full", "parameters": "9"}]),
        r"parameters='9' is of the wrong kind",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_in_one_line(folder: Path, name: str) -> None:
    damage, named = DAMAGES[name]
    damage(folder)
    with pytest.raises(NestlingError, match=named) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert not isinstance(caught.value, UsageError), "the file is wrong, not the command"


def test_an_undamaged_copy_opens(folder: Path, tmp_path: Path) -> None:
    load_model(shutil.copytree(folder, tmp_path / "copy"))


# ---------------------------------------------------------------- tokens that end a text


def test_settings_of_generation_that_are_not_applied_are_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change_json("generation_config.json", suppress_tokens=[1], forced_bos_token_id=3)(folder)
    load_model(folder)
    (line,) = caplog.messages
    assert "generation_config.json: suppress_tokens=[1], forced_bos_token_id=3 has no effect here" in line


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (5, None, (5,)),
        ([5, 6], None, (5, 6)),
        ([5], None, (5,)),
        (None, None, ()),
        (5, [7, 6], (5, 7, 6)),
        ([5, 6], [6, 8], (5, 6, 8)),
        (None, 4, (4,)),
        ([5, 5], 5, (5,)),
    ],
)
def test_every_end_token_that_the_folder_states_counts_and_goes_with_an_extraction(
    folder: Path, tmp_path: Path, config: object, generation: object, expected: tuple[int, ...]
) -> None:
    change_json("config.json", eos_token_id=config)(folder)
    change_json("generation_config.json", eos_token_id=generation)(folder)
    opened = load_model(folder)
    assert opened.model.config.eos_token_ids == expected
    out = extract(opened, FAMILY["S"], tmp_path / "out")
    assert load_model(out).model.config.eos_token_ids == expected
    stated = json.loads((out / "config.json").read_text())["eos_token_id"]
    assert stated == (list(expected) if len(expected) > 1 else expected[0] if expected else None)
    ends = to_hugging_face(opened.model).config.eos_token_id
    assert ends == stated


@pytest.mark.parametrize("value", ["5", [1, None], {"a": 1}, True, 1.5])
def test_an_end_token_that_is_none_is_named(folder: Path, value: object) -> None:
    for file in ("config.json", "generation_config.json"):
        before = (folder / file).read_bytes()
        change_json(file, eos_token_id=value)(folder)
        with pytest.raises(NestlingError, match=rf"{file}: eos_token_id=.* is not a whole number"):
            load_model(folder)
        (folder / file).write_bytes(before)


def test_an_extraction_with_several_end_tokens_is_equal_in_transformers(folder: Path, tmp_path: Path) -> None:
    change_json("config.json", eos_token_id=[5, 6, 7])(folder)
    opened = load_model(folder)
    out = extract(opened, FAMILY["S"], tmp_path / "out")
    assert verify_extraction(opened, FAMILY["S"], out).holds


def test_no_compiler_is_imported_to_open_and_to_pack_a_model(folder: Path) -> None:
    """It would take a second of each command, longer than to read a model of a billion weights."""
    program = (
        "import sys; from models.checkpoint.folder import load_model; "
        "from models.packed.quantize import pack; "
        f"pack(load_model({str(folder)!r}, mapped=True).model, 'fp32'); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_overflowing_sum_of_finite_weights_is_no_damage(tiny_model: ElasticLM) -> None:
    tensors = dict(weights_of(tiny_model))
    name = next(iter(tensors))
    tensors[name] = torch.full_like(tensors[name], 3e38)
    expected = {name: tensor.shape for name, tensor in tensors.items()}
    assert check_tensors(expected, tensors).keys() == tensors.keys()
    for sick in (torch.nan, torch.inf):
        tensors[name].view(-1)[7] = sick
        with pytest.raises(NestlingError, match="not finite"):
            check_tensors(expected, tensors)
