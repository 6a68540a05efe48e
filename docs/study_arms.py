"""What docs/study.py trains: the arms, and the recipe and the files of a run."""

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from train.objective.flops import count_step_flops
from train.recipe.dials import MEMBERS, learning_of
from train.recipe.recipe import Recipe, load_recipe
from train.recipe.settings import show

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "study.yaml"
DEEP = ("model.num_hidden_layers=8", "model.intermediate_size=384", "family.D=layers=0-1")
"""A shape of twice as many layers."""
LARGE = (
    *("model.hidden_size=256", "model.intermediate_size=960", "model.num_hidden_layers=8"),
    *("model.num_attention_heads=8", "model.num_key_value_heads=4", "family.D=layers=0-1"),
    *("data.vocab_size=2048", "data.sequence_length=256", "optim.lr=1.5e-3"),
)
"""Eight million parameters; 39,000 steps are 20 tokens for each, and take a day of one core."""
SLOWER = ("optim.lr=2e-3",)
"""Half of the learning rate."""


class Corpus(NamedTuple):
    """What a study reads, and the shape of the models that read it.

    Args:
        file: How the names of its files begin.
        ending: How they end.
        overrides: Of the recipe.
    """

    file: str
    ending: str = "txt.xz"
    overrides: tuple[str, ...] = ()

    @property
    def batch_tokens(self) -> int:
        """The tokens of a step."""
        recipe = load_recipe([CONFIG], self.overrides)
        return recipe.trainer.rows_per_step * recipe.data.sequence_length


CORPORA = {
    "tinystories": Corpus("tinystories"),
    "dialogues": Corpus("dialogues", "jsonl.xz"),
    "pd_books": Corpus("pd_books", overrides=SLOWER),
    "pd_books-8-layers": Corpus("pd_books", overrides=(*SLOWER, *DEEP)),
    "pd_books-8M": Corpus("pd_books", overrides=LARGE),
    "tinystories-lr-2e-3": Corpus("tinystories", overrides=SLOWER),
    "dialogues-lr-2e-3": Corpus("dialogues", "jsonl.xz", SLOWER),
}

SHORT_CORPORA = ("tinystories", "dialogues")
"""Those of short runs; a run of 20 tokens a parameter would read them six times."""

SEEDS = range(3)
SHORT = 450
"""Steps of the recipe."""

LONGEST_LOSS = 1000
"""Steps that a run does again at most if it is stopped."""
ALONE = "full model alone"
NO_FAMILY = ("family.S=null", "family.L=null", "family.D=null")
SMALL = {
    "S": ("intermediate_size", 1 / 8),
    "L": ("intermediate_size", 1 / 2),
    "D": ("num_hidden_layers", 1 / 4),
}
"""A member's shape as a model of its own: which number of the full model's shrinks, and to what part."""

EXTRA_TIME = 0.25
"""What a family may cost beyond its full model, in steps of the full model."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        name: what differs, as the page says it.
        overrides: of the recipe.
        member: which member's shape this is, if it is a small model of its own.
        taught: whether it learns from the full model that was trained alone, as members do from theirs.
        extra: whether it gets no more time than the family would take for it: a third of `EXTRA_TIME`.
    """

    name: str
    overrides: tuple[str, ...] = ()
    member: str | None = None
    taught: bool = False
    extra: bool = False


def _small(member: str, **settings: bool) -> Arm:
    how = "distilled" if settings.get("taught") else "alone"
    name = f"{member} {how}" + (" in the extra time" if settings.get("extra") else "")
    return Arm(name, NO_FAMILY, member=member, **settings)


BEFORE = ("sampler.exit_stride=4", "loss.fade_to=0.1")
"""The defaults before members owned anything."""


def _preset(members: str, *overrides: str, change: str = "", name: str = "") -> Arm:
    """Return the family of a preset, `members=...`, with something changed if so said, of S, L and D."""
    settings = {key: value for key, value in MEMBERS[members].items() if key != "family"}
    own = tuple(f"{key}={show(value)}" for key, value in settings.items())
    return Arm((name or members) + (f", {change}" if change else ""), (*own, *overrides))


ACCEPTANCE = "loss.divergence=neg_log_alpha"
NARROW_ONLY = "loss.exit_gradient=0.3"
FAST = ("owned.lr=8e-3", "loss.narrow_gradient=0.3")
TO_TENTH = "owned.min_lr_ratio=0.1"
"""What members own slows down as much as all else."""
PULL = "loss.narrow_gradient=0.2"
LONG = "loss.narrow_gradient=1"


