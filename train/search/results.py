"""Results of a search: the fields of docs/json.md, a table of predicted beside measured, and summaries."""

from collections.abc import Iterator
from typing import Any

from models.base.numbers import NOTHING
from models.base.table import Table
from models.decode.tune.draft_plan import DraftPlan, DraftSpec
from models.decode.tune.tuned import Plans
from train.search.confirm import Confirmed
from train.search.drafts import Result
from train.search.measure import Prediction

HEADER = (
    "T", "draft", "verifier", "gamma", "alpha", "c", "v",
    "tau predicted", "measured", "x plain predicted", "measured", "off by",
)  # fmt: skip
LEGEND = (
    "alpha: chance that one drafted token is kept; c, v: a drafted token, a target pass on gamma + 1 tokens, "
    "with the host's part, in plain tokens;\ntau: tokens per target pass"
)
SHOWN_PASSES = (2, 4, 8, 16, 32)


def result_fields(result: Result) -> dict[str, Any]:
    """Return what was measured, for JSON."""
    return {
        "results": [_confirmed_fields(one) for one in result.confirmed],
        "estimates": [_prediction_fields(one) for one in result.predictions],
        "v": result.slowdown,
        "num_candidates": result.num_candidates,
        "num_tried": result.num_tried,
        "busy_rounds": result.busy_rounds,
    }


def choice_fields(plans: Plans) -> list[dict[str, Any]]:
    """Return what `--draft auto` will take, for JSON."""
    return [
        {"temperature": temperature, **plan.as_dict(), "vocabulary": _vocabulary_size(plan.spec)}
        for temperature, by_verifier in plans.items()
        for plan in by_verifier
    ]


def result_table(result: Result) -> Table:
    """Return what was confirmed, predicted beside measured."""
    return Table(HEADER, tuple(_row(one) for one in result.confirmed), num_labels=3)


def headline(result: Result) -> str:
    """Say how many members were tried, and how a target pass grows with its tokens."""
    slowdown = " ".join(f"v({m})={result.slowdown[m]:.2f}" for m in SHOWN_PASSES if m in result.slowdown)
    return f"{result.num_tried} of {result.num_candidates} members tried; target: {slowdown}"


def describe_plans(plans: Plans) -> Iterator[str]:
    """Say in a line for each temperature and verifier what `--draft auto` will take."""
    for temperature, by_verifier in plans.items():
        for plan in by_verifier:
            sampling = "greedy" if temperature == 0 else f"T = {temperature:g}, {plan.verifier}"
            yield f"{sampling}: {_describe(plan)}"


def _describe(plan: DraftPlan) -> str:
    if plan.spec is None:
        return "plain decoding"
    size = _vocabulary_size(plan.spec)
    trimmed = "" if size is None else f" with the {size} most frequent tokens"
    return f"{plan.spec.text}{trimmed}, gamma {plan.gamma}: {plan.speed}"


def _row(one: Confirmed) -> tuple[str, ...]:
    temperature, prediction = f"{one.params.temperature:g}", one.prediction
    tau, speedup = f"{one.tau:.2f}", f"{one.speedup:.2f}"
    if prediction is None:  # plain decoding has no prediction
        return (temperature, "none", *[NOTHING] * 6, tau, NOTHING, "1.00", NOTHING)
    predicted = prediction.plan.speed.predicted
    return (
        temperature,
        str(prediction.spec),
        NOTHING if one.params.is_greedy else prediction.plan.verifier,
        str(prediction.plan.gamma),
        *(f"{value:.3f}" for value in (prediction.alpha, prediction.c, prediction.v)),
        f"{prediction.tau:.2f}",
        tau,
        f"{predicted:.2f}",
        speedup,
        f"{predicted / one.speedup - 1:+.0%}",
    )


def _confirmed_fields(one: Confirmed) -> dict[str, Any]:
    return {
        "temperature": one.params.temperature,
        **(_prediction_fields(one.prediction) if one.prediction else {"draft": "none", "gamma": 0}),
        "measured": one.speedup,
        "measured_tau": one.tau,
        "measured_alpha": one.alpha,
        "tokens_per_second": one.tokens_per_second,
        "error": one.prediction.plan.speed.predicted / one.speedup - 1 if one.prediction else None,
    }


def _prediction_fields(one: Prediction) -> dict[str, Any]:
    return {
        "temperature": one.params.temperature,
        "verifier": one.plan.verifier,
        "draft": one.spec.text,
        "vocabulary": _vocabulary_size(one.spec),
        "gamma": one.plan.gamma,
        "alpha": one.alpha,
        "c": one.c,
        "v": one.v,
        "tau": one.tau,
        "predicted": one.plan.speed.predicted,
    }


def _vocabulary_size(spec: DraftSpec | None) -> int | None:
    return None if spec is None or spec.vocabulary is None else len(spec.vocabulary)
