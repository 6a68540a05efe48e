"""A model over a few of its tokens: small enough to walk through all that it may write.

`restrict` keeps the rows of the embedding and of the head that belong to these tokens; every other weight
is the model's own. `Passes` makes such walks cheap: the branches of a walk share most of their passes, and
each is made once. `Few` runs the engine on both.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from models.cache import KVCache, Memory
from models.config import ElasticConfig
from models.decode.chance import Random
from models.decode.draft import Draft, ModelDraft, NestedDraft
from models.decode.engine import stream
from models.decode.reference import full_pass_law, plain_decode
from models.decode.sampling import SamplingParams
from models.elastic import ElasticLM
from models.granularity import FULL, Granularity
from models.measure.laws import Law, exact_law
from models.quantize import pack
from models.view import View
from models.weights import EMBEDDING, HEAD, model_from, weights_of


def likeliest_tokens(model: ElasticLM, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[int]:
    """The tokens [num_tokens] that are likeliest after the prompts, on average; the likeliest first."""
    device = model.model.embed_tokens.weight.device
    with torch.inference_mode():
        ends = [model(torch.tensor([list(ids)], device=device), num_last=1)[0, -1] for ids in prompts]
        mean_V = torch.stack([logits_V.float().softmax(-1) for logits_V in ends]).mean(0)
        tokens: list[int] = mean_V.topk(num_tokens).indices.tolist()
    return tokens


def restrict(model: ElasticLM, token_ids: Sequence[int], dtype: torch.dtype | None = None) -> ElasticLM:
    """A copy whose token i is the model's `token_ids[i]`; its laws are the model's, given these tokens.

    No token ends its texts. A packed model gives a plain one, of the weights that it was packed from.

    Args:
        model: any elastic model.
        token_ids: of the model, each once.
        dtype: of the copy; None keeps the embedding's.
    """
    config = dataclasses.replace(
        model.config, vocab_size=len(token_ids), bos_token_id=None, eos_token_id=None
    )
    rows = torch.tensor(list(token_ids), device=model.model.embed_tokens.weight.device)
    tensors = {
        name: tensor[rows] if name in {EMBEDDING, HEAD} else tensor
        for name, tensor in weights_of(model).items()
    }
    return model_from(config, tensors, dtype=dtype).eval()


_Key: TypeAlias = tuple[int, Granularity, int, int | None, tuple[int, ...]]
"""Which model, which member, at which position, how many of them scored, on which tokens."""


@dataclass(frozen=True)
class _Pass:
    logits_BTV: Tensor
    start: int
    end: int
    written: list[tuple[Tensor, Tensor]]
    """Keys and values [B, G, end - start, K] of each layer."""
    following: "dict[_Key, _Pass]" = field(default_factory=dict)


class Passes:
    """What the passes of a request gave, found again when another request begins with the same ones.

    A request starts with empty stores, so that a pass is a function of those before it: of their models,
    positions and tokens. What it wrote is put into the stores before the next pass that is really made.
    """

    def __init__(self) -> None:
        self._first: dict[_Key, _Pass] = {}
        self._alone: dict[_Key, Tensor] = {}
        self.start()

    def start(self) -> None:
        """The passes from now on are those of a new request, whose stores are empty."""
        self._following = self._first
        self._found: list[tuple[KVCache, int, _Pass]] = []

    def view(self, model: ElasticLM, granularity: Granularity = FULL) -> View:
        """A member whose passes are remembered; the model must stay alive as long as this."""
        return _RememberedView(model, granularity, self)

    def run(self, view: View, tokens_BT: Tensor, memory: Memory | None, num_last: int | None) -> Tensor:
        """Logits [B, T, V] of a pass, made or found; see `View.__call__`."""
        assert memory is None or isinstance(memory, KVCache), memory
        start = 0 if memory is None else memory.length
        tokens = tuple(tokens_BT.flatten().tolist())
        key = (id(view.model), view.granularity, start, num_last, tokens)
        if memory is None:
            if key not in self._alone:
                self._alone[key] = View.__call__(view, tokens_BT, num_last=num_last)
            return self._alone[key]
        num_layers, one = view.model.config.num_hidden_layers, self._following.get(key)
        if one is None:
            self._write_what_was_found()
            logits_BTV = View.__call__(view, tokens_BT, memory, num_last=num_last)
            end = start + tokens_BT.shape[1]
            written = [
                (k_BGTK.clone(), v_BGTK.clone())
                for k_BGTK, v_BGTK in _positions(memory, num_layers, start, end)
            ]
            one = self._following[key] = _Pass(logits_BTV, start, end, written)
        else:
            self._found.append((memory, num_layers, one))
        self._following = one.following
        return one.logits_BTV

    def _write_what_was_found(self) -> None:
        for memory, num_layers, one in self._found:
            places = _positions(memory, num_layers, one.start, one.end)
            for (k_BGTK, v_BGTK), (k, v) in zip(places, one.written, strict=True):
                k_BGTK.copy_(k)
                v_BGTK.copy_(v)
        self._found.clear()


class _RememberedView(View):
    def __init__(self, model: ElasticLM, granularity: Granularity, passes: Passes) -> None:
        super().__init__(model, granularity)
        self._passes = passes

    def __call__(
        self, tokens_BT: Tensor, memory: Memory | None = None, *, num_last: int | None = None
    ) -> Tensor:
        return self._passes.run(self, tokens_BT, memory, num_last)


def _positions(memory: KVCache, num_layers: int, start: int, end: int) -> list[tuple[Tensor, Tensor]]:
    """Views of the stores' keys and values at these positions, committed or not."""
    whole = memory.view()
    whole.rewind(0)
    whole.commit(end)
    stores = [whole.read(layer) for layer in range(num_layers)]
    return [(k_BGSK[:, :, start:], v_BGSK[:, :, start:]) for k_BGSK, v_BGSK in stores]