def _learning(tokens_per_parameter: float) -> list[str]:
    """Return how members learn in a run of this length, as the dials set it."""
    return [f"{key}={value}" for key, value in learning_of(tokens_per_parameter, 1).items()]


SHORT_RUN, LONG_RUN = _learning(0.8), _learning(20)
ON_CACHE = ("sampler.shared_cache=0.5", "sampler.turns_power=0.5")
"""As it was while members had half of their rows on the full model's cache, and large ones more turns."""
MORE_ROWS = ("sampler.row_fraction=0.375", "loss.hidden_weight=6", *ON_CACHE)
"""As it was while members had three eighths of the rows."""
NO_HIDDEN = "loss.hidden_weight=0"
HARD_HIDDEN = "loss.hidden_weight=12"
OUTER = "optim.outer_lr_ratio=0.5"
UNMIXED = "sampler.mixed_fraction=0"
QUARTER = "sampler.mixed_fraction=0.25"
"""Twice the turns with mixtures, as by default before members learnt from hidden states."""
ALL_ROWS = "sampler.row_fraction=1"
SLOW = "owned.lr=2e-3"
"""What members own learns as fast as all else, as it did before it had a learning rate."""
_even_short = partial(_preset, "even", *SHORT_RUN)
_even_long = partial(_preset, "even", *LONG_RUN)
_cached = partial(_preset, "even", *SHORT_RUN, *ON_CACHE, name="even on the cache")
_cached_long = partial(_preset, "even", *LONG_RUN, *ON_CACHE, name="even on the cache")
_more = partial(_preset, "even", *SHORT_RUN, *MORE_ROWS, name="even on more rows")
_more_long = partial(_preset, "even", *LONG_RUN, *MORE_ROWS, name="even on more rows")
_even_tenth = partial(_preset, "even", *MORE_ROWS, PULL, TO_TENTH, name="even to a tenth")
_logits = partial(_preset, "even", *MORE_ROWS, NO_HIDDEN, TO_TENTH, name="even by logits alone")
# What `even`, `light` and `draft` were before that, and at first.
_even = partial(
    _preset,
    "even",
    *MORE_ROWS,
    NO_HIDDEN,
    TO_TENTH,
    SLOW,
    UNMIXED,
    "loss.narrow_gradient=0.7",
    "sampler.turns_power=1",
    name="former even",
)
_light = partial(_preset, "light", SLOW, "sampler.row_fraction=0.125", name="former light")
_draft = partial(_preset, "draft", "loss.exit_gradient=1", SLOW, name="former draft")
_gentle = partial(_even, "loss.narrow_gradient=0.3", "owned.rank=8", "sampler.turns_power=0", name="gentle")
_lighter = partial(_light, "loss.narrow_gradient=0.3", "sampler.turns_power=0", name="lighter")
D_ALONE = ("family.S=null", "family.L=null")

