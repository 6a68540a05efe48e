"""Cut a granularity out of a family: contiguous weights in a stock folder of its own.

A member whose layers are equal is a smaller model of a stock architecture, so that
`AutoModelForCausalLM.from_pretrained` opens it with no code of ours (invariant 1); for unequal layers see
models/checkpoint/layout.py. Source: MatFormer, https://arxiv.org/abs/2310.07707.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.base.errors import UsageError
from models.base.files import check_replaceable, check_room, read_json
from models.checkpoint.compressed import compress, count_compressed_bytes
from models.checkpoint.family import FAMILY_FILE
from models.checkpoint.folder import Member, ModelFolder, save_model
from models.checkpoint.huggingface import load_stock
from models.checkpoint.layout import PADDED, Layout, lay_out
from models.checkpoint.receipt import Probe, make_probe
from models.checkpoint.weights import count_elements, model_from, weights_of
from models.elastic.cache import KVCache
from models.elastic.config import ElasticConfig
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from models.elastic.owning import copy_owned
from models.elastic.view import View

# Both sides compute in fp32 but may add in another order; this is some hundred roundings of 6e-8, relative to
# the largest logit, where layers are cut that nobody has healed (10 of SmolLM2's 30: 1.1e-5).
LOGITS_TOLERANCE = 5e-5


@dataclass(frozen=True, kw_only=True)
class Parity:
    """Comparison of an extraction with its view, in fp32.

    Args:
        num_tokens: positions compared.
        ids_equal: whether greedy decoding wrote the same ids.
        difference: the largest difference of two logits, relative to the largest logit.
    """

    num_tokens: int
    ids_equal: bool
    difference: float

    @property
    def holds(self) -> bool:
        """True if invariant 1 holds: ids exactly, logits to `LOGITS_TOLERANCE`."""
        return self.ids_equal and self.difference <= LOGITS_TOLERANCE


def count_extracted_bytes(
    folder: ModelFolder, granularity: Granularity, *, form: str | None = None, dtype: str | None = None
) -> int:
    """Return the bytes of an extraction's weights, before anything is written; arguments as of `extract`."""
    return _count_bytes(folder, lay_out(View(folder.model, granularity), form), dtype)


def _count_bytes(folder: ModelFolder, layout: Layout, dtype: str | None) -> int:
    itemsize = folder.model.dtype.itemsize
    return layout.parameters * itemsize if dtype is None else count_compressed_bytes(layout, dtype, itemsize)


def extract(
    folder: ModelFolder,
    granularity: Granularity,
    out: str | Path,
    *,
    form: str | None = None,
    dtype: str | None = None,
    finish: Callable[[Path, Layout], object] | None = None,
) -> Path:
    """Write one member as a model folder of its own; tokenizer and generation settings go with it.

    Args:
        folder: the family.
        granularity: the member.
        out: the new folder. It may replace an earlier extraction, never a family.
        form: one of `models.checkpoint.layout.FORMS`; None takes ragged where layers are unequal.
        dtype: int8 or int4 for matrices in few bits, see models/checkpoint/compressed.py; None keeps the
            dtype on disk.
        finish: called with the folder before it appears; what it raises leaves nothing.

    Returns:
        The new folder. Its `nestling.json` names the parent, and its family is itself alone.

    Raises:
        UsageError: if the granularity or the form does not fit, or `out` cannot be replaced.
        NestlingError: if the disk refuses.
    """
    out = Path(out)
    layout = lay_out(View(folder.model, granularity), form)
    _check_out(folder, out)
    check_room(out, _count_bytes(folder, layout, dtype))
    layout = layout if dtype is None else compress(layout, dtype)
    known = _measured(folder, granularity)
    member = Member(
        name="full",
        granularity=str(FULL),
        parameters=layout.parameters,
        loss=known.loss if known else None,
        perplexity=known.perplexity if known else None,
    )
    with torch.device("meta"):  # only its shape is written: the weights are the layout's
        shape = ElasticLM(layout.config)
    return save_model(
        out,
        shape,
        tokenizer=folder.tokenizer,
        family={"full": FULL},
        members=[member],
        provenance={
            **provenance(folder, granularity, member.parameters),
            "form": layout.form,
            **({"dtype": dtype} if dtype else {}),
        },
        chat_template=folder.chat_template,
        like=folder.path,
        layout=layout,
        finish=None if finish is None else lambda path: finish(path, layout),
    )


def verify_extraction(
    folder: ModelFolder,
    granularity: Granularity,
    out: str | Path,
    *,
    tokens_BT: Tensor | None = None,
    num_new_tokens: int = 32,
    progress: Callable[[], object] = lambda: None,
) -> Parity:
    """Open an extraction in stock transformers and compare it with the view that it was cut from.

    Both compute in fp32 whatever the dtype on disk, so that equal weights give equal ids.

    Args:
        folder: the family.
        granularity: the member.
        out: the folder that `extract` wrote.
        tokens_BT: prompts that both continue greedily; None takes fixed random tokens.
        num_new_tokens: length of the continuation.
        progress: called for each token of the continuation.
    """
    return compare_with_stock(
        folder, granularity, out, tokens_BT=tokens_BT, num_new_tokens=num_new_tokens, progress=progress
    )[0]


