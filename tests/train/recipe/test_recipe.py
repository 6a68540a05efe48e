import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.base.errors import UsageError
from models.elastic.config import ElasticConfig
from models.elastic.count import count_parameters
from models.elastic.granularity import Granularity
from train.recipe.recipe import (
    RENAMED,
    Recipe,
    load_recipe,
    load_saved_recipe,
    recipe_help,
    save_recipe,
)
from train.recipe.sections import DataConfig, LossConfig, OptimConfig, SamplerConfig, TrackingConfig
from train.recipe.settings import as_table

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write a YAML file and give its path."""

    def write(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return path

    return write


def refusal(*overrides: str, configs: tuple[Path, ...] = ()) -> str:
    with pytest.raises(UsageError) as caught:
        load_recipe(configs, overrides)
    return str(caught.value)


# ---------------------------------------------------------------- where values come from


def test_without_files_and_overrides_a_recipe_is_the_defaults() -> None:
    assert load_recipe() == Recipe()
    assert list(Recipe().granularities) == ["S", "M", "L", "D", "XL"]


def test_overrides_win_over_later_files_which_win_over_earlier_ones(write: Any) -> None:
    first = write("seed: 1\noptim: {lr: 1e-2, eps: 1.0e-6}\n", "first.yaml")
    second = write("optim: {lr: 2e-2}\nmodel:\n", "second.yaml")
    recipe = load_recipe([first, second], ["optim.weight_decay=0.2"])
    assert (recipe.seed, recipe.optim.lr, recipe.optim.eps) == (1, 2e-2, 1e-6)
    assert (recipe.optim.weight_decay, recipe.model) == (0.2, Recipe().model)
    assert load_recipe([second], ["optim.lr=3e-2", "optim.lr=4e-2"]).optim.lr == 4e-2


@pytest.mark.parametrize(
    "words", [["trainer.max_steps=7"], ["--trainer.max_steps=7"], ["--trainer.max_steps", "7"]]
)
def test_the_three_ways_to_write_an_override_are_equal(words: list[str]) -> None:
    recipe = load_recipe([], ["seed=5", *words, "--model.qk_norm", "true"])
    assert (recipe.trainer.max_steps, recipe.seed, recipe.model.qk_norm) == (7, 5, True)


@pytest.mark.parametrize("words", [["seed"], ["--seed"], ["=1"], ["--"], ["--seed", "--model.qk_norm=true"]])
def test_a_word_that_is_no_override_is_named(words: list[str]) -> None:
    assert refusal(*words).startswith(words[0])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("tracking.name=2024", "2024"),
        ("tracking.name=off", "off"),
        ("tracking.name=a: b", "a: b"),
        ("tracking.name=a=b", "a=b"),
        ("tracking.name='7'", "7"),
        ("tracking.name=", None),
        ("tracking.name=null", None),
    ],
)
def test_text_needs_no_quotes_in_an_override(override: str, value: str | None) -> None:
    assert load_recipe([], [override]).tracking.name == value


@pytest.mark.parametrize("key", ["model.from", "loss.teacher"])
def test_a_model_that_is_named_by_nothing_is_refused(key: str) -> None:
    assert f"{key}=: is empty; give a model, or null for none" in refusal(f"{key}=")
    assert load_recipe(overrides=[f"{key}=null"]) == Recipe()


def test_numbers_are_read_in_every_usual_form() -> None:
    words = ["optim.lr=1e-3", "trainer.max_steps=1e4", "optim.betas=[0.8, 0.9]", "trainer.devices=2"]
    recipe = load_recipe([], words)
    assert (recipe.optim.lr, recipe.trainer.max_steps, recipe.trainer.devices) == (1e-3, 10_000, 2)
    assert recipe.optim.betas == (0.8, 0.9)
    assert load_recipe([], ["optim.weight_decay=1"]).optim.weight_decay == 1.0
    assert load_recipe([], ["trainer.devices=auto"]).trainer.devices == "auto"


def test_a_setting_can_refer_to_another(write: Any) -> None:
    path = write("model:\n  hidden_size: 32\n  intermediate_size: ${model.hidden_size}\n")
    assert load_recipe([path]).model.intermediate_size == 32
    assert load_recipe([path], ["model.hidden_size=48"]).model.intermediate_size == 48
    assert "model.hidden" in refusal("model.intermediate_size=${model.hidden}")


def test_a_family_in_a_file_replaces_and_an_override_changes_one_member(write: Any) -> None:
    path = write("family: {A: ffn=0.5, B: 'heads=0.5,layers=0:2'}")
    assert load_recipe([path]).family == {"A": "ffn=0.5", "B": "heads=0.5,layers=0:2"}
    changed = load_recipe([path], ["family.A=ffn=0.25", "--family.C", "layers=0-2", "family.B=null"])
    assert changed.family == {"A": "ffn=0.25", "C": "layers=0-2"}
    assert load_recipe([], ["family={}"]).granularities == {"XL": Granularity()}


def test_probabilities_are_a_table_that_starts_empty() -> None:
    words = ["sampler.kind=random", "sampler.probabilities.S=1", "sampler.probabilities.XL=3"]
    assert load_recipe([], words).sampler.probabilities == {"S": 1.0, "XL": 3.0}


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("model.hiden_size=64", "model.hidden_size"),
        ("max_steps=10", "trainer.max_steps"),
        ("train.max_steps=10", "trainer.max_steps"),
        ("optim.learning_rate=1", "optim has lr, betas"),
        ("seeed=1", "seed"),
        ("seed.x=1", "seed"),
        ("loss.divergance=kl_tv", "loss.divergence"),
        ("model=3", "model.from"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_right_one(override: str, nearest: str) -> None:
    message = refusal(override)
    assert message.startswith(override)
    assert nearest in message


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_key_is_refused_with_its_new_name_but_read_from_a_finished_run(
    old: str, new: str, write: Any
) -> None:
    assert refusal(f"{old}=1") == f"{old}=1: is now called {new}"
    section, _, name = new.partition(".")
    path = write(f"{section}:\n  {old.partition('.')[2]}: 1\n")
    assert refusal(configs=(path,)) == f"{old}=1 in {path}: is now called {new}"
    assert getattr(getattr(load_saved_recipe(path), section), name) == 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.hidden_size=wide", "whole number"),
        ("model.hidden_size=1.5", "whole number"),
        ("model.hidden_size=true", "whole number"),
        ("model.hidden_size=null", "whole number"),
        ("model.hidden_size=0", "[1, inf)"),
        ("optim.lr=0", "number in (0, inf)"),
        ("optim.lr=nan", "number in (0, inf)"),
        ("optim.betas=[0.9]", "list of 2"),
        ("optim.betas=[0.9, 1.0]", "[0, 1)"),
        ("sampler.row_fraction=0", "(0, 1]"),
        ("sampler.row_fraction=1.1", "(0, 1]"),
        ("sampler.kind=some", "rows, all, random, sandwich"),
        ("loss.divergence=kl", "forward_kl, reverse_kl"),
        ("model.qk_norm=3", "true or false"),
        ("data.max_documents=many", "whole number in [1, inf) or null"),
        ("family=S", "table of text"),
        ("sampler.probabilities={S: -1}", "[0, inf)"),
    ],
)
def test_a_wrong_value_is_refused_with_what_was_expected(override: str, expected: str) -> None:
    message = refusal(override)
    key, _, value = override.partition("=")
    assert message.startswith(f"{key}={value}: expected ")
    assert expected in message


def test_all_problems_come_at_once_a_line_each_and_name_their_file(write: Any) -> None:
    path = write("optim: {lr: -1, lrr: 2}\ntracking: {name: 2024}\nsampler: 4\n")
    lines = refusal("seed=x", "modell.x=1", configs=(path,)).splitlines()
    assert len(lines) == 6
    for key in ("optim.lr=-1", "optim.lrr=2", "tracking.name=2024", "sampler=4"):
        assert any(line.startswith(key) and str(path) in line for line in lines), key
    for key in ("seed=x", "modell.x=1"):
        assert any(line.startswith(key) and str(path) not in line for line in lines), key


@pytest.mark.parametrize("text", ["- 1\n", "7\n", "a: [1", "seed: 1\nseed: 2\n", "\x00"])
def test_a_file_that_is_no_recipe_is_named(write: Any, text: str) -> None:
    path = write(text)
    message = refusal(configs=(path,))
    assert message.startswith(f"--config {path}: ")
    assert "\n" not in message


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none.yaml"
    assert refusal(configs=(path,)) == f"--config {path}: there is no such file"
    assert str(tmp_path) in refusal(configs=(tmp_path,))


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("family.S=ffn=2", "above 0"),
        ("family.S=small", "write it out"),
        ("family.S=layers=0-9", "0 to 5"),
        ("family.S=heads=0.3", "0.25, 0.5"),
        ("family.S=layers=0-5", "family.S=null"),
        ("family.XL=ffn=0.5", "rename"),
        ("family.lookup=ffn=0.5", "--draft lookup is something else; rename"),
        ("family.a b=ffn=0.5", "letters"),
    ],
)
def test_a_member_that_does_not_fit_the_model_is_named(override: str, remedy: str) -> None:
    message = refusal(override)
    assert message.startswith(override)
    assert remedy in message


def test_the_full_model_may_be_named_in_a_family_and_still_comes_last() -> None:
    recipe = load_recipe([], ["family={XL: full, S: ffn=0.5}"])
    assert list(recipe.granularities) == ["S", "XL"]


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["sampler.probabilities.S=1"], "set that to random"),
        (["sampler.turns.D=2"], "D has no pass of its own; those that have: L, M, S"),
        (["sampler.turns.S=2", "sampler.kind=all"], "set that to rows"),
        (["sampler.kind=random", "sampler.probabilities.Z=1"], "Z is not in the family"),
        (["sampler.turns={S:2}"], "sampler.turns={S:2}: expected table of whole number"),
        (["family.T=ffn=0.5"], "family.T=ffn=0.5: has the layers and widths of L"),
        (
            ["members=draft", "sampler.turns={D: 2}"],
            "D has no pass of its own; no member has; set it to null",
        ),
        (["sampler.kind=random", "sampler.probabilities.S=0"], "above 0"),
        (["loss.narrow_gradient=1e-30"], "loss.narrow_gradient=1e-30"),
        (["model.max_position_embeddings=100"], "data.sequence_length=256"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], remedy: str) -> None:
    assert remedy in refusal(*overrides)


def test_a_section_made_in_code_is_checked_too() -> None:
    with pytest.raises(ValidationError, match=r"(?s)beta.*less than 1.*skew.*greater than or equal to 0"):
        LossConfig(beta=2, skew=-1)
    assert isinstance(LossConfig(weight=2).weight, float)


# ---------------------------------------------------------------- saved, and explained

TEXT = st.text(max_size=20).filter(lambda text: "$" not in text and text.isprintable())
RECIPES = st.builds(
    replace,
    st.just(Recipe()),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["auto", "fp32", "bf16"]),
    family=st.dictionaries(
        st.from_regex(r"[A-Za-z0-9_]{1,4}", fullmatch=True).filter(lambda name: name != "XL"),
        st.sampled_from(["ffn=0.5", "layers=0:3:5", "ffn=1:0.5,layers=0-1", "heads=0.25"]),
    ).filter(lambda family: len(set(family.values())) == len(family)),
    sampler=st.builds(SamplerConfig, row_fraction=st.floats(0.01, 1.0)),
    data=st.builds(DataConfig, source=TEXT, valid=st.none() | TEXT, separator=TEXT),
    optim=st.builds(
        OptimConfig, lr=st.floats(1e-12, 1e3), betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99))
    ),
    tracking=st.builds(TrackingConfig, name=st.none() | TEXT),
)


@given(recipe=RECIPES)
def test_a_saved_recipe_reads_back_equal(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    save_recipe(recipe, path)
    assert load_recipe([path]) == recipe
    assert list(load_recipe([path]).family) == list(recipe.family)
    assert [file.name for file in path.parent.iterdir()] == ["recipe.yaml"]


def test_every_setting_has_a_row_of_help() -> None:
    def keys(values: dict[str, Any], prefix: str = "") -> list[str]:
        inner = {"family", "probabilities", "turns"}
        nested = [
            keys(value, f"{prefix}{name}.")
            if isinstance(value, dict) and name not in inner
            else [f"{prefix}{name}"]
            for name, value in values.items()
        ]
        return [key for group in nested for key in group]

    rows = recipe_help()
    assert [row.key for row in rows] == keys(as_table(Recipe()))
    assert all(row.help and row.type and row.default for row in rows)
    share = next(row for row in rows if row.key == "sampler.row_fraction")
    assert (share.type, share.default) == ("number in (0, 1]", "0.25")


def test_a_default_is_what_the_help_says_and_reads_back() -> None:
    words = [f"{row.key}={row.default}" for row in recipe_help()]
    assert load_recipe([], words) == Recipe()


def test_reading_a_recipe_does_not_load_torch() -> None:
    code = "import sys, train.recipe.recipe as r; r.load_recipe(); print('torch' in sys.modules)"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "False"


# ---------------------------------------------------------------- the recipes in configs/


def shape(recipe: Recipe) -> ElasticConfig:
    return recipe.elastic_config()


def test_there_are_recipes() -> None:
    assert {"tiny", "demo", "tinystories-8m"} <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_loads_and_its_members_fit(path: Path) -> None:
    recipe = load_recipe([path])
    for granularity in recipe.granularities.values():
        granularity.resolve(shape(recipe))
    ramp_end = recipe.loss.ramp_start + recipe.loss.ramp_steps
    assert max(recipe.optim.warmup_steps, ramp_end) < recipe.trainer.max_steps


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_table_in_a_recipe_is_true(path: Path) -> None:
    recipe = load_recipe([path])
    config = shape(recipe)
    embedding, full = config.vocab_size * config.hidden_size, count_parameters(config)
    rows = [
        f"# | {name} | {recipe.family.get(name, 'full')} | {count:,} | "
        f"{(count - embedding) / (full - embedding):.0%} |"
        for name, one in recipe.granularities.items()
        for count in [count_parameters(config, one)]
    ]
    table = [line for line in path.read_text("utf-8").splitlines() if re.match(r"# \| \w+ \| [\w=]", line)]
    assert [line[: len(row)] for line, row in zip(table[1:], rows, strict=True)] == rows


def test_exits_learn_at_the_same_positions_of_every_row() -> None:
    with pytest.raises(UsageError, match=r"exit_stride=4: .* data.sequence_length=30; set it to 3"):
        load_recipe(overrides=["data.sequence_length=30", "sampler.exit_stride=4"])


@pytest.mark.parametrize("value", ["1e30", "16385", "4611686018427387904"])
def test_more_layers_than_any_model_has_are_refused_before_they_are_counted(value: str) -> None:
    with pytest.raises(UsageError, match=r"model\.num_hidden_layers=.*16384"):
        load_recipe(overrides=[f"model.num_hidden_layers={value}"])


def test_what_is_not_printable_in_a_recipe_is_shown_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text('{"model": {"hid\\nden": "a\\nb"}, "dtype": "f\\np"}')
    with pytest.raises(UsageError) as caught:
        load_recipe([tmp_path / "a.yaml"])
    assert len(str(caught.value).splitlines()) == 2


def test_a_run_saved_before_members_owned_weights_goes_on_without_them(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 3\n")
    saved = load_saved_recipe(path)
    assert (saved.seed, saved.owned.norms, saved.owned.rank, saved.loss.narrow_gradient) == (3, False, 0, 1.0)
    save_recipe(Recipe(), path)
    assert load_saved_recipe(path) == Recipe()


def test_what_members_own_learns_faster_unless_nothing_else_trains_or_the_run_is_older(
    tmp_path: Path,
) -> None:
    assert Recipe().owned_optim.lr == pytest.approx(3 * Recipe().optim.lr)
    assert load_recipe(overrides=["owned.lr=0.5"]).owned_optim.lr == 0.5
    assert load_recipe(overrides=["owned.min_lr_ratio=null"]).owned_optim.min_lr_ratio == 0.1
    path = tmp_path / "recipe.yaml"
    path.write_text("optim: {lr: 0.25}\n")
    saved = load_saved_recipe(path)
    assert saved.owned_optim == saved.optim, "as was all else"