PRESETS = (
    _even_short(),
    _even_long(change="narrow_gradient 1"),
    _even_long("sampler.turns_power=1", change="narrow_gradient 1, turns_power 1"),
    _even_long("sampler.row_fraction=0.375", change="narrow_gradient 1, row_fraction 3/8"),
    _preset("even", *_learning(2), change="narrow_gradient 0.5"),
    _cached(),
    _cached_long(change="narrow_gradient 1"),
    _cached_long("loss.narrow_gradient=2", change="narrow_gradient 2"),
    _cached_long("loss.hidden_weight=24", change="narrow_gradient 1, hidden_weight 24"),
    _cached_long("owned.rank=32", "owned.alpha=22.6", change="narrow_gradient 1, rank 32"),
    _cached("loss.hidden_weight=6", change="hidden_weight 6"),
    _cached("loss.hidden_weight=16", change="hidden_weight 16"),
    _cached("loss.hidden_weight=24", change="hidden_weight 24"),
    _more(),
    _more_long(change="narrow_gradient 1"),
    _more_long(UNMIXED, change="narrow_gradient 1, unmixed"),
    _more_long(QUARTER, change="narrow_gradient 1, a quarter mixed"),
    _more_long(
        "loss.narrow_gradient=0.7",
        HARD_HIDDEN,
        UNMIXED,
        change="narrow_gradient 0.7, hidden_weight 12, unmixed",
    ),
    _even_tenth(),
    _even_tenth(UNMIXED, change="unmixed"),
    _even_tenth(HARD_HIDDEN, change="hidden_weight 12"),
    _even_tenth(QUARTER, change="a quarter mixed"),
    _even_tenth(OUTER, change="outer_lr_ratio 0.5"),
    _logits("loss.narrow_gradient=0.4", QUARTER),
    _logits("loss.narrow_gradient=0.4", UNMIXED, change="unmixed"),
    _logits(LONG, QUARTER, change="narrow_gradient 1"),
    _preset("light"),
    _preset("draft", *D_ALONE),
    _preset("draft", "loss.exit_gradient=1", *D_ALONE, change="exit_gradient 1"),
    _even(),
    _even("owned.lr=8e-3", change="owned.lr 8e-3"),
    _even("owned.lr=2e-2", change="owned.lr 2e-2"),
    _even("owned.lr=4e-3", "loss.narrow_gradient=0.3", change="owned.lr 4e-3, gradients 0.3, 1"),
    _even(*FAST, change="owned.lr 8e-3, gradients 0.3, 1"),
    _even(*FAST, NARROW_ONLY, change="owned.lr 8e-3, gradients 0.3"),
    _even(*FAST, "sampler.turns_power=0", change="owned.lr 8e-3, gradients 0.3, 1, turns_power 0"),
    _even(*FAST, "owned.rank=32", change="owned.lr 8e-3, gradients 0.3, 1, rank 32"),
    _even(*FAST, "loss.narrow_gradient=0.15", change="owned.lr 8e-3, gradients 0.15, 1"),
    _even(LONG, NARROW_ONLY, "owned.rank=8", change="gradients 1, 0.3, rank 8"),
    _even("loss.narrow_gradient=0.5", NARROW_ONLY, "owned.rank=8", change="gradients 0.5, 0.3, rank 8"),
    _even("loss.narrow_gradient=0.5", NARROW_ONLY, "owned.rank=32", change="gradients 0.5, 0.3, rank 32"),
    _even(LONG, change="narrow_gradient 1"),
    _even("sampler.turns_power=0", change="turns_power 0"),
    _even("owned.rank=0", change="norms alone"),
    _even("owned.norms=false", "owned.rank=0", change="nothing owned"),
    _even("loss.divergence=cross_entropy", change="cross_entropy"),
    _even(ACCEPTANCE, change="neg_log_alpha"),
    _logits(LONG, QUARTER, "sampler.turns_power=1", change="narrow_gradient 1, turns_power 1"),
    _logits(LONG, UNMIXED, change="narrow_gradient 1, unmixed"),
    _logits("loss.narrow_gradient=2", UNMIXED, change="narrow_gradient 2, unmixed"),
    _logits(LONG, ALL_ROWS, UNMIXED, change="narrow_gradient 1, all rows, unmixed"),
    _light(),
    _light("loss.narrow_gradient=1", change="narrow_gradient 1"),
    _light("sampler.row_fraction=0.08", change="row_fraction 0.08"),
    _draft(*D_ALONE),
    _draft(change="with S and L"),
    _draft("sampler.exit_stride=2", change="exit_stride 2, with S and L"),
    _draft("loss.exit_gradient=0.5", change="exit_gradient 0.5, with S and L"),
    _gentle(),
    _gentle(NARROW_ONLY, change="exit_gradient 0.3"),
    _gentle(ACCEPTANCE, NARROW_ONLY, change="neg_log_alpha, exit_gradient 0.3"),
    _gentle("sampler.turns={S: 2, L: 1}", change="turns 2:1"),
    _gentle("sampler.turns={S: 3, L: 1}", change="turns 3:1"),
    _lighter(),
    _lighter(ACCEPTANCE, change="neg_log_alpha"),
    _lighter("sampler.turns={S: 3, L: 1}", change="turns 3:1"),
    _lighter("loss.exit_gradient=1", "sampler.turns={S: 3, L: 1}", change="exit_gradient 1, turns 3:1"),
)

