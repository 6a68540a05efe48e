"""Parameters, operations and bytes of a member: pure arithmetic of a shape and a granularity.

Operations are those of the matrix products, 2 per multiply-add, as `torch.utils.flop_counter` counts
them: projections, feed-forward, vocabulary head, and both products of attention over the whole
rectangle of new and read positions. Norms, rotations, softmax and the embedding look-up are left out.

>>> from models.elastic.config import ElasticConfig
>>> from models.elastic.granularity import Granularity
>>> config = ElasticConfig(
...     vocab_size=1000,
...     hidden_size=64,
...     intermediate_size=256,
...     num_hidden_layers=4,
...     num_attention_heads=4,
...     num_key_value_heads=2,
... )
>>> count_parameters(config), count_parameters(config, Granularity.parse("ffn=0.25,layers=0-1"))
(310336, 113472)
>>> count_flops(config), count_flops(config, num_cached=100)
(620544, 722944)
>>> count_kv_bytes(config, num_positions=1024, dtype_bytes=2)
524288
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from models.elastic.config import ElasticConfig, window_blocks
from models.elastic.granularity import FULL, Granularity, LayerPlan


def count_parameters(config: ElasticConfig, granularity: Granularity = FULL) -> int:
    """Return how many numbers the member's extraction holds; a tied head is the embedding, counted once.

    Raises:
        UsageError: if the granularity does not fit (so do all functions here).
    """
    return count_ends(config) + count_layer_parameters(config, granularity.resolve(config).layers)


def count_layer_parameters(config: ElasticConfig, layers: Iterable[LayerPlan]) -> int:
    """Return how many numbers a member's layers hold: all of it but the embedding, last norm and head."""
    return sum(math.prod(shape) for layer in layers for shape in layer.shapes(config).values())


def count_flops(
    config: ElasticConfig,
    granularity: Granularity = FULL,
    *,
    num_tokens: int = 1,
    num_cached: int = 0,
    num_scored: int | None = None,
) -> int:
    """Return the operations of one forward pass over one row.

    Args:
        config: the full model's shape.
        granularity: the member.
        num_tokens: new tokens.
        num_cached: earlier positions, whose keys and values are read from a cache.
        num_scored: positions that the vocabulary head scores; all new tokens if None.
    """
    layers = granularity.resolve(config).layers
    matrices = sum(_matrix_weights(config, layer) for layer in layers)
    # Each head's scores, and the values that they mix.
    attention = sum(
        2 * _rows(config, layer, "q") * _count_scores(config.window(layer.index), num_tokens, num_cached)
        for layer in layers
    )
    head = config.hidden_size * config.vocab_size
    return 2 * (num_tokens * matrices + attention + (num_tokens if num_scored is None else num_scored) * head)


def count_weight_bytes(config: ElasticConfig, granularity: Granularity = FULL, *, dtype_bytes: int) -> int:
    """Return the bytes of the member's weights."""
    return count_parameters(config, granularity) * dtype_bytes


def count_kv_bytes(
    config: ElasticConfig, granularity: Granularity = FULL, *, num_positions: int, dtype_bytes: int
) -> int:
    """Return the bytes of one row's keys and values."""
    keys = sum(_rows(config, layer, "k") for layer in granularity.resolve(config).layers)
    return 2 * keys * num_positions * dtype_bytes


