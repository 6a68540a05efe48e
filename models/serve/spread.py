"""The client's side of a model that is spread over machines: its layers run elsewhere, in stages.

    member         embeds tokens, gives logits, and drafts: every member of a family has the model's two ends
    stage          runs its layers on the states that it is sent (models/serve/stage.py)
    hop            a text's connection to a stage; keeps what entered it, and sends it all to a replacement

      ids -> embedding --> stage 1 --> back --> stage 2 --> back --> norm, head -> logits

The model that is put together is one that the engine decodes as any other: sampling, drafts and stop strings
are the client's own, and the text is that of one machine.
"""

import base64
import binascii
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from models.base.errors import NestlingError, UsageError
from models.decode.decoder import Decoder, open_decoder
from models.decode.engine.draft import ModelDraft
from models.decode.engine.policy import NO_DRAFT
from models.decode.sampling.params import GREEDY, SamplingParams
from models.decode.sampling.samplers import COUPLED
from models.decode.tune.resolve import AUTO, DEFAULT_GAMMA, Drafting
from models.elastic.cache import KVCache
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.norm import RMSNorm
from models.elastic.request import Head, Request
from models.serve.hop import Facts, Hop, StagePeer, StageRoute, describe
from models.serve.protocol import tokenizer_digest
from models.serve.stage import ends_digest
from models.serve.states import STATES, states_of

MOST_DRAFTED = 32
"""The most drafted tokens of a round where gamma adapts: a far stage is worth long drafts."""
MOST_TEXTS = 16
"""The most texts whose round trips run at the same time."""


def open_spread(
    path: str | Path,
    stages: Sequence[str],
    *,
    spares: Sequence[str] = (),
    gamma: int | Literal["auto"] | None = None,
    params: SamplingParams = GREEDY,
    verifier: str | None = None,
    dtype: str = "auto",
    **settings: Any,
) -> Decoder:
    """Open a model that is spread over stages; its text is that of one machine with the same seed.

    Args:
        path: the folder of a member, or of the model: it embeds, gives logits and drafts.
        stages: their addresses in the order of their layers.
        spares: addresses of stages that stand in for one that is lost.
        gamma: drafted tokens a round; 0 drafts none, `auto` and None follow what is measured.
        params: settings of sampling.
        verifier: as in `open_decoder`; None is `coupled`, by which no text depends on the draft.
        dtype: as `open_for_decoding` takes it; `auto` is that of the stages.
        settings: `token`, `ca` and `timeout` of `Peer`.

    Raises:
        UsageError: if the stages are not the model's layers in order.
        NestlingError: if a stage does not answer, or has another model; naming what differs.
    """
    peers = [StagePeer.parse(text, **settings) for text in stages]
    others = [StagePeer.parse(text, **settings) for text in spares]
    found = [(peer, describe(peer)) for peer in (*peers, *others)]
    dtype = found[0][1].dtype if dtype == AUTO else dtype
    decoder = open_decoder(path, draft=NO_DRAFT, params=params, verifier=verifier or COUPLED, dtype=dtype)
    member = decoder.folder.model
    ours = {
        "dtype": decoder.dtype,
        "states": STATES,
        "hidden_size": member.config.hidden_size,
        "tokenizer": tokenizer_digest(decoder.tokenizer),
        "ends": ends_digest(member),
    }
    routes = _routes(found[: len(peers)], found[len(peers) :], ours)
    model = SpreadLM(member, routes)
    fixed = isinstance(gamma, int)
    repeats = params.is_greedy or verifier in (None, COUPLED)
    drafts = gamma != 0
    drafting = Drafting(
        draft=ModelDraft(member) if drafts else None,
        name=str(path) if drafts else NO_DRAFT,
        gamma=gamma if isinstance(gamma, int) else DEFAULT_GAMMA,
        note=f"layers at {', '.join(peer.url for peer in peers)}",
        most=MOST_DRAFTED,
        adapts=drafts and not fixed and repeats,
        source=(decoder.folder.path, FULL) if drafts else None,
        verifier=verifier or COUPLED,
    )
    return replace(decoder, folder=replace(decoder.folder, model=model), drafting=drafting)


