"""docs/pretrained.md is a tutorial that runs, on a small real model where there is one."""

import functools
import importlib
import io
import json
import os
import shlex
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from torch import Tensor

from models.checkpoint.folder import load_model, save_model
from models.checkpoint.weights import model_from
from models.elastic.config import ElasticConfig
from models.elastic.model import ElasticLM
from models.machine.card import measure_card
from train.cli import main
from train.data.tokenizer import train_bpe
from train.run.start import hash_tensors

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "pretrained.md").read_text(encoding="utf-8")
STORIES = ROOT.parent / "shared" / "weights" / "stories260K.bin"
"""A Llama of 260 thousand parameters, https://github.com/karpathy/llama2.c; it is not part of the project."""
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
STORY = "Once upon a time there was a little cat. The cat sat on a mat and saw a dog. The dog ran. "
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMALL = {
    "train": "trainer.max_steps=2 trainer.batch_size=2 data.sequence_length=32 trainer.limit_val_batches=1 "
    "optim.warmup_steps=1 tracking.wandb=disabled tracking.tensorboard=false dtype=fp32",
    "generate": "--max-new-tokens 8",
    "order": "--max-tokens 64",
    "evaluate": "--max-tokens 64",
    "demo": "trainer.max_steps=2 trainer.batch_size=2 trainer.limit_val_batches=1 dtype=fp32",
}
"""What is added to a command, so that it takes no time."""


def commands() -> list[str]:
    """The lines of the page's shell blocks, those that go on in the next joined."""
    blocks = [part.split("```")[0] for part in PAGE.split("```sh\n")[1:]]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def read_stories(weights: Path) -> ElasticLM:
    """Read llama2.c's first format: seven numbers, then tensors, each for all layers."""
    data = weights.read_bytes()
    width, ffn, layers, heads, groups, vocabulary, length = struct.unpack("<7i", data[:28])
    config = ElasticConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=length,
        bos_token_id=1,
        eos_token_id=2,
    )
    numbers, taken = torch.from_numpy(np.frombuffer(data, "<f4", offset=28).copy()), 0

    def take(*shape: int) -> Tensor:
        nonlocal taken
        first, taken = taken, taken + int(np.prod(shape))
        return numbers[first:taken].view(*shape)

    def halves(rows_LOI: Tensor) -> Tensor:
        """Rotary positions of neighbouring rows there, of halves here."""
        parts = rows_LOI.unflatten(1, (-1, config.head_dim // 2, 2)).transpose(2, 3)
        halved_LOI: Tensor = parts.reshape(rows_LOI.shape)
        return halved_LOI

    kv = groups * config.head_dim
    tensors = {"model.embed_tokens.weight": take(vocabulary, width)}
    named = {
        "input_layernorm": take(layers, width),
        "self_attn.q_proj": halves(take(layers, width, width)),
        "self_attn.k_proj": halves(take(layers, kv, width)),
        "self_attn.v_proj": take(layers, kv, width),
        "self_attn.o_proj": take(layers, width, width),
        "post_attention_layernorm": take(layers, width),
        "mlp.gate_proj": take(layers, ffn, width),
        "mlp.down_proj": take(layers, width, ffn),
        "mlp.up_proj": take(layers, ffn, width),
    }
    for name, all_layers in named.items():
        tensors |= {f"model.layers.{layer}.{name}.weight": one for layer, one in enumerate(all_layers)}
    return model_from(config, {**tensors, "model.norm.weight": take(width)})


def read_pieces(path: Path) -> Tokenizer:
    """Read llama2.c's pieces, each with a score; a merge makes a piece of two, the best score first."""
    data, pieces, at = path.read_bytes(), [], 4
    while at < len(data):
        length = struct.unpack("<i", data[at + 4 : at + 8])[0]
        pieces.append(data[at + 8 : at + 8 + length].decode().strip("\n").replace(" ", "▁"))
        at += 8 + length
    numbers = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[259:]
        for cut in range(1, len(piece))
        if piece[:cut] in numbers and piece[cut:] in numbers
    ]
    tokenizer = Tokenizer(models.BPE(vocab=numbers, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the tutorial begins with."""
    here = tmp_path_factory.mktemp("tutorial")
    if STORIES.is_file():
        model, tokenizer = read_stories(STORIES), read_pieces(STORIES.with_name("tok512.bin"))
    else:
        ours = train_bpe([STORY] * 9, vocab_size=300)
        model = ElasticLM(
            ElasticConfig(
                vocab_size=300,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=5,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                eos_token_id=ours.eos_token_id,
            )
        )
        model.init_weights(torch.Generator().manual_seed(0))
        tokenizer = ours.backend
    save_model(here / "given", model, tokenizer=tokenizer, chat_template=TEMPLATE)
    if not STORIES.is_file():  # whose tokenizer no GGUF file of ours can hold
        words = ["--granularity", "full", "--format", "gguf", "--dtype", "fp32"]
        assert main(["extract", str(here / "given"), *words, "--out", str(here / GGUF)]) == 0
    for name in ("text.jsonl", "other.jsonl"):
        (here / name).write_text("".join(json.dumps({"text": STORY * 4}) + "\n" for _ in range(8)))
    questions = ["Why?", "Who is the cat?", "Where does the dog run?", "What is a mat?"] * 3
    (here / "questions.jsonl").write_text("".join(json.dumps({"prompt": one}) + "\n" for one in questions))
    return here


@pytest.mark.skipif(not STORIES.is_file(), reason="needs the weights beside the project")
def test_the_real_model_tells_a_story(place: Path) -> None:
    words = ["--prompt", "Once upon a time", "--max-new-tokens", "24", "--json", str(place / "story.json")]
    assert main(["generate", str(place / "given"), "--draft", "none", "--dtype", "fp32", *words]) == 0
    assert json.loads((place / "story.json").read_text())["text"].startswith(", there was a")


def test_every_command_of_the_tutorial_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("train.commands.demo_pretrained.TOPICS", ("rain", "bread"))
    quick = functools.cache(functools.partial(measure_card, num_matrices=1, budget=0.0))
    monkeypatch.setattr("models.machine.card.measure_card", quick)
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n"))
    monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(place / "cache"))
    source = GGUF if (place / GGUF).exists() else "given"
    for line in commands():
        line = line.replace("make demo-pretrained MODEL=smollm2", "nestling demo --model smollm2")
        line = line.replace(GGUF, source)
        if source == "given" and "--format gguf" in line:
            continue
        program, command, *words = shlex.split(line)
        assert program == "nestling", line
        small = SMALL.get(command, "").split()
        capsys.readouterr()
        assert main([command, *words, *small]) == 0, (line, capsys.readouterr().err)
    before, after = load_model(place / "smollm2"), load_model(place / "checkpoints" / "draft" / "model")
    assert hash_tensors(after.model) == hash_tensors(before.model), "the model itself stayed"
    assert after.family["D"] != after.family["XL"]


def test_the_tables_of_the_page_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    tables = importlib.import_module("pretrained")
    assert tables.main(["--check"]) == 0
    points = [
        {"tokens": tokens, "minutes": 1.0, "members": {"D": {"loss": 3.0, "alpha": alpha}}}
        for tokens, alpha in ((0, 0.1), (100_000, 0.3), (400_000, 0.4))
    ]
    assert tables.extrapolate(points[1:], "D", 1_600_000) == pytest.approx(0.5)
    assert tables.table(points).splitlines()[-1].startswith("| 1.6M, extrapolated |")
