import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.base.errors import NestlingError, UsageError
from models.base.files import read_json, write_json
from models.elastic.model import ElasticLM
from train.recipe.recipe import load_recipe
from train.recipe.sections import OptimConfig
from train.run.optim import make_optimizer
from train.run.state import load_state, newest_state, save_state


def train_a_little(model: ElasticLM, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        tokens_BT = torch.arange(step, step + 20)[None]
        model(tokens_BT).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def save_at(steps: Path, model: ElasticLM, *places: int, keep: int = 9) -> torch.optim.Optimizer:
    optimizer = make_optimizer(model, OptimConfig())
    for place in places:
        train_a_little(model, optimizer, range(place, place + 2))
        save_state(steps, model, optimizer, step=place, tokens=10 * place, keep=keep)
    return optimizer


def test_a_restored_run_goes_on_bit_for_bit(tiny_model: ElasticLM, tmp_path: Path) -> None:
    optimizer = save_at(tmp_path, tiny_model, 3)
    train_a_little(tiny_model, optimizer, range(10, 13))

    resumed = ElasticLM(tiny_model.config)
    state, damaged = newest_state(tmp_path)
    assert state is not None
    assert (state.step, state.tokens, damaged) == (3, 30, [])
    state.restore_weights(resumed)
    again = make_optimizer(resumed, OptimConfig())
    state.restore_optimizer(resumed, again)
    train_a_little(resumed, again, range(10, 13))
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_only_the_newest_states_stay(tiny_model: ElasticLM, tmp_path: Path) -> None:
    save_at(tmp_path, tiny_model, 1, 2, 10, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "00000010"]


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_state_is_named_and_the_last_good_one_serves(
    tiny_model: ElasticLM, tmp_path: Path, file: str, damage: str
) -> None:
    save_at(tmp_path, tiny_model, 1, 2)
    path = tmp_path / "00000002" / file
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x20
        path.write_bytes(content)
    state, damaged = newest_state(tmp_path)
    assert state is not None
    assert state.step == 1
    assert len(damaged) == 1
    assert str(tmp_path / "00000002") in damaged[0]


def test_without_any_good_state_there_is_none(tmp_path: Path) -> None:
    assert newest_state(tmp_path / "steps") == (None, [])
    (tmp_path / "00000001").mkdir()
    state, damaged = newest_state(tmp_path)
    assert state is None
    assert len(damaged) == 1


def test_a_state_named_by_the_user_must_be_there_and_whole(tiny_model: ElasticLM, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--resume .*: no such folder"):
        load_state(tmp_path / "00000007")
    save_at(tmp_path, tiny_model, 7)
    (tmp_path / "00000007" / "state.json").write_text("{}")
    with pytest.raises(NestlingError, match=r"state\.json is missing or damaged"):
        load_state(tmp_path / "00000007")


def test_states_of_a_replaced_history_go_with_the_first_new_one(
    tiny_model: ElasticLM, tmp_path: Path
) -> None:
    save_at(tmp_path, tiny_model, 4, 8)
    (tmp_path / "00000008" / "state.json").write_text("{}")
    save_at(tmp_path, tiny_model, 6, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000004", "00000006"]


def test_an_unreadable_or_incomplete_state_is_damaged(tiny_model: ElasticLM, tmp_path: Path) -> None:
    save_at(tmp_path, tiny_model, 7)
    write_json(tmp_path / "00000007" / "manifest.json", {})
    with pytest.raises(NestlingError, match=r"model\.safetensors is missing or damaged"):
        load_state(tmp_path / "00000007")


def test_a_state_written_before_there_was_a_guard_still_serves(tiny_model: ElasticLM, tmp_path: Path) -> None:
    save_at(tmp_path, tiny_model, 7)
    folder = tmp_path / "00000007"
    write_json(folder / "state.json", {"step": 7, "tokens": 70})
    manifest = read_json(folder / "manifest.json")
    content = (folder / "state.json").read_bytes()
    manifest["state.json"] = f"{len(content)} {hashlib.sha256(content).hexdigest()}"
    write_json(folder / "manifest.json", manifest)
    state = load_state(folder)
    assert (state.step, state.tokens, dict(state.guard), dict(state.run)) == (7, 70, {}, {})
    assert state.first_row(load_recipe(overrides=["trainer.batch_size=3"])) == 21


def test_weights_of_another_shape_are_named(tiny_model: ElasticLM, tmp_path: Path) -> None:
    save_at(tmp_path, tiny_model, 7)
    other = ElasticLM(replace(tiny_model.config, vocab_size=65))
    with pytest.raises(NestlingError, match=r"another model: model\.embed_tokens.* is \[64, 32\], here \[65"):
        load_state(tmp_path / "00000007").restore_weights(other)