def _routes(
    stages: Sequence[tuple[StagePeer, Facts]],
    spares: Sequence[tuple[StagePeer, Facts]],
    ours: Mapping[str, Any],
) -> list[StageRoute]:
    """Check that all stages are one model's, and ours; give each those that stand in for it."""
    first_peer, first = stages[0]
    for peer, facts in (*stages, *spares):
        for name, value in ours.items():
            if getattr(facts, name) != value:
                hint = f"; give --dtype {facts.dtype}" if name == "dtype" else ""
                raise NestlingError(
                    f"--stages {peer.url}: {name}: MODEL has {value}, the stage {getattr(facts, name)}{hint}"
                )
        for name in ("weights", "num_layers"):
            if getattr(facts, name) != getattr(first, name):
                raise NestlingError(
                    f"--stages: {name}: {first_peer.url} has {getattr(first, name)}, "
                    f"{peer.url} {getattr(facts, name)}; all must have one model"
                )
    _check_order([facts for _, facts in stages])
    return [
        StageRoute(facts=facts, peers=(peer, *(spare for spare, other in spares if other == facts)))
        for peer, facts in stages
    ]


def _check_order(stages: Sequence[Facts]) -> None:
    """Raise UsageError unless the stages are all layers, in order."""
    expected, given = 0, ", ".join(_range(*facts.layers) for facts in stages)
    for facts in stages:
        first, last = facts.layers
        if first > expected:
            raise UsageError(
                f"--stages have the layers {given}: {_range(expected, first - 1)} are missing before {first}"
            )
        if first < expected:
            raise UsageError(
                f"--stages have the layers {given}: {first} comes twice or late; give each once, in order"
            )
        expected = last + 1
    if stages[-1].num_layers != expected:
        missing = _range(expected, stages[-1].num_layers - 1)
        raise UsageError(f"--stages have the layers {given}: {missing} are missing at the end")


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


class SpreadLM(ElasticLM):
    """A model whose ends are here and whose layers are stages.

    Args:
        member: has the ends.
        routes: the stages, in order.
    """

    def __init__(self, member: ElasticLM, routes: Sequence[StageRoute]) -> None:
        facts = routes[-1].facts
        with torch.device("meta"):
            super().__init__(_config(member.config, facts))
        self.is_compiled = member.is_compiled
        self._member, self._routes = [member], routes  # in a list, so that torch does not look into it
        self.model.embed_tokens, self.lm_head = member.model.embed_tokens, member.lm_head
        self.model.norm = RMSNorm(member.config.hidden_size, member.config)
        with torch.no_grad():
            self.model.norm.weight.copy_(_norm(facts))
        self.model.norm.to(member.device, member.model.norm.weight.dtype)
        self._threads = ThreadPoolExecutor(MOST_TEXTS, "nestling-hops")
        self.eval()

    def new_cache(self, num_positions: int) -> "SpreadCache":
        """See `ElasticLM.new_cache`; keys and values are at the stages."""
        return SpreadCache(self.config, num_positions, [Hop(route, num_positions) for route in self._routes])

    def run(
        self, requests: Sequence[Request], granularity: Granularity = FULL, head: Head | None = None
    ) -> Tensor:
        """See `ElasticLM.run`; the round trips of several texts run at the same time."""
        assert (granularity, head) == (FULL, None), "a draft runs in the member"
        entered = [self._member[0].embed(one.ids) for one in requests]
        through: Callable[..., Iterable[Tensor]] = self._threads.map if len(requests) > 1 else map
        left_TD = torch.cat(list(through(_through_stages, requests, entered)))
        return self._member[0].score(left_TD, self.model.norm)


def _through_stages(request: Request, x_TD: Tensor) -> Tensor:
    cache = request.cache
    assert isinstance(cache, SpreadCache), cache
    *before, last = cache.hops
    for hop in before:
        x_TD = hop.run(x_TD, cache.length, len(request.ids))
    return last.run(x_TD, cache.length, request.num_last)


def _config(config: ElasticConfig, facts: Facts) -> ElasticConfig:
    """Return the model's shape, as far as decoding asks for it."""
    return replace(
        config,
        num_hidden_layers=facts.num_layers,
        no_rope_layers=None,
        layer_types=None,
        max_position_embeddings=facts.context,
        eos_token_id=facts.eos_token_ids,
    )


def _norm(facts: Facts) -> Tensor:
    try:
        norm = states_of(base64.b64decode(facts.norm, validate=True), facts.hidden_size)
    except (binascii.Error, ValueError):
        norm = torch.empty(0)
    if norm.shape != (1, facts.hidden_size):
        raise NestlingError("--stages: the last stage's answer has no final norm; is it a stage?")
    return norm[0]


class SpreadCache(KVCache):
    """The length of a text whose keys and values are at the stages.

    Args:
        config: the model's shape.
        num_positions: the most positions of the text.
        hops: its connections, which end with it.
    """

    def __init__(self, config: ElasticConfig, num_positions: int, hops: Sequence["Hop"]) -> None:
        super().__init__(config, num_positions=num_positions, num_layers=0)
        self.hops = hops
        for hop in hops:
            weakref.finalize(self, hop.close)
