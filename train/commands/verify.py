"""`nestling verify`: the distribution tests on the user's own model; see models/verify/plan.py."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from models.base.errors import NestlingError, UsageError
from models.base.progress import progress_bar
from train.commands.common import (
    DtypeOption,
    JsonOption,
    ModelArgument,
    check_json,
    write_results,
)
from train.commands.console import make_console

if TYPE_CHECKING:
    from models.checkpoint.folder import ModelFolder
    from models.verify.checks import Check
    from models.verify.drafts import ForModel

NUM_PROMPTS = 4


def verify(
    model: ModelArgument,
    *,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            metavar="G[@int4|int8|bf16]|DIR",
            help="A member that drafts, or another model folder; repeatable. Default: the whole family. "
            "An adversarial draft, copied text, a controller and batches come on top.",
        ),
    ] = None,
    verifier: Annotated[
        list[str] | None,
        typer.Option(metavar="token|block|coupled", help="What is tested; repeatable. Default: all."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="What to continue; repeatable. Default: a few headings."),
    ] = None,
    trials: Annotated[int, typer.Option(help="Texts drawn for each test of counts.")] = 10_000,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the texts that must be the same.")] = 64,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    dtype: DtypeOption = "auto",
    json: JsonOption = None,
) -> None:
    """Test on this model that speculative decoding follows the full model's distribution."""
    check_json(json)
    for flag, value, least in (("--trials", trials, 100), ("--max-new-tokens", max_new_tokens, 1)):
        if value < least:
            raise UsageError(f"{flag} must be at least {least}, got {value}")
    from models.decode.open import open_for_decoding
    from models.decode.sampling.samplers import VERIFIER_NAMES, check_verifier
    from models.verify.plan import FALSE_ALARM, plan_checks

    verifiers = list(dict.fromkeys(verifier or VERIFIER_NAMES))
    for name in verifiers:
        check_verifier(name)
    console = make_console(stderr=True)
    with console.status("preparing"):
        folder, dtype = open_for_decoding(model, dtype)
        context = folder.model.config.max_position_embeddings
        prompts = encode(folder, prompt or [])
        longest = max(map(len, prompts))
        if longest >= context:
            raise UsageError(f"--prompt has {longest} tokens, but the model's context holds {context}")
        jobs = plan_checks(
            folder.model,
            dtype=dtype,
            drafts=choose_drafts(folder, draft or []),
            verifiers=verifiers,
            prompts=prompts,
            num_trials=trials,
            length=min(max_new_tokens, context - longest),
            seed=seed,
        )
    checks = []
    with progress_bar("verifying", len(jobs), console=console) as bar:
        for job in jobs:
            checks.append(job())
            bar.advance()
    failed = [check for check in checks if not check.passed]
    make_console().print(_table(checks, title=f"{model}: {len(checks) - len(failed)} of {len(checks)} hold"))
    results = {
        "passed": not failed,
        "checks": [dataclasses.asdict(check) for check in checks],
        "model": str(model),
        "false_alarm": FALSE_ALARM,
        "trials": trials,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    write_results(json, results, dtypes={"model": dtype})
    if failed:
        one = failed[0]
        raise NestlingError(
            f"{len(failed)} of {len(checks)} tests failed, first {one.test} {one.verifier} with draft "
            f"{one.draft}: {one.value:.1e}, bound {one.bound:.1e}; please report it with the --json file"
        )


def choose_drafts(folder: "ModelFolder", asked: list[str]) -> "dict[str, ForModel]":
    """What was asked for, else every member of the family but the full one; copied text comes by itself.

    Raises:
        UsageError: if one is neither a granularity of the model nor a folder, or no draft for it, or cannot
            run in its precision here.
        NestlingError: if a folder cannot be opened.
    """
    from models.decode.engine.draft import ModelDraft
    from models.decode.engine.drafters import DRAFTERS
    from models.decode.tune.resolve import AUTO, is_drafter, open_separate, other_folder
    from models.elastic.granularity import Granularity
    from models.packed.quantize import split_precision
    from models.verify.drafts import member, separate

    config = folder.model.config
    smaller = [name for name, one in folder.family.items() if not one.resolve(config).is_full]
    drafts: dict[str, ForModel] = {}
    for text in [text for text in asked if not is_drafter(folder, text)] or smaller or ["full"]:
        if text in (AUTO, "none") and text not in folder.family:
            remedy = f"name a member, a folder or {', '.join(DRAFTERS)}"
            raise UsageError(f"--draft {text} is no draft to test; {remedy}")
        other = other_folder(folder, text)
        if other is not None:
            path, precision = other
            model = open_separate(folder, path).model
            ModelDraft(model).check(folder.model)
            drafts[text] = separate(model, precision)
            continue
        name, precision = split_precision(text)
        granularity = Granularity.parse(name, folder.family)
        granularity.resolve(config)
        drafts[text] = member(granularity, precision)
    return drafts


def encode(folder: "ModelFolder", texts: list[str]) -> list[list[int]]:
    """Token ids of the prompts; without any, of a few headings, or single tokens if there is no tokenizer.

    Raises:
        UsageError: if a prompt is empty.
        NestlingError: if there are prompts but no tokenizer.
    """
    from models.decode.prompts import HEADINGS

    config = folder.model.config
    if folder.tokenizer is None:
        if texts:
            raise NestlingError(f"{folder.path} has no tokenizer.json; leave --prompt out")
        return [[token % config.vocab_size] for token in range(NUM_PROMPTS)]
    encoded = [folder.tokenizer.encode(text).ids for text in texts or HEADINGS[:NUM_PROMPTS]]
    for text, ids in zip(texts, encoded, strict=False):
        if not ids:
            raise UsageError(f"--prompt {text!r} has no tokens; give at least one to continue")
    if not texts:  # ours must fit any context
        encoded = [ids[: max(1, config.max_position_embeddings // 2)] for ids in encoded]
    return encoded


def _table(checks: "Sequence[Check]", title: str) -> Table:
    table = Table(title=title, title_justify="left", caption=_LEGEND, caption_justify="left")
    for column in ("test", "verifier", "draft", "gamma", "batch", "sampling", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in ("value", "bound"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("holds")
    table.add_column("what")
    for check in checks:
        bound = f"{'>=' if check.test == 'counts' else '<='} {check.bound:.0e}"
        words = (
            check.test,
            check.verifier,
            check.draft,
            check.gamma,
            str(check.batch),
            check.sampling,
            check.dtype,
        )
        table.add_row(*words, f"{check.value:.1e}", bound, "yes" if check.passed else "NO", check.note)
    return table


_LEGEND = (
    "any: what a controller chooses among all drafts, by a clock that is arithmetic; batch: texts decoded at "
    "once\nvalue: total variation to the target's distribution (exact, dtype), p-value (counts), or the gap "
    "between the two tokens at a first difference (coupled, greedy)\nexact and dtype walk through every "
    "branch and draw nothing; counts of a correct decoder fail with a probability below 1e-6, all together"
)
