"""`nestling extract --pair`: a draft and its target, cut out to run together in other engines."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.base.errors import NestlingError, UsageError
from models.base.files import check_room, write_folder, write_json
from models.base.numbers import si
from train.commands.export import prove_member

if TYPE_CHECKING:
    from rich.console import Console

    from models.checkpoint.folder import ModelFolder
    from models.checkpoint.launch import Line
    from models.elastic.granularity import Granularity
    from models.measure.pairing import Estimate, PairCosts

PAIR_FILE = "pair.json"
MEMBERS = ("target", "draft")
FORMAT = 1
LEAST_SPEEDUP = 1.0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A draft and its target, and what is known of how they run together.

    Args:
        target: the member whose text it is.
        draft: the one that drafts.
        kept: by rule the chance that a drafted token is kept.
        costs: what a drafted token and a target's pass take.
        busy: whether others kept the machine busy while those were timed, on one thread then.
    """

    target: "Granularity"
    draft: "Granularity"
    kept: "Mapping[str, Estimate]"
    costs: "PairCosts"
    busy: bool = False

    def best(self, rule: str) -> tuple[int, float]:
        """Return the number of tokens to draft, and the speed over plain decoding.

        Where sampled drafting does not pay, it is that of greedy decoding.
        """
        length, speed = self.costs.best(self.kept[rule].mean)
        greedy = self.costs.best(self.kept["greedy"].mean)
        return (length, speed) if speed > LEAST_SPEEDUP else (greedy[0], speed)


def parse_pair(text: str, folder: "ModelFolder") -> tuple["Granularity", "Granularity"]:
    """Read `DRAFT:TARGET`; each is a name of the family or a granularity, which may have colons of its own.

    Raises:
        UsageError: if it is no pair, or the draft is not smaller.
    """
    from models.elastic.count import count_parameters
    from models.elastic.granularity import Granularity

    parts, problem = text.split(":"), None
    for place in range(1, len(parts)):
        halves = ":".join(parts[:place]), ":".join(parts[place:])
        try:
            draft, target = (Granularity.parse(half, folder.family) for half in halves)
            sizes = [count_parameters(folder.model.config, one) for one in (draft, target)]
        except UsageError as error:
            problem = problem or error
            continue
        if sizes[0] >= sizes[1]:
            remedy = "name a smaller draft" if sizes[0] == sizes[1] else f"write {halves[1]}:{halves[0]}"
            raise UsageError(
                f"--pair {text}: the draft has {si(sizes[0])} parameters and the target {si(sizes[1])}; "
                f"a draft is smaller, {remedy}"
            )
        return draft, target
    if problem is not None:
        raise UsageError(f"--pair {text}: {problem}")
    raise UsageError(f"--pair {text} names one member; write draft and target, as in --pair D:XL")


def measure_pair(folder: "ModelFolder", draft: "Granularity", target: "Granularity", batches: Any) -> Pair:
    """Measure on a text how many drafted tokens are kept, and on this machine what they cost."""
    from models.elastic.view import View
    from models.machine.card import machine_card, resolve_dtype
    from models.measure.pairing import RULES, compare_models, measure_pair_costs
    from models.packed.quantize import pack
    from train.commands.latency import timing

    found = compare_models(View(folder.model, target), View(folder.model, draft), batches)
    kept = {rule: found[rule] for rule in RULES}
    dtype = resolve_dtype("auto", machine_card(), purpose="decoding")
    packed = pack(folder.model, dtype)
    with timing() as how:
        costs = measure_pair_costs(packed, target, draft, how.clock)
    return Pair(target=target, draft=draft, kept=kept, costs=costs, busy=how.busy)


def measure_written(target: Path, draft: Path) -> "tuple[dict[str, Estimate], int]":
    """Open two extractions, and measure on what the target's receipt says it writes how they run together.

    Returns:
        By rule the chance that a drafted token is kept, and the number of tokens.
    """
    import torch

    from models.checkpoint.folder import load_model
    from models.checkpoint.receipt import read_receipt
    from models.elastic.granularity import FULL
    from models.elastic.view import View
    from models.measure.pairing import RULES, compare_models
    from train.commands.rounding import own_text

    ours, theirs = (
        View(load_model(path, dtype=torch.float32, mapped=True).model, FULL) for path in (target, draft)
    )
    sizes = [view.model.config.vocab_size for view in (theirs, ours)]
    if sizes[0] != sizes[1]:
        raise NestlingError(
            f"{draft} has {sizes[0]} tokens and its target {sizes[1]}, which is no pair; extract it again"
        )
    probe = read_receipt(target)["probe"]
    ids_BT = torch.tensor(probe["ids"])
    found = compare_models(ours, theirs, own_text(ids_BT, probe["num_prompt"]))
    return {rule: found[rule] for rule in RULES}, len(ids_BT) * (ids_BT.shape[1] - probe["num_prompt"])


def check_pair_room(
    folder: "ModelFolder",
    members: "Sequence[Granularity]",
    out: Path,
    *,
    form: str | None,
    format_: str,
    dtype: str | None,
) -> None:
    """Refuse a disk that cannot hold both members, before anything is measured.

    Raises:
        UsageError: if a form or a format does not hold one of them.
        NestlingError: if there is no room.
    """
    from models.checkpoint.extract import count_extracted_bytes
    from train.commands.export_gguf import count_gguf_bytes

    if format_ == "gguf":
        counts = [count_gguf_bytes(folder, member, dtype) for member in members]
    else:
        counts = [count_extracted_bytes(folder, member, form=form, dtype=dtype) for member in members]
    check_room(out, sum(counts))


