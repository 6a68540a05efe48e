"""The cache of a teacher: the same bytes whatever happens, runs from it, and what is refused."""

import contextlib
import errno
import io
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from rich.console import Console
from torch import Tensor

import nestling
from models.base.errors import NestlingError, UsageError
from models.base.files import write_file
from models.checkpoint.folder import save_model
from models.checkpoint.weights import hash_weights
from models.elastic.model import ElasticLM
from train.data.module import TextData
from train.distill import cache as module
from train.distill.cache import CachedTeacher, uniforms
from train.distill.open import open_teacher
from train.objective.teacher import ElasticTeacher, Teacher
from train.recipe.recipe import Recipe, load_recipe, save_recipe
from train.run.fit import fit

SMALL = "family={} model.hidden_size=32 model.intermediate_size=64 model.num_hidden_layers=1 dtype=fp32"
QUICK = (
    "trainer.max_steps=6 trainer.batch_size=4 trainer.checkpoint_every=3 loss.ramp_start=0 loss.ramp_steps=2"
)
QUIET = Console(quiet=True)


def make_recipe(teacher_folder: Path, text: Path, *words: str) -> Recipe:
    given = [
        f"loss.teacher={teacher_folder}",
        f"data.source={text}",
        f"data.cache_dir={text.parent / 'data'}",
    ]
    given += ["data.sequence_length=16", "tracking.wandb=disabled", "tracking.tensorboard=false"]
    given += ["loss.ramp_steps=2"]
    return load_recipe(overrides=[*SMALL.split(), *QUICK.split(), *given, "sampler.exit_stride=1", *words])


def make(recipe: Recipe, console: Console = QUIET) -> tuple[CachedTeacher, TextData]:
    opened, data = open_teacher(recipe, "fp32"), TextData(recipe).prepare()
    assert isinstance(opened, CachedTeacher)
    opened.prepare(data, console)
    return opened, data


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.bin"))}


@pytest.fixture
def several_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_TOKENS", 8 * 16)


def weights(folder: Path) -> str:
    return hash_weights(folder)


@pytest.mark.parametrize("form", ["topk", "samples", "all"])
def test_a_cache_made_once_serves_many_runs(
    teacher_folder: Path, text: Path, tmp_path: Path, form: str
) -> None:
    kept = f"distill.cache={tmp_path / 'cache'}", f"distill.form={form}", "loss.divergence=forward_kl"
    first = fit(make_recipe(teacher_folder, text, *kept), tmp_path / "one", console=QUIET)
    bytes_before = shards(tmp_path / "cache")
    again = fit(make_recipe(teacher_folder, text, *kept), tmp_path / "two", console=QUIET)
    other = fit(make_recipe(teacher_folder, text, *kept, "seed=1"), tmp_path / "three", console=QUIET)
    assert weights(first) == weights(again) != weights(other)
    assert shards(tmp_path / "cache") == bytes_before
    assert json.loads((tmp_path / "one" / "teacher.json").read_text())["cache"] == form


def test_a_cache_of_all_of_the_vocabulary_equals_the_run_beside_the_teacher_bit_for_bit(
    teacher_folder: Path, text: Path, tmp_path: Path, several_shards: None
) -> None:
    online = fit(make_recipe(teacher_folder, text), tmp_path / "online", console=QUIET)
    kept = make_recipe(teacher_folder, text, f"distill.cache={tmp_path / 'cache'}", "distill.form=all")
    assert weights(fit(kept, tmp_path / "cached", console=QUIET)) == weights(online)


