"""Students of one teacher on equal tokens: from text, beside the teacher, from each cache, from written rows.

    python docs/distillation.py --teacher MODEL --data TRAIN --valid VALID --runs DIR --json RESULTS

The teacher is any model folder; every student has the shape below, or begins as the model of --student; one
seed, and a forward KL where it has a teacher, which all forms of a cache know. Loss is that on the validation
text; alpha, match and KL are against the teacher; tau is the number of tokens that a pass of the teacher
yields with the student as its draft.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from models.base.files import write_json, write_text
from models.checkpoint.folder import ModelFolder, load_model
from models.decode.decoder import open_decoder
from models.decode.sampling.params import SamplingParams
from models.machine.provenance import make_card
from train.data.loader import take_batches
from train.data.pack import document_starts
from train.data.tokens import load_rows_for
from train.objective.divergences import alpha, forward_kl, greedy_match
from train.objective.losses import cross_entropy
from train.recipe.recipe import load_recipe
from train.run.fit import fit

SHAPE = (
    "model.hidden_size=96 model.intermediate_size=256 model.num_hidden_layers=2 model.num_attention_heads=4 "
)
SHAPE += "model.num_key_value_heads=2 family={{}}"
SCHEDULE = "trainer.max_steps={steps} trainer.batch_size=4 data.sequence_length=128 optim.lr=3e-3 "
SCHEDULE += "optim.warmup_steps=30 trainer.val_check_interval=100000 trainer.checkpoint_every=100000 "
SCHEDULE += "trainer.limit_val_batches=2 tracking.wandb=disabled tracking.tensorboard=false dtype=fp32"
TAUGHT = "loss.teacher={teacher} loss.divergence=forward_kl loss.ramp_start=0 loss.ramp_steps=0"
ARMS: Mapping[str, str] = {
    "text alone": "data.tokenizer={teacher} loss.divergence=cross_entropy",
    "beside the teacher": TAUGHT,
    "cache, top 16": f"{TAUGHT} distill.cache={{runs}}/topk",
    "cache, 16 draws": f"{TAUGHT} distill.cache={{runs}}/samples distill.form=samples",
    "half the rows written by the student": f"{TAUGHT} distill.written_fraction=0.5",
    "half the rows written by the teacher": f"{TAUGHT} distill.written_fraction=0.5 distill.writer=teacher",
}
K = 16
NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS, GAMMA = 16, 16, 48, 4


def main() -> None:
    """Train and measure every arm; what is there already is not trained again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name in ("teacher", "data", "valid"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--valid-tokens", type=int, default=12_000)
    parser.add_argument("--student", help="model that every student begins as; None: random weights")
    parser.add_argument("--arm", action="append", choices=ARMS, help="students to train; None: all")
    parser.add_argument("--set", action="append", default=[], help="recipe keys that differ")
    given = parser.parse_args()
    teacher = load_model(given.teacher, dtype=torch.float32)
    rows = load_rows_for(teacher, given.valid, longest=128, text_field=None, key="--teacher")
    batches = list(take_batches(rows, given.valid_tokens))
    prompts = document_starts(rows.stream, PROMPT_TOKENS, NUM_PROMPTS).tolist()
    results: dict[str, Any] = {
        "teacher": Path(given.teacher).name,
        "steps": given.steps,
        "tokens": given.steps * 4 * 128,
        "student": given.student and Path(given.student).name,
        "outside": outside_top(teacher, batches),
        "students": [],
    }
    for arm in given.arm or ARMS:
        out = given.runs / arm.replace(" ", "-").replace(",", "")
        if not (out / "model" / "nestling.json").is_file():
            train(given, out, ARMS[arm])
        student = load_model(out / "model", dtype=torch.float32)
        measured = compare(teacher, student, batches) | measure_tau(given.teacher, out / "model", prompts)
        results["students"].append({"name": arm, **measured})
        document = {**results, "card": make_card(dtypes={"training": "fp32"})}
        write_json(given.json, document)
        write_text(given.json.with_suffix(".md"), table(document))
        print(json.dumps(results["students"][-1]), flush=True)


def table(document: Mapping[str, Any]) -> str:
    """Return a page about the results."""
    outside, card = document["outside"], document["card"]
    begins = f" Each begins as {document['student']}." if document.get("student") else ""
    intro = (
        f"{document['tokens']:,} tokens each, one seed.{begins} The teacher ({document['teacher']}) has "
        f"{outside['mean']:.1%} of its probability outside "
        f"its {outside['k']} most likely tokens. Made by docs/distillation.py."
    )
    head = "| student | loss | alpha | match | KL | tau, greedy | tau, sampled |"
    rows = [
        f"| {one['name']} | {one['loss']:.3f} | {one['alpha']:.3f} | {one['match']:.1%} "
        f"| {one['kl']:.3f} | {one['tau_greedy']:.2f} | {one['tau_sampled']:.2f} |"
        for one in document["students"]
    ]
    where = f"{card['hardware']['cpu']}, {card['date']}: `python {card['command']}`"
    lines = ["# Students of one teacher", "", intro, "", head, "|---" * 7 + "|", *rows, "", where, ""]
    return "\n".join(lines)


def train(given: argparse.Namespace, out: Path, words: str) -> None:
    """Train a student."""
    data = f"data.source={given.data} data.valid={given.valid} data.cache_dir={given.runs}/data "
    data += f"data.max_documents={given.documents}"
    shape = f"model.from={given.student} loss.trust=0 family={{{{}}}}" if given.student else SHAPE
    said = " ".join([shape, SCHEDULE, data, words, *given.set])
    said = said.format(teacher=given.teacher, runs=given.runs, steps=given.steps)
    fit(load_recipe(overrides=said.split()), out, console=Console(quiet=True))


def compare(teacher: ModelFolder, student: ModelFolder, batches: list[Any]) -> dict[str, float]:
    """Return the student's loss, and alpha, match and KL against its teacher, means over tokens."""
    sums, num_tokens = torch.zeros(4, dtype=torch.float64), 0
    with torch.no_grad():
        for tokens_BT, labels_BT in batches:
            labels_N = labels_BT.flatten()
            valid_N = labels_N >= 0
            p_NV, q_NV = (one.model(tokens_BT).flatten(0, 1)[valid_N] for one in (teacher, student))
            values = (cross_entropy(q_NV, labels_N[valid_N]), alpha(p_NV, q_NV), greedy_match(p_NV, q_NV))
            sums += torch.stack([one.double().sum() for one in (*values, forward_kl(p_NV, q_NV))])
            num_tokens += int(valid_N.sum())
    return dict(zip(("loss", "alpha", "match", "kl"), (sums / num_tokens).tolist(), strict=True))


def outside_top(teacher: ModelFolder, batches: list[Any]) -> dict[str, float]:
    """Return the probability outside the k most likely tokens, and what a renormalised loss makes of it."""
    outside = []
    with torch.no_grad():
        for tokens_BT, labels_BT in batches[:8]:
            p_NV = teacher.model(tokens_BT).float().softmax(-1).flatten(0, 1)[labels_BT.flatten() >= 0]
            outside.append(1 - p_NV.topk(K).values.sum(-1))
    outside_N = torch.cat(outside)
    return {
        "k": K,
        "mean": float(outside_N.mean()),
        "loss_at_teacher": float(-torch.log1p(-outside_N).mean()),
    }


def measure_tau(teacher: str, student: Path, prompts: list[list[int]]) -> dict[str, float]:
    """Return tokens for each pass of the teacher, the student drafting: greedily and at temperature 1."""
    found = {}
    for name, params in (("tau_greedy", SamplingParams()), ("tau_sampled", SamplingParams(temperature=1.0))):
        decoder = open_decoder(teacher, draft=student, gamma=GAMMA, params=params, dtype="fp32")
        texts = decoder.generate_batch(prompts, max_new_tokens=NEW_TOKENS, eos_token_ids=())
        rounds = sum(one.report.rounds for one in texts)
        found[name] = sum(len(one.ids) - 1 for one in texts) / rounds
    return found


if __name__ == "__main__":
    main()
