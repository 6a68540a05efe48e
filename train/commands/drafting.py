"""What `--draft` means: a member of the family, the best one on this machine, nothing, or another folder."""

from dataclasses import dataclass
from pathlib import Path

from models.checkpoint import ModelFolder, load_model
from models.decode.auto import choose_draft, known_acceptance, measure_costs
from models.decode.draft import Draft, ModelDraft, NestedDraft
from models.decode.sampling import SamplingParams
from models.errors import UsageError
from models.granularity import Granularity
from models.view import View

DEFAULT_GAMMA = 4


@dataclass(frozen=True, kw_only=True)
class Drafting:
    """What drafts, and how much a round."""

    draft: Draft | None
    name: str
    gamma: int
    note: str = ""
    """Why, in a few words, if it was chosen for the user."""


def choose_drafting(folder: ModelFolder, text: str, gamma: int | None, params: SamplingParams) -> Drafting:
    """Resolve `--draft` and `--gamma`.

    Raises:
        UsageError: if the text is neither a granularity of the model nor a folder.
        NestlingError: if the other folder cannot be opened.
    """
    if text == "none":
        return Drafting(draft=None, name="none", gamma=0)
    if text == "auto":
        return _automatic(folder, gamma, params)
    number = DEFAULT_GAMMA if gamma is None else gamma
    if text in folder.family or text == "full" or "=" in text:
        return Drafting(draft=_nested(folder, text), name=text, gamma=number)
    if not Path(text).is_dir():
        raise UsageError(
            f"--draft {text} is neither a member of the family nor a folder; choose from "
            f"{', '.join(folder.family)}, auto and none, write a granularity out as in ffn=0.25, "
            "or give a model folder"
        )
    dtype = folder.model.model.embed_tokens.weight.dtype
    other = load_model(text, dtype=dtype)
    _check_same_tokens(folder, other)
    return Drafting(draft=ModelDraft(other.model), name=text, gamma=number)


def _automatic(folder: ModelFolder, gamma: int | None, params: SamplingParams) -> Drafting:
    acceptance = known_acceptance(folder.members, params)
    if not acceptance:
        return Drafting(draft=None, name="none", gamma=0, note="no member of this folder was ever measured")
    family = {member.name: member.granularity for member in folder.members}
    drafts = {name: Granularity.parse(family[name]) for name in acceptance}
    best = choose_draft(acceptance, measure_costs(folder.model, drafts))
    if best is None:
        return Drafting(draft=None, name="none", gamma=0, note="plain decoding is faster here")
    return Drafting(
        draft=_nested(folder, family[best.name]),
        name=best.name,
        gamma=best.gamma if gamma is None else gamma,
        note=f"{best.speedup:.2f}x predicted",
    )


def _nested(folder: ModelFolder, text: str) -> NestedDraft:
    return NestedDraft(View(folder.model, Granularity.parse(text, folder.family)))


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
