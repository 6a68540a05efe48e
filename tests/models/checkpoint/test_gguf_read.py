"""A GGUF file opens as the model that it holds; what cannot be held is refused in one line."""

import contextlib
import dataclasses
import random
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

from models.base.errors import NestlingError, UsageError
from models.checkpoint.folder import load_model, read_config
from models.checkpoint.gguf import DTYPES, write_gguf
from models.checkpoint.gguf_read import is_gguf, read_gguf
from models.checkpoint.gguf_tokenizer import tokenizer_keys
from models.checkpoint.gguf_vocabulary import read_tokenizer
from models.checkpoint.weights import weights_of
from models.elastic.config import ElasticConfig
from models.elastic.model import ElasticLM
from models.elastic.rope_scaling import RopeScaling
from models.elastic.view import View
from tests.models.checkpoint.test_gguf import KINDS as UNEQUAL_KINDS
from tests.models.checkpoint.test_gguf import TOKENS, UNEQUAL, make_model
from tests.models.checkpoint.test_gguf_tokenizer import PATTERNS, config_of, make_texts, make_tokenizer

ROUNDING = {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-10, "int8": 2**-6, "int4": 2**-3}
"""By how much a stored weight may differ, relative to the largest."""
SCALING: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 2048}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "untied": {"tie_word_embeddings": False, "head_dim": 16, "rope_theta": 500.0},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "smollm3": {"no_rope_layers": (1, 1, 1, 0)},
    "linear": {"rope_scaling": RopeScaling(rope_type="linear", factor=2.0)},
    "llama3": {"rope_scaling": RopeScaling(rope_type="llama3", **SCALING)},
    "yarn": {"rope_scaling": RopeScaling(rope_type="yarn", attention_factor=1.25, **SCALING)},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_each_architecture_reads_back_as_it_was(
    tiny_config: ElasticConfig, tmp_path: Path, shape: str
) -> None:
    model = make_model(tiny_config, **SHAPES[shape], eos_token_id=None)
    folder = load_model(write_gguf(model, tmp_path / "m.gguf", dtype="fp32"))
    # The file has no place for how weights were initialised, and keeps the yarn factor in fp32.
    expected = dataclasses.replace(model.config, initializer_range=0.02)
    found = folder.model.config
    if found.rope_scaling is not None:
        assert found.rope_scaling.attention_factor == pytest.approx(
            getattr(expected.rope_scaling, "attention_factor", 1.0), rel=1e-6
        )
        found = dataclasses.replace(found, rope_scaling=expected.rope_scaling)
    assert (
        found
        == expected
        == dataclasses.replace(read_config(tmp_path / "m.gguf"), rope_scaling=expected.rope_scaling)
    )
    theirs = weights_of(folder.model)
    assert theirs.keys() == weights_of(model).keys()
    for name, tensor in weights_of(model).items():
        assert torch.equal(theirs[name], tensor), name
    assert folder.tokenizer is None
    assert folder.chat_template is None


