import math
from collections import Counter

import torch

from models.decode.sampling.rng import SeededRandom, gumbel_noise

# With 20,000 draws a share is off by more than 5 sigma about once in 1.7 million tests of this kind.
NUM_DRAWS = 20_000
SIGMAS = 5.0
KNOWN_NOISE = [-0.39547335251890564, 0.8567799509184033, 0.3212846826815552, -0.0621887688593318]
KNOWN_NOISE = [-0.39547335251890564, 0.8567799509184033, 0.3212846826815552, -0.0621887688593318]


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


def test_the_noise_of_a_position_is_a_fixed_number_of_the_seed_and_the_row() -> None:
    first_V = SeededRandom(3).noise(10, 50)
    random = SeededRandom(3)
    random.draft(torch.full((50,), 0.02))
    random.noise(11, 50)
    assert random.noise(10, 50).equal(first_V)
    # The words of Philox4x64-10 for key (3, 0) and counter (1, 0, 0, 10), on any machine.
    torch.testing.assert_close(
        first_V[:4], torch.tensor(KNOWN_NOISE, dtype=torch.float64), rtol=0, atol=1e-12
    )
    others = [gumbel_noise(4, 10, 50), gumbel_noise(3, 11, 50), gumbel_noise(3, 10, 50, row=1)]
    assert not any(other.eq(first_V).any() for other in others)
    assert gumbel_noise(-1, 0, 4).isfinite().all()


def test_the_noise_is_gumbels() -> None:
    noise = torch.cat([gumbel_noise(1, position, 100) for position in range(200)])
    for point in (-1.0, 0.0, 1.0, 3.0):
        probability = math.exp(-math.exp(-point))
        sigma = math.sqrt(NUM_DRAWS * probability * (1 - probability))
        assert abs(int((noise <= point).sum()) - NUM_DRAWS * probability) <= SIGMAS * sigma