# ------------------------------------------------------------------ what drafts

MakeDraft: TypeAlias = Callable[[], Draft]
"""A new draft for each request: one of its own keeps the last request's text."""
ForModel: TypeAlias = Callable[[ElasticLM, Callable[[ElasticLM, Granularity], View]], MakeDraft]
"""(target, how members are seen) -> its draft."""


def member(granularity: Granularity, precision: str | None = None) -> ForModel:
    """A member of the target in place, or packed in a precision."""

    def of(model: ElasticLM, view: Callable[[ElasticLM, Granularity], View]) -> MakeDraft:
        source = model if precision is None else pack(model, precision, granularity)
        seen = view(source, granularity)
        return lambda: NestedDraft(seen)

    return of


def hostile(model: ElasticLM, view: Callable[[ElasticLM, Granularity], View]) -> MakeDraft:
    """A very small model of its own, which knows nothing and is sure of it."""
    config = ElasticConfig(
        vocab_size=model.config.vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=model.config.max_position_embeddings,
        initializer_range=0.5,
    )
    stranger = ElasticLM(config)
    stranger.init_weights(torch.Generator().manual_seed(99))
    weight = model.model.embed_tokens.weight
    seen = view(stranger.to(device=weight.device, dtype=weight.dtype).eval(), FULL)
    return lambda: ModelDraft(seen)


# ------------------------------------------------------------------ whose law is walked


class Few:
    """A target and its drafts over a few tokens, whose laws can be walked through.

    Args:
        target: a restricted model, packed or not.
        drafts: by name.
        remember: whether passes are made once each, rather than once in every branch.
    """

    PROMPT = (1, 0)

    def __init__(self, target: ElasticLM, drafts: Mapping[str, ForModel], *, remember: bool = True) -> None:
        self.num_tokens = target.config.vocab_size
        self._passes = Passes()
        view = self._passes.view if remember else View
        self._target = view(target, FULL)
        self._drafts = {name: of(target, view) for name, of in drafts.items()}

    def decode(self, random: Random, *, draft: str | None, length: int, **options: Any) -> list[int]:
        """What the engine writes after the prompt with these choices; options are those of `stream`."""
        self._passes.start()
        made = None if draft is None else self._drafts[draft]()
        options |= {"draft": made, "max_new_tokens": length, "random": random}
        return [token.id for token in stream(self._target, self.PROMPT, **options)]

    def law(self, **options: Any) -> Law:
        """The exact law of `decode`."""
        return exact_law(partial(self.decode, **options))

    def reference(self, params: SamplingParams, length: int, eos_token_ids: Collection[int] = ()) -> Law:
        """The target's law by a full pass for every token: no cache, no draft, no engine."""
        p = full_pass_law(self._target, params)
        options: dict[str, Any] = {"max_new_tokens": length, "eos_token_ids": eos_token_ids}
        return exact_law(lambda random: plain_decode(p, list(self.PROMPT), random=random, **options))