@dataclass(frozen=True, kw_only=True)
class TrainingBytes:
    """An estimate of the memory of a training step, by what takes it."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The sum, as if everything were alive at once."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def estimate_training_bytes(
    config: ElasticConfig,
    *,
    batch_tokens: int,
    activation_bytes: int = 4,
    members: Iterable[tuple[Granularity, float]] = (),
    shards: int = 1,
    scored_at_once: int | None = None,
    compiled: bool = False,
    owned: int = 0,
) -> TrainingBytes:
    """Estimate the memory of a step with AdamW and fp32 weights; no checkpointing of activations.

    What autograd keeps per token and layer is counted; temporaries, fragmentation, the libraries and copies
    of keys that blocks of a window keep are not, and nothing is assumed to be freed before the step ends.

    Args:
        config: the full model's shape.
        batch_tokens: tokens of one backward pass, over all its rows.
        activation_bytes: per number, 2 under autocast to bf16, which also keeps a cast of the weights.
        members: members that train too, each with the fraction of the tokens on which it does. Prefixes
            of the layers cost a head only: the full pass's states are theirs.
        shards: processes that weights, gradients and moments are sharded over. Beside its shard each holds
            the gathered embedding, norm and head with their gradients for the whole step, one layer that
            runs and the next one.
        scored_at_once: tokens whose logits are held at the same time; all of them if None.
        compiled: whether models/kernels/train_ops.py runs the operations between the products.
        owned: weights that members have for themselves, which are gathered for the whole step.
    """
    parameters = count_parameters(config)
    layer = count_layer_parameters(config, FULL.resolve(config).layers[:1])
    gathered = 0 if shards == 1 else min(parameters, count_ends(config) + 2 * layer)
    gathered += 0 if shards == 1 else owned
    held = -(-(parameters + owned) // shards)
    scored, passes = 1.0, [(FULL, 1.0)]
    for granularity, fraction in members:
        scored += fraction
        if not granularity.resolve(config).is_layer_prefix:
            passes.append((granularity, fraction))
    kept = sum(round(fraction * _kept_numbers(config, one, compiled=compiled)) for one, fraction in passes)
    fused = sum(_fused_weights(config, one) for one, _ in passes) if compiled else 0
    # Logits as the head gives them, then in fp32 their log-softmax and its gradient.
    tokens_at_once = min(batch_tokens, scored_at_once or batch_tokens)
    logits = scored * tokens_at_once * config.vocab_size * (activation_bytes + 8)
    return TrainingBytes(
        weights=4 * (held + gathered)
        + activation_bytes * (fused + (activation_bytes < 4) * (parameters + owned)),
        gradients=4 * (held + gathered),
        optimizer=8 * held,
        activations=kept * batch_tokens * activation_bytes,
        logits=round(logits),
    )


@dataclass(frozen=True, kw_only=True)
class StepTraffic:
    """Bytes of the tensors that the processes of a training step exchange.

    Args:
        reduced: gradients added up and handed to every process.
        gathered: weights whose parts every process gets.
        scattered: gradients added up, of which each process gets its part.
    """

    reduced: int = 0
    gathered: int = 0
    scattered: int = 0

    def sent(self, processes: int) -> int:
        """Return the bytes that each process sends, and receives, in rings (https://arxiv.org/abs/1802.05799)."""
        return (2 * self.reduced + self.gathered + self.scattered) * (processes - 1) // processes


def count_step_traffic(
    config: ElasticConfig,
    *,
    sharded: bool,
    passes: Iterable[Granularity] = (FULL,),
    micro_batches: int = 1,
    owned: int = 0,
) -> StepTraffic:
    """Return the traffic of an optimizer step with fp32 weights and gradients.

    Whole models (DDP) add up their gradients once a step. Sharded (FSDP2), a layer is gathered for
    each pass that runs it, forward and backward, and freed in between; embedding,
    norm and head are gathered once; gradients are added up after each micro-batch.

    Args:
        config: the full model's shape.
        sharded: whether the weights are sharded over the processes.
        passes: members that run a trained pass in a micro-batch, the full model among them.
        micro_batches: number of micro-batches of a step.
        owned: weights that members have for themselves.

    >>> from models.elastic.config import ElasticConfig
    >>> config = ElasticConfig(
    ...     vocab_size=1000,
    ...     hidden_size=64,
    ...     intermediate_size=256,
    ...     num_hidden_layers=4,
    ...     num_attention_heads=4,
    ...     num_key_value_heads=2,
    ... )
    >>> count_step_traffic(config, sharded=False).sent(8) // 1000, 4 * count_parameters(config) // 1000
    (2172, 1241)
    >>> count_step_traffic(config, sharded=True).sent(8) // 1000
    3034
    """
    parameters, ends = count_parameters(config) + owned, count_ends(config) + owned
    if not sharded:
        return StepTraffic(reduced=4 * parameters)
    full = FULL.resolve(config).layers
    gathered = 0
    for granularity in passes:
        for layer in granularity.resolve(config).layers:
            gathered += 2 * count_layer_parameters(config, [full[layer.index]])
    return StepTraffic(
        gathered=4 * micro_batches * (ends + gathered), scattered=4 * micro_batches * parameters
    )


def count_ends(config: ElasticConfig) -> int:
    """Return how many numbers there are in the embedding, the final norm and the vocabulary head."""
    embedding = config.vocab_size * config.hidden_size
    return embedding * (1 if config.tie_word_embeddings else 2) + config.hidden_size


def _count_scores(window: int | None, num_tokens: int, num_cached: int) -> int:
    """Return how many scores each head of a layer computes."""
    num_read = num_cached + num_tokens
    if window is None:
        return num_tokens * num_read
    return sum(count * (end - start) for start, end, count in window_blocks(num_tokens, num_read, window))


def _matrix_weights(config: ElasticConfig, layer: LayerPlan) -> int:
    """Return the number of weights that multiply each token: all but norms and biases."""
    return sum(math.prod(shape) for shape in layer.shapes(config).values() if len(shape) == 2)


def _rows(config: ElasticConfig, layer: LayerPlan, name: str) -> int:
    """Return the outputs of the layer's q, k or v projection."""
    return layer.shapes(config)[f"self_attn.{name}_proj.weight"][0]


def _fused_weights(config: ElasticConfig, granularity: Granularity) -> int:
    """Return the weights of q, k and v, which a compiled training pass fuses into one matrix a layer."""
    layers = granularity.resolve(config).layers
    return config.hidden_size * sum(_rows(config, layer, name) for layer in layers for name in "qkv")


def _kept_numbers(config: ElasticConfig, granularity: Granularity, *, compiled: bool) -> int:
    """Return how many numbers per token a pass keeps for its backward pass."""
    kept = 2 * config.hidden_size  # a norm keeps its input and its output
    for layer in granularity.resolve(config).layers:
        queries, keys = (_rows(config, layer, name) for name in "qk")
        kept += (6 if config.post_norms else 4) * config.hidden_size  # its norms; of those after, the input
        kept += 2 * queries + 2 * keys + (queries + keys if config.qk_norm else 0)  # attention
        recomputes = compiled and config.hidden_act == "silu"
        kept += (3 if recomputes else 4) * layer.ffn  # gate, what it becomes unless recomputed, up, product
    return kept
