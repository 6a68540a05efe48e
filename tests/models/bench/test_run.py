"""Real engines on a tiny model: every one of them writes the same greedy ids."""

import dataclasses
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from models.base.errors import UsageError
from models.bench.contenders import Cell, Label, Target, make_cells
from models.bench.engines import Sample
from models.bench.run import run_cells
from models.checkpoint.folder import load_model, save_model
from models.decode.engine.costs import Costs
from models.decode.engine.draft import ModelDraft
from models.decode.engine.policy import Policy
from models.decode.sampling.params import SamplingParams
from models.decode.tune.controller import Controller
from models.decode.tune.draft_plan import DraftSpec
from models.decode.tune.resolve import Drafting, choose_drafting, make_policy, nested_drafting
from models.elastic.config import ElasticConfig
from models.elastic.model import ElasticLM

PROMPTS = [[1, 2, 3], [4, 5, 4, 5, 4]]
GREEDY = SamplingParams()
END_OF_TEXT = 14


@pytest.fixture
def target(tiny_config: ElasticConfig, tmp_path: Path) -> Target:
    """Greedy decoding soon writes END_OF_TEXT: an engine that obeyed it would stop early."""
    model = ElasticLM(dataclasses.replace(tiny_config, eos_token_id=END_OF_TEXT))
    model.init_weights(torch.Generator().manual_seed(0))
    folder = load_model(save_model(tmp_path / "model", model))
    return Target(folder, dtype="fp32", num_threads=1, most_threads=1, scratch=tmp_path)


def nested(target: Target, text: str, gamma: int = 3) -> Drafting:
    return nested_drafting(target.folder, DraftSpec.parse(text), gamma)


def separate(target: Target) -> Drafting:
    model = ElasticLM(dataclasses.replace(target.model.config, num_hidden_layers=1))
    model.init_weights(torch.Generator().manual_seed(1))
    path = save_model(target.folder.path.parent / "small", model)
    return dataclasses.replace(choose_drafting(target.folder, str(path), 2, GREEDY), name="folder")


def test_what_transformers_cannot_run_in_int8_is_left_out_and_its_draft_runs_in_the_targets_dtype(
    tiny_model: ElasticLM, tmp_path: Path
) -> None:
    folder = load_model(save_model(tmp_path / "model", tiny_model))
    choice = nested_drafting(folder, DraftSpec.parse("S@int8"), 2)
    labels = {}
    for dtype in ("fp32", "int8"):
        target = Target(folder, dtype=dtype, num_threads=1, most_threads=1, scratch=tmp_path)
        labels[dtype] = [cell.label for cell in make_cells(target, GREEDY, [choice])]
    assert {(label.engine, label.draft) for label in labels["int8"]} == {
        ("nestling", None),
        ("nestling", "S@int8"),
    }
    assert {label.draft for label in labels["fp32"] if label.mode == "assisted"} == {"S"}


def test_a_controller_is_made_anew_for_each_prompt(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Controller] = []

    def watched(*request: Any) -> Policy:
        policy = make_policy(*request)
        if isinstance(policy, Controller):
            made.append(policy)
        return policy

    monkeypatch.setattr("models.bench.contenders.make_policy", watched)
    costs = Costs(dict.fromkeys(range(1, 10), 1.0), {"L": 0.01})
    choice = dataclasses.replace(nested(target, "L"), adapts=True, costs=costs)
    cells = [cell for cell in make_cells(target, GREEDY, [choice]) if cell.label.engine == "nestling"]
    runs = run_cells(cells, PROMPTS, max_new_tokens=12, num_rounds=1)
    assert [label.gamma for label in runs.samples] == [None, "auto"]
    made = made[1:]  # the first one only checked the draft
    assert len(made) == 3  # one to warm up
    plain, ours = ([sample.ids for sample in rounds[0]] for rounds in runs.samples.values())
    assert ours == plain
    assert all(one.spent > 1 for one in made), "each was told of its own rounds"


def test_every_engine_writes_the_greedy_ids_of_plain_decoding(target: Target) -> None:
    cells = make_cells(target, GREEDY, [nested(target, "L"), separate(target)])
    runs = run_cells(cells, PROMPTS, max_new_tokens=12, num_rounds=2)
    assert [
        (label.engine, label.mode, label.draft, label.schedule or label.cache) for label in runs.samples
    ] == [
        ("nestling", "plain", None, None),
        ("nestling", "speculative", "L", None),
        ("nestling", "speculative", "folder", None),
        ("transformers", "plain", None, "dynamic"),
        ("transformers", "plain", None, "static"),
        ("transformers", "assisted", "L", "default"),
        *[("transformers", "assisted", "L", "constant")] * 4,
        ("transformers", "assisted", "folder", "default"),
        *[("transformers", "assisted", "folder", "constant")] * 3,
        *[("transformers", "lookup", None, None)] * 2,
    ]
    plain = [sample.ids for sample in runs.samples[cells[0].label][0]]
    assert all(END_OF_TEXT in ids[:-1] for ids in plain)
    for label, rounds in runs.samples.items():
        assert [[sample.ids for sample in samples] for samples in rounds] == [plain, plain], label
    assert len(runs.busy) == 2