@pytest.mark.parametrize("kind", UNEQUAL_KINDS)
@torch.no_grad()
def test_unequal_layers_open_filled_up_with_zeros(
    tiny_config: ElasticConfig, tmp_path: Path, kind: str
) -> None:
    changes = SHAPES["llama3"] if "llama3" in kind else UNEQUAL_KINDS[kind]  # contexts that models have
    view = View(make_model(tiny_config, **changes), UNEQUAL)
    folder = load_model(write_gguf(view, tmp_path / "m.gguf", dtype="fp32"), in_blocks=True)
    assert list(folder.family) == ["full"]
    assert folder.model.config.intermediate_size == 64
    ours_TV, theirs_TV = view(torch.tensor([TOKENS])), folder.model(torch.tensor([TOKENS]))
    torch.testing.assert_close(theirs_TV, ours_TV, atol=1e-5 * float(ours_TV.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("widths", "line"),
    [
        ({"feed_forward_length": [64, 0, 48]}, "layers lack a part"),
        ({"attention.head_count": [2, 4, 4], "attention.head_count_kv": [1, 2, 1]}, "query heads to a"),
        ({"attention.head_count": [2, 0, 2]}, "'0' must be 1 or more in each layer"),
        ({"feed_forward_length": [64, 32]}, "must be 3 numbers, one for each layer"),
    ],
)
def test_unequal_layers_of_another_kind_are_refused(
    tiny_config: ElasticConfig, tmp_path: Path, widths: dict[str, Any], line: str
) -> None:
    path = write_gguf(View(make_model(tiny_config), UNEQUAL), tmp_path / "m.gguf", dtype="fp32")
    reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(tmp_path / "other.gguf", "deci")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            value = widths.get(name.removeprefix("deci."), field.contents())
            kinds = field.types if isinstance(value, list) else [field.types[0]]
            writer.add_key_value(name, value, kinds[0], *kinds[1:2])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(NestlingError, match=line) as caught:
        read_config(tmp_path / "other.gguf")
    assert str(caught.value).startswith(str(tmp_path / "other.gguf"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_dtype_is_dequantized(tiny_config: ElasticConfig, tmp_path: Path, dtype: str) -> None:
    model = make_model(tiny_config)
    found = read_gguf(write_gguf(model, tmp_path / "m.gguf", dtype=dtype))
    assert found.quantizations == (DTYPES[dtype], *(["Q8_0"] if dtype == "int4" else []))
    for name, tensor in weights_of(model).items():
        error = float((found.tensors[name] - tensor).abs().max() / tensor.abs().max())
        assert error <= ROUNDING[dtype], name


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_blocks_of_few_bits_are_dequantized_as_the_library_does(
    tiny_config: ElasticConfig, tmp_path: Path, kind: str
) -> None:
    model = make_model(tiny_config)
    path = tmp_path / "m.gguf"
    write_gguf(model, path, dtype="fp32")
    quantization = gguf.GGMLQuantizationType[kind]
    reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        narrow = tensor.name == "blk.0.ffn_down.weight"
        data = gguf.quants.quantize(np.array(tensor.data), quantization) if narrow else np.array(tensor.data)
        writer.add_tensor(tensor.name, data, raw_dtype=quantization if narrow else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    name = "model.layers.0.mlp.down_proj.weight"
    expected = gguf.quants.dequantize(
        gguf.quants.quantize(weights_of(model)[name].numpy(), quantization), quantization
    )
    found = read_gguf(tmp_path / "q.gguf")
    assert torch.equal(found.tensors[name], torch.from_numpy(expected))
    assert set(found.quantizations) == {"F32", kind}


@pytest.mark.parametrize("pre", PATTERNS)
def test_a_byte_level_tokenizer_reads_back_with_the_same_cuts(
    tiny_config: ElasticConfig, tmp_path: Path, pre: str
) -> None:
    ours = make_tokenizer(PATTERNS[pre], ignore_merges=pre == "llama-bpe")
    if pre == "qwen2":  # whose tokenizers all compose characters, which the file does not say
        ours.normalizer = normalizers.NFC()
    ours.add_tokens([AddedToken("<tool>", normalized=False)])
    config = config_of(ours)
    keys = tokenizer_keys(ours, config, chat_template="{{ messages }}")
    path = write_gguf(ElasticLM(config), tmp_path / "m.gguf", dtype="fp32", metadata=keys)
    folder = load_model(path)
    assert folder.tokenizer is not None
    assert folder.chat_template == "{{ messages }}"
    assert folder.model.config.eos_token_id == 0
    for text in [*make_texts(), "a<tool>b<|endoftext|>c"]:
        found = folder.tokenizer.encode(text).ids
        assert found == ours.encode(text).ids, text
        assert folder.tokenizer.decode(found) == ours.decode(found)


def make_sentence_piece() -> Tokenizer:
    """A tokenizer of Llama 2's kind: pieces with spaces, unknown characters as bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [text for text in make_texts()[:100] if text.isascii()]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    return tokenizer


def sentence_piece_keys(tokenizer: Tokenizer, **changes: Any) -> dict[str, Any]:
    size = tokenizer.get_vocab_size()
    kinds = [2, 3, 3, *[6] * 256, *[1] * (size - 259)]
    keys = {
        "model": "llama",
        "tokens": [tokenizer.id_to_token(token) for token in range(size)],
        "token_type": kinds,
        "scores": [0.0 if kind != 1 else float(-token) for token, kind in enumerate(kinds)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_bos_token": False,
    }
    return {f"tokenizer.ggml.{name}": value for name, value in (keys | changes).items()}


def test_a_sentence_piece_tokenizer_reads_back_with_the_same_cuts() -> None:
    ours = make_sentence_piece()
    theirs = read_tokenizer(Path("m.gguf"), sentence_piece_keys(ours))
    assert theirs is not None
    for text in ["the cat sat", " a  mat", "zebra", "that 🙂 hat é", "", "then\nthe"]:
        ids = ours.encode(text).ids
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids) == ours.decode(ids, skip_special_tokens=False) == text


def test_a_text_begins_with_the_token_that_the_file_asks_for() -> None:
    ours = make_sentence_piece()
    keys = sentence_piece_keys(ours)
    del keys["tokenizer.ggml.add_bos_token"]  # SentencePiece models begin with one unless the file says no
    theirs = read_tokenizer(Path("m.gguf"), keys)
    assert theirs is not None
    assert theirs.encode("the cat").ids == [1, *ours.encode("the cat").ids]
    assert theirs.encode("the cat", add_special_tokens=False).ids == ours.encode("the cat").ids


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model": "t5"}, "of the kind 't5'; gpt2 and llama are supported"),
        ({"model": "gpt2", "pre": "tekken"}, "by the pattern 'tekken'"),
        ({"scores": None}, "no tokenizer.ggml.scores"),
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
    ],
)
def test_a_tokenizer_of_another_kind_is_named(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(NestlingError, match=line):
        read_tokenizer(Path("m.gguf"), sentence_piece_keys(make_sentence_piece(), **changes))


def test_a_file_that_is_cut_or_of_another_kind_is_refused(tiny_config: ElasticConfig, tmp_path: Path) -> None:
    path = write_gguf(make_model(tiny_config), tmp_path / "m.gguf", dtype="fp32")
    content = path.read_bytes()
    for length in (4, 100, 5000, len(content) - 2000):
        path.write_bytes(content[:length])
        with pytest.raises(NestlingError, match=r"m\.gguf"):
            load_model(path)
    path.write_bytes(content.replace(b"llama", b"mamba"))
    with pytest.raises(NestlingError, match=r"architecture 'mamba'; llama, qwen2, .*, openelm are supported"):
        load_model(path)
    path.write_text("no model")
    assert not is_gguf(path)
    with pytest.raises(UsageError, match="or a GGUF file"):
        load_model(path)


@pytest.mark.parametrize("content", [None, []])
def test_a_byte_level_tokenizer_without_merges_is_refused(content: list[str] | None) -> None:
    ours = make_tokenizer(PATTERNS["gpt-2"])
    keys = tokenizer_keys(ours, config_of(ours)) | {"tokenizer.ggml.merges": content}
    with pytest.raises(NestlingError, match=r"m\.gguf has no tokenizer\.ggml\.merges.*fetch the file again"):
        read_tokenizer(Path("m.gguf"), keys)


def with_another_value(content: bytes, key: bytes, value: bytes) -> bytes:
    """Replace the type and value of a key that holds 4 bytes."""
    start = content.index(key) + len(key)
    return content[:start] + value + content[start + 8 :] + bytes(64)


WRONG_VALUES = {
    "abc": struct.pack("<IQ3s", 8, 3, b"abc"),
    "nan": struct.pack("<If", 6, float("nan")),
    "array": struct.pack("<IIQII", 9, 4, 2, 1, 2),
    "0": struct.pack("<II", 4, 0),
}
WHOLE_NUMBERS = ["block_count", "embedding_length", "attention.head_count", "context_length"]
NUMBERS = ["rope.freq_base", "attention.layer_norm_rms_epsilon"]


@pytest.mark.parametrize("shown", WRONG_VALUES)
@pytest.mark.parametrize("key", WHOLE_NUMBERS + NUMBERS)
def test_a_key_of_another_type_is_named_with_its_value(
    tiny_config: ElasticConfig, tmp_path: Path, key: str, shown: str
) -> None:
    path = write_gguf(make_model(tiny_config), tmp_path / "m.gguf", dtype="fp32")
    name = f"llama.{key}".encode()
    path.write_bytes(with_another_value(path.read_bytes(), name, WRONG_VALUES[shown]))
    with pytest.raises(NestlingError) as caught:
        read_config(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert line.count("m.gguf") == 1
    if shown in ("abc", "nan"):
        assert f"llama.{key}='{shown}' must be a" in line
        assert line.endswith("fetch the file again")


def test_a_list_that_is_longer_than_the_file_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    endless = struct.pack(
        "<QsIIQ", 1, b"a", 9, 0, 2**60
    )  # a list of bytes, which take up nothing beyond the end
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + endless)
    with pytest.raises(NestlingError, match=r"m\.gguf is damaged.*fetch it again"):
        read_config(path)


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    ours = make_tokenizer(PATTERNS["gpt-2"])
    model = ElasticLM(config_of(ours))
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return write_gguf(
        model, path, dtype="bf16", metadata=tokenizer_keys(ours, model.config, chat_template="{{ 1 }}")
    ).read_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_a_file_with_any_byte_changed_opens_or_is_refused_in_a_line(
    small_gguf: bytes, tmp_path: Path, seed: int
) -> None:
    path, draw = tmp_path / "m.gguf", random.Random(seed)
    header = small_gguf.index(b"blk.0.attn_q.weight")
    for _ in range(25):
        content = bytearray(small_gguf)
        content[draw.randrange(4, draw.choice((400, 1500, header + 1000)))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        with contextlib.suppress(NestlingError):
            load_model(path)
