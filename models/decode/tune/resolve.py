"""What `--draft` and `--gamma` mean: who drafts, and who decides how much.

A draft is a member of the family, the best one on this machine, another folder, a copy of earlier text, or
nothing. A member or folder may carry its precision, as in `S@int8`: any precision is a legal draft.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from models.base.errors import UsageError
from models.checkpoint.folder import ModelFolder, load_model
from models.decode.engine.costs import Costs
from models.decode.engine.draft import Draft, ModelDraft, NestedDraft
from models.decode.engine.lookup import LookupDraft
from models.decode.engine.policy import Fixed, Policy
from models.decode.engine.trimmed_head import FewTokens
from models.decode.sampling.params import SamplingParams
from models.decode.tune.controller import PRIOR_ALPHA, Arm, Controller
from models.decode.tune.predict import choose_draft, known_acceptance, measure_costs
from models.decode.tune.tuned import PLAIN, find_draft
from models.elastic.granularity import FULL, Granularity
from models.elastic.view import View
from models.packed.quantize import pack, packed_bytes, prepare, split_precision

DEFAULT_GAMMA = 4
AUTO, LOOKUP = "auto", "lookup"
# Of copied tokens, before any was seen: members know theirs, and should be tried first.
LOOKUP_ALPHA = 0.5
DEFAULT_VERIFIER = "block"


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """What drafts, and how much a round."""

    draft: Draft | None
    name: str
    gamma: int
    note: str = ""
    """Why, in a few words, if it was chosen for the user; or what it costs besides time."""
    extra_bytes: int = 0
    """Of weights that only the draft has."""
    precision: str | None = None
    """That it runs in; None is the target's."""
    costs: Costs | None = None
    """Of the target and of this draft, where they were measured for the choice."""
    verifier: str = DEFAULT_VERIFIER
    """The one that was asked for, else the one that was found to be fastest with this draft."""


def choose_drafting(
    folder: ModelFolder,
    text: str,
    gamma: int | None,
    params: SamplingParams,
    *,
    dtype: str | None = None,
    verifier: str | None = None,
) -> Drafting:
    """Resolve `--draft`, `--gamma` and `--verifier`.

    Args:
        folder: the model, as it decodes.
        text: of `--draft`; `auto` takes what `nestling search` found, and measures if it never ran.
        gamma: drafted tokens a round; None leaves the choice.
        params: the law.
        dtype: the model's, by which to look for a search's result; None looks for none.
        verifier: a name; None leaves the choice.

    Raises:
        UsageError: if the text is neither a granularity of the model nor a folder.
        NestlingError: if the other folder cannot be opened.
    """
    if text == AUTO:
        found = _searched(folder, gamma, params, dtype, verifier)
        return found or _automatic(folder, gamma, params, verifier or DEFAULT_VERIFIER)
    drafting = _asked(folder, text, gamma)
    return drafting if verifier is None else dataclasses.replace(drafting, verifier=verifier)


def _asked(folder: ModelFolder, text: str, gamma: int | None) -> Drafting:
    if text == "none":
        return Drafting(draft=None, name="none", gamma=0)
    number = DEFAULT_GAMMA if gamma is None else gamma
    if is_lookup(folder, text):
        return Drafting(draft=LookupDraft(), name=LOOKUP, gamma=number)
    other = other_folder(folder, text)
    return nested_drafting(folder, text, number) if other is None else _separate(folder, *other, number)


def is_lookup(folder: ModelFolder, text: str) -> bool:
    """Whether `--draft` means copies of earlier text, and no member of that name."""
    return text == LOOKUP and LOOKUP not in folder.family


def other_folder(folder: ModelFolder, text: str) -> tuple[str, str | None] | None:
    """The folder that `--draft` means and its precision; None if it means a member of this one.

    Raises:
        UsageError: if it means neither.
    """
    if text and Path(text).is_dir() and text not in folder.family:
        return text, None  # a folder's name may hold anything
    name, precision = split_precision(text)
    if name in folder.family or name == "full" or "=" in name:
        return None
    if not name or not Path(name).is_dir():
        raise UsageError(
            f"--draft {text or repr(text)} is neither a member of the family nor a folder; choose from "
            f"{', '.join(folder.family)}, auto, lookup and none, write a granularity out as in ffn=0.25, "
            "or give a model folder; each may carry a precision, as in S@int8"
        )
    return name, precision


def open_separate(folder: ModelFolder, path: str) -> ModelFolder:
    """Another folder in the dtype of the target's weights.

    Raises:
        UsageError: if it means other texts by its tokens.
        NestlingError: if it cannot be opened.
    """
    other = load_model(path, dtype=folder.model.dtype)
    _check_same_tokens(folder, other)
    return other


def nested_drafting(
    folder: ModelFolder, text: str, gamma: int, note: str = "", vocabulary: Sequence[int] | None = None
) -> Drafting:
    """A member of the model as its draft, in the precision that follows its `@`, else the model's own.

    Args:
        folder: the model.
        text: the member.
        gamma: drafted tokens a round.
        note: why, if it was chosen for the user.
        vocabulary: the only tokens that it drafts; None for all.

    Raises:
        UsageError: if it is none, or cannot run in this precision here.
    """
    name, precision = split_precision(text)
    granularity = Granularity.parse(name, folder.family)
    if precision is None:
        model, extra_bytes = folder.model, prepare(folder.model, granularity)
    else:
        model = pack(folder.model, precision, granularity)
        extra_bytes = packed_bytes(model)
    draft = NestedDraft(View(model, granularity), None if vocabulary is None else torch.tensor(vocabulary))
    if isinstance(draft.scorer, FewTokens):
        extra_bytes += draft.scorer.num_bytes
    return Drafting(
        draft=draft,
        name=text,
        gamma=gamma,
        note=", ".join(filter(None, [note, _weights(extra_bytes)])),
        extra_bytes=extra_bytes,
        precision=precision,
    )


