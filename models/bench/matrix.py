"""Which engines run: ours, and what transformers offers on the same weights.

    nestling      plain; speculative with each draft
    transformers  plain, on a dynamic and on a static cache; assisted by each draft cut out as a model
                  of its own, by the library's own schedule and by a constant one of as many tokens as
                  ours; prompt lookup

A cell is one of these in one dtype at one temperature. Another engine is one more generator of cells.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from models.bench.engines import Engine, OurEngine, Stock, StockEngine
from models.checkpoint import ModelFolder
from models.decode.draft import Draft, ModelDraft, NestedDraft
from models.decode.sampling import SamplingParams
from models.decode.state import elastic_model
from models.extract import extract
from models.huggingface import load_stock, to_hugging_face
from models.quantize import INT8

LOOKUP_TOKENS = 10
"""Drafted by prompt lookup: what transformers takes by itself."""


@dataclass(frozen=True, kw_only=True)
class Label:
    """What a cell is; these are fields of its row."""

    engine: str
    """nestling or transformers."""
    mode: str
    """plain, speculative, assisted or lookup."""
    dtype: str
    temperature: float
    draft: str | None = None
    gamma: int | None = None
    """Drafted tokens a round; None where nothing drafts or a schedule decides."""
    schedule: str | None = None
    """constant, or default: of transformers, which stops drafting where the draft is not confident."""
    cache: str | None = None
    """dynamic or static, where there is a choice."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One thing that is timed."""

    label: Label
    engine: Engine
    num_threads: int


@dataclass(frozen=True, kw_only=True)
class DraftChoice:
    """A draft that was asked for."""

    name: str
    draft: Draft
    gamma: int


class Target:
    """A model in one dtype, its stock copy, and stock copies of its drafts, each made once.

    Args:
        folder: the model, in the dtype and on the device that it runs on.
        dtype: its name.
        num_threads: for all that runs in this dtype.
        scratch: a folder for extractions.
    """

    def __init__(self, folder: ModelFolder, *, dtype: str, num_threads: int, scratch: Path) -> None:
        self.folder, self.model = folder, folder.model
        self.dtype, self.num_threads = dtype, num_threads
        self.stock = _stock(to_hugging_face(folder.model))
        self._scratch = scratch
        self._assistants: dict[str, Stock | None] = {}

    def assistant(self, choice: DraftChoice) -> Stock | None:
        """The draft as a stock model; None if no stock architecture holds it."""
        if choice.name not in self._assistants:
            self._assistants[choice.name] = self._make_assistant(choice.draft)
        return self._assistants[choice.name]

    def _make_assistant(self, draft: Draft) -> Stock | None:
        if isinstance(draft, ModelDraft):
            return _stock(to_hugging_face(elastic_model(draft.model)))
        if not (isinstance(draft, NestedDraft) and draft.view.plan.is_uniform):
            return None
        out = self._scratch / f"{self.dtype}-{len(self._assistants)}"
        weight = self.model.lm_head.weight
        stock: Any = load_stock(extract(self.folder, draft.view.granularity, out))
        return _stock(stock.to(device=weight.device, dtype=weight.dtype))


def _stock(model: object) -> Stock:
    """The library mixes `generate` in at a place that a type checker does not see."""
    return cast("Stock", model)


def make_cells(target: Target, params: SamplingParams, drafts: Sequence[DraftChoice]) -> list[Cell]:
    """The cells of one dtype and one temperature; ours plain is the first.

    Raises:
        UsageError: if a draft does not fit the target.
    """
    for choice in drafts:
        choice.draft.check(target.model)
    labelled = [*_ours(target, params, drafts)]
    if target.dtype != INT8:  # theirs would be another model: the weights before they were quantized
        labelled += _theirs(target, params, drafts)
    common: dict[str, Any] = {"dtype": target.dtype, "temperature": params.temperature}
    engines = {Label(**common, **label): engine for label, engine in labelled}  # each once
    return [
        Cell(label=label, engine=engine, num_threads=target.num_threads) for label, engine in engines.items()
    ]


_Labelled = Iterator[tuple[dict[str, Any], Engine]]


def _ours(target: Target, params: SamplingParams, drafts: Sequence[DraftChoice]) -> _Labelled:
    yield {"engine": "nestling", "mode": "plain"}, OurEngine(model=target.model, params=params)
    for choice in drafts:
        label = {"engine": "nestling", "mode": "speculative", "draft": choice.name, "gamma": choice.gamma}
        new_draft = functools.partial(_renew, choice.draft)
        yield label, OurEngine(model=target.model, params=params, new_draft=new_draft, gamma=choice.gamma)


def _theirs(target: Target, params: SamplingParams, drafts: Sequence[DraftChoice]) -> _Labelled:
    def engine(**settings: Any) -> Engine:
        return StockEngine(model=target.stock, params=params, **settings)

    plain = {"engine": "transformers", "mode": "plain"}
    yield {**plain, "cache": "dynamic"}, engine()
    yield {**plain, "cache": "static"}, engine(options={"cache_implementation": "static"})
    for choice in drafts:
        assistant = target.assistant(choice)
        if assistant is not None:
            name = choice.name.rpartition("@")[0] or choice.name  # their draft runs in the target's dtype
            label = {"engine": "transformers", "mode": "assisted", "draft": name}
            yield {**label, "schedule": "default"}, engine(assistant=assistant)
            constant = engine(assistant=assistant, schedule=_constant(choice.gamma))
            yield {**label, "schedule": "constant", "gamma": choice.gamma}, constant
    lookup = {"engine": "transformers", "mode": "lookup", "gamma": LOOKUP_TOKENS}
    yield lookup, engine(options={"prompt_lookup_num_tokens": LOOKUP_TOKENS})


def _constant(gamma: int) -> dict[str, Any]:
    """The assistant's settings under which it drafts `gamma` tokens every time."""
    return {
        "num_assistant_tokens": gamma,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }


def _renew(draft: Draft) -> Draft:
    """A draft that has seen nothing yet; a nested one has nothing to forget."""
    return ModelDraft(draft.model) if isinstance(draft, ModelDraft) else draft
