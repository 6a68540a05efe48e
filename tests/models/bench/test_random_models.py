"""Random models: the acceptance asked for, and refusals."""

import pytest
import torch

from models.base.errors import NestlingError, UsageError
from models.bench.random_models import (
    SHAPES,
    TOLERANCE,
    acceptance,
    check_memory,
    find_factor,
    needed_bytes,
    random_model,
    random_prompts,
)
from models.decode.sampling.params import SamplingParams
from models.elastic.config import ElasticConfig
from models.elastic.count import count_parameters
from models.elastic.granularity import Granularity

EXIT = Granularity.parse("layers=0-1")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("alpha", [0.6, 0.9])
def test_the_exit_is_accepted_as_often_as_was_asked(
    tiny_config: ElasticConfig, alpha: float, temperature: float
) -> None:
    params = SamplingParams(temperature=temperature)
    made = random_model(tiny_config, EXIT, alpha=alpha, params=params)
    assert abs(made.alpha - alpha) <= TOLERANCE
    # On other random text it is about the same; 8 x 128 positions scatter by 0.016 at most.
    tokens_BT = torch.randint(64, (8, 128), generator=torch.Generator().manual_seed(9))
    assert acceptance(made.model, 2, tokens_BT, params) == pytest.approx(alpha, abs=0.08)


def test_a_factor_is_found_where_rejections_are_far_from_proportional() -> None:
    for slope in (0.3, 1.0, 4.0):
        factor, found = find_factor(lambda factor, slope=slope: 1 / (1 + factor**slope), 0.7)  # type: ignore[misc]
        assert abs(found - 0.7) <= TOLERANCE
        assert 1 / (1 + factor**slope) == found


def test_what_no_factor_gives_is_told() -> None:
    with pytest.raises(NestlingError, match=r"--alpha 0.1 is out of reach: .* gave is 0.500"):
        find_factor(lambda factor: max(0.5, 1 - factor), 0.1)


@pytest.mark.parametrize("text", ["full", "layers=0-3", "layers=1-2", "ffn=0.5,layers=0-1"])
def test_only_an_exit_can_draft_for_a_random_model(tiny_config: ElasticConfig, text: str) -> None:
    member = Granularity.parse(text)
    with pytest.raises(UsageError, match="with --random it is the first layers at full width"):
        random_model(tiny_config, member, alpha=0.8, params=SamplingParams())


@pytest.mark.parametrize("size", SHAPES)
def test_a_size_has_about_the_parameters_that_it_is_called_by(size: str) -> None:
    called = float(size.replace("M", "e6").replace("B", "e9"))
    assert count_parameters(SHAPES[size]) == pytest.approx(called, rel=0.05)


def test_a_model_that_would_not_fit_is_refused_and_a_smaller_one_named() -> None:
    room = needed_bytes(SHAPES["60M"], "fp32")
    check_memory("60M", "fp32", room)
    with pytest.raises(UsageError, match=r"--random 350M needs about .* GiB are free; choose 15M or 60M"):
        check_memory("350M", "fp32", room)
    with pytest.raises(UsageError, match="free some"):
        check_memory("15M", "fp32", 2**20)


def test_random_prompts_are_the_same_each_time(tiny_config: ElasticConfig) -> None:
    prompts = random_prompts(tiny_config, num_prompts=3, num_tokens=5)
    assert [len(prompt) for prompt in prompts] == [5, 5, 5]
    assert prompts == random_prompts(tiny_config, num_prompts=3, num_tokens=5)
    assert len({tuple(prompt) for prompt in prompts}) == 3
