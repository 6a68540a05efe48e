"""The engines that run: ours, and those of transformers on the same weights.

    nestling      plain; speculative with each draft
    transformers  plain, on a dynamic, a static and (on request) a compiled static cache; assisted by
                  each draft cut out as a model of its own, by the library's own schedule and by constant
                  ones, of as many tokens as ours and of other numbers; prompt lookup
    llama.cpp     where it is installed: plain; assisted by each draft cut out, of the same numbers of tokens

Ours run as `nestling generate` would run them, theirs in every way that may be their fastest. A cell is
one of these in one dtype at one temperature. Another engine is one more generator of cells.
"""

import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from models.base.dtypes import DTYPES
from models.bench import llama
from models.bench.engines import Engine, OurEngine, Stock, StockEngine
from models.bench.threads import NUM_TOKENS, engine_threads
from models.checkpoint import gguf
from models.checkpoint.folder import ModelFolder, load_model
from models.checkpoint.huggingface import compile_config, load_stock, to_hugging_face
from models.checkpoint.weights import model_from
from models.decode.sampling.params import SamplingParams
from models.decode.tune.resolve import Drafting, make_policy
from models.elastic.model import ElasticLM
from models.elastic.view import View
from models.packed.quantize import FILE, INT8

ENGINES = ("nestling", "transformers", "llama.cpp")
CONSTANT_SCHEDULES = (2, 4, 8)
"""Tokens a round that their assistant drafts, besides as many as ours."""
LOOKUP_TOKENS = (4, 10)
"""Drafted by their prompt lookup; 10 is what the library takes by itself."""


@dataclass(frozen=True, kw_only=True)
class Label:
    """The label of a cell; its fields are those of the row."""

    engine: str
    """nestling, transformers or llama.cpp."""
    mode: str
    """plain, speculative, assisted or lookup."""
    dtype: str
    temperature: float
    threads: int
    draft: str | None = None
    gamma: int | Literal["auto"] | None = None
    """Drafted tokens a round; `auto`: ours, by what is measured; None where nothing drafts or their
    schedule decides."""
    schedule: str | None = None
    """constant, or default: of transformers, which stops drafting where the draft is not confident."""
    cache: str | None = None
    """dynamic, static or compiled (static, under torch.compile), where there is a choice."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One thing that is timed."""

    label: Label
    engine: Engine


class Target:
    """A model in one dtype, its stock copy, and stock copies of its drafts, each made once.

    Args:
        folder: the model, in the dtype and on the device that it runs on.
        dtype: its name.
        num_threads: for ours.
        most_threads: what theirs may take; they get the number that they are fastest with.
        scratch: a folder for extractions.
    """

    def __init__(
        self, folder: ModelFolder, *, dtype: str, num_threads: int, most_threads: int, scratch: Path
    ) -> None:
        self.folder, self.model = folder, folder.model
        self.dtype, self.num_threads = dtype, num_threads
        self._most_threads, self._scratch = most_threads, scratch
        self._assistants: dict[str, Stock | None] = {}
        self._llamas: dict[tuple[str | None, int], llama.Llamas] = {}
        self._num_files = 0

    @functools.cached_property
    def stock(self) -> Stock:
        """The folder as transformers opens it; of a GGUF file what it would open of its weights."""
        path = self.folder.path
        return self._in_place(load_stock(path) if path.is_dir() else to_hugging_face(load_model(path).model))

    def llamas(self, choice: Drafting | None, num_positions: int) -> llama.Llamas | None:
        """Return the folder in llama.cpp, alone or with a draft; None if the format cannot hold that."""
        key = (None if choice is None else choice.name, num_positions)
        if key not in self._llamas:
            draft = None if choice is None else self._draft_file(choice)
            if choice is not None and draft is None:
                return None
            self._llamas[key] = llama.Llamas(self._llama_file, num_positions, draft)
        return self._llamas[key]

    @functools.cached_property
    def llama_threads(self) -> int:
        """The number of threads that llama.cpp is fastest with."""
        context = min(2 * NUM_TOKENS, self.model.config.max_position_embeddings)
        engine = llama.LlamaEngine(llamas=llama.Llamas(self._llama_file, context), params=SamplingParams())
        return engine_threads(engine, self._most_threads, context=context)

    @functools.cached_property
    def _llama_file(self) -> Path:
        path = self.folder.path
        return path if self.dtype == FILE else self._gguf(load_model(path).model)

    def _draft_file(self, choice: Drafting) -> Path | None:
        model = None if self.dtype == FILE else _own_model(choice)  # its bits cannot be written here
        return self._gguf(model) if model is not None and gguf.holds(model.config, self.dtype) else None

    @property
    def runs_in_llama(self) -> bool:
        """True if llama.cpp is installed and holds this model."""
        return llama.is_installed() and gguf.holds(self.model.config, self.dtype)

    def _gguf(self, model: ElasticLM) -> Path:
        self._num_files += 1
        return gguf.write_gguf(
            model, self._scratch / f"{self.dtype}-{self._num_files}.gguf", dtype=self.dtype
        )

    @functools.cached_property
    def stock_threads(self) -> int:
        """The number of threads that the stock model is fastest with."""
        engine = StockEngine(model=self.stock, params=SamplingParams())
        return engine_threads(engine, self._most_threads, context=self.model.config.max_position_embeddings)

    def assistant(self, choice: Drafting) -> Stock | None:
        """Return the draft as a stock model; None if no stock architecture holds it."""
        if choice.name not in self._assistants:
            model = _own_model(choice)
            self._assistants[choice.name] = None if model is None else self._in_place(to_hugging_face(model))
        return self._assistants[choice.name]

    def _in_place(self, stock: Any) -> Stock:
        device = self.model.device
        return cast("Stock", stock.to(device=device, dtype=DTYPES[self.dtype]))


