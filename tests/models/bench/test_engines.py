"""The settings that transformers gets, and how its tokens are read: a fake that answers as it does."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.bench.engines import DEFAULT_SCHEDULE, StockEngine
from models.decode.sampling.params import SamplingParams


class FakeStock:
    """Writes 7s in blocks of the given sizes, and keeps the settings that it got."""

    device = torch.device("cpu")

    def __init__(self, *blocks: int) -> None:
        self.blocks = blocks
        self.asked: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        self.generation_config = SimpleNamespace(update=self.settings.update)

    def generate(self, tokens_BT: Tensor, **options: Any) -> Tensor:
        self.asked = options
        streamer = options["streamer"]
        streamer.put(tokens_BT)
        for size in self.blocks:
            streamer.put(torch.full((1, size), 7))
        streamer.end()
        return torch.cat([tokens_BT, torch.full((1, sum(self.blocks)), 7)], dim=1)


def test_the_first_pass_and_the_ones_after_it_are_told_apart() -> None:
    engine = StockEngine(model=FakeStock(3, 1, 2), params=SamplingParams())
    sample = engine.decode([1, 2], max_new_tokens=6, seed=0)
    assert sample.ids == [7] * 6
    assert (sample.first_tokens, sample.passes) == (3, 2)
    assert 0 < sample.first_seconds < sample.seconds


def test_the_end_of_text_is_ignored_and_no_setting_is_left_to_the_library() -> None:
    stock = FakeStock(1)
    params = SamplingParams(temperature=0.7)
    StockEngine(model=stock, params=params).decode([1], max_new_tokens=1, seed=0)
    asked = {
        name: stock.asked[name] for name in ("eos_token_id", "do_sample", "temperature", "top_k", "top_p")
    }
    assert asked == {"eos_token_id": None, "do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0}
    StockEngine(model=stock, params=SamplingParams()).decode([1], max_new_tokens=1, seed=0)
    assert stock.asked["do_sample"] is False
    assert "temperature" not in stock.asked


def test_an_assistant_is_set_anew_for_each_prompt() -> None:
    stock, assistant = FakeStock(1), FakeStock()
    assistant.settings["num_assistant_tokens"] = 99  # as a schedule may have left it
    for schedule in ({}, {"num_assistant_tokens": 3}):
        engine = StockEngine(model=stock, params=SamplingParams(), assistant=assistant, schedule=schedule)
        engine.decode([1], max_new_tokens=1, seed=0)
        assert stock.asked["assistant_model"] is assistant
        assert assistant.settings == DEFAULT_SCHEDULE | schedule


@pytest.mark.parametrize("seed", [0, 5])
def test_a_seed_sets_the_random_state_that_transformers_draws_from(seed: int) -> None:
    StockEngine(model=FakeStock(1), params=SamplingParams(temperature=1.0)).decode(
        [1], max_new_tokens=1, seed=seed
    )
    assert torch.initial_seed() == seed
