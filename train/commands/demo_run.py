"""`nestling demo`: the whole chain in a few minutes on two cores, from Python's own source.

train a family -> its table -> cut S out, prove it equal in stock transformers
               -> complete a function plainly and with the family's own draft: the same text
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from models.base.errors import NestlingError
from models.base.numbers import NOTHING, fixed, optional
from models.base.table import Table
from models.checkpoint.folder import ModelFolder, load_model
from models.decode.engine.generation_config import GenerationConfig
from models.decode.engine.policy import Fixed
from models.decode.open import open_for_decoding
from models.decode.sampling.params import GREEDY
from models.decode.text import GenerationResult, stream_text
from models.decode.tune.predict import choose_draft, known_acceptance, measure_costs
from models.decode.tune.resolve import Drafting, nested_drafting
from models.elastic.view import View
from train.commands.export import extract_and_prove
from train.recipe.recipe import Recipe, load_recipe, load_saved_recipe
from train.recipe.shipped import CONFIGS
from train.report.tables import FAMILY_LEGEND, family_table
from train.run.fit import fit
from train.run.identity import RECIPE_FILE

RECIPE = CONFIGS / "demo.yaml"
MEMBER = "S"
# No line break at its end: a token holds the break and the indent that follows.
PROMPT = 'def read_config(path, encoding="utf-8"):'
NUM_TOKENS = 128
NUM_RUNS = 5


def run_demo(out: Path, console: Console, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run it.

    Args:
        out: the run folder; a finished demo there starts anew, an interrupted one goes on.
        console: where it tells.
        overrides: recipe keys that differ from configs/demo.yaml.

    Returns:
        What was measured, for JSON.

    Raises:
        NestlingError: if a member cut out is not equal, or a draft changed the text: bugs of ours.
    """
    started = time.perf_counter()
    console.rule("1. train a family on the Python standard library")
    recipe = load_recipe([RECIPE], overrides)
    resume = "auto" if _was_interrupted(recipe, out) else "never"
    path = fit(recipe, out, resume=resume, console=console)
    folder = load_model(path)
    console.print(family_table(folder.members).to_rich(caption=FAMILY_LEGEND))

    console.rule(f"2. cut {MEMBER} out, and open it in stock transformers")
    parity = extract_and_prove(folder, folder.family[MEMBER], out / MEMBER, console)

    console.rule("3. complete a function, plainly and with the family's own draft")
    speed = _decode(open_for_decoding(path, "fp32")[0], console)

    page = _report(out)
    seconds = time.perf_counter() - started
    console.rule(f"done in {seconds / 60:.1f} minutes")
    console.print(_next_steps(out, page), markup=False)
    return {
        "members": [dataclasses.asdict(member) for member in folder.members],
        "extraction": dataclasses.asdict(parity),
        "decoding": speed,
        "seconds": seconds,
    }


def _was_interrupted(recipe: Recipe, out: Path) -> bool:
    """Whether a run of this very recipe waits there to go on."""
    try:
        return not (out / "model").exists() and load_saved_recipe(out / RECIPE_FILE) == recipe
    except NestlingError:  # no recipe there, or one of another release
        return False


def _decode(folder: ModelFolder, console: Console) -> dict[str, Any]:
    """Alternate plain and speculative decoding; both must write the same tokens."""
    choice = _choose(folder)
    plain, drafted = [], []
    for _ in range(NUM_RUNS):
        plain.append(_complete(folder, None))
        drafted.append(_complete(folder, choice))
    ids_equal = all(result.ids == plain[0].ids for result in plain + drafted)
    console.print(PROMPT, end="", style="dim", markup=False)
    console.print(plain[0].text, markup=False)
    console.print(_speed_table(choice, plain, drafted).to_rich())
    console.print(f"medians of {NUM_RUNS} alternating runs" + ids_equal * "; the same tokens in all of them")
    if _median_speed(drafted) < _median_speed(plain):
        console.print("so small a model is plainly decoded faster than its draft can pay; larger ones gain")
    if not ids_equal:
        raise NestlingError("speculative decoding wrote other tokens than plain; please report this")
    return {
        "ids_equal": ids_equal,
        "draft": choice.name,
        "gamma": choice.gamma,
        "plain_tokens_per_second": _median_speed(plain),
        "tokens_per_second": _median_speed(drafted),
        "tau": drafted[0].report.tau,
        "alpha": drafted[0].report.alpha,
    }


def _choose(folder: ModelFolder) -> Drafting:
    """The member that drafts best here, even if plain decoding should be as fast."""
    acceptance = known_acceptance(folder.members, GREEDY)
    drafts = {name: View(folder.model, folder.family[name]) for name in acceptance}
    plan = choose_draft(acceptance, measure_costs(folder.model, drafts, GREEDY), least=0.0)
    assert plan is not None, "a trained family has measured members"
    assert plan.spec is not None, plan
    return nested_drafting(folder, plan.spec, plan.gamma)


def _complete(folder: ModelFolder, choice: Drafting | None) -> GenerationResult:
    assert folder.tokenizer is not None
    policy = Fixed(None, 0) if choice is None else Fixed(choice.draft, choice.gamma)
    config = GenerationConfig(max_new_tokens=NUM_TOKENS)
    return stream_text(folder.model, folder.tokenizer, PROMPT, config, policy=policy).finish()


def _speed_table(choice: Drafting, plain: list[GenerationResult], drafted: list[GenerationResult]) -> Table:
    report = drafted[0].report
    ours = (
        f"drafted by {choice.name}, gamma {choice.gamma}",
        f"{_median_speed(drafted):.0f}",
        f"{report.tau or 1:.2f}",
        optional(report.alpha, fixed(3)),
    )
    header = ("decoding", "tokens/s", "tau", "alpha")
    return Table(header, (("plain", f"{_median_speed(plain):.0f}", "1.00", NOTHING), ours))


def _median_speed(results: list[GenerationResult]) -> float:
    return statistics.median(result.report.tokens_per_second or 0.0 for result in results)


def _report(out: Path) -> Path:
    from train.report.page import write_report

    return write_report([out], out / "report.html")


def _next_steps(out: Path, page: Path) -> str:
    return f"""
look at        {page}
complete text  nestling generate {out}/model --prompt "class Stack:"
any member     nestling evaluate {out}/model --data stdlib --granularity ffn=1:0.5:0.5:0.25
cut one out    nestling extract {out}/model --granularity ffn=0.5 --out {out}/half
train longer   nestling train --config configs/demo.yaml trainer.max_steps=5000 --out checkpoints/longer
"""
