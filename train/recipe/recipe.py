"""A recipe: everything that decides what a training run makes, in one frozen value.

It is read from defaults <- YAML files <- dials <- `a.b=c` overrides, and saved resolved beside every
checkpoint. Nothing here imports torch, so that the command line's help is quick.

    recipe = load_recipe([Path("configs/tiny.yaml")], ["trainer.max_steps=100", "--family.S", "ffn=0.5"])
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic.dataclasses import dataclass

from models.base.errors import NestlingError, UsageError
from models.decode.engine.drafters import DRAFTERS
from models.elastic.config import ElasticConfig
from models.elastic.count import count_parameters
from models.elastic.granularity import FULL, Granularity, Plan
from train.recipe.dials import DIALS, MEMBERS, learning_of, overrides_of, schedule_of, split_dials
from train.recipe.overrides import load, pair_overrides, save
from train.recipe.pretrained import implied_by_start
from train.recipe.sections import (
    DataConfig,
    DistillConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    OwnedConfig,
    SamplerConfig,
    TrackingConfig,
    TrainerConfig,
    Whole,
    without_nulls,
)
from train.recipe.settings import CHECKED, SettingHelp, help_rows, show

OWNED_LR_FACTOR = 3.0
"""Learning rate of what members own / that of what they share, unless it is set (docs/LOG.md)."""
FULL_NAME = "XL"
"""The full model's name in every family."""
NO_NAMES = frozenset({"auto", "full", "adversarial", "none", *DRAFTERS})
"""Names of drafts and granularities that no member may take."""
MODELS = ("model.from", "loss.teacher")
NO_SHAPE = ("from_", "train", "blend")
"""What section model tells besides the model's shape."""
RENAMED = {
    "sampler.share": "sampler.row_fraction",
    "sampler.rows_per_turn": "sampler.min_rows",
    "sampler.exit_every": "sampler.exit_stride",
    "sampler.reweight": "sampler.weight_power",
}
"""The new key of each setting that an earlier release called otherwise."""
BEFORE: Mapping[str, Any] = {
    "model.blend": 1.0,
    "owned.norms": False,
    "owned.rank": 0,
    "owned.min_lr_ratio": None,
    "loss.narrow_gradient": 1.0,
    "loss.exit_gradient": 1.0,
    "loss.hidden_weight": 0.0,
    "sampler.turns_power": 0.0,
    "sampler.mixed_fraction": 0.0,
}
"""What a run of a release without these settings did; there a saved recipe does not have them."""


