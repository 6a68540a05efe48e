"""The three dials set other settings, below what the command line says of those and above the files."""

from pathlib import Path

import pytest

from models.base.errors import UsageError
from models.elastic.count import count_parameters
from train.recipe.dials import DIALS, MEMBERS, SIZES
from train.recipe.recipe import Recipe, load_recipe, with_members


def test_the_defaults_are_what_the_help_says() -> None:
    assert load_recipe(overrides=["tokens=8.192M", "members=even"]) == Recipe()
    assert DIALS["members"].default == "even"
    assert count_parameters(Recipe().elastic_config()) == pytest.approx(7e6, rel=0.05)


@pytest.mark.parametrize("size", SIZES)
def test_a_size_has_the_parameters_that_it_is_called_after(size: str) -> None:
    config = load_recipe(overrides=[f"size={size}"]).elastic_config()
    assert count_parameters(config) == pytest.approx(float(size.removesuffix("M")) * 1e6, rel=0.12)


@pytest.mark.parametrize("members", MEMBERS)
@pytest.mark.parametrize("size", SIZES)
def test_every_family_fits_every_size(size: str, members: str) -> None:
    recipe = load_recipe(overrides=["--size", size, f"--members={members}", "tokens=1M"])
    for granularity in recipe.granularities.values():
        granularity.resolve(recipe.elastic_config())


def test_tokens_set_the_schedule_by_what_a_step_holds() -> None:
    recipe = load_recipe(overrides=["tokens=8e6", "trainer.batch_size=50", "data.sequence_length=200"])
    assert recipe.trainer.max_steps == 800
    assert (recipe.optim.warmup_steps, recipe.loss.ramp_start, recipe.loss.ramp_steps) == (40, 80, 320)
    assert load_recipe(overrides=["tokens=1"]).trainer.max_steps == 1


def test_in_a_short_run_the_full_model_learns_alone_at_first_and_is_seldom_measured() -> None:
    for tokens, steps, first in (("1M", 244, 50), ("200k", 49, 49)):
        recipe = load_recipe(overrides=[f"tokens={tokens}"])
        found = (recipe.trainer.max_steps, recipe.loss.ramp_start, recipe.trainer.val_check_interval)
        assert found == (steps, first, first)
    assert load_recipe(overrides=["tokens=1M", "loss.teacher=x"]).loss.ramp_start == 24, "it knows already"


def test_members_learn_otherwise_in_a_longer_run_unless_it_is_said_how() -> None:
    def learning(*words: str) -> tuple[float | None, ...]:
        recipe = load_recipe(overrides=["size=8M", *words])
        loss = recipe.loss
        return loss.narrow_gradient, recipe.owned.min_lr_ratio, loss.hidden_weight, recipe.sampler.turns_power

    found = [learning(f"tokens={tokens}") for tokens in ("1M", "20M", "160M")]
    assert found == [(0.2, 0.3, 12.0, 1.0), (0.7, 0.2, 9.0, 0.7), (1.0, 0.1, 6.0, 0.5)]
    assert learning("tokens=160M", "members=even") == found[-1]
    assert learning("trainer.max_steps=39000", "members=even") == found[-1]
    assert learning("trainer.max_steps=39000") == learning()
    light = (0.7, None, 0.0, 1.0)
    assert learning("tokens=160M", "members=light") == learning("tokens=1M", "members=light") == light
    own = (
        *("loss.narrow_gradient=0.2", "owned.min_lr_ratio=0"),
        "loss.hidden_weight=1",
        "sampler.turns_power=0",
    )
    for words in (own, ("members=even", *own)):
        assert learning("tokens=160M", *words) == (0.2, 0.0, 1.0, 0.0)


def test_dials_win_over_files_and_keys_win_over_dials_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {hidden_size: 64, qk_norm: true}\n")
    recipe = load_recipe([path], ["model.num_hidden_layers=5", "size=8M"])
    assert (recipe.model.hidden_size, recipe.model.qk_norm) == (256, True)
    assert recipe.model.num_hidden_layers == 5
    assert load_recipe([path], ["optim.warmup_steps=3", "tokens=2M"]).optim.warmup_steps == 3


def test_wrong_values_are_all_named_with_what_a_dial_takes() -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(overrides=["size=3M", "tokens=1e400", "members=heavy"])
    size, tokens, members = str(caught.value).splitlines()
    assert size == "size=3M: expected 1M, 8M, 17M, 52M, 100M"
    assert tokens == "tokens=1e400: expected number, as in 8M"
    assert members == "members=heavy: expected light, even, draft"


def test_a_mistyped_dial_and_one_in_a_file_are_told_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="token=8M: is not a setting; did you mean tokens"):
        load_recipe(overrides=["token=8M"])
    path = tmp_path / "recipe.yaml"
    path.write_text("size: 8M\n")
    with pytest.raises(UsageError, match=r"^size=8M in .*: is a dial; give it on the command line$"):
        load_recipe([path])


@pytest.mark.parametrize("members", MEMBERS)
def test_a_recipe_changes_as_the_dial_would_change_it(members: str) -> None:
    words = ["seed=3", "sampler.min_rows=2"]
    dialled = load_recipe(overrides=[*words, f"members={members}"])
    assert with_members(load_recipe(overrides=words), members) == dialled
    words = ["trainer.max_steps=200", "loss.hidden_weight=3"]
    shorter = with_members(load_recipe(overrides=words), members)
    assert shorter.loss.hidden_weight == (0 if members == "light" else 12)


def test_a_model_that_is_too_small_for_the_members_is_refused() -> None:
    with pytest.raises(UsageError, match="keeps layer 1, but this model's layers are 0 to 0"):
        with_members(load_recipe(overrides=["model.num_hidden_layers=1", "family={}"]), "draft")
