"""A recipe: everything that decides what a training run makes, in one frozen value.

Read from defaults <- YAML files <- `a.b=c` overrides, saved resolved beside every checkpoint. Model and
trainer settings carry Hugging Face's and Lightning's names. Nothing here imports torch, so that the
command line's help is quick.

    recipe = load_recipe([Path("configs/tiny.yaml")], ["trainer.max_steps=100", "--family.S", "ffn=0.5"])
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from models.base.errors import NestlingError, UsageError
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, Granularity
from train.recipe.overrides import load, save
from train.recipe.settings import Section, SettingHelp, help_rows, setting, show

FULL_NAME = "XL"
"""What the full model is called in every family."""
NO_NAMES = frozenset({"auto", "full", "hostile", "lookup", "none"})
"""What drafts and granularities are called that no family has to name."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The full model, in Hugging Face's names; the vocabulary comes from the tokenizer."""

    hidden_size: int = setting(256, "width of the residual stream", within="[1, inf)")
    intermediate_size: int = setting(1024, "hidden neurons of a feed-forward part", within="[1, inf)")
    num_hidden_layers: int = setting(6, "number of layers", within="[1, inf)")
    num_attention_heads: int = setting(8, "query heads of a layer", within="[1, inf)")
    num_key_value_heads: int = setting(4, "key/value heads of a layer", within="[1, inf)")
    head_dim: int = setting(0, "width of a head; 0: hidden_size / heads", within="[0, inf)")
    max_position_embeddings: int = setting(
        0, "longest context in tokens; 0: data.sequence_length", within="[0, inf)"
    )
    rope_theta: float = setting(10000.0, "base of the rotary frequencies", within="(0, inf)")
    rms_norm_eps: float = setting(1e-5, "epsilon of the norms", within="(0, inf)")
    tie_word_embeddings: bool = setting(True, "use the embedding as the vocabulary head")
    attention_bias: bool = setting(False, "bias on q, k and v, as in Qwen2")
    qk_norm: bool = setting(False, "norm on each query and key head, as in Qwen3")
    initializer_range: float = setting(0.02, "deviation of the initial weights", within="(0, inf)")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(Section):
    """Which members train in a step, and on what."""

    kind: Literal["rows", "all", "random", "sandwich"] = setting(
        "rows",
        "rows: one full pass, members share some rows; all: every member on every row; "
        "random: one member a step; sandwich: full, smallest and random ones",
    )
    share: float = setting(
        0.0625,
        "rows: share of a batch's rows that the members which are no layer prefix divide among them",
        within="(0, 1]",
    )
    rows_per_turn: int = setting(
        4,
        "rows: such a member waits for so many rows and trains on them in one step, which is faster than a "
        "row in each",
        within="[1, inf)",
    )
    exit_every: int = setting(
        4,
        "rows: a member that is a prefix of the layers at full width (an exit) learns at one of so many "
        "positions; each costs it a vocabulary head",
        within="[1, inf)",
    )
    reweight: float = setting(
        0.0,
        "rows: a member on n of N rows or positions counts (N/n)**reweight times: 0 sums tokens, 1 is its "
        "mean, 0.5 lets it add as much gradient noise as the full model does",
        within="[0, 1]",
    )
    shared_cache: float = setting(
        0.5,
        "share of a member's rows trained on the full model's keys and values, as a draft decodes",
        within="[0, 1]",
    )
    block: int = setting(5, "drafted tokens of a block in shared-cache training", within="[1, inf)")
    probabilities: dict[str, float] | None = setting(  # noqa: RUF009 (None is no call's result)
        None, "random: weight of each member by name; null: all alike", within="[0, inf)"
    )
    num_random: int = setting(1, "sandwich: members drawn at random", within="[0, inf)")


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """What a member learns from: cross-entropy that ramps to a divergence from the full model.

    With a teacher the full model learns from it in the same way.
    """

    divergence: Literal[
        "cross_entropy",
        "forward_kl",
        "reverse_kl",
        "jensen_shannon",
        "total_variation",
        "skew_kl",
        "neg_log_alpha",
        "kl_tv",
    ] = setting(
        "neg_log_alpha",
        "how a member's law differs from the full model's; cross_entropy: it learns from text alone",
    )
    weight: float = setting(1.0, "factor of the divergence", within="[0, inf)")
    temperature: float = setting(1.0, "divides both sides' logits", within="(0, inf)")
    beta: float = setting(0.5, "jensen_shannon: share of the full model", within="(0, 1)")
    skew: float = setting(0.1, "skew_kl: share of the full model in the mixture", within="[0, 1)")
    eta: float = setting(3.0, "kl_tv: how fast KL gives way to total variation", within="[0, inf)")
    ramp_start: int = setting(200, "step up to which members train on text alone", within="[0, inf)")
    ramp_steps: int = setting(800, "steps from cross-entropy to the divergence", within="[0, inf)")
    fade_from: float = setting(
        0.6, "share of the run after which members' losses lose weight, to its end", within="[0, 1]"
    )
    fade_to: float = setting(0.1, "what is left of that weight at the end; 1: all of it", within="[0, 1]")
    teacher: str | None = setting(
        None,
        "a trained model's folder, from which the full model learns as members learn from the full model; "
        "null: from text alone",
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The text, its tokenizer, and how it is cut into rows."""

    source: str = setting(
        "stdlib",
        "stdlib (this Python's own source), a path or glob of .txt, .jsonl or .parquet files "
        "(.xz too), or a Hugging Face dataset",
    )
    valid: str | None = setting(None, "validation text, likewise; null: split off from source")
    valid_fraction: float = setting(0.02, "share of documents split off", within="(0, 1)")
    text_field: str = setting("text", "field of a jsonl or parquet row that holds the text")
    separator: str = setting("<|endoftext|>", "line that ends a document in a .txt file")
    tokenizer: str = setting(
        "bpe", "bpe (trained on source, or with loss.teacher the teacher's), a folder, or a Hugging Face name"
    )
    vocab_size: int = setting(4096, "tokens of a trained tokenizer", within="[2, inf)")
    sequence_length: int = setting(256, "tokens of a row", within="[2, inf)")
    max_documents: int | None = setting(None, "documents to read; null: all", within="[1, inf)")
    cache_dir: str | None = setting(None, "where tokenised text is kept; null: the user's cache")
    num_workers: int = setting(0, "processes that load rows", within="[0, inf)")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: float = setting(1e-3, "peak learning rate", within="(0, inf)")
    betas: tuple[float, float] = setting((0.9, 0.95), "decay of AdamW's averages", within="[0, 1)")
    eps: float = setting(1e-8, "epsilon of AdamW", within="(0, inf)")
    weight_decay: float = setting(0.1, "decay of the matrices", within="[0, inf)")
    warmup_steps: int = setting(100, "steps of linear warm-up", within="[0, inf)")
    min_lr_ratio: float = setting(0.1, "last learning rate / peak (cosine)", within="[0, 1]")
    fused: bool = setting(
        True, "one kernel for the whole update; without it, skip_sigma waits for the device once a step"
    )
    skip_sigma: float = setting(
        6.0,
        "skip a step whose gradient norm is not finite, or whose logarithm is so many deviations above "
        "its running mean; three in a row go back to the last state, with new data; 0: never",
        within="[0, inf)",
    )


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(Section):
    """How long and on what to train, in Lightning's names."""

    max_steps: int = setting(2000, "optimizer steps", within="[1, inf)")
    batch_size: int = setting(
        16,
        "rows of a micro-batch, over all devices, which share them evenly: a recipe trains on the same rows "
        "in the same steps on any number of devices",
        within="[1, inf)",
    )
    accumulate_grad_batches: int = setting(1, "micro-batches of a step", within="[1, inf)")
    gradient_clip_val: float | None = setting(
        1.0, "largest norm of the gradient; null: no limit", within="(0, inf)"
    )
    accelerator: str = setting("auto", "auto, cpu, gpu, ...")
    devices: int | str = setting("auto", "of each machine: auto, a number, or a list as in 0,1")
    num_nodes: int = setting(1, "machines", within="[1, inf)")
    strategy: Literal["auto", "ddp", "fsdp"] = setting(
        "auto",
        "ddp: every device holds the whole model; fsdp: they share out weights, gradients and moments "
        "(FSDP2); auto: ddp if there are several devices",
    )
    val_check_interval: int = setting(250, "steps between validations", within="[1, inf)")
    limit_val_batches: int = setting(16, "batches of a validation", within="[1, inf)")
    log_every_n_steps: int = setting(10, "steps between log lines", within="[1, inf)")
    checkpoint_every: int = setting(500, "steps between resumable states", within="[1, inf)")
    keep_checkpoints: int = setting(2, "resumable states that are kept", within="[2, inf)")
    max_time: str | None = setting(
        None, "DD:HH:MM:SS after which the run saves its state and ends, code 143; null: no limit"
    )

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, over all micro-batches and devices."""
        return self.batch_size * self.accumulate_grad_batches

    @property
    def max_seconds(self) -> float:
        """`max_time` as a number; infinite without a limit."""
        if self.max_time is None:
            return math.inf
        days, hours, minutes, seconds = map(int, self.max_time.split(":"))
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Section):
    """Where the run can be watched; metrics.jsonl is always written."""

    wandb: Literal["auto", "online", "offline", "disabled"] = setting(
        "auto", "auto: online when logged in, else offline"
    )
    project: str = setting("nestling", "project in the dashboard")
    name: str | None = setting(None, "name of the run; null: that of its folder")
    tensorboard: bool = setting(True, "write TensorBoard files when it is installed")
    logger: str | None = setting(None, "import path of one more Lightning logger class")


@dataclass(frozen=True, kw_only=True)
class Recipe(Section):
    """A whole run.

    Raises:
        UsageError: one line for each setting that cannot be, alone or together with others.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    family: dict[str, str] = setting(  # noqa: RUF009 (copied for each recipe)
        {"S": "ffn=0.125", "M": "ffn=0.25", "L": "ffn=0.5", "D": "layers=0-1"},
        f"granularity of each member by name; the full model is always there as {FULL_NAME}",
    )
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: int = setting(0, "of weights, data order and sampling", within="[0, 4294967295]")
    dtype: Literal["auto", "fp32", "bf16"] = setting("auto", "auto: what this machine is fast at")

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = [*_family_problems(self), *_sampler_problems(self)]
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
        if problems:
            raise UsageError("\n".join(problems))

    def elastic_config(self, vocab_size: int | None = None, eos_token_id: int | None = None) -> ElasticConfig:
        """The full model's shape.

        Args:
            vocab_size: of the tokenizer; None is what the recipe asks for.
            eos_token_id: of the tokenizer.

        Raises:
            UsageError: if the sizes do not fit together.
        """
        fields = asdict(self.model)
        fields["max_position_embeddings"] = fields["max_position_embeddings"] or self.data.sequence_length
        vocab_size = self.data.vocab_size if vocab_size is None else vocab_size
        try:
            return ElasticConfig(vocab_size=vocab_size, eos_token_id=eos_token_id, **fields)
        except NestlingError as error:
            raise UsageError(str(error)) from None

    @property
    def granularities(self) -> dict[str, Granularity]:
        """Every member by name, in the recipe's order; the full model comes last."""
        family = {name: Granularity.parse(text, {}) for name, text in self.family.items()}
        return {**{name: one for name, one in family.items() if name != FULL_NAME}, FULL_NAME: FULL}


def load_recipe(configs: Sequence[Path] = (), overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: defaults <- YAML files, in order <- `a.b=c`, `--a.b=c` or `--a.b c` overrides.

    Raises:
        UsageError: one line for each thing that is wrong.

    >>> load_recipe(overrides=["seed=3", "--trainer.max_steps", "10"]).trainer.max_steps
    10
    """
    return load(Recipe, configs, overrides)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as YAML; `load_recipe([path])` gives an equal one."""
    save(recipe, path)


def recipe_help() -> list[SettingHelp]:
    """Key, type, default and help of every setting, for the command line."""
    return help_rows(Recipe)


def _family_problems(recipe: Recipe) -> list[str]:
    problems = []
    for name, text in recipe.family.items():
        try:
            is_full = Granularity.parse(text, {}).resolve(recipe.model).is_full
        except UsageError as error:
            problems.append(f"family.{name}={text}: {error}")
            continue
        if not re.fullmatch(r"\w[\w-]*", name):
            problems.append(f"family.{name}={text}: a name has letters, digits, _ and -")
        elif name in NO_NAMES:
            problems.append(f"family.{name}={text}: --draft {name} is something else; rename this one")
        elif name == FULL_NAME and not is_full:
            problems.append(f"family.{name}={text}: {FULL_NAME} is the full model; rename this one")
        elif name != FULL_NAME and is_full:
            problems.append(
                f"family.{name}={text}: is the full model of {recipe.model.num_hidden_layers} layers, "
                f"which is always there as {FULL_NAME}; make it smaller or remove it "
                f"(family.{name}=null)"
            )
    return problems


def _sampler_problems(recipe: Recipe) -> list[str]:
    sampler, names = recipe.sampler, {*recipe.family, FULL_NAME}
    if recipe.data.sequence_length % sampler.exit_every:
        length = recipe.data.sequence_length
        fits = max(every for every in range(1, sampler.exit_every) if length % every == 0)
        shown = f"sampler.exit_every={sampler.exit_every}"
        return [f"{shown}: it must divide data.sequence_length={length}; set it to {fits}"]
    if sampler.probabilities is None:
        return []
    shown = f"sampler.probabilities={show(sampler.probabilities)}"
    if sampler.kind != "random":
        return [f"{shown}: has no effect with sampler.kind={sampler.kind}; set that to random"]
    if strangers := sorted(set(sampler.probabilities) - names):
        return [f"{shown}: {strangers[0]} is not in the family of {', '.join(sorted(names))}"]
    if not sum(sampler.probabilities.values()):
        return [f"{shown}: at least one must be above 0"]
    return []