def _separate(folder: ModelFolder, path: str, precision: str | None, gamma: int) -> Drafting:
    other = open_separate(folder, path)
    model = other.model if precision is None else pack(other.model, precision, FULL)
    extra_bytes = sum(weight.nbytes for weight in other.model.parameters()) + packed_bytes(model)
    return Drafting(
        draft=ModelDraft(model),
        name=f"{path}@{precision}" if precision else path,
        gamma=gamma,
        note=_weights(extra_bytes),
        extra_bytes=extra_bytes,
        precision=precision,
    )


def _weights(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB of its own" if num_bytes else ""


def _searched(
    folder: ModelFolder, gamma: int | None, params: SamplingParams, dtype: str | None, verifier: str | None
) -> Drafting | None:
    """What a search found for this model, dtype and machine; None if there was none."""
    found = None if dtype is None else find_draft(folder.path, dtype, params, verifier)
    if found is None:
        return None
    if found.draft == PLAIN:
        note = "plain decoding is faster here, as nestling search found"
        return Drafting(draft=None, name="none", gamma=0, note=note, verifier=found.verifier)
    speed = (
        f"{found.predicted:.2f}x predicted" if found.measured is None else f"{found.measured:.2f}x measured"
    )
    few = "" if found.vocabulary is None else f", {len(found.vocabulary)} tokens"
    number = found.gamma if gamma is None else gamma
    drafting = nested_drafting(
        folder, found.draft, number, f"{speed} by nestling search{few}", found.vocabulary
    )
    assert isinstance(drafting.draft, NestedDraft)
    # Timed again, in half a second: what a controller begins with should be of now, not of the search's day.
    verifier = verifier or found.verifier
    costs = measure_costs(folder.model, {drafting.name: drafting.draft.scorer}, params, verifier)
    return dataclasses.replace(drafting, verifier=verifier, costs=costs)


def _automatic(folder: ModelFolder, gamma: int | None, params: SamplingParams, verifier: str) -> Drafting:
    acceptance = known_acceptance(folder.members, params, verifier)
    if not acceptance:
        note = "no member of this folder was ever measured"
        return Drafting(draft=None, name="none", gamma=0, note=note, verifier=verifier)
    family = {member.name: member.granularity for member in folder.members}
    drafts = {name: View(folder.model, Granularity.parse(family[name])) for name in acceptance}
    costs = measure_costs(folder.model, drafts, params, verifier)
    best = choose_draft(acceptance, costs)
    if best is None:
        note = "plain decoding is faster here"
        return Drafting(draft=None, name="none", gamma=0, note=note, verifier=verifier)
    return Drafting(
        draft=nested_drafting(folder, family[best.name], best.gamma).draft,
        name=best.name,
        gamma=best.gamma if gamma is None else gamma,
        note=f"{best.speedup:.2f}x predicted",
        costs=costs,
        verifier=verifier,
    )


def make_policy(
    folder: ModelFolder, drafting: Drafting, params: SamplingParams, *, adapts: bool, copies: bool
) -> Policy:
    """Who decides on each round of a request.

    Args:
        folder: the target's, whose members' acceptance may be known.
        drafting: what drafts.
        params: how tokens are chosen.
        adapts: whether the number of tokens follows what it measures; else it is `drafting.gamma`.
        copies: whether earlier text is one more draft.
    """
    if not adapts:
        return Fixed(drafting.draft, drafting.gamma, drafting.name, drafting.costs)
    alpha = known_acceptance(folder.members, params).get(drafting.name, PRIOR_ALPHA)
    arms = [] if drafting.draft is None else [make_arm(drafting.name, drafting.draft, alpha)]
    if copies:
        arms.append(make_arm(LOOKUP, LookupDraft()))
    return Controller(arms, drafting.costs)


def make_arm(name: str, draft: Draft, alpha: float = PRIOR_ALPHA) -> Arm:
    """What a controller may pick; `alpha` is a member's acceptance, as far as it is known."""
    if isinstance(draft, LookupDraft):  # it costs nothing, and may have nothing to propose
        return Arm(name=name, draft=draft, alpha=LOOKUP_ALPHA, step=0.0, room=draft.room)
    return Arm(name=name, draft=draft, alpha=alpha)


def _check_same_tokens(target: ModelFolder, draft: ModelFolder) -> None:
    """Any draft is safe, but one that means other texts by its tokens is of no use."""
    ours, theirs = target.tokenizer, draft.tokenizer
    if ours is None or theirs is None or ours.get_vocab_size() != theirs.get_vocab_size():
        return  # sizes that differ are the draft's own to refuse
    if ours.get_vocab() != theirs.get_vocab():
        raise UsageError(
            f"--draft {draft.path} has another vocabulary than {target.path}: "
            "both must come from the same tokenizer"
        )