def test_samples_know_their_passes_and_their_times(target: Target) -> None:
    cells = make_cells(target, GREEDY, [nested(target, "full")])
    runs = run_cells(cells, PROMPTS, max_new_tokens=11, num_rounds=1)
    by_name = {
        (label.engine, label.mode, label.schedule or label.cache): rounds[0]
        for label, rounds in runs.samples.items()
        if label.gamma in (None, 3)
    }
    for samples in by_name.values():
        assert all(0 < sample.first_seconds <= sample.seconds for sample in samples)
    assert [(one.first_tokens, one.passes) for one in by_name["nestling", "plain", None]] == [(1, 10)] * 2
    assert [(one.first_tokens, one.passes) for one in by_name["transformers", "plain", "static"]] == [
        (1, 10)
    ] * 2
    # The model drafts for itself: ours takes 4 + 4 + 2 after the first token; theirs drafts before it.
    assert [(one.first_tokens, one.passes) for one in by_name["nestling", "speculative", None]] == [
        (1, 3)
    ] * 2
    assert [one.overlap / one.reached for one in by_name["nestling", "speculative", None]] == [1.0] * 2
    constant = by_name["transformers", "assisted", "constant"]
    assert [(one.first_tokens, one.passes) for one in constant] == [(4, 2)] * 2


def test_sampling_is_seeded_and_does_not_touch_the_callers_random_state(target: Target) -> None:
    params = SamplingParams(temperature=1.0)
    cells = make_cells(target, params, [nested(target, "S")])
    state = torch.get_rng_state()
    runs = run_cells(cells, PROMPTS, max_new_tokens=8, num_rounds=2)
    assert torch.equal(torch.get_rng_state(), state)
    for label, (one, other) in runs.samples.items():
        assert [sample.ids for sample in one] == [sample.ids for sample in other], label


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_cell_is_compiled_once_and_writes_the_same_ids(target: Target) -> None:
    cells = make_cells(target, GREEDY, [], num_positions=20, compiled=True)
    cells = [cell for cell in cells if cell.label.mode == "plain"]
    assert [cell.label.cache for cell in cells] == [None, "dynamic", "static", "compiled"]
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    runs = run_cells(cells, PROMPTS, max_new_tokens=12, num_rounds=1)
    plain, *others = [[sample.ids for sample in rounds[0]] for rounds in runs.samples.values()]
    assert others == [plain] * 3
    # Prompts of other lengths meet the same cache: nothing is compiled while the clock runs.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="needs the extra `llama`")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_llama_cpp_runs_beside_the_others(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.bench.llama.is_installed", lambda: True)
    cells = make_cells(target, GREEDY, [nested(target, "L"), separate(target)], num_positions=17)
    chosen = [cell for cell in cells if cell.label.engine == "llama.cpp" or cell is cells[0]]
    assert [(cell.label.mode, cell.label.draft, cell.label.gamma) for cell in chosen[1:]] == [
        ("plain", None, None),
        *[("assisted", "L", gamma) for gamma in (2, 3, 4, 8)],
        *[("assisted", "folder", gamma) for gamma in (2, 4, 8)],
    ]
    runs = run_cells(chosen, PROMPTS, max_new_tokens=12, num_rounds=1)
    plain, *others = [[sample.ids for sample in rounds[0]] for rounds in runs.samples.values()]
    assert others == [plain] * 8


def test_unequal_layers_have_no_assistant_and_draft_all_the_same(target: Target) -> None:
    choice = nested(target, "ffn=1:0.5,layers=0:1")
    assert target.assistant(choice) is None
    modes = [(cell.label.engine, cell.label.mode) for cell in make_cells(target, GREEDY, [choice])]
    assert ("nestling", "speculative") in modes
    assert ("transformers", "assisted") not in modes


def test_equal_labels_are_one_cell(target: Target) -> None:
    cells = make_cells(target, GREEDY, [nested(target, "S", 2), nested(target, "S", 4)])
    assisted = [(cell.label.schedule, cell.label.gamma) for cell in cells if cell.label.mode == "assisted"]
    assert assisted == [("default", None), ("constant", 2), ("constant", 4), ("constant", 8)]


def test_a_draft_that_does_not_fit_is_refused(target: Target, tiny_config: ElasticConfig) -> None:
    other = ElasticLM(dataclasses.replace(tiny_config, vocab_size=63))
    choice = Drafting(name="other", draft=ModelDraft(other), gamma=2)
    with pytest.raises(UsageError, match="--draft has a vocabulary of 63"):
        make_cells(target, GREEDY, [choice])


class Recorder:
    """An engine that only remembers who was asked for what."""

    def __init__(self, name: str, log: list[tuple[str, int]], make_sample: Callable[..., Sample]) -> None:
        self.name, self.log, self.make_sample = name, log, make_sample

    def decode(self, prompt_ids: Sequence[int], *, max_new_tokens: int, seed: int) -> Sample:
        self.log.append((self.name, len(prompt_ids)))
        return self.make_sample(ids=[0] * max_new_tokens)


def test_cells_take_turns_and_each_begins_in_turn(make_sample: Callable[..., Sample]) -> None:
    log: list[tuple[str, int]] = []
    cells = [
        Cell(
            label=Label(engine=name, mode="plain", dtype="fp32", temperature=0.0, threads=1),
            engine=Recorder(name, log, make_sample),
        )
        for name in "abc"
    ]
    calls: list[None] = []
    run_cells(cells, PROMPTS, max_new_tokens=4, num_rounds=2, progress=lambda: calls.append(None))
    warm_up, timed = log[:3], log[3:]
    assert warm_up == [("a", 5), ("b", 5), ("c", 5)]
    assert "".join(name for name, _ in timed) == "abcbcacababc"
    assert [length for _, length in timed[::3]] == [3, 5, 3, 5]
    assert len(calls) == len(log)
