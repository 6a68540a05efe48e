"""The meaning of `--draft` and `--gamma`: who drafts, and who decides how much.

A draft is a member of the family, the best one on this machine, another folder, a copy of earlier text, or
nothing. A member or folder may carry its precision, as in `S@int8`: any precision is a legal draft.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from models.base.dtypes import DTYPES
from models.base.errors import UsageError
from models.base.numbers import size
from models.checkpoint.folder import ModelFolder, load_model
from models.decode.engine.costs import Costs
from models.decode.engine.draft import Draft, ModelDraft, NestedDraft
from models.decode.engine.drafters import DRAFTERS
from models.decode.engine.policy import NO_DRAFT, Fixed, Policy
from models.decode.sampling.params import SamplingParams
from models.decode.tune.controller import Controller
from models.decode.tune.draft_plan import DraftPlan, DraftSpec
from models.decode.tune.predict import MAX_GAMMA, choose_draft, known_acceptance, measure_costs
from models.decode.tune.tuned import find_draft
from models.elastic.count import count_parameters
from models.elastic.granularity import FULL, Granularity
from models.elastic.view import View
from models.packed.quantize import Q4_0, PackedLM, pack, packed_bytes, prepare, split_precision

DEFAULT_GAMMA = 4
AUTO = "auto"
DEFAULT_VERIFIER = "block"
LARGE = 50_000_000
"""Parameters from which on reading them takes most of a pass."""


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """A draft that is ready to run, and how much it drafts a round."""

    draft: Draft | None
    name: str
    gamma: int
    note: str = ""
    """A reason, if it was chosen for the user; or what it costs besides time."""
    extra_bytes: int = 0
    """Size of the weights that only the draft has."""
    precision: str | None = None
    """The precision that it runs in; None is the target's."""
    source: tuple[Path, Granularity] | None = None
    """The folder and granularity from which it is cut out as a model of its own; None for `DRAFTERS`."""
    adapts: bool = False
    """True if the number of tokens follows what a text measures; else it is `gamma`."""
    copies: bool = False
    """True if all of `DRAFTERS`, as copies of earlier text, are drafts besides, where it adapts."""
    costs: Costs | None = None
    """Costs of the target and of this draft, where they were measured for the choice."""
    most: int = MAX_GAMMA
    """The most drafted tokens of a round, where it adapts."""
    verifier: str = DEFAULT_VERIFIER
    """The verifier of `--verifier`, else the one that was found to be fastest with this draft."""


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
        params: settings of sampling.
        dtype: the model's, by which to look for a search's result; None looks for none.
        verifier: a name; None leaves the choice.

    Raises:
        UsageError: if the text is neither a granularity of the model nor a folder.
        NestlingError: if the other folder cannot be opened.
    """
    if text == AUTO:
        found = None if dtype is None else find_draft(folder.path, dtype, params, verifier)
        if found is None:
            return _predicted(folder, gamma, params, verifier or DEFAULT_VERIFIER)
        return _searched(folder, found, gamma, params, verifier)
    drafting = _asked(folder, text, gamma)
    return drafting if verifier is None else dataclasses.replace(drafting, verifier=verifier)


def _asked(folder: ModelFolder, text: str, gamma: int | None) -> Drafting:
    if text == NO_DRAFT:
        return _plain()
    number = DEFAULT_GAMMA if gamma is None else gamma
    if is_drafter(folder, text):
        return Drafting(draft=DRAFTERS[text](folder.model), name=text, gamma=number)
    other = other_folder(folder, text)
    if other is None:
        return nested_drafting(folder, DraftSpec.parse(text), number)
    return _separate(folder, *other, number)


def is_drafter(folder: ModelFolder, text: str) -> bool:
    """Return whether `--draft` means one of `DRAFTERS`, and no member of that name."""
    return text in DRAFTERS and text not in folder.family


def other_folder(folder: ModelFolder, text: str) -> tuple[str, str | None] | None:
    """Return the folder that `--draft` means and its precision; None if it means a member of this one.

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
            f"{', '.join([*folder.family, *DRAFTERS])}, auto and none, write a granularity out "
            "as in ffn=0.25, or give a model folder; each may carry a precision, as in S@int8"
        )
    return name, precision


def open_separate(folder: ModelFolder, path: str) -> ModelFolder:
    """Open another folder in the dtype of the target's weights.

    Raises:
        UsageError: if it means other texts by its tokens.
        NestlingError: if it cannot be opened.
    """
    other = load_model(path, dtype=folder.model.dtype)
    _check_same_tokens(folder, other)
    return other


