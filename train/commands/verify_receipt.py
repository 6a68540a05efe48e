"""`nestling verify` of an extraction: its receipt is run again, without the model that it was cut from."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from models.base.errors import NestlingError
from models.base.files import naming, read_json
from train.commands.common import write_results
from train.commands.console import make_console
from train.commands.pair import FORMAT, MEMBERS, PAIR_FILE, measure_written

if TYPE_CHECKING:
    from models.checkpoint.receipt import Check

LEAST_ERROR = 1e-3
"""What another machine's roundings may change, where a standard error is less."""
_UNITS = {"logits": "off by {value:.1g} of the largest", "alpha": "off by {value:.2g}, within {bound:.2g}"}


def has_receipt(place: Path) -> bool:
    """Return whether a folder or a file says of itself what was compared."""
    # As in models/checkpoint/receipt.py, which takes a second to import.
    beside = place.with_name(f"{place.name}.receipt.json")
    return any(path.is_file() for path in (place / "receipt.json", place / PAIR_FILE, beside))


def repeat(place: Path, json: Path | None) -> None:
    """Run the receipt of an extraction again, or the receipts of a pair; fail if anything differs."""
    from models.checkpoint.extract import LOGITS_TOLERANCE
    from models.checkpoint.receipt import repeat_receipt
    from models.machine.provenance import versions

    console = make_console()
    is_pair = (place / PAIR_FILE).is_file()
    with console.status("running its receipt again"):
        checks = repeat_pair(place) if is_pair else repeat_receipt(place, LOGITS_TOLERANCE)
    for one in checks:
        verdict = "holds" if one.holds else "FAILS"
        told = _UNITS.get(one.check.split()[0], "{value:g} differ").format(value=one.value, bound=one.bound)
        console.print(f"{verdict}: {one.check}, {one.compared} compared, {told}", markup=False)
    runs = (
        f"in transformers {versions().get('transformers')}" if place.is_dir() else "as it opens here in fp32"
    )
    console.print(f"{runs}, without the model it was cut from")
    if is_pair and (theirs := _other_machine(place)) is not None:
        console.print(
            f"c, v and the lengths of rounds were measured on another machine ({theirs}); "
            "extract the pair here to measure them",
            markup=False,
        )
    fields = [dataclasses.asdict(one) | {"holds": one.holds} for one in checks]
    passed = all(one.holds for one in checks)
    results = {"receipt": fields, "passed": passed, "model": str(place)}
    write_results(json, results, dtypes={"comparison": "fp32"})
    if not passed:
        wrong = ", ".join(one.check for one in checks if not one.holds)
        raise NestlingError(f"{place} is not what its receipt says ({wrong}); extract the member again")


def _other_machine(place: Path) -> str | None:
    """Return the processor and GPU that a pair was measured on, if they are not this machine's."""
    from models.machine.provenance import make_card

    stated = read_json(place / PAIR_FILE).get("card")
    hardware = stated.get("hardware") if isinstance(stated, dict) else None
    theirs, ours = hardware if isinstance(hardware, dict) else {}, make_card(dtypes={})["hardware"]
    if all(theirs.get(part) == ours[part] for part in ("cpu", "cores", "gpu")):
        return None
    return f"{theirs.get('cores')} cores of {theirs.get('cpu')}, GPU: {theirs.get('gpu') or 'none'}"


def repeat_pair(place: Path) -> "list[Check]":
    """Compare both members with their receipts, and how they run together with pair.json.

    Raises:
        NestlingError: if pair.json or a receipt is damaged.
    """
    from models.checkpoint.extract import LOGITS_TOLERANCE
    from models.checkpoint.receipt import Check, repeat_receipt
    from models.checkpoint.weights import hash_weights

    fields = read_json(place / PAIR_FILE)
    with naming(place / PAIR_FILE):
        if fields.get("format", FORMAT) != FORMAT:
            raise NestlingError("it is no pair that this release reads; extract the pair again")
        try:
            paths = {name: place / Path(fields[name]["path"]).name for name in MEMBERS}
            stated = {name: str(fields[name]["sha256"]) for name in MEMBERS}
            probe = fields["probe"]
            expected = {
                rule: (float(probe["alpha"][rule]), float(probe["error"][rule])) for rule in probe["alpha"]
            }
        except (KeyError, TypeError, ValueError):
            raise NestlingError("it lacks what a pair has; extract the pair again") from None
    checks = [
        dataclasses.replace(one, check=f"{one.check} of the {name}")
        for name, path in paths.items()
        for one in repeat_receipt(path, LOGITS_TOLERANCE)
    ]
    other = sum(hash_weights(path) != stated[name] for name, path in paths.items())
    checks.append(Check(check="weights that pair.json names", compared=len(paths), value=other, bound=0))
    found, num_tokens = measure_written(paths["target"], paths["draft"])
    for rule, (mean, error) in expected.items():
        value = abs(found[rule].mean - mean) if rule in found else float("inf")
        checks.append(
            Check(check=f"alpha {rule}", compared=num_tokens, value=value, bound=max(error, LEAST_ERROR))
        )
    return checks