def _own_model(choice: Drafting) -> ElasticLM | None:
    """Return the draft as a model of its own; None where no stock model holds it."""
    if choice.source is None:
        return None
    path, granularity = choice.source
    view = View(load_model(path).model, granularity)
    return model_from(view.config, view.state_dict()) if view.plan.is_uniform else None


def make_cells(
    target: Target,
    params: SamplingParams,
    drafts: Sequence[Drafting],
    *,
    num_positions: int | None = None,
    compiled: bool = False,
    engines: Collection[str] = ENGINES,
) -> list[Cell]:
    """Return the cells of one dtype and one temperature; ours plain is the first.

    Args:
        target: the model.
        params: settings of sampling.
        drafts: the drafts.
        num_positions: of the longest prompt with its continuation: a static cache that is made once.
        compiled: whether theirs are compiled as well, where the library does not do it by itself.
        engines: which of `ENGINES` run beside ours.

    Raises:
        UsageError: if a draft does not fit the target.
    """
    for choice in drafts:
        make_policy(target.folder, choice, params).check(target.model)
    labelled = [*_ours(target, params, drafts)]
    # Of quantized weights theirs would be another model.
    if "transformers" in engines and target.dtype not in (INT8, FILE):
        labelled += _theirs(target, params, drafts, num_positions, compiled)
    if "llama.cpp" in engines and target.runs_in_llama:
        positions = num_positions or target.model.config.max_position_embeddings
        labelled += _llamas(target, params, drafts, positions)
    common: dict[str, Any] = {"dtype": target.dtype, "temperature": params.temperature}
    cells = {Label(**common, **label): engine for label, engine in labelled}  # each once
    return [Cell(label=label, engine=engine) for label, engine in cells.items()]


_Labelled = Iterator[tuple[dict[str, Any], Engine]]


def _ours(target: Target, params: SamplingParams, drafts: Sequence[Drafting]) -> _Labelled:
    common = {"engine": "nestling", "threads": target.num_threads}
    yield {**common, "mode": "plain"}, OurEngine(model=target.model, params=params)
    for choice in drafts:
        gamma = "auto" if choice.adapts else choice.gamma
        label = {**common, "mode": "speculative", "draft": choice.name, "gamma": gamma}
        new_policy = functools.partial(make_policy, target.folder, choice, params)
        yield label, OurEngine(model=target.model, params=params, new_policy=new_policy)


def _theirs(
    target: Target,
    params: SamplingParams,
    drafts: Sequence[Drafting],
    num_positions: int | None,
    compiled: bool,
) -> _Labelled:
    def engine(**settings: Any) -> Engine:
        return StockEngine(model=target.stock, params=params, **settings)

    common = {"engine": "transformers", "threads": target.stock_threads}
    plain = {**common, "mode": "plain"}
    static = {"cache_implementation": "static", "max_cache_len": num_positions}
    yield {**plain, "cache": "dynamic"}, engine()
    yield {**plain, "cache": "static"}, engine(options=static)
    if compiled:
        yield {**plain, "cache": "compiled"}, engine(options={**static, "compile_config": compile_config()})
    for choice in drafts:
        assistant = target.assistant(choice)
        if assistant is not None:
            name = choice.name.rpartition("@")[0] or choice.name  # their draft runs in the target's dtype
            label = {**common, "mode": "assisted", "draft": name}
            yield {**label, "schedule": "default"}, engine(assistant=assistant)
            for gamma in sorted({choice.gamma, *CONSTANT_SCHEDULES}):
                constant = engine(assistant=assistant, schedule=_constant(gamma))
                yield {**label, "schedule": "constant", "gamma": gamma}, constant
    for gamma in LOOKUP_TOKENS:
        lookup = {**common, "mode": "lookup", "gamma": gamma}
        yield lookup, engine(options={"prompt_lookup_num_tokens": gamma})


def _llamas(
    target: Target, params: SamplingParams, drafts: Sequence[Drafting], num_positions: int
) -> _Labelled:
    common = {"engine": "llama.cpp", "threads": target.llama_threads}
    longest = max([*CONSTANT_SCHEDULES, *(choice.gamma for choice in drafts)])
    for choice in [None, *drafts]:
        llamas = target.llamas(choice, num_positions + longest + 1)  # a proposal behind the last token
        if llamas is None:
            continue
        if choice is None:
            yield {**common, "mode": "plain"}, llama.LlamaEngine(llamas=llamas, params=params)
            continue
        label = {**common, "mode": "assisted", "draft": choice.name.rpartition("@")[0] or choice.name}
        for gamma in sorted({choice.gamma, *CONSTANT_SCHEDULES}):
            engine = llama.LlamaEngine(llamas=llamas, params=params, gamma=gamma)
            yield {**label, "gamma": gamma}, engine


def _constant(gamma: int) -> dict[str, Any]:
    """Return the assistant's settings under which it drafts `gamma` tokens every time."""
    return {
        "num_assistant_tokens": gamma,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
