"""Plans are written as JSON and read back; what is no plan is refused."""

import json
from typing import Any

import pytest

from models.base.errors import UsageError
from models.decode.tune.draft_plan import DraftPlan, DraftSpec, Speed

WRITTEN = {
    "verifier": "block",
    "draft": "ffn=0.5,layers=0-1@int8",
    "vocabulary": [1, 5],
    "gamma": 3,
    "predicted": 1.5,
    "measured": 1.25,
}
PLAN = DraftPlan(
    spec=DraftSpec(member="ffn=0.5,layers=0-1", precision="int8", vocabulary=(1, 5)),
    gamma=3,
    verifier="block",
    speed=Speed(1.5, 1.25),
)


@pytest.mark.parametrize("plan", [DraftPlan.plain("token"), PLAN])
def test_a_plan_is_read_as_it_was_written(plan: DraftPlan) -> None:
    assert DraftPlan.from_dict(json.loads(json.dumps(plan.as_dict()))) == plan


def test_a_search_of_an_earlier_release_is_read() -> None:
    assert DraftPlan.from_dict(WRITTEN) == PLAN
    assert str(PLAN.spec) == "ffn=0.5,layers=0-1@int8, 2 tokens"
    assert str(PLAN.speed) == "1.25x measured"


@pytest.mark.parametrize(
    ("fields", "error"),
    [({"gamma": "x"}, ValueError), ({"draft": "S@int3"}, UsageError), ({"vocabulary": 7}, TypeError)],
)
def test_what_is_no_plan_is_refused(fields: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        DraftPlan.from_dict({**WRITTEN, **fields})