def test_a_killed_run_from_a_cache_goes_on_bit_for_bit(
    teacher_folder: Path, text: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(teacher_folder, text, f"distill.cache={tmp_path / 'cache'}")
    whole = fit(recipe, tmp_path / "whole", console=QUIET)
    fit(recipe, tmp_path / "cut", console=QUIET)
    state = tmp_path / "cut" / "steps" / "00000003"
    resumed = fit(recipe, tmp_path / "resumed", resume=str(state), console=QUIET)
    assert weights(resumed) == weights(whole)


class Dies(Exception):
    """Stands for a kill."""


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Kills the teacher when it was asked as often as the list says."""
    left = [10**9]
    ask = ElasticTeacher.logits

    def logits(self: ElasticTeacher, tokens_BT: Tensor) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise Dies
        return ask(self, tokens_BT)

    monkeypatch.setattr(ElasticTeacher, "logits", logits)
    return left


def test_a_cache_that_was_killed_goes_on_and_its_bytes_are_the_same(
    teacher_folder: Path, text: Path, tmp_path: Path, several_shards: None, dying: list[int]
) -> None:
    make(make_recipe(teacher_folder, text, f"distill.cache={tmp_path / 'whole'}", "distill.form=samples",
                     "loss.divergence=forward_kl"))  # fmt: skip
    cut = make_recipe(
        teacher_folder,
        text,
        f"distill.cache={tmp_path / 'cut'}",
        "distill.form=samples",
        "loss.divergence=forward_kl",
    )
    dying[0] = 7
    with pytest.raises(Dies):
        make(cut)
    done = shards(tmp_path / "cut")
    assert 0 < len(done) < len(shards(tmp_path / "whole"))
    stamps = {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in done}
    dying[0] = 10**9
    make(cut)
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    assert stamps == {name: (tmp_path / "cut" / name).stat().st_mtime_ns for name in done}, "made once"


def test_a_whole_cache_asks_the_teacher_nothing(
    teacher_folder: Path, text: Path, tmp_path: Path, dying: list[int]
) -> None:
    recipe = make_recipe(teacher_folder, text, f"distill.cache={tmp_path / 'cache'}")
    make(recipe)
    dying[0] = 0
    make(recipe)


@pytest.mark.parametrize("spoil", ["cut", "changed", "gone"])
def test_a_damaged_shard_is_named_and_made_again(
    teacher_folder: Path, text: Path, tmp_path: Path, several_shards: None, spoil: str
) -> None:
    recipe = make_recipe(teacher_folder, text, f"distill.cache={tmp_path / 'cache'}")
    make(recipe)
    before = shards(tmp_path / "cache")
    path = tmp_path / "cache" / "00001.bin"
    content = path.read_bytes()
    path.unlink() if spoil == "gone" else path.write_bytes(
        content[:-1] if spoil == "cut" else bytes([content[0] ^ 1]) + content[1:]
    )
    console = Console(record=True, file=io.StringIO(), width=200)
    make(recipe, console)
    assert shards(tmp_path / "cache") == before
    said = console.export_text()
    assert ("00001.bin is damaged; it is made again" in said) == (spoil != "gone")
    assert "66 bytes a token" in said


def test_what_a_cache_takes_is_said_before_it_is_made(
    teacher_folder: Path, text: Path, tmp_path: Path, dying: list[int]
) -> None:
    dying[0] = 0
    console = Console(record=True, file=io.StringIO(), width=200)
    with pytest.raises(Dies):
        make(make_recipe(teacher_folder, text, f"distill.cache={tmp_path / 'cache'}"), console)
    assert "66 bytes a token" in console.export_text()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["data.sequence_length=32"], r"another data\.sequence_length: 16, now 32"),
        (["distill.k=8"], r"another distill\.k: 16, now 8"),
        (["loss.temperature=2.0"], r"another loss\.temperature: 1\.0, now 2\.0"),
        (["distill.form=samples", "loss.divergence=forward_kl"], r"another distill\.form: topk, now samples"),
        (["data.max_documents=9"], r"another data\.source: \w{12}, now \w{12}"),
    ],
)
def test_a_cache_of_something_else_is_refused_by_name(
    teacher_folder: Path, text: Path, tmp_path: Path, words: list[str], named: str
) -> None:
    kept = f"distill.cache={tmp_path / 'cache'}"
    make(make_recipe(teacher_folder, text, kept))
    before = shards(tmp_path / "cache")
    with pytest.raises(UsageError, match=f"distill.cache={tmp_path / 'cache'}: was made from {named}"):
        make(make_recipe(teacher_folder, text, kept, *words))
    assert shards(tmp_path / "cache") == before


def test_a_cache_of_another_teacher_is_refused_by_name(
    teacher_folder: Path, text: Path, tmp_path: Path
) -> None:
    kept = f"distill.cache={tmp_path / 'cache'}"
    make(make_recipe(teacher_folder, text, kept))
    other = tmp_path / "other"
    save_model(other, _changed(teacher_folder), like=teacher_folder, family={})
    with pytest.raises(
        UsageError, match=rf"another loss\.teacher: \w{{12}} \({teacher_folder}\), now \w{{12}}"
    ):
        make(make_recipe(other, text, kept))
    alike = tmp_path / "alike"
    shutil.copytree(teacher_folder, alike)
    fields = json.loads((alike / "config.json").read_text())
    (alike / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 0.1}))
    with pytest.raises(UsageError, match=r"another config\.json of loss\.teacher: \w{12}, now \w{12}"):
        make(make_recipe(alike, text, kept))


def test_every_logit_is_kept_in_one_dtype(teacher_folder: Path, text: Path, tmp_path: Path) -> None:
    kept = f"distill.cache={tmp_path / 'cache'}", "distill.form=all"
    make(make_recipe(teacher_folder, text, *kept))
    with pytest.raises(UsageError, match=r"another distill\.dtype: fp32, now bf16"):
        make(make_recipe(teacher_folder, text, *kept, "distill.dtype=bf16"))


def _changed(teacher_folder: Path) -> ElasticLM:
    from models.checkpoint.folder import load_model

    model = load_model(teacher_folder).model
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1
    return model


def test_a_folder_of_something_else_is_refused(teacher_folder: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"distill\.cache=.*mine: .*is not ours to replace"):
        make(make_recipe(teacher_folder, text, f"distill.cache={tmp_path / 'mine'}"))


def test_a_disk_without_room_is_told_before_the_teacher_is_asked(
    teacher_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dying: list[int]
) -> None:
    dying[0] = 0
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(NestlingError, match=r"needs [\d,]+ bytes and the disk has 100; make room"):
        make(make_recipe(teacher_folder, text, f"distill.cache={tmp_path / 'cache'}"))


def test_a_disk_that_fills_up_is_told_in_a_line_and_what_was_made_stays(
    teacher_folder: Path,
    text: Path,
    tmp_path: Path,
    several_shards: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = make_recipe(teacher_folder, text, f"distill.cache={tmp_path / 'cache'}")
    left = [2]

    @contextlib.contextmanager
    def fills_up(path: Path) -> Iterator[Path]:
        left[0] -= 1
        with write_file(path) as partial:
            yield partial
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("train.distill.cache.write_file", fills_up)
    with pytest.raises(NestlingError, match=r"cannot write .*00002\.bin: No space left on device; make room"):
        make(recipe)
    assert sorted(shards(tmp_path / "cache")) == ["00000.bin", "00001.bin"]
    assert not list((tmp_path / "cache").glob(".*.partial"))
    left[0] = 10**9
    make(recipe)
    assert len(shards(tmp_path / "cache")) > 2


def test_the_same_from_python(teacher_folder: Path, text: Path, tmp_path: Path) -> None:
    recipe = make_recipe(teacher_folder, text, f"distill.cache={tmp_path / 'cache'}")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    by_call = nestling.distill(
        teacher_folder, tmp_path / "recipe.yaml", out=tmp_path / "one", cache=tmp_path / "cache"
    )
    assert weights(by_call) == weights(fit(recipe, tmp_path / "two", console=QUIET))


def test_random_numbers_are_a_function_of_the_row() -> None:
    together, alone = uniforms(np.array([3, 4]), 5), uniforms(np.array([4]), 5)
    assert (together[1] == alone[0]).all()
    assert ((together >= 0) & (together < 1)).all()


def test_the_teacher_protocol_is_kept(teacher_folder: Path, text: Path, tmp_path: Path) -> None:
    kept: Teacher = make(make_recipe(teacher_folder, text, f"distill.cache={tmp_path / 'cache'}"))[0]
    assert kept.record["path"] == str(teacher_folder)


def test_a_cache_serves_runs_of_any_batch_size(
    teacher_folder: Path, text: Path, tmp_path: Path, several_shards: None
) -> None:
    kept = f"distill.cache={tmp_path / 'cache'}"
    make(make_recipe(teacher_folder, text, kept))
    before = shards(tmp_path / "cache")
    other, data = make(make_recipe(teacher_folder, text, kept, "trainer.batch_size=3"))
    assert shards(tmp_path / "cache") == before
    assert sum(map(len, other.maps)) == len(data.train_rows)


def test_a_damaged_list_of_shards_costs_the_shards_and_no_more(
    teacher_folder: Path, text: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(teacher_folder, text, f"distill.cache={tmp_path / 'cache'}")
    make(recipe)
    before = shards(tmp_path / "cache")
    (tmp_path / "cache" / "shards.json").write_text("{")
    shown = io.StringIO()
    make(recipe, Console(file=shown, width=300))
    assert "shards.json is damaged; all shards are made again" in shown.getvalue()
    assert shards(tmp_path / "cache") == before


def test_a_process_waits_for_the_one_that_fills_the_cache(
    teacher_folder: Path, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    recipe = make_recipe(teacher_folder, text, f"distill.cache={folder}")
    opened, data = open_teacher(recipe, "fp32"), TextData(recipe).prepare()
    assert opened is not None
    folder.mkdir()
    held, told = threading.Event(), threading.Event()

    class Shown(io.StringIO):
        def write(self, words: str) -> int:
            if "another process is filling it; this one waits" in words:
                told.set()
            return super().write(words)

    def hold() -> None:
        with FileLock(folder / ".lock"):  # before cache.json: so would a kill leave it
            held.set()
            told.wait(120)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    opened.prepare(data, Console(file=Shown(), width=300))
    other.join()
    assert told.is_set()
    assert shards(folder)