def nested_drafting(folder: ModelFolder, spec: DraftSpec, gamma: int, note: str = "") -> Drafting:
    """Return a member of the model as its draft.

    Args:
        folder: the model.
        spec: the member, its precision and vocabulary.
        gamma: drafted tokens a round.
        note: why, if it was chosen for the user.

    Raises:
        UsageError: if there is no such member, or it cannot run in this precision here.
    """
    granularity = Granularity.parse(spec.member, folder.family)
    if spec.precision is None:
        model, extra_bytes = folder.model, prepare(folder.model, granularity)
    else:
        model = pack(folder.model, spec.precision, granularity)
        extra_bytes = packed_bytes(model)
    vocabulary = None if spec.vocabulary is None else torch.tensor(spec.vocabulary)
    draft = NestedDraft(View(model, granularity), vocabulary)
    extra_bytes += draft.num_bytes + draft.view.owned_bytes
    return Drafting(
        draft=draft,
        name=spec.text,
        gamma=gamma,
        note=", ".join(filter(None, [note, _weights(extra_bytes)])),
        extra_bytes=extra_bytes,
        precision=spec.precision,
        source=(folder.path, granularity),
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
        source=(other.path, FULL),
    )


def _weights(num_bytes: int) -> str:
    return f"{size(num_bytes)} of its own" if num_bytes else ""


def _searched(
    folder: ModelFolder,
    plan: DraftPlan,
    gamma: int | None,
    params: SamplingParams,
    verifier: str | None,
) -> Drafting:
    """Return what a search found for this model, dtype and machine."""
    if plan.spec is None:
        return _plain("plain decoding is faster here, as nestling search found", plan.verifier)
    few = "" if plan.spec.vocabulary is None else f", {len(plan.spec.vocabulary)} tokens"
    note = f"{plan.speed} by nestling search{few}"
    drafting = nested_drafting(folder, plan.spec, plan.gamma if gamma is None else gamma, note)
    assert isinstance(drafting.draft, NestedDraft)
    # Timed again, in half a second: what a controller begins with should be of now, not of the search's day.
    verifier = verifier or plan.verifier
    costs = measure_costs(folder.model, {drafting.name: drafting.draft.scorer}, params, verifier)
    return dataclasses.replace(drafting, verifier=verifier, costs=costs)


def _predicted(folder: ModelFolder, gamma: int | None, params: SamplingParams, verifier: str) -> Drafting:
    """Return the member that should be fastest, by its known acceptance and the costs of now."""
    acceptance = known_acceptance(folder.members, params, verifier)
    if not acceptance:
        return _plain(f"no member of this folder was ever measured{_hint(folder)}", verifier)
    drafts = {name: View(folder.model, folder.family[name]) for name in acceptance}
    costs = measure_costs(folder.model, drafts, params, verifier)
    plan = choose_draft(acceptance, costs, verifier=verifier)
    if plan is None or plan.spec is None:
        return _plain("plain decoding is faster here", verifier)
    drafting = nested_drafting(folder, plan.spec, plan.gamma if gamma is None else gamma, str(plan.speed))
    return dataclasses.replace(drafting, verifier=verifier, costs=costs)


def _hint(folder: ModelFolder) -> str:
    """Name a draft that needs no training, where the model's weights are too many for near caches."""
    model = folder.model
    is_large = count_parameters(model.config) >= LARGE
    pays = is_large and isinstance(model, PackedLM) and model.is_compiled and model.precision in DTYPES
    return f"; in 4 bits it drafts for itself: --draft full@{Q4_0}" if pays else ""


def _plain(note: str = "", verifier: str = DEFAULT_VERIFIER) -> Drafting:
    return Drafting(draft=None, name=NO_DRAFT, gamma=0, note=note, verifier=verifier)


def make_policy(folder: ModelFolder, drafting: Drafting, params: SamplingParams) -> Policy:
    """Return who decides on each round of a request; each request gets its own.

    Args:
        folder: the target's, whose members' acceptance may be known.
        drafting: the draft.
        params: settings of sampling.
    """
    draft = drafting.draft and drafting.draft.renew()
    if not drafting.adapts:
        return Fixed(draft, drafting.gamma, drafting.name, drafting.costs)
    drafts = {} if draft is None else {drafting.name: draft}
    if drafting.copies:
        drafts |= {name: make(folder.model) for name, make in DRAFTERS.items()}
    alphas = known_acceptance(folder.members, params)
    return Controller(drafts, drafting.costs, alphas=alphas, most=drafting.most)


def _check_same_tokens(target: ModelFolder, draft: ModelFolder) -> None:
    """Refuse a draft that means other texts by its tokens: it is safe, but of no use."""
    ours, theirs = target.tokenizer, draft.tokenizer
    if ours is None or theirs is None or ours.get_vocab_size() != theirs.get_vocab_size():
        return  # sizes that differ are the draft's own to refuse
    if ours.get_vocab() != theirs.get_vocab():
        raise UsageError(
            f"--draft {draft.path} has another vocabulary than {target.path}: "
            "both must come from the same tokenizer"
        )
