import math
from collections import Counter

import torch

from models.decode.chance import SeededRandom

# With 20,000 draws a share is off by more than 5 sigma about once in 1.7 million tests of this kind.
NUM_DRAWS = 20_000
SIGMAS = 5.0


def test_drawn_shares_are_the_probabilities() -> None:
    random, probs_V = SeededRandom(0), torch.tensor([0.1, 0.0, 0.6, 0.3])
    for draw in (random.draft, random.target):
        counts = Counter(draw(probs_V) for _ in range(NUM_DRAWS))
        assert counts[1] == 0
        for token, probability in enumerate(probs_V.tolist()):
            sigma = math.sqrt(NUM_DRAWS * probability * (1 - probability))
            assert abs(counts[token] - NUM_DRAWS * probability) <= SIGMAS * sigma


def test_acceptance_is_certain_at_one_and_impossible_at_zero() -> None:
    random = SeededRandom(0)
    assert all(random.accept(1.0) for _ in range(1000))
    assert not any(random.accept(0.0) for _ in range(1000))
    accepted = sum(random.accept(0.305) for _ in range(NUM_DRAWS))
    sigma = math.sqrt(NUM_DRAWS * 0.305 * 0.695)
    assert abs(accepted - NUM_DRAWS * 0.305) <= SIGMAS * sigma


def test_the_three_streams_do_not_move_each_other() -> None:
    probs_V = torch.full((50,), 0.02)
    alone, beside = SeededRandom(3), SeededRandom(3)
    for _ in range(7):
        beside.draft(probs_V)
    assert [alone.target(probs_V) for _ in range(20)] == [beside.target(probs_V) for _ in range(20)]
    assert [alone.accept(0.5) for _ in range(20)] == [beside.accept(0.5) for _ in range(20)]


def test_the_streams_and_seeds_differ() -> None:
    probs_V = torch.full((50,), 0.02)
    random, other = SeededRandom(3), SeededRandom(4)
    draws = [
        tuple(draw(probs_V) for _ in range(20))
        for draw in (random.draft, random.target, other.draft, other.target)
    ]
    assert len(set(draws)) == 4
