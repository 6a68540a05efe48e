"""The sections of a recipe: what each setting is called, takes, and means.

Model and trainer settings carry Hugging Face's and Lightning's names. The docstring below a field is its
help.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from models.elastic.ownership import Ownership
from train.recipe.settings import CHECKED


def _whole(value: Any) -> Any:
    """Take 1e4 for a number of steps, too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def without_nulls(table: Any) -> Any:
    """Remove the entries that are set to null."""
    if not isinstance(table, Mapping):
        return table
    if any(value is None and ":" in str(key) for key, value in table.items()):
        raise ValueError("a key without a value, as which YAML reads {S:2}")
    return {key: value for key, value in table.items() if value is not None}


Whole = Annotated[int, BeforeValidator(_whole)]
Natural = Annotated[Whole, Field(ge=0)]
Count = Annotated[Whole, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Pull = Annotated[float, Field(ge=1e-4)]
"""A factor of gradients; with a smaller one AdamW's epsilon would hold back what members own."""
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class ModelConfig:
    """The full model, in Hugging Face's names; the vocabulary comes from the tokenizer."""

    from_: Annotated[str | None, Field(alias="from")] = None
    """Folder or GGUF file of a model to begin from, which gives the shape (fewer layers or neurons are a
    prefix of it), the tokenizer and, if it has one, the family; null: random weights."""
    train: Literal["joint", "owned"] = "joint"
    """joint: all weights train; owned: only what members own (section owned), and the full model's tensors
    stay as model.from has them, bit for bit."""
    blend: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    """Fraction of what changed in the weights that all share since model.from which is left when a run with
    loss.trust ends; auto: as much, from half to all, as leaves the full model as good as it was."""
    hidden_size: Count = 256
    """Width of the residual stream."""
    intermediate_size: Count = 1024
    """Hidden neurons of a feed-forward part."""
    num_hidden_layers: Annotated[Whole, Field(ge=1, le=2**14)] = 6
    """Number of layers."""
    num_attention_heads: Count = 8
    """Query heads of a layer."""
    num_key_value_heads: Count = 4
    """Key/value heads of a layer."""
    head_dim: Natural = 0
    """Width of a head; 0: hidden_size / num_attention_heads."""
    max_position_embeddings: Natural = 0
    """Longest context in tokens; 0: data.sequence_length."""
    rope_theta: Positive = 10000.0
    """Base of the rotary frequencies."""
    rms_norm_eps: Positive = 1e-5
    """Epsilon of the norms."""
    tie_word_embeddings: bool = True
    """Use the embedding as the vocabulary head."""
    attention_bias: bool = False
    """Add a bias to q, k and v, as in Qwen2."""
    qk_norm: bool = False
    """Normalize each query and key head, as in Qwen3."""
    initializer_range: Positive = 0.02
    """Standard deviation of the initial weights."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class SamplerConfig:
    """The choice of the members that train in a step, and of their rows."""

    kind: Literal["rows", "all", "random", "sandwich"] = "rows"
    """rows: the full model trains on every row, members on some of them; all: every member on every row;
    random: one member a step; sandwich: the full model, the smallest member and random ones."""
    row_fraction: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Fraction of a batch's rows (kind rows) that the members other than layer prefixes divide among
    them."""
    min_rows: Count = 4
    """Rows that such a member waits for (kind rows) to train on them in one step, which is faster than one
    row in each step."""
    exit_stride: Count = 4
    """Distance between the positions (kind rows) at which an early exit, a member that is a prefix of the
    layers at full width, is trained; each position costs a vocabulary head."""
    weight_power: Fraction = 0.0
    """A member on n of N rows or positions (kind rows) counts (N/n)**weight_power times: 0 sums tokens, 1 is
    the member's mean, 0.5 lets it add as much gradient noise as the full model does."""
    shared_cache: Fraction = 0.25
    """Fraction of a member's rows trained on the full model's keys and values, as a draft decodes; on the
    others it learns to decode by itself."""
    block: Count = 5
    """Drafted tokens of a block in shared-cache training."""
    turns: Annotated[dict[str, Count] | None, BeforeValidator(without_nulls)] = None
    """Rows of each member by name (kind rows), relative to those of the others; null: by `turns_power`."""
    turns_power: Annotated[float, Field(ge=0, le=2)] = 0.9
    """Members get rows (kind rows) by the parameters of their layers to the power of minus this: with 0 all
    have as many, with 1 one of half the size has twice as many, as it costs half as much and needs more."""
    mixed_fraction: Fraction = 0.125
    """Fraction of such a member's turns (kind rows) in which some of its layers, drawn anew, are as wide as
    those of the next larger member: for members of any size, which `nestling search` finds."""
    probabilities: Annotated[dict[str, NonNegative] | None, BeforeValidator(without_nulls)] = None
    """Weight of each member by name (kind random); null: all alike."""
    num_random: Natural = 1
    """Members drawn at random (kind sandwich)."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class OwnedConfig:
    """What each member has for itself, beside its part of the full model's matrices."""

    norms: bool = True
    """Give each member its own gains in the norms of the layers that it runs, and in the last norm. A prefix
    of the layers at full width, an early exit, has the last one alone."""
    rank: Natural = 16
    """Rank of each narrow member's own low-rank addition to each of its matrices (LoRA); 0: none."""
    alpha: NonNegative = 0.0
    """Additions are scaled by alpha / rank, as LoRA's; 0: by 1."""
    lr: Positive | None = None
    """Peak learning rate of what members own; null: three times optim.lr, or optim.lr where nothing else
    trains."""
    min_lr_ratio: Fraction | None = 0.3
    """Last learning rate / peak of what members own; null: optim.min_lr_ratio."""

    @property
    def ownership(self) -> Ownership:
        """The same, for a model."""
        return Ownership(norms=self.norms, rank=self.rank, alpha=self.alpha)


DivergenceName = Literal[
    "cross_entropy",
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "total_variation",
    "skew_kl",
    "neg_log_alpha",
    "kl_tv",
]
"""The names of the losses in train/objective/divergences.py."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class LossConfig:
    """A member's loss: cross-entropy that ramps to a divergence from the full model.

    With a teacher the full model learns from it in the same way.
    """

    divergence: DivergenceName = "forward_kl"
    """Measure of how a member's distribution differs from the full model's; cross_entropy: the member learns
    from text alone."""
    weight: NonNegative = 1.0
    """Factor of the divergence."""
    temperature: Positive = 1.0
    """Divisor of both sides' logits."""
    beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Weight of the full model in the mixture of jensen_shannon."""
    skew: Decay = 0.1
    """Weight of the full model in the mixture of skew_kl."""
    eta: NonNegative = 3.0
    """Speed at which KL gives way to total variation in kl_tv."""
    ramp_start: Natural = 200
    """Step up to which members train on text alone."""
    ramp_steps: Natural = 800
    """Steps from cross-entropy to the divergence."""
    fade_from: Fraction = 0.6
    """Fraction of the run after which members' losses lose weight, to its end."""
    fade_to: Fraction = 1.0
    """Fraction of that weight that is left at the end; 1: all of it."""
    text_weight: Fraction = 0.0
    """Fraction of the cross-entropy that stays when the ramp is over."""
    hidden_weight: NonNegative = 11.0
    """Factor of how a narrow member's hidden states differ in direction from the full model's (1 minus the
    cosine): the last ones, and those between layers on average. It comes with the divergence, and falls to 0
    by the end of the run."""
    narrow_gradient: Pull = 0.3
    """Factor of the gradients that members with a pass of their own send into the layers, which they share
    with the full model. What they own learns at the full rate, whatever this is."""
    exit_gradient: Pull = 1.0
    """The same factor for early exits."""
    head_gradient: Positive = 1.0
    """Factor of all members' gradients into the vocabulary head, which everybody shares."""
    teacher: str | None = None
    """A trained model, from which the full model learns as members learn from the full model: a model
    folder, a GGUF file or the URL of an OpenAI-shaped endpoint; null: it learns from text alone."""
    trust: Fraction = 0.9
    """With model.from and without loss.teacher, the fraction of the full model's loss that holds it to the
    frozen original (KL); the rest is cross-entropy. 0: no original is kept."""
    trust_every: Count = 1
    """Steps from one in which the full model is held to its original to the next; its loss counts as many
    times. In the steps between, it only teaches, which costs a third if no early exit trains its layers."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class DistillConfig:
    """How the teacher of `loss.teacher` runs."""

    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Type of the teacher's weights; auto: that of the run."""
    device: str = "auto"
    """Device of the teacher: cpu, cuda, cuda:1, ...; auto: where the student trains."""
    cache: str | None = None
    """Folder that keeps what the teacher says about the training text: made once, used by many runs; null:
    the teacher runs beside the student."""
    form: Literal["topk", "samples", "all"] = "topk"
    """Form of the cache: the k most likely tokens and all others as one bucket; k draws with their counts; or
    every logit."""
    k: Annotated[Whole, Field(ge=1, le=255)] = 16
    """Tokens of a position in the cache, or that a served teacher tells."""
    model: str | None = None
    """Name of the model at a served teacher; null: the first that it serves."""
    written_fraction: Fraction = 0.0
    """Fraction of a step's rows that distill.writer continues in place of the text: on-policy distillation,
    where the teacher scores what the student says."""
    writer: str = "student"
    """Who continues them: student, a member's name, or teacher (sequence-level distillation)."""
    prompt_tokens: Count = 32
    """Tokens of the text that a written row begins with."""
    replay_steps: Count = 8
    """Steps whose rows are written at once, by the weights of the first."""
    timeout: Positive = 60.0
    """Seconds to wait for an answer of a served teacher; it is asked three times."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class DataConfig:
    """The text, its tokenizer, and how it is cut into rows."""

    source: str = "stdlib"
    """Training text: stdlib (this Python's own source), a path or glob of .txt, .jsonl or .parquet files (.xz
    too), or a Hugging Face dataset."""
    valid: str | None = None
    """Validation text, likewise; null: split off from source."""
    valid_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Fraction of the documents that is split off."""
    text_field: str = "text"
    """Field of a jsonl or parquet row that holds the text."""
    messages_field: str | None = None
    """Field of a jsonl or parquet row that holds a conversation, a list of messages with role and content. It
    is written by the model's chat template, and answers alone are learned; null: the text field is read."""
    separator: str = "<|endoftext|>"
    """Line that ends a document in a .txt file."""
    tokenizer: str = "bpe"
    """Tokenizer: bpe (trained on source; with model.from or loss.teacher, that model's), a folder, or a
    Hugging Face name."""
    vocab_size: Annotated[Whole, Field(ge=2)] = 4096
    """Number of tokens of a trained tokenizer."""
    sequence_length: Annotated[Whole, Field(ge=2)] = 256
    """Tokens of a row."""
    max_documents: Count | None = None
    """Documents to read; null: all."""
    cache_dir: str | None = None
    """Folder that keeps tokenized text; null: the user's cache."""
    num_workers: Natural = 0
    """Processes that load rows."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class OptimConfig:
    """AdamW and its schedule."""

    lr: Positive = 1e-3
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of AdamW's two averages."""
    eps: Positive = 1e-8
    """Epsilon of AdamW."""
    weight_decay: NonNegative = 0.1
    """Weight decay of the matrices."""
    warmup_steps: Natural = 100
    """Steps of linear warm-up."""
    min_lr_ratio: Fraction = 0.1
    """Last learning rate / peak (cosine)."""
    outer_lr_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of the neurons and heads that no narrow member has / that of the others. Below 1 the
    first neurons take over more of the work, and in a short run narrow members come closer to the full
    model, which pays for it: see docs/results/study."""
    fused: bool = True
    """Update in one kernel; without it, skip_sigma waits for the device once a step."""
    skip_sigma: NonNegative = 6.0
    """Skip a step whose gradient norm is not finite, or whose logarithm is this many standard deviations
    above its running mean; after three in a row, return to the last state with new data; 0: never."""


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class TrainerConfig:
    """Length, batches and devices of the run, in Lightning's names."""

    max_steps: Count = 2000
    """Optimizer steps."""
    batch_size: Count = 16
    """Rows of a micro-batch, over all devices, which divide them evenly: a recipe trains on the same rows in
    the same steps on any number of devices."""
    accumulate_grad_batches: Count = 1
    """Micro-batches of a step."""
    gradient_clip_val: Positive | None = 1.0
    """Largest norm of the gradient; null: no limit."""
    accelerator: str = "auto"
    """Kind of device: auto, cpu, gpu, ..."""
    devices: int | str = "auto"
    """Devices of each machine: auto, a number, or a list as in 0,1."""
    num_nodes: Count = 1
    """Number of machines."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: every device holds the full model; fsdp: weights, gradients and moments are sharded (FSDP2);
    auto: ddp if there are several devices."""
    val_check_interval: Count = 250
    """Steps between validations."""
    limit_val_batches: Count = 16
    """Batches of a validation."""
    log_every_n_steps: Count = 10
    """Steps between log lines."""
    checkpoint_every: Count = 500
    """Steps between resumable states."""
    keep_checkpoints: Annotated[Whole, Field(ge=2)] = 2
    """Number of resumable states to keep."""
    max_time: str | None = None
    """Time (DD:HH:MM:SS) after which the run saves its state and ends with code 143; null: no limit."""

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, over all micro-batches and devices."""
        return self.batch_size * self.accumulate_grad_batches

    @property
    def limit_final_batches(self) -> int:
        """Batches on which the finished family is measured."""
        return 4 * self.limit_val_batches

    @property
    def max_seconds(self) -> float:
        """`max_time` as a number; infinite without a limit."""
        if self.max_time is None:
            return math.inf
        days, hours, minutes, seconds = map(int, self.max_time.split(":"))
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass(frozen=True, kw_only=True, config=CHECKED)
class TrackingConfig:
    """Dashboards of the run; metrics.jsonl is always written."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Mode of Weights & Biases; auto: online when logged in, else offline."""
    project: str = "nestling"
    """Project in the dashboard."""
    name: str | None = None
    """Name of the run; null: that of its folder."""
    tensorboard: bool = True
    """Write TensorBoard files when it is installed."""
    logger: str | None = None
    """Import path of one more Lightning logger class."""
