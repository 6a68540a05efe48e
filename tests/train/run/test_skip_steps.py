import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from train.recipe.sections import OptimConfig
from train.run.optim import make_optimizer
from train.run.skip_steps import IN_A_ROW, WARM_UP, WINDOW, Guard, skip_if

NAN, INF = math.nan, math.inf


def noise(count: int, seed: int = 0) -> Tensor:
    """Log-normal norms; at 6 sigma, one in 10**9 would be skipped."""
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).mul(0.3).exp()


def judge(guard: Guard, norms: Any) -> list[int]:
    return [int(guard.judge(torch.as_tensor(norm)).item()) for norm in norms]


def test_ordinary_noise_passes_and_a_leap_does_not() -> None:
    guard = Guard(6.0)
    assert sum(judge(guard, noise(2000))) == 0
    assert judge(guard, [math.exp(0.3 * 5), math.exp(0.3 * 7), 0.01]) == [0, 1, 0]
    assert (guard.skipped, guard.diverged) == (1, False)


def test_a_norm_that_drifts_is_followed() -> None:
    assert sum(judge(Guard(6.0), noise(2000) * torch.linspace(0, 3, 2000).exp())) == 0


def test_until_it_knows_what_is_usual_only_what_is_not_finite_is_skipped() -> None:
    guard = Guard(6.0)
    assert judge(guard, [1.0, 1e9, NAN, INF, 1.0]) == [0, 0, 1, 1, 0]
    assert judge(guard, noise(WARM_UP)) == [0] * WARM_UP


def test_mean_and_variance_are_those_of_all_good_steps_until_the_window_is_full() -> None:
    guard, norms = Guard(6.0), noise(WINDOW)
    judge(guard, [*norms[:9], NAN, *norms[9:]])
    mean, variance = guard.values["mean"], guard.values["variance"]
    torch.testing.assert_close(mean, norms.log().mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(variance, norms.log().var(correction=0), rtol=1e-4, atol=1e-5)


def test_what_is_skipped_teaches_nothing() -> None:
    guard = Guard(6.0)
    judge(guard, noise(200))
    before = guard.counters()
    judge(guard, [1e6, NAN])
    assert guard.counters() == {**before, "skipped": 2.0, "in_row": 2.0}


def test_steps_in_which_nobody_has_a_turn_say_nothing_of_the_others() -> None:
    guard, now_and_then = Guard(6.0), Guard(6.0)
    norms = [*noise(200), torch.tensor(1e6), torch.tensor(NAN), *noise(9)]
    verdicts = judge(guard, norms)
    assert sum(verdicts) == 2
    idle = [torch.tensor(0.0)] * 3
    assert [judge(now_and_then, [*idle, norm]) for norm in norms] == [[0, 0, 0, one] for one in verdicts]
    assert now_and_then.counters() == guard.counters()


def test_only_three_in_a_row_take_the_run_back_and_that_is_remembered() -> None:
    guard = Guard(6.0)
    judge(guard, [NAN, NAN, 1.0, NAN])
    assert not guard.diverged
    judge(guard, [NAN] * (IN_A_ROW - 1))
    judge(guard, [1.0])
    assert guard.diverged
    again = Guard(6.0, guard.after_rollback())
    assert (again.skipped, again.rollbacks, again.diverged) == (5, 1, False)


def test_a_guard_restored_from_json_judges_exactly_alike() -> None:
    norms = [*noise(150), torch.tensor(NAN), torch.tensor(50.0), *noise(150, seed=1)]
    whole, first = Guard(3.0), Guard(3.0)
    verdicts = judge(whole, norms)
    before = judge(first, norms[:151])
    second = Guard(3.0, json.loads(json.dumps(first.counters())))
    assert before + judge(second, norms[151:]) == verdicts
    assert second.counters() == whole.counters()
    assert sum(verdicts) >= 2


class NoSync(TorchDispatchMode):
    """Refuses what would wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device() -> None:
    layer = nn.Linear(3, 3)
    layer(torch.ones(3)).sum().backward()
    guard, optimizer = Guard(6.0), make_optimizer(layer, OptimConfig())
    with NoSync():  # type: ignore[no-untyped-call]
        skip_if(guard.judge(torch.tensor(1.0)), optimizer)
    with pytest.raises(AssertionError), NoSync():  # type: ignore[no-untyped-call]
        guard.judge(torch.tensor(1.0)).item()


@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_step_leaves_weights_moments_and_counters_alone(fused: bool) -> None:
    layer = nn.Linear(3, 3)
    optimizer = make_optimizer(layer, OptimConfig(lr=0.1, fused=fused))

    def step(scale: float, flag: float) -> list[Tensor]:
        def closure() -> float:
            optimizer.zero_grad()
            (layer(torch.ones(3)).sum() * scale).backward()
            skip_if(torch.tensor(flag), optimizer)
            return 0.0

        optimizer.step(closure)
        moments = [value for slots in optimizer.state.values() for value in slots.values()]
        return [tensor.detach().clone() for tensor in (*layer.parameters(), *moments)]

    before = step(1.0, 0.0)
    skipped = step(NAN, 1.0)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(skipped, before, strict=True))
    after = step(1.0, 0.0)
    assert not any(torch.equal(ours, theirs) for ours, theirs in zip(after, before, strict=True))
    assert all(tensor.isfinite().all() for tensor in after)