def write_pair(
    folder: "ModelFolder",
    pair: Pair,
    out: Path,
    console: "Console",
    *,
    form: str | None = None,
    format_: str = "hf",
    dtype: str | None = None,
) -> dict[str, Any]:
    """Write both and pair.json; return what it says.

    Raises:
        UsageError: if `out` cannot be replaced, or a form or format does not hold one of them.
        NestlingError: if the disk refuses, or an extraction differs.
    """
    from models.checkpoint.launch import RULES, draft_settings
    from train.commands.export_gguf import extract_gguf

    members = {"target": pair.target, "draft": pair.draft}
    suffix = ".gguf" if format_ == "gguf" else ""
    lengths = {engine: pair.best(rule)[0] for engine, rule in RULES.items()}
    with write_folder(out, marker=PAIR_FILE) as partial:
        forms = set()
        for name, member in members.items():
            if suffix:
                extract_gguf(folder, member, partial / f"{name}.gguf", console, dtype=dtype)
            else:
                settings = draft_settings(lengths["transformers"]) if name == "draft" else None
                place = partial / name
                written = prove_member(folder, member, place, form=form, dtype=dtype, generation=settings)
                forms.add(written.form)
        places = {name: out / f"{name}{suffix}" for name in members}
        fields = _fields(folder, pair, partial, places, lengths, ragged="ragged" in forms)
        write_json(partial / PAIR_FILE, fields)
    return fields


def _fields(
    folder: "ModelFolder",
    pair: Pair,
    partial: Path,
    places: Mapping[str, Path],
    lengths: Mapping[str, int],
    *,
    ragged: bool,
) -> dict[str, Any]:
    from models.checkpoint.launch import RULES, launch_lines
    from models.checkpoint.weights import hash_weights
    from models.elastic.count import count_parameters
    from models.machine.provenance import make_card

    lines = launch_lines(places["target"], places["draft"], lengths, ragged=ragged)
    members = {"target": pair.target, "draft": pair.draft}
    probe, num_tokens = measure_written(*(partial / places[name].name for name in MEMBERS))
    return {
        "format": FORMAT,
        **{
            name: {
                "path": places[name].name,
                "granularity": str(member),
                "parameters": count_parameters(folder.model.config, member),
                "sha256": hash_weights(partial / places[name].name),
            }
            for name, member in members.items()
        },
        "shared": ["tokenizer", "vocab_size", "special tokens", "chat template", "max_position_embeddings"],
        "alpha": {rule: one.mean for rule, one in pair.kept.items()},
        "alpha_error": {rule: one.error for rule, one in pair.kept.items()},
        "probe": {
            "num_tokens": num_tokens,
            "alpha": {rule: one.mean for rule, one in probe.items()},
            "error": {rule: one.error for rule, one in probe.items()},
        },
        "c": pair.costs.c,
        "v": {str(count): cost for count, cost in pair.costs.v.items()},
        "break_even": pair.costs.break_even(),
        "busy": pair.busy,
        "engines": {engine: _engine(pair, RULES[engine], line) for engine, line in lines.items()},
        "card": make_card(dtypes={"model": str(folder.model.dtype).removeprefix("torch.")}),
    }


def _engine(pair: Pair, rule: str, line: "Line") -> dict[str, Any]:
    length, speed = pair.best(rule)
    greedy = pair.costs.best(pair.kept["greedy"].mean)[1]
    return {
        **dataclasses.asdict(line),
        "rule": rule,
        "num_tokens": length,
        "predicted_speedup": speed,
        "predicted_greedy_speedup": greedy,
        "worth_it": max(speed, greedy) > LEAST_SPEEDUP,
    }


def tell_pair(fields: Mapping[str, Any], out: Path, console: "Console") -> None:
    """Say how the two run together, with the line of each engine."""
    target, draft = fields["target"], fields["draft"]
    console.print(
        f"{out}: {draft['granularity']} ({si(draft['parameters'])}) drafts for {target['granularity']} "
        f"({si(target['parameters'])})",
        markup=False,
    )
    kept = ", ".join(
        f"{rule.replace('_', ' ')} {value:.3f} +- {fields['alpha_error'][rule]:.3f}"
        for rule, value in fields["alpha"].items()
    )
    console.print(f"kept of a drafted token: {kept}; it costs {fields['c']:.2f} of a target's", markup=False)
    if fields["busy"]:
        console.print("other programs kept the machine busy: costs are of one thread's own time")
    for engine, one in fields["engines"].items():
        sampled, greedy = one["predicted_speedup"], one["predicted_greedy_speedup"]
        speed = f"{sampled:.2f} times as fast as plain when sampling, {greedy:.2f} greedily"
        verdict = f"{one['num_tokens']} tokens a round" if one["worth_it"] else "no draft on this machine"
        console.print(f"{engine}: {verdict}, {speed}", markup=False)
        if one["worth_it"]:
            line = one["command"] or f"no line: {one['note']}"
            console.print(f"  {line}", markup=False, soft_wrap=True)