@torch.no_grad()
def compare_with_stock(
    folder: ModelFolder,
    granularity: Granularity,
    out: str | Path,
    *,
    tokens_BT: Tensor | None = None,
    num_new_tokens: int = 32,
    progress: Callable[[], object] = lambda: None,
) -> tuple[Parity, Probe]:
    """Return the comparison of `verify_extraction`, and the probe by which it can be repeated."""
    view = in_fp32(folder.model, granularity)
    if tokens_BT is None:
        tokens_BT = fixed_prompts(folder.model.config, num_new_tokens)
    ours_BT = continue_greedily(view, tokens_BT, num_new_tokens, progress)
    ours_BTV, theirs_BTV = view(ours_BT), load_stock(out)(ours_BT, use_cache=False).logits
    parity = compare_logits(ours_BT, ours_BTV, theirs_BTV, tokens_BT.shape[1])
    return parity, make_probe(ours_BT, ours_BTV, tokens_BT.shape[1], folder.tokenizer)


def fixed_prompts(config: ElasticConfig, num_new_tokens: int) -> Tensor:
    """Return a few rows of random tokens, the same each time, that leave room for so many new ones."""
    num_prompt = max(1, min(32, config.max_position_embeddings - num_new_tokens))
    return torch.randint(config.vocab_size, (4, num_prompt), generator=torch.Generator().manual_seed(0))


def compare_logits(ids_BT: Tensor, ours_BTV: Tensor, theirs_BTV: Tensor, num_prompt: int) -> Parity:
    """Compare logits at ids that one side wrote greedily after a prompt.

    The other side would write the same ids if its likeliest token is the next id at every place.
    """
    written_BT = theirs_BTV[:, num_prompt - 1 : -1].argmax(-1)
    same = torch.equal(written_BT, ids_BT[:, num_prompt:])
    return Parity(
        num_tokens=ids_BT.numel(),
        ids_equal=same and torch.equal(ours_BTV.argmax(-1), theirs_BTV.argmax(-1)),
        difference=float((ours_BTV - theirs_BTV).abs().max()) / max(float(ours_BTV.abs().max()), 1e-30),
    )


def in_fp32(model: ElasticLM, granularity: Granularity) -> View:
    """Return the member in fp32; of a copy of the model, unless that is its dtype."""
    view = View(model, granularity)
    if model.dtype == torch.float32 and model.device.type == "cpu":
        return view
    if any(one.ownership.rank for one in model.members):
        # What is merged is rounded to the dtype on disk, which a pass in fp32 would not do.
        layout = lay_out(view, None if view.plan.is_uniform else PADDED)
        return View(model_from(layout.config, layout.tensors, dtype=torch.float32).to("cpu").eval(), FULL)
    full = model_from(model.config, weights_of(model), dtype=torch.float32)
    return View(copy_owned(model, full).to("cpu").eval(), granularity)


def provenance(folder: ModelFolder, granularity: Granularity, parameters: int) -> dict[str, Any]:
    """Return where a member comes from: anything that JSON holds."""
    return {
        "parent": str(folder.path),
        "parent_parameters": count_elements(folder.model),
        "granularity": str(granularity),
        "parameters": parameters,
        "parent_provenance": folder.provenance,
    }


@torch.no_grad()
def continue_greedily(
    view: View, tokens_BT: Tensor, num_new_tokens: int, progress: Callable[[], object] = lambda: None
) -> Tensor:
    """Return rows of tokens and what a member writes after them; `progress` is called for each new token."""
    batch_size, num_prompt = tokens_BT.shape
    cache = KVCache(
        view.model.config, batch_size=batch_size, num_positions=num_prompt + num_new_tokens, dtype=view.dtype
    )
    new_BT = tokens_BT
    for _ in range(num_new_tokens):
        logits_B1V = view.model(new_BT, view.granularity, cache, num_last=1)
        cache.commit(new_BT.shape[1])
        new_BT = logits_B1V.argmax(-1)
        tokens_BT = torch.cat([tokens_BT, new_BT], dim=1)
        progress()
    return tokens_BT


def _check_out(folder: ModelFolder, out: Path) -> None:
    check_replaceable(out, marker=FAMILY_FILE)
    source, target = folder.path.resolve(), out.resolve()
    if source == target or source.is_relative_to(target):
        raise UsageError(f"{out} holds the model itself; choose another place for the extraction")
    if (out / FAMILY_FILE).is_file() and "parent" not in read_json(out / FAMILY_FILE).get("provenance", {}):
        raise UsageError(f"{out} holds a family, not an extraction; choose another place or empty it")


def _measured(folder: ModelFolder, granularity: Granularity) -> Member | None:
    for member in folder.members:
        if folder.family.get(member.name) == granularity or member.granularity == str(granularity):
            return member
    return None
