"""The models that a server offers: the folder's own with its draft, and each member of the family."""

from collections.abc import Callable
from dataclasses import dataclass

from models.decode.decoder import Decoder
from models.decode.engine.draft import ModelDraft, NestedDraft
from models.decode.engine.policy import Fixed, Policy
from models.decode.sampling.params import GREEDY
from models.decode.tune.predict import known_acceptance
from models.elastic.granularity import FULL
from models.elastic.view import Model, View
from models.serve.load import Load, LoadPolicy, measure_passes


@dataclass(frozen=True)
class ServedModel:
    """A model that clients may name."""

    target: Model
    new_policy: Callable[[], Policy]
    """Makes what decides on the drafts of one text."""


def default_name(decoder: Decoder) -> str:
    """Return the name of the run or folder that the model came from."""
    path = decoder.folder.path.resolve()
    return path.parent.name if path.name == "model" and path.parent.name else path.stem


def serve_family(decoder: Decoder, name: str) -> tuple[dict[str, ServedModel], Load | None]:
    """Return the models by name, and the load that decides how much is drafted, if that is not fixed.

    Members are decoded plainly: they are what drafts.
    """
    model = decoder.folder.model
    new_policy, load = _drafts(decoder)
    models = {name: ServedModel(model, new_policy)}
    for member, granularity in decoder.folder.family.items():
        is_full = granularity == FULL
        target = model if is_full else View(model, granularity)
        models[f"{name}:{member}"] = ServedModel(target, new_policy if is_full else _plain)
    return models, load


def _plain() -> Policy:
    return Fixed(None, 0)


def _drafts(decoder: Decoder) -> tuple[Callable[[], Policy], Load | None]:
    drafting, folder = decoder.drafting, decoder.folder
    draft = drafting.draft
    if draft is None:
        return _plain, None
    if not drafting.adapts or not isinstance(draft, NestedDraft | ModelDraft):
        return lambda: Fixed(draft.renew(), drafting.gamma, drafting.name), None
    scorer = draft.scorer if isinstance(draft, NestedDraft) else draft.model
    known = known_acceptance(folder.members, GREEDY)
    load = Load(measure_passes(folder.model, scorer), known.get(drafting.name, draft.prior.alpha))
    return lambda: LoadPolicy(draft.renew(), drafting.name, load), load
