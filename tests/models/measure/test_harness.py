"""Scores of a member in place are those of the harness's own loader on the extraction; skipped without it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from models.base.errors import NestlingError, UsageError
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.view import View
from models.measure import harness
from models.measure.harness import find_tasks, is_installed, run_tasks, score_rows

CHOICE = """task: words
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """task: pages
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
validation_split: validation
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
WRITING = """task: endings
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
validation_split: validation
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
COUNTED = ("acc", "acc_norm", "exact_match")
needs_harness = pytest.mark.skipif(not is_installed(), reason="needs the extra `eval`")


def make_tasks(folder: Path) -> list[str]:
    rows = [
        {"question": f"def area(x, {n}): return", "choices": [" x", " y * 2", " area"], "label": n % 3}
        for n in range(9)
    ]
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = []
    for name, text in (("words", CHOICE), ("pages", ROLLING), ("endings", WRITING)):
        path = folder / f"{name}.yaml"
        path.write_text(text.format(file=file))
        paths.append(str(path))
    return paths


@torch.no_grad()
def test_rows_of_any_length_are_scored_as_one_by_one(
    tiny_model: ElasticLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = View(tiny_model, Granularity(ffn=(0.5,)))
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (3, 9, 1, 12, 9):
        ids = torch.randint(64, (length + 1,), generator=generator).tolist()
        rows.append((ids[:-1], ids[-min(length, 3) :]))
    together = score_rows(view, rows)
    monkeypatch.setattr(harness, "BATCH_TOKENS", 1)
    for (given, continuation), (score, greedy), alone in zip(
        rows, together, score_rows(view, rows), strict=True
    ):
        log_probs_TV = view(torch.tensor([given]))[0].log_softmax(-1)[-len(continuation) :]
        expected = float(log_probs_TV.gather(1, torch.tensor(continuation)[:, None]).sum())
        assert score == pytest.approx(expected, rel=1e-5)
        assert alone[0] == pytest.approx(score, rel=1e-5)
        assert greedy == (log_probs_TV.argmax(-1).tolist() == continuation)


def test_without_the_extra_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "is_installed", lambda: False)
    with pytest.raises(NestlingError, match=r"pip install 'nestling\[eval\]'"):
        find_tasks(["words"])


def test_a_task_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("a: 1\n")
    with pytest.raises(UsageError, match="does not exist"):
        find_tasks([str(tmp_path / "nowhere.yaml")])
    with pytest.raises(UsageError, match="needs a line such as"):
        find_tasks([str(tmp_path / "empty.yaml")])


@needs_harness
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", ['task: "words"\n', CHOICE])
def test_a_task_that_the_harness_cannot_run_is_named(
    text: str, byte_level_family: Path, tmp_path: Path
) -> None:
    from models.checkpoint.folder import load_model

    folder, empty, path = load_model(byte_level_family), tmp_path / "rows.jsonl", tmp_path / "words.yaml"
    assert folder.tokenizer is not None
    empty.write_text("")
    path.write_text(text.format(file=empty))
    names, manager = find_tasks([str(path)])
    with pytest.raises(NestlingError, match="--tasks words: lm-evaluation-harness cannot run it"):
        run_tasks(View(folder.model, FULL), folder.tokenizer, names, manager)


def test_what_the_harness_raises_is_one_line_and_our_own_errors_stay() -> None:
    with (
        pytest.raises(NestlingError, match=r"^--tasks a, b: .*\(StopIteration\); mend"),
        harness._naming(["a", "b"]),
    ):
        raise StopIteration
    with pytest.raises(UsageError, match=r"^ours$"), harness._naming(["a"]):
        raise UsageError("ours")


@needs_harness
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_scores_in_place_are_those_of_the_hf_loader_on_the_extraction(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from models.checkpoint.extract import extract
    from models.checkpoint.folder import load_model, save_model
    from models.elastic.config import ElasticConfig
    from tests.models.checkpoint.test_gguf_tokenizer import make_tokenizer

    tokenizer: Tokenizer = make_tokenizer()
    config = ElasticConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=0,
    )
    model = ElasticLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    folder = load_model(save_model(tmp_path / "model", model.eval(), tokenizer=tokenizer))
    names, manager = find_tasks(make_tasks(tmp_path))
    for member, form in ((FULL, None), (Granularity(ffn=(1.0, 0.5)), "ragged")):
        out = extract(folder, member, tmp_path / f"out-{form}", form=form)
        theirs_lm: Any = HFLM(
            pretrained=str(out), dtype="float32", trust_remote_code=True, device="cpu", batch_size=4
        )
        theirs = simple_evaluate(
            model=theirs_lm, tasks=names, task_manager=manager, log_samples=False, bootstrap_iters=0
        )["results"]
        ours = harness.run_tasks(View(folder.model, member), tokenizer, names, manager)
        for name in names:
            for measure, score in ours[name].items():
                given = theirs[name].get(f"{measure},none", theirs[name].get(measure))
                if measure in COUNTED:  # of decisions, which are the same
                    assert score == given, (name, measure)
                assert score == pytest.approx(given, rel=1e-5), (name, measure)  # sums of another order
