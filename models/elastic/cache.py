"""The keys and values that an attention layer reads: four memories with one verb, `extend`.

    KVCache        decoding: a static store of committed positions; a draft's `view()` shares it
    Batch          decoding: the caches of several requests, whose tokens share one pass
    Recording      training: keeps the full model's keys and values of this pass for the members
    SharedPrefix   training: a member reads the recorded keys and values as it will when it drafts

A draft in place attends to the full model's keys and values up to the last verified position and to
its own for the few positions that it drafted itself:

    position     0 1 2 3 4 | 5 6 7
    written by   full model| draft      <- the full model's next pass overwrites 5 6 7

B batch, G key/value groups, T new positions, S positions read, K head dim.
"""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from models.elastic.config import ElasticConfig, window_blocks


class Reading(NamedTuple):
    """Keys and values [B, G, S, K] to attend to, and which of them each new position sees.

    A mask, of bools or of numbers to add, has a row for each new position, or one for each query head of
    a group and each position. None means causal where S == T, and everything where T == 1. Keys and values
    that another pass recorded, and that get no gradients, come first in the mask's columns.
    """

    k_BGSK: Tensor
    v_BGSK: Tensor
    mask_TS: Tensor | None
    recorded: tuple[Tensor, Tensor] | None = None


class Readings(NamedTuple):
    """The reading of each request of a pass, or of each block of its tokens, and their number, in order."""

    counts: list[int]
    each: list[Reading]


def read_window(k_BGSK: Tensor, v_BGSK: Tensor, num_new: int, window: int | None) -> Reading | Readings:
    """Return what the last `num_new` of S positions read, each itself and the earlier ones.

    Args:
        k_BGSK: keys.
        v_BGSK: values.
        num_new: T.
        window: the positions that each reads, itself among them; None for all, with T == S.
    """
    num_read = k_BGSK.shape[2]
    if window is None:
        return Reading(k_BGSK, v_BGSK, None)
    counts, each = [], []
    for start, end, count in window_blocks(num_new, num_read, window):
        mask_TS = None
        if count > 1 and end - start > count:
            seen_TS = torch.ones(count, end - start, dtype=torch.bool, device=k_BGSK.device)
            own = end - start - count  # the column of the first new position
            mask_TS = seen_TS.tril(own).triu(own - window + 1)
        counts.append(count)
        each.append(Reading(k_BGSK[:, :, start:end], v_BGSK[:, :, start:end], mask_TS))
    return each[0] if len(each) == 1 else Readings(counts, each)


class Memory(Protocol):
    """The keys and values that one forward pass reads and writes."""

    def positions(self, num_tokens: int) -> slice | Tensor:
        """Return the positions of the new tokens in their texts."""
        ...

    def extend(
        self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor, window: int | None = None
    ) -> Reading | Readings:
        """Take the new keys and values of a layer; return what to read.

        Args:
            layer: its index in the full model.
            k_BGTK: keys.
            v_BGTK: values.
            window: the positions that each token reads, itself among them; None for all.
        """
        ...


