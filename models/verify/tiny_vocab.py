"""A model over a few of its tokens: small enough to walk through all that it may write.

`Passes` makes such walks cheap: the branches of a walk share most of their passes, and each is made once.
`TinyVocab` runs the engine on it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor

from models.decode.engine.engine import stream, stream_batch
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.rng import Random, SeededRandom
from models.elastic.cache import KVCache, Memory
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.request import Request
from models.elastic.view import View
from models.measure.reference import full_pass_probs, plain_decode
from models.verify.drafts import ADVERSARIAL, Drafts, ForModel, Gamma, Subject
from models.verify.exact import Distribution, exact_distribution

_Key: TypeAlias = tuple[int, Granularity, int, int | None, tuple[int, ...]]
"""(model, member, position, number of scored tokens, tokens)."""


@dataclass(frozen=True)
class _Remembered:
    logits_TV: Tensor
    start: int
    end: int
    written: list[tuple[Tensor, Tensor]]
    """Keys and values [B, G, end - start, K] of each layer."""
    following: "dict[_Key, _Remembered]" = field(default_factory=dict)


class Passes:
    """Remembered passes of requests, found again when another request begins with the same ones.

    A request starts with empty stores, so that a pass is a function of those before it: of their models,
    positions and tokens. What it wrote is put into the stores before the next pass that is really made.
    """

    def __init__(self) -> None:
        self._first: dict[_Key, _Remembered] = {}
        self._alone: dict[_Key, Tensor] = {}
        self.start()

    def start(self) -> None:
        """Begin the passes of a new request, whose stores are empty."""
        self._following = self._first
        self._found: list[tuple[KVCache, int, _Remembered]] = []

    def view(self, model: ElasticLM, granularity: Granularity = FULL) -> View:
        """Return a member whose passes are remembered; the model must stay alive as long as this."""
        return _RememberedView(model, granularity, self)

    def alone(self, view: View, tokens_BT: Tensor, num_last: int | None) -> Tensor:
        """Return logits [B, T, V] of a pass that reads nothing else, made or found."""
        key = (id(view.model), view.granularity, 0, num_last, tuple(tokens_BT.flatten().tolist()))
        if key not in self._alone:
            self._alone[key] = View.__call__(view, tokens_BT, num_last=num_last)
        return self._alone[key]

    def run(self, view: View, request: Request) -> Tensor:
        """Return logits [num_last, V] of a pass of decoding, made or found; see `Scorer.run`."""
        ids, cache, num_last, _ = request
        start, num_layers = cache.length, view.model.config.num_hidden_layers
        key = (id(view.model), view.granularity, start, num_last, tuple(ids))
        one = self._following.get(key)
        if one is None:
            self._write_what_was_found()
            logits_TV = View.run(view, [request])
            end = start + len(ids)
            written = [
                (k_BGTK.clone(), v_BGTK.clone())
                for k_BGTK, v_BGTK in _positions(cache, num_layers, start, end)
            ]
            one = self._following[key] = _Remembered(logits_TV, start, end, written)
        else:
            self._found.append((cache, num_layers, one))
        self._following = one.following
        return one.logits_TV

    def _write_what_was_found(self) -> None:
        for memory, num_layers, one in self._found:
            stores = _positions(memory, num_layers, one.start, one.end)
            for (k_BGTK, v_BGTK), (k, v) in zip(stores, one.written, strict=True):
                k_BGTK.copy_(k)
                v_BGTK.copy_(v)
        self._found.clear()


class _RememberedView(View):
    def __init__(self, model: ElasticLM, granularity: Granularity, passes: Passes) -> None:
        super().__init__(model, granularity)
        self._passes = passes

    @property
    def can_draw(self) -> bool:
        return False  # every pass is to be found again

    def __call__(
        self, tokens_BT: Tensor, memory: Memory | None = None, *, num_last: int | None = None
    ) -> Tensor:
        assert memory is None, memory
        return self._passes.alone(self, tokens_BT, num_last)

    def run(self, requests: Sequence[Request]) -> Tensor:
        (request,) = requests  # exact distributions are those of one text alone
        return self._passes.run(self, request)


def _positions(memory: KVCache, num_layers: int, start: int, end: int) -> list[tuple[Tensor, Tensor]]:
    """Return views of the stores' keys and values at these positions, committed or not."""
    whole = memory.view()
    whole.rewind(0)
    whole.commit(end)
    stores = [whole.read(layer) for layer in range(num_layers)]
    return [(k_BGSK[:, :, start:], v_BGSK[:, :, start:]) for k_BGSK, v_BGSK in stores]


# ------------------------------------------------------------------ whose distribution is walked through


class TinyVocab:
    """A target and its drafts over a few tokens, whose distributions can be walked through.

    Args:
        target: a restricted model, packed or not.
        drafts: drafts by name.
        tokens: of the whole model, the first of which are the target's; None means 0, 1, ...
        remember: whether passes are made once each, rather than once in every branch.
    """

    PROMPT = (0, 1, 0)
    """Its end is known from before if token 1 follows: then there is something to copy."""
    COMPANIONS: Mapping[Sequence[int], tuple[str | None, int]] = {
        (1,): (None, 0),
        (0, 1, 1, 0): (ADVERSARIAL, 3),
    }
    """Prompts of other lengths with a draft and gamma, decoded in a batch with the walk's."""

    def __init__(
        self,
        target: ElasticLM,
        drafts: Mapping[str, ForModel],
        *,
        tokens: Sequence[int] | None = None,
        remember: bool = True,
    ) -> None:
        self.num_tokens = target.config.vocab_size
        self._passes = Passes()
        view = self._passes.view if remember else View
        self._target = view(target, FULL)
        kept = range(self.num_tokens) if tokens is None else tokens[: self.num_tokens]
        self._drafts = Drafts(Subject(target, view, kept), drafts)

    def decode(
        self, random: Random, *, draft: str | None, length: int, gamma: Gamma = 0, **options: Any
    ) -> list[int]:
        """Return what the engine writes after the prompt with these choices and options of `stream`."""
        self._passes.start()
        options |= {"policy": self._drafts.policy(draft, gamma), "max_new_tokens": length, "random": random}
        return [token.id for token in stream(self._target, self.PROMPT, **options)]

    def decode_in_batch(
        self, random: Random, *, draft: str | None, length: int, gamma: Gamma = 0, **options: Any
    ) -> list[int]:
        """Return the same in a batch with `COMPANIONS`, that choose by themselves, remembering nothing."""
        rows = {self.PROMPT: (draft, gamma), **self.COMPANIONS}
        policies = (self._drafts.policy(*row) for row in rows.values())
        randoms = [random, *(SeededRandom(0, row) for row in range(1, len(rows)))]
        options |= {"max_new_tokens": length, "randoms": randoms, "new_policy": policies.__next__}
        first, *others = stream_batch(self._target, list(rows), **options)
        written = [token.id for token in first]
        for other in others:
            other.close()
        return written

    def distribution(self, *, in_batch: bool = False, **options: Any) -> Distribution:
        """Return the exact distribution of `decode`, or of `decode_in_batch`."""
        return exact_distribution(partial(self.decode_in_batch if in_batch else self.decode, **options))

    def reference(
        self, params: SamplingParams, length: int, eos_token_ids: Collection[int] = ()
    ) -> Distribution:
        """Return the target's distribution by a full pass for every token: no cache, no draft, no engine."""
        p = full_pass_probs(self._target, params)
        options: dict[str, Any] = {"max_new_tokens": length, "eos_token_ids": eos_token_ids}
        return exact_distribution(lambda random: plain_decode(p, list(self.PROMPT), random=random, **options))
