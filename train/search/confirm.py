"""Confirmation by real decoding: the few best drafts of a search and plain, in turn, on prompts."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models.bench.contenders import Cell, Label
from models.bench.engines import Engine, OurEngine
from models.bench.report import make_rows
from models.bench.run import Runs, run_cells
from models.decode.engine.draft import NestedDraft
from models.decode.engine.policy import Fixed
from models.decode.sampling.params import SamplingParams
from train.search.measure import Measurements, Prediction, Progress


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """A prediction, or plain decoding, and what real decoding made of it."""

    prediction: Prediction | None
    params: SamplingParams
    speedup: float
    """Speed-up over plain decoding, after the first token."""
    tau: float
    alpha: float | None
    tokens_per_second: float
    """Speed after the first token."""


def confirm(
    measured: Measurements,
    best: Mapping[SamplingParams, Sequence[Prediction]],
    num_prompts: int,
    num_rounds: int,
    dtype: str,
    progress: Progress,
) -> tuple[list[Confirmed], Runs]:
    """Decode plainly and with the best drafts, in turn, each temperature on the same prompts."""
    contenders = {
        _label(params, prediction, dtype): (params, prediction)
        for params, predictions in best.items()
        for prediction in (None, *predictions)
    }
    cells = [
        Cell(label=label, engine=_engine(measured, *contender)) for label, contender in contenders.items()
    ]
    rows_RT = next(iter(measured.text.rows.values()))[:num_prompts]
    prompts = rows_RT[:, : measured.text.num_prompt].tolist()
    total, done = len(cells) * (1 + num_rounds * len(prompts)), itertools.count(1)
    runs = run_cells(
        cells,
        prompts,
        max_new_tokens=measured.text.num_new,
        num_rounds=num_rounds,
        progress=lambda: progress("decoding", next(done), total),
    )
    confirmed = [
        Confirmed(
            prediction=prediction,
            params=params,
            speedup=row["decode_speedup"],
            tau=row["tau"],
            alpha=row["alpha"],
            tokens_per_second=row["decode_tokens_per_second"],
        )
        for (params, prediction), row in zip(contenders.values(), make_rows(runs), strict=True)
    ]
    return confirmed, runs


def _label(params: SamplingParams, prediction: Prediction | None, dtype: str) -> Label:
    common: dict[str, Any] = {
        "engine": "nestling",
        "dtype": dtype,
        "temperature": params.temperature,
        "threads": torch.get_num_threads(),
    }
    if prediction is None:
        return Label(**common, mode="plain")
    name = f"{prediction.spec} by {prediction.plan.verifier}"
    return Label(**common, mode="speculative", draft=name, gamma=prediction.plan.gamma)


def _engine(measured: Measurements, params: SamplingParams, prediction: Prediction | None) -> Engine:
    """Return the engine that decodes as a prediction says, or plainly."""
    if prediction is None:
        return OurEngine(model=measured.target, params=params)
    plan, vocabulary = prediction.plan, prediction.spec.vocabulary
    view = measured.views[prediction.spec.member, prediction.spec.precision]
    draft = NestedDraft(view, None if vocabulary is None else torch.tensor(vocabulary))
    return OurEngine(
        model=measured.target,
        params=params,
        new_policy=lambda: Fixed(draft, plan.gamma),  # the draft has nothing to forget
        verifier=plan.verifier,
    )