ARMS = (
    Arm("base"),
    Arm(ALONE, NO_FAMILY),
    _small("S"),
    _small("D"),
    _small("S", taught=True),
    _small("D", taught=True),
    Arm("weight_power 0.5", ("sampler.weight_power=0.5",)),
    Arm("exit_stride 1", ("sampler.exit_stride=1",)),
    Arm("row_fraction 1/4", ("sampler.row_fraction=0.25",)),
    Arm("cross_entropy", ("loss.divergence=cross_entropy",)),
    Arm("forward_kl", ("loss.divergence=forward_kl",)),
    Arm("kl_tv", ("loss.divergence=kl_tv",)),
    Arm("no ramp", ("loss.ramp_start=0", "loss.ramp_steps=0")),
    Arm("shared_cache 0", ("sampler.shared_cache=0",)),
    Arm("min_rows 1", ("sampler.min_rows=1",)),
    Arm("all members on all rows", ("sampler.kind=all",)),
    Arm("exit_stride 4", ("sampler.exit_stride=4",)),
    Arm("shared_cache 1", ("sampler.shared_cache=1",)),
    Arm("exit_stride 4, fade_to 0.25", ("sampler.exit_stride=4", "loss.fade_to=0.25")),
    Arm("exit_stride 4, fade_to 0.1", BEFORE),
    Arm("MatFormer", ("sampler.kind=all", "loss.divergence=cross_entropy", "sampler.shared_cache=0")),
    *PRESETS,
    _small("L"),
    _small("S", extra=True),
    _small("D", extra=True),
    _small("S", taught=True, extra=True),
    _small("D", taught=True, extra=True),
)
DEFAULT = "even"
"""The arm that README.md shows beside models of their own."""
FIRST = 14
"""The number of arms that get all their seeds before the others get their first."""


class Run(NamedTuple):
    """One training: an arm, a corpus, a seed and a length."""

    arm: str
    corpus: str
    seed: int
    steps: int = SHORT

    def folder(self, out: Path) -> Path:
        """Return the folder of the training."""
        above = out / self.corpus if self.steps == SHORT else out / f"{self.corpus}-{self.steps}"
        return above / str(self.seed) / self.arm.replace(" ", "-").replace("/", "_").replace(".", "_")

    def result(self, out: Path) -> Path:
        """Return the file that tells what it reached."""
        folder = self.folder(out)
        return folder.with_name(f"{folder.name}.json")

    def of(self, arm: str) -> "Run":
        """Return the run of another arm, with all else equal."""
        return self._replace(arm=arm)


def work(corpora: Iterable[str], seeds: Iterable[int], steps: int) -> Iterator[tuple[Arm, Run]]:
    """Yield every run, in the order that makes an early end worth most."""
    for arms in (ARMS[:FIRST], ARMS[FIRST:]):
        for seed in seeds:
            for corpus in corpora:
                for arm in arms:
                    yield arm, Run(arm.name, corpus, seed, steps)


def overrides_of(arm: Arm, run: Run) -> list[str]:
    """Return what an arm and its corpus set in the recipe."""
    overrides = [*CORPORA[run.corpus].overrides, *arm.overrides]
    if arm.member:
        key, part = SMALL[arm.member]
        whole = getattr(load_recipe([CONFIG], overrides).model, key)
        overrides.append(f"model.{key}={max(1, round(part * whole))}")
    return overrides


def recipe_of(arm: Arm, run: Run, data: Path, out: Path) -> Recipe:
    """Return the recipe of a run; what the recipe counts in steps grows with the length."""
    corpus, steps = CORPORA[run.corpus], run.steps
    overrides = [f"data.source={data}/{corpus.file}_train.{corpus.ending}"]
    overrides += [f"data.valid={data}/{corpus.file}_valid.{corpus.ending}", f"seed={run.seed}"]
    overrides += overrides_of(arm, run)
    if arm.taught:
        overrides.append(f"loss.teacher={run.of(ALONE).folder(out) / 'model'}")
    if arm.extra:
        steps = round(steps * _extra_fraction(load_recipe([CONFIG], overrides), corpus))
    return load_recipe([CONFIG], [*_lengths(steps), *overrides])


def _lengths(steps: int) -> list[str]:
    """Return the settings of another length than the recipe's."""
    if steps == SHORT:
        return []
    tenth, two_fifths = steps // 10, 2 * steps // 5
    return [
        *(f"trainer.{name}={steps}" for name in ("max_steps", "val_check_interval")),
        f"trainer.checkpoint_every={min(steps, LONGEST_LOSS)}",
        *(f"{name}={tenth}" for name in ("optim.warmup_steps", "loss.ramp_start")),
        f"loss.ramp_steps={two_fifths}",
    ]


def _extra_fraction(recipe: Recipe, corpus: Corpus) -> float:
    """Return the fraction of the full model's steps that fit into a third of the extra time."""
    alone = load_recipe([CONFIG], [*corpus.overrides, *NO_FAMILY])
    full, own = (one.elastic_config(one.data.vocab_size, 0) for one in (alone, recipe))
    of_full, of_own = count_step_flops(alone, full), count_step_flops(recipe, own)
    if recipe.loss.teacher:
        of_own += of_full / 3  # a forward pass
    return EXTRA_TIME / 3 * of_full / of_own
