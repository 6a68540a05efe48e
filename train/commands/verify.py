"""`nestling verify`: the distribution tests on the user's own model; see models/verify/plan.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from models.base.errors import UsageError
from models.base.numbers import duration
from models.base.progress import progress_bar
from train.commands.common import check_at_least, check_json, draft_paths, write_results
from train.commands.console import make_console
from train.commands.options import DtypeOption, JsonOption, ModelArgument, SeedOption

if TYPE_CHECKING:
    from models.verify.plan import Plan

AUTO_EFFORT = "auto"
DraftsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="G[@q4_0|int4|int8|bf16]|DIR",
        help="Draft to test: a member of the family, or another model folder; repeatable. Default: the "
        "whole family. An adversarial draft, copied text, a controller and batches are tested too.",
    ),
]
VerifiersOption = Annotated[
    list[str] | None,
    typer.Option(metavar="token|block|coupled", help="Verifier to test; repeatable. Default: all."),
]
PromptsOption = Annotated[
    list[str] | None,
    typer.Option(metavar="TEXT", help="Text to continue; repeatable. Default: a few headings."),
]
TrialsOption = Annotated[
    int | None,
    typer.Option(help="Number of texts drawn for each test of counts.", show_default="10000; quick: 2000"),
]
LengthOption = Annotated[
    int | None,
    typer.Option(help="Number of tokens of each continuation.", show_default="64; quick: 24"),
]
EffortOption = Annotated[
    str,
    typer.Option(
        metavar="auto|quick|full",
        help="Sizes of the tests: quick walks through fewer tokens and draws fewer texts. auto takes full "
        "where that is over in five minutes.",
    ),
]


def verify(
    model: ModelArgument,
    *,
    draft: DraftsOption = None,
    verifier: VerifiersOption = None,
    prompt: PromptsOption = None,
    effort: EffortOption = AUTO_EFFORT,
    trials: TrialsOption = None,
    max_new_tokens: LengthOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    json: JsonOption = None,
) -> None:
    """Test on this model that speculative decoding follows the full model's distribution.

    An extraction has a receipt, and so has each member of a pair: without --draft, what they say is run
    again.
    """
    check_json(json, MODEL=model, draft=draft_paths(draft))
    from train.commands.verify_receipt import has_receipt, repeat

    if draft is None and has_receipt(model):
        repeat(model, json)
        return
    check_at_least(100, trials=100 if trials is None else trials)
    check_at_least(1, max_new_tokens=1 if max_new_tokens is None else max_new_tokens)
    from models.decode.open import open_for_decoding
    from models.decode.sampling.samplers import VERIFIER_NAMES, check_verifier
    from models.verify.effort import EFFORTS
    from models.verify.inputs import choose_drafts, encode
    from models.verify.plan import plan_checks

    verifiers = list(dict.fromkeys(verifier or VERIFIER_NAMES))
    for name in verifiers:
        check_verifier(name)
    if effort not in (AUTO_EFFORT, *EFFORTS):
        raise UsageError(f"--effort {effort}: give {AUTO_EFFORT}, {' or '.join(EFFORTS)}")
    console = make_console(stderr=True)
    with console.status("preparing"):
        folder, dtype = open_for_decoding(model, dtype)
        context = folder.model.config.max_position_embeddings
        prompts = encode(folder, prompt or [])
        longest = max(map(len, prompts))
        if longest >= context:
            raise UsageError(f"--prompt has {longest} tokens, but the model's context holds {context}")
        plan = plan_checks(
            folder.model,
            dtype=dtype,
            drafts=choose_drafts(folder, draft or []),
            verifiers=verifiers,
            prompts=prompts,
            effort=EFFORTS.get(effort),
            num_trials=trials,
            length=max_new_tokens,
            seed=seed,
        )
    _run(plan, {"model": str(model), "seed": seed}, dtype, json, console)


def _run(plan: "Plan", settings: Mapping[str, Any], dtype: str, json: Path | None, console: Console) -> None:
    """Run the tests, show and write their outcome, and fail if one of them did."""
    from models.verify.plan import FALSE_ALARM
    from models.verify.report import LEGEND, check_fields, check_table, require_passed

    jobs, effort = plan.jobs, plan.effort
    remedy = "; --effort full takes longer and sees more" if effort.name == "quick" else ""
    told = f"{len(jobs)} tests ({effort.name}), about {duration(plan.seconds)}{remedy}"
    make_console().print(told, markup=False, highlight=False)
    checks = []
    with progress_bar("verifying", len(jobs), console=console) as bar:
        for job in jobs:
            checks.append(job())
            bar.advance()
    title = f"{settings['model']}: {sum(check.passed for check in checks)} of {len(checks)} hold"
    make_console().print(check_table(checks).to_rich(title=title, caption=LEGEND))
    sizes = {"effort": effort.name, "trials": effort.num_trials, "max_new_tokens": effort.length}
    results = {**check_fields(checks), "false_alarm": FALSE_ALARM, **sizes, **settings}
    write_results(json, results, dtypes={"model": dtype})
    require_passed(checks)
