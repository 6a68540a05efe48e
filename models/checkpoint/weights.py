"""The weights of an elastic model as named tensors: read, check, adopt.

Names are Hugging Face's. A tied vocabulary head is the embedding matrix and is stored once.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.base.errors import NestlingError
from models.base.file_hashes import known_hash
from models.base.files import hash_files, read_json
from models.base.mapped import Regions, file_regions, forget_pages
from models.base.paths import utf8_path
from models.elastic.config import ElasticConfig
from models.elastic.layers import Rotary
from models.elastic.model import ElasticLM
from models.elastic.ownership import is_owned
from models.kernels.blocks import BlockTensor

WEIGHTS = "model.safetensors"
OWNED_WEIGHTS = "owned.safetensors"
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def weights_of(model: ElasticLM) -> dict[str, Tensor]:
    """Return every tensor of the full model once, detached, sharing its memory."""
    return {name: tensor.detach() for name, tensor in model.named_parameters() if not is_owned(name)}


def dtype_name(model: ElasticLM) -> str:
    """Return the dtype of the weights, as a configuration spells it."""
    return str(model.dtype).removeprefix("torch.")


def count_elements(model: ElasticLM) -> int:
    """Return how many numbers the full model's tensors hold."""
    return sum(tensor.numel() for tensor in weights_of(model).values())


def model_from(
    config: ElasticConfig,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    mapped: bool = False,
    copy: bool = True,
) -> ElasticLM:
    """Return an elastic model that holds `tensors`.

    Args:
        config: shape of the model.
        tensors: weights by Hugging Face name; a tied head may be there if it equals the embedding.
        dtype: dtype of the model; None keeps the embedding's, or each tensor's own where some are in blocks.
        mapped: take tensors of this dtype as they are, read where files are mapped; nobody may change them.
        copy: copy all others; False where they are nobody else's.

    Raises:
        NestlingError: naming tensors that are missing, unknown, of another shape or not numbers.
    """
    with torch.device("meta"):  # a model without memory: its initial weights would be thrown away
        model = ElasticLM(config)
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    tensors = check_tensors(expected, tensors, mapped=mapped)
    if dtype is None and any(isinstance(tensor, BlockTensor) for tensor in tensors.values()):
        copies = {name: tensor.detach() for name, tensor in tensors.items()}
    else:
        dtype = dtype or tensors[EMBEDDING].dtype
        copies = {
            name: tensor.detach().to(dtype, copy=copy and not mapped).contiguous()
            for name, tensor in tensors.items()
        }
    model.is_mapped = mapped
    model.load_state_dict(copies, assign=True, strict=False)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.rotary = Rotary(config).to(copies[EMBEDDING].device)  # its tables are computed, not stored
    return model


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read `model.safetensors`, or the shards that its index lists.

    Raises:
        NestlingError: naming the file that is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in _files(folder):
        tensors |= read_tensors(file)
    return tensors


def hash_weights(folder: Path) -> str:
    """Return the SHA-256 of `model.safetensors`, or of all shards, one after the other; or of a GGUF file.

    Raises:
        NestlingError: naming the file that is missing.
    """
    return hash_files(*_files(folder))


def hash_family(folder: Path, *, cached: bool = False) -> str:
    """Return the SHA-256 of all weights, of those that members own, too.

    Where a stale one does no harm it may be `cached`: see `known_hash`.

    Raises:
        NestlingError: naming the file that is missing.
    """
    own = folder / OWNED_WEIGHTS
    files = (*_files(folder), *([own] if own.is_file() else []))
    return known_hash(*files) if cached else hash_files(*files)


def _files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        if pickles:
            raise NestlingError(
                f"{folder} keeps its weights as a pickle ({pickles[0]}), which can run code when "
                f"opened; save it again with transformers (save_pretrained writes {WEIGHTS})"
            )
        raise NestlingError(f"{folder} has no {WEIGHTS}; restore it, or write the folder again")
    return [folder / shard for shard in _shards(folder / INDEX)]


def _shards(index: Path) -> list[str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise NestlingError(f"{index} has no weight_map of names to files; restore it")
    shards = sorted(set(places.values()))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise NestlingError(f"{index} points outside its folder: {outside[0]!r}; restore it")
    return shards


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        NestlingError: if it is missing or damaged.
    """
    try:
        with utf8_path(path) as spelled:
            return load_file(spelled)
    except FileNotFoundError:
        raise NestlingError(f"{path} is missing; restore it, or write the folder again") from None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise NestlingError(f"{path} is damaged ({error}); restore it, or write the folder again") from None


def check_tensors(
    expected: Mapping[str, torch.Size], tensors: Mapping[str, Tensor], *, mapped: bool = False
) -> dict[str, Tensor]:
    """Return the tensors that a model of the expected shapes takes, and nothing else.

    Those of mapped files leave no memory behind.

    Raises:
        NestlingError: naming tensors that are missing, unknown, of another shape or not numbers.
    """
    # Old releases of transformers stored the rotary frequencies, which the configuration gives.
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if HEAD not in expected and HEAD in found:
        head, embedding = found.pop(HEAD), found.get(EMBEDDING)
        if embedding is not None and not torch.equal(head, embedding):
            raise NestlingError(
                f"{HEAD} differs from {EMBEDDING} though tie_word_embeddings is true; set it to false"
            )
    regions = file_regions() if mapped else None
    problems = [
        *_named("missing", [name for name in expected if name not in found]),
        *_named("not of this model", [name for name in found if name not in expected]),
        *_named(
            "of another shape",
            [
                f"{name} {list(found[name].shape)} instead of {list(shape)}"
                for name, shape in expected.items()
                if name in found and found[name].shape != shape
            ],
        ),
        *_named(
            "not floating point",
            [f"{name} ({tensor.dtype})" for name, tensor in found.items() if not tensor.is_floating_point()],
        ),
        *_named(
            "not finite (nan or infinity)",
            [name for name in expected if _is_sick(found.get(name), regions)],
        ),
    ]
    if problems:
        raise NestlingError(
            f"weights do not fit the configuration: {'; '.join(problems)}; "
            "use the config.json that was saved with them"
        )
    return found


def _is_sick(tensor: Tensor | None, regions: Regions | None = None) -> bool:
    """Return True if a tensor holds a NaN or an infinity; give its pages back where regions are known."""
    if tensor is None or not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return False
    found = tensor.blocks_OBY if isinstance(tensor, BlockTensor) else tensor
    if isinstance(tensor, BlockTensor):  # its scales tell
        tensor = tensor.scales
    tensor = tensor.detach().float() if tensor.element_size() < 2 else tensor.detach()
    # A sum is read faster than the extremes; where it is finite, so is all of it. It may overflow by itself.
    is_finite = math.isfinite(tensor.sum()) or all(map(math.isfinite, tensor.aminmax()))
    if regions is not None:
        forget_pages(found, regions)
    return not is_finite


def _named(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    return [f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"]
