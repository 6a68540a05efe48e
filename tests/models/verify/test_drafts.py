"""Drafts of the distribution tests: another model over the same tokens, a controller that repeats itself."""

import torch

from models.decode.engine.draft import ModelDraft
from models.decode.engine.engine import stream
from models.decode.sampling.params import SamplingParams
from models.decode.sampling.rng import SeededRandom
from models.elastic.granularity import Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View
from models.verify.drafts import ANY, AUTO, Drafts, Subject, adversarial, member, registered, separate
from models.verify.restrict import restrict

PROMPT = [1, 2, 3]
WARM = SamplingParams(temperature=1.0)


@torch.inference_mode()
def test_another_model_is_kept_to_the_targets_tokens_and_dtype(tiny_model: ElasticLM) -> None:
    tokens, ids_BT = [17, 4, 9], torch.tensor([[0, 2, 1]])
    target = restrict(tiny_model, tokens, torch.float64)
    draft = separate(tiny_model)(Subject(target, View, tokens))()
    assert isinstance(draft, ModelDraft)
    torch.testing.assert_close(draft.model(ids_BT), target(ids_BT))
    draft = separate(tiny_model, "int8")(Subject(target, View, tokens))()
    assert isinstance(draft, ModelDraft)
    assert 0 < (draft.model(ids_BT) - target(ids_BT)).abs().max() < 0.1


def test_the_controller_changes_its_mind_and_does_so_again(tiny_model: ElasticLM) -> None:
    named = {
        "D": member(Granularity.parse("layers=0-1")),
        "lookup": registered("lookup"),
        "adversarial": adversarial,
    }
    drafts = Drafts(Subject(tiny_model, View, range(64)), named)

    def rounds() -> dict[tuple[object, object], object]:
        """How many there were of each draft and length."""
        policy, random = drafts.policy(ANY, AUTO), SeededRandom(0)
        tokens = stream(
            tiny_model,
            [1, 2, 3],
            policy=policy,
            random=random,
            params=WARM,
            max_new_tokens=48,
            eos_token_ids=(),
        )
        assert len(list(tokens)) == 48
        return {(row["draft"], row["gamma"]): row["rounds"] for row in tokens.report.choices()}

    first = rounds()
    assert {name for name, _ in first} >= {"adversarial", "D"}
    assert len({number for _, number in first}) > 2
    assert rounds() == first