def _before(tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a recipe of an earlier release means, where all had one learning rate."""
    return {**BEFORE, "owned.lr": (tables.get("optim") or {}).get("lr")}


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class Recipe:
    """A run; settings that contradict each other are refused."""

    model: ModelConfig = ModelConfig()
    family: Annotated[dict[str, str], BeforeValidator(without_nulls)] = Field(
        default_factory=lambda: {"S": "ffn=0.125", "M": "ffn=0.25", "L": "ffn=0.5", "D": "layers=0-1"}
    )
    """Granularity of each member by name; the full model is always there as XL."""
    owned: OwnedConfig = OwnedConfig()
    sampler: SamplerConfig = SamplerConfig()
    loss: LossConfig = LossConfig()
    distill: DistillConfig = DistillConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    trainer: TrainerConfig = TrainerConfig()
    tracking: TrackingConfig = TrackingConfig()
    seed: Annotated[Whole, Field(ge=0, le=2**32 - 1)] = 0
    """Random seed of weights, data order and sampling."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the weights in a pass; auto: the one that this machine is fast at."""

    def __post_init__(self) -> None:
        problems = [*_family_problems(self), *_sampler_problems(self), *_owned_problems(self)]
        length, longest = self.data.sequence_length, self.model.max_position_embeddings
        if longest and length > longest:
            problems.append(
                f"data.sequence_length={length}: is longer than "
                f"model.max_position_embeddings={longest}; set that to 0 or at least {length}"
            )
        if not re.fullmatch(r"\d+:\d\d:\d\d:\d\d", self.trainer.max_time or "00:00:00:00"):
            problems.append(
                f"trainer.max_time={show(self.trainer.max_time)}: expected DD:HH:MM:SS, such as 00:11:30:00"
            )
        if self.loss.teacher is not None and self.loss.divergence == "cross_entropy":
            problems.append(
                f"loss.teacher={self.loss.teacher}: has no effect with loss.divergence=cross_entropy; "
                "choose another divergence"
            )
        problems += _written_problems(self)
        if problems:
            raise UsageError("\n".join(problems))

    def elastic_config(self, vocab_size: int | None = None, eos_token_id: int | None = None) -> ElasticConfig:
        """Return the full model's shape.

        Args:
            vocab_size: The tokenizer's size; None is what the recipe asks for.
            eos_token_id: The tokenizer's end of text.

        Raises:
            UsageError: if the sizes do not fit together.
        """
        fields = {name: value for name, value in asdict(self.model).items() if name not in NO_SHAPE}
        fields["max_position_embeddings"] = fields["max_position_embeddings"] or self.data.sequence_length
        vocab_size = self.data.vocab_size if vocab_size is None else vocab_size
        try:
            return ElasticConfig(vocab_size=vocab_size, eos_token_id=eos_token_id, **fields)
        except NestlingError as error:
            raise UsageError(str(error)) from None

    @property
    def is_held(self) -> bool:
        """Return whether a frozen copy of the model that the run began from holds the full model."""
        return self.model.from_ is not None and self.loss.teacher is None and self.loss.trust > 0

    @property
    def owned_optim(self) -> OptimConfig:
        """Return section `optim` as it holds for what members own."""
        optim, own = self.optim, self.owned
        usual = optim.lr if self.model.train == "owned" else OWNED_LR_FACTOR * optim.lr
        return replace(
            optim,
            lr=usual if own.lr is None else own.lr,
            min_lr_ratio=optim.min_lr_ratio if own.min_lr_ratio is None else own.min_lr_ratio,
        )

    def full_weight(self, step: int) -> float:
        """Return the factor of the full model's own loss in a step; 0: it only teaches."""
        if self.model.train == "owned":
            return 0.0
        every = self.loss.trust_every if self.is_held else 1
        return float(every) if (step + 1) % every == 0 else 0.0  # those that are logged are among them

    @property
    def granularities(self) -> dict[str, Granularity]:
        """Every member by name, in the recipe's order; the full model comes last."""
        family = {name: Granularity.parse(text, {}) for name, text in self.family.items()}
        return {**{name: one for name, one in family.items() if name != FULL_NAME}, FULL_NAME: FULL}


def load_recipe(configs: Sequence[Path] = (), overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: defaults <- YAML files, in order <- dials <- `a.b=c`, `--a.b=c` or `--a.b c` overrides.

    Raises:
        UsageError: one line for each thing that is wrong.

    >>> load_recipe(overrides=["seed=3", "--trainer.max_steps", "10"]).trainer.max_steps
    10
    """
    dials, words = split_dials(overrides)
    empty = [key for key, text in pair_overrides(words) if key in MODELS and not text]
    if empty:  # as of a variable of a shell that is not set
        raise UsageError(f"{empty[0]}=: is empty; give a model, or null for none")
    preset = list(overrides_of(dials))

    def read(*by_dials: str) -> Recipe:
        given = [*by_dials, *words]
        return load(Recipe, configs, given, renamed=RENAMED, dials=DIALS, implied=implied_by_start)

    recipe = read(*preset)
    if "tokens" in dials:  # whose number of steps depends on what the others say
        taught = recipe.loss.teacher is not None
        schedule = schedule_of(dials["tokens"], recipe.trainer, recipe.data, taught=taught)
        if recipe.model.from_ is not None:  # whose members learn from the full model from the first step on
            schedule = [word for word in schedule if not word.startswith("loss.")]
        preset += schedule
        recipe = read(*preset)
    if dials.keys() & {"tokens", "members"}:
        learning = [f"{key}={value}" for key, value in _learning(recipe).items()]
        recipe = read(*learning, *preset)
    return recipe


def _learning(recipe: Recipe) -> dict[str, float]:
    """Return how members learn in so long a run; with `model.from` that follows from the start."""
    if recipe.model.from_ is not None:
        return {}
    num_tokens = recipe.trainer.max_steps * recipe.trainer.rows_per_step * recipe.data.sequence_length
    return learning_of(num_tokens, count_parameters(recipe.elastic_config()))


def load_saved_recipe(path: Path) -> Recipe:
    """Read the recipe.yaml of a run, which an earlier release may have written.

    Raises:
        UsageError: one line for each thing that is wrong.
    """
    return load(Recipe, [path], [], renamed=RENAMED, saved=True, implied=_before)


def with_members(recipe: Recipe, members: str) -> Recipe:
    """Return the recipe as the dial `members` would change it.

    Raises:
        UsageError: if the model is too small for such members.

    >>> with_members(Recipe(), "light").sampler.row_fraction
    0.08
    >>> "E" in with_members(with_members(Recipe(), "draft"), "even").family
    False
    """
    sections: dict[str, Any] = {}
    if recipe.family == MEMBERS["draft"]["family"]:  # which the dial gave it, not the recipe
        sections["family"] = Recipe().family
    for key, value in {**_learning(recipe), **MEMBERS[members]}.items():
        section, _, name = key.partition(".")
        before = sections.get(section, getattr(recipe, section))
        sections[section] = replace(before, **{name: value}) if name else value
    try:
        return replace(recipe, **sections)
    except ValidationError as error:  # as which pydantic passes on what a check of ours says
        raise UsageError(str(error)) from None


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as YAML; `load_recipe([path])` gives an equal one."""
    save(recipe, path)


def recipe_help() -> list[SettingHelp]:
    """Return key, type, default and help of every setting, for the command line."""
    return help_rows(Recipe)


def _family_problems(recipe: Recipe) -> list[str]:
    problems = []
    names: dict[Plan, str] = {}
    for name, text in recipe.family.items():
        try:
            plan = Granularity.parse(text, {}).resolve(recipe.model)
        except UsageError as error:
            problems.append(f"family.{name}={text}: {error}")
            continue
        if not re.fullmatch(r"\w[\w-]*", name):
            problems.append(f"family.{name}={text}: a name has letters, digits, _ and -")
        elif name in NO_NAMES:
            problems.append(f"family.{name}={text}: --draft {name} is something else; rename this one")
        elif name == FULL_NAME and not plan.is_full:
            problems.append(f"family.{name}={text}: {FULL_NAME} is the full model; rename this one")
        elif name != FULL_NAME and plan.is_full:
            problems.append(
                f"family.{name}={text}: is the full model of {recipe.model.num_hidden_layers} layers, "
                f"which is always there as {FULL_NAME}; make it smaller or remove it "
                f"(family.{name}=null)"
            )
        elif names.setdefault(plan, name) != name:
            same = f"has the layers and widths of {names[plan]} in this model"
            problems.append(f"family.{name}={text}: {same}; change or remove it (family.{name}=null)")
    return problems


def _owned_problems(recipe: Recipe) -> list[str]:
    if recipe.model.train == "joint":
        return []
    shown = "model.train=owned"
    if recipe.model.from_ is None:
        return [f"{shown}: the full model would keep its random weights; set model.from to a trained one"]
    if not recipe.owned.ownership.owns:
        return [f"{shown}: members own nothing; set owned.norms=true or owned.rank above 0"]
    if len(recipe.granularities) == 1:
        return [f"{shown}: there is no member beside the full model; add one, as in family.D=layers=0-3"]
    if not recipe.owned.norms and not _narrow(recipe):
        return [f"{shown}: early exits own a norm alone, which owned.norms=false takes; set that to true"]
    for key, value in {"teacher": recipe.loss.teacher, "trust": recipe.loss.trust}.items():
        if value:
            told = f"has no effect with {shown}, where the full model stays as it is; leave it out"
            return [f"loss.{key}={show(value)}: {told}"]
    return []


def _narrow(recipe: Recipe) -> list[str]:
    """Return the members that have a pass of their own, as far as they fit the model."""
    found = []
    for name, text in recipe.family.items():
        with contextlib.suppress(UsageError):
            if not Granularity.parse(text, {}).resolve(recipe.model).is_layer_prefix:
                found.append(name)
    return found


def _sampler_problems(recipe: Recipe) -> list[str]:
    sampler, names = recipe.sampler, {*recipe.family, FULL_NAME}
    has_exits = sampler.kind == "rows" and len(_narrow(recipe)) < len(recipe.family)
    if has_exits and recipe.data.sequence_length % sampler.exit_stride:
        length = recipe.data.sequence_length
        fits = max(every for every in range(1, sampler.exit_stride) if length % every == 0)
        shown = f"sampler.exit_stride={sampler.exit_stride}"
        return [f"{shown}: it must divide data.sequence_length={length}; set it to {fits}"]
    if sampler.turns is not None:
        shown, narrow = f"sampler.turns={show(sampler.turns)}", sorted(_narrow(recipe))
        if sampler.kind != "rows":
            return [f"{shown}: has no effect with sampler.kind={sampler.kind}; set that to rows"]
        if unknown := sorted(set(sampler.turns) - set(narrow)):
            those = f"those that have: {', '.join(narrow)}" if narrow else "no member has; set it to null"
            return [f"{shown}: {unknown[0]} has no pass of its own; {those}"]
    if sampler.probabilities is None:
        return []
    shown = f"sampler.probabilities={show(sampler.probabilities)}"
    if sampler.kind != "random":
        return [f"{shown}: has no effect with sampler.kind={sampler.kind}; set that to random"]
    if unknown := sorted(set(sampler.probabilities) - names):
        return [f"{shown}: {unknown[0]} is not in the family of {', '.join(sorted(names))}"]
    drawn = names - {FULL_NAME} if recipe.model.train == "owned" else names
    if not sum(sampler.probabilities.get(name, 0.0) for name in drawn):
        return [f"{shown}: at least one of {', '.join(sorted(drawn))} must be above 0"]
    return []


def _written_problems(recipe: Recipe) -> list[str]:
    config, num_rows = recipe.distill, recipe.trainer.rows_per_step
    if not config.written_fraction:
        told = f"distill.writer={config.writer}: has no effect without distill.written_fraction; set both"
        return [] if config.writer == DistillConfig.writer else [told]
    shown = f"distill.written_fraction={config.written_fraction:g}"
    problems = []
    if recipe.loss.teacher is None and not recipe.is_held and recipe.model.train == "joint":
        problems.append(f"{shown}: nobody scores what is written; set loss.teacher")
    if config.cache is not None:
        problems.append(f"{shown}: distill.cache knows the text alone; leave one of them out")
    if config.written_fraction * num_rows < 1:
        problems.append(f"{shown}: is less than one of {num_rows} rows a step; set it to {1 / num_rows:g}")
    if config.prompt_tokens >= recipe.data.sequence_length:
        problems.append(
            f"distill.prompt_tokens={config.prompt_tokens}: leaves nothing of data.sequence_length="
            f"{recipe.data.sequence_length}; set it lower"
        )
    if config.writer not in ("student", "teacher", *recipe.family):
        problems.append(
            f"distill.writer={config.writer}: is neither student, teacher nor a member of the family; "
            "choose one of these"
        )
    return problems