class KVCache:
    """Keys and values of committed positions, in buffers that never move.

    A pass writes behind `length` and commits nothing: the caller does, once it knows how much holds.

    Args:
        config: the full model's shape.
        batch_size: rows.
        num_positions: the most positions it can hold, drafted ones included.
        dtype: dtype of keys and values.
        device: device of the buffers.
        num_layers: the number of layers; None is the model's.
    """

    def __init__(
        self,
        config: ElasticConfig,
        *,
        batch_size: int = 1,
        num_positions: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        num_layers: int | None = None,
    ) -> None:
        shape = (batch_size, config.num_key_value_heads, num_positions, config.head_dim)
        self._stores = [
            (
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
            )
            for _ in range(config.num_hidden_layers if num_layers is None else num_layers)
        ]
        keys, values = zip(*self._stores, strict=True) if self._stores else ((), ())
        self.addresses = _addresses(keys), _addresses(values)
        self.dtype, self.batch_size = dtype, batch_size
        self.num_positions = num_positions
        self.heads_per_group = config.heads_per_group
        self.length = 0
        self._mask: Tensor | None = None

    def positions(self, num_tokens: int) -> slice:
        """See `Memory`; they follow the committed ones."""
        return slice(self.length, self.length + num_tokens)

    def extend(
        self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor, window: int | None = None
    ) -> Reading | Readings:
        """Write behind the committed positions; read everything up to and including the new ones.

        All positions are kept, also those that are out of a window: a draft is rewound, and a beginning
        is shared.
        """
        groups, num_tokens = k_BGTK.shape[1], k_BGTK.shape[2]
        end = self.length + num_tokens
        assert end <= self.num_positions, (end, self.num_positions)
        k_BGSK, v_BGSK = (store[:, :groups, :end] for store in self._stores[layer])
        k_BGSK[:, :, self.length :] = k_BGTK
        v_BGSK[:, :, self.length :] = v_BGTK
        if window is not None and end > window:
            return read_window(k_BGSK, v_BGSK, num_tokens, window)
        mask_TS = None if num_tokens == 1 or self.length == 0 else self._causal(num_tokens, k_BGSK)
        return Reading(k_BGSK, v_BGSK, mask_TS)

    def _causal(self, num_tokens: int, like: Tensor) -> Tensor:
        """Return the causal mask aligned to the last position, made once for all layers of a pass.

        It is ready to be added to the scores of all query heads of a group.
        """
        shape = (self.heads_per_group * num_tokens, self.length + num_tokens)
        if self._mask is None or self._mask.shape != shape:
            mask_TS = torch.full((num_tokens, shape[1]), -torch.inf, dtype=like.dtype, device=like.device)
            self._mask = mask_TS.triu_(self.length + 1).repeat(self.heads_per_group, 1)
        return self._mask

    def commit(self, num_tokens: int) -> None:
        """Keep the next `num_tokens` positions that the last pass wrote."""
        assert self.length + num_tokens <= self.num_positions, (self.length, num_tokens)
        self.length += num_tokens

    def rewind(self, length: int) -> None:
        """Forget everything from `length` on."""
        assert 0 <= length <= self.length, (length, self.length)
        self.length = length

    def copy_from(self, other: "KVCache", length: int) -> None:
        """Hold the first `length` positions that another cache has committed, and nothing else."""
        assert length <= min(other.length, self.num_positions), (length, other.length, self.num_positions)
        for ours, theirs in zip(self._stores, other._stores, strict=True):
            for our_BGSK, their_BGSK in zip(ours, theirs, strict=True):
                our_BGSK[:, :, :length] = their_BGSK[:, :, :length]
        self.length = length

    def view(self) -> "KVCache":
        """Return the same store with a length of its own, which starts at this one's."""
        view = object.__new__(KVCache)
        view.__dict__.update(self.__dict__)
        view._mask = None
        return view

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the committed keys and values [B, G, length, K] of a layer."""
        k_BGSK, v_BGSK = self._stores[layer]
        return k_BGSK[:, :, : self.length], v_BGSK[:, :, : self.length]

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(store.nbytes for pair in self._stores for store in pair)


def _addresses(stores: tuple[Tensor, ...]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(stores))(*(store.data_ptr() for store in stores))


class Batch:
    """The caches of several requests, whose new tokens lie one after another in one row of a pass.

    The tokens share the products with the weights, and nothing else: each request attends to its own
    cache, at its own positions, as if it were alone. Nothing is padded.

    Args:
        caches: a cache of one row for each request, all on one device.
        counts: number of new tokens of each request.
    """

    def __init__(self, caches: Sequence[KVCache], counts: Sequence[int]) -> None:
        self.caches, self.counts = list(caches), list(counts)

    def positions(self, num_tokens: int) -> Tensor:
        """See `Memory`."""
        ranges = [
            torch.arange(cache.length, cache.length + count)
            for cache, count in zip(self.caches, self.counts, strict=True)
        ]
        assert sum(map(len, ranges)) == num_tokens, (self.counts, num_tokens)
        return torch.cat(ranges)

    def extend(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor, window: int | None = None) -> Readings:
        """See `KVCache.extend`, for each request."""
        keys, values = k_BGTK.split(self.counts, dim=2), v_BGTK.split(self.counts, dim=2)
        all_counts, each = list[int](), list[Reading]()
        for cache, count, k_1GTK, v_1GTK in zip(self.caches, self.counts, keys, values, strict=True):
            reading = cache.extend(layer, k_1GTK, v_1GTK, window)
            blocks = reading if isinstance(reading, Readings) else Readings([count], [reading])
            all_counts += blocks.counts
            each += blocks.each
        return Readings(all_counts, each)


class Recording:
    """The full model's keys and values of one training pass, cut from the graph."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def positions(self, num_tokens: int) -> slice:
        """See `Memory`."""
        return slice(num_tokens)

    def extend(
        self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor, window: int | None = None
    ) -> Reading | Readings:
        """Keep them and read just them, causally."""
        self.layers[layer] = (k_BGTK.detach(), v_BGTK.detach())
        return read_window(k_BGTK, v_BGTK, k_BGTK.shape[2], window)

    def rows(self, rows: slice) -> "Recording":
        """Return the recording of some rows of the batch."""
        part = Recording()
        part.layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self.layers.items()}
        return part


class SharedPrefix:
    """Training on the shared cache: each block of positions is drafted from the full model's prefix.

    A position reads the recorded keys and values before its block's start, and its own from there
    on: exactly what decoding gives a draft whose round began at that start.

    Args:
        recording: the full model's pass over the same tokens.
        starts_T: for each position the first position of its block (not above the position).
    """

    def __init__(self, recording: Recording, starts_T: Tensor) -> None:
        positions = torch.arange(len(starts_T), device=starts_T.device)
        recorded_TT = positions < starts_T[:, None]
        own_TT = (positions >= starts_T[:, None]) & (positions <= positions[:, None])
        self.recording = recording
        self.mask_TS = torch.cat([recorded_TT, own_TT], dim=1)
        self._distances_TS = (positions[:, None] - positions).repeat(1, 2)

    def positions(self, num_tokens: int) -> slice:
        """See `Memory`."""
        return slice(num_tokens)

    def extend(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor, window: int | None = None) -> Reading:
        """Read [recorded | own] keys and values, S = 2T, through the block mask."""
        groups = k_BGTK.shape[1]
        recorded_k, recorded_v = (x[:, :groups].to(k_BGTK.dtype) for x in self.recording.layers[layer])
        mask_TS = self.mask_TS if window is None else self.mask_TS & (self._distances_TS < window)
        return Reading(k_BGTK, v_BGTK, mask_TS, (recorded_k, recorded_v))


def block_starts(num_positions: int, block: int, shift: int) -> Tensor:
    """Return block starts [T]: blocks of `block` positions, the first one `shift` positions short.

    >>> block_starts(7, 3, 1).tolist()
    [0, 0, 2, 2, 2, 5, 5]
    """
    positions = torch.arange(num_positions)
    return ((positions + shift) // block * block - shift).clamp(min=0)
