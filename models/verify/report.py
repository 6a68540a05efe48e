"""The outcome of the tests, as a table and for JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from models.base.errors import NestlingError
from models.base.table import Table
from models.verify.checks import Check

HEADER = (
    "test",
    "verifier",
    "draft",
    "gamma",
    "batch",
    "sampling",
    "dtype",
    "verdict",
    "value",
    "bound",
    "note",
)
LEGEND = (
    "any: what a controller chooses among all drafts, by a clock that is arithmetic; batch: texts decoded at "
    "once\nvalue: total variation to the target's distribution (exact, dtype), p-value (counts), or the gap "
    "between the two tokens at a first difference (coupled, greedy)\nexact and dtype walk through every "
    "branch and draw nothing; true distributions fail the tests of counts with a probability below 1e-6"
)


def check_table(checks: Sequence[Check]) -> Table:
    """Return a row for each test."""
    return Table(HEADER, tuple(map(_row, checks)), num_labels=9)


def check_fields(checks: Sequence[Check]) -> dict[str, Any]:
    """Return the outcome for JSON: `passed`, and all `checks`."""
    rows = [dataclasses.asdict(check) for check in checks]
    return {"passed": all(check.passed for check in checks), "checks": rows}


def require_passed(checks: Sequence[Check]) -> None:
    """Raise NestlingError that names the first test that failed."""
    failed = [check for check in checks if not check.passed]
    if failed:
        one = failed[0]
        raise NestlingError(
            f"{len(failed)} of {len(checks)} tests failed, first {one.test} {one.verifier} with draft "
            f"{one.draft}: {one.value:.1e}, bound {one.bound:.1e}; please report it with the --json file"
        )


def _row(check: Check) -> tuple[str, ...]:
    names = (
        check.test,
        check.verifier,
        check.draft,
        check.gamma,
        str(check.batch),
        check.sampling,
        check.dtype,
    )
    bound = f"{'>=' if check.test == 'counts' else '<='} {check.bound:.0e}"
    return (*names, "passed" if check.passed else "FAILED", check.note, f"{check.value:.1e}", bound)
