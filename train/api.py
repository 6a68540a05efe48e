"""The commands as functions; `import nestling` gives them."""

from collections.abc import Sequence
from pathlib import Path

from models.base.errors import UsageError
from models.base.kinds import one_path, show, texts, whole_number
from models.checkpoint import extract as extraction
from models.checkpoint.compressed import BITS
from models.checkpoint.family import Member
from models.checkpoint.folder import load_model
from models.elastic.granularity import Granularity
from models.measure.consistency import evaluate_family
from train.commands.choose import Request, choose
from train.commands.common import open_for_measuring
from train.commands.console import make_console
from train.commands.evaluate import MAX_SEQUENCE_LENGTH, choose_members
from train.data.loader import take_batches
from train.data.tokens import load_rows_for
from train.recipe.recipe import load_recipe
from train.recipe.shipped import find_recipe
from train.run.fit import fit
from train.search.found import Result


def train(
    *configs: str | Path, overrides: Sequence[str] = (), out: str | Path, resume: str | Path = "auto"
) -> Path:
    """Train a family as `nestling train` does.

    Args:
        configs: recipe files, or names of recipes of the package; later ones override earlier ones.
        overrides: recipe keys, such as "trainer.max_steps=100".
        out: the run folder.
        resume: `auto`, `never`, or the folder of a state to go on from.

    Returns:
        The model folder.

    Raises:
        UsageError: if the recipe or the run folder cannot be.
        SystemExit: after a signal or `trainer.max_time`; the state is saved.
    """
    files = [find_recipe(one_path("config", config)) for config in configs]
    recipe = load_recipe(files, texts("overrides", overrides))
    resume = str(one_path("resume", resume))
    return fit(recipe, one_path("out", out), resume=resume, console=make_console())


def distill(
    teacher: str | Path,
    *configs: str | Path,
    overrides: Sequence[str] = (),
    out: str | Path,
    cache: str | Path | None = None,
    resume: str | Path = "auto",
) -> Path:
    """Train a family, or one model, that learns from a trained one, as `nestling distill` does.

    Args:
        teacher: a model folder, a GGUF file or the URL of a server.
        configs: as in `train`, like all that follow but the cache.
        overrides: recipe keys, such as "family={}" for one model.
        out: the run folder.
        cache: folder that keeps what the teacher says about the text; made if it is not there.
        resume: `auto`, `never`, or the folder of a state to go on from.

    Returns:
        The model folder.

    Raises:
        UsageError: as `train`, or if the teacher does not fit.
        NestlingError: if the teacher is damaged or does not answer, or the disk refuses.
    """
    named = teacher if isinstance(teacher, str) else one_path("teacher", teacher)
    words = [*texts("overrides", overrides), f"loss.teacher={named}"]
    if cache is not None:
        words.append(f"distill.cache={one_path('cache', cache)}")
    return train(*configs, overrides=words, out=out, resume=resume)


def evaluate(
    model: str | Path,
    data: str | Path,
    *,
    granularities: Sequence[str] = (),
    text_field: str | None = None,
    max_tokens: int = 100_000,
    dtype: str = "fp32",
) -> list[Member]:
    """Measure the members of a model folder on text as `nestling evaluate` does: loss, match, KL, alpha.

    Args:
        model: the model folder.
        data: a .txt, .jsonl or .parquet file, or "stdlib".
        granularities: members to measure besides the family, trained or not.
        text_field: field that holds the text; None is the one that the model was trained on.
        max_tokens: measure about this many tokens; 0 means all.
        dtype: dtype of the weights: auto, fp32, bf16 or int8.

    Returns:
        One entry per member, the largest last.
    """
    names = texts("granularities", granularities)
    source = data if isinstance(data, str) else str(one_path("data", data))
    max_tokens = whole_number("max_tokens", max_tokens)
    if max_tokens < 0:
        raise UsageError(f"max_tokens must be 0 (all) or more, got {max_tokens}")
    folder, _ = open_for_measuring(one_path("model", model), dtype)
    rows = load_rows_for(folder, source, longest=MAX_SEQUENCE_LENGTH, text_field=text_field, key="model")
    batches = list(take_batches(rows, max_tokens or rows.num_labels))
    return list(evaluate_family(folder.model, choose_members(folder, names), batches))


def search(
    model: str | Path,
    data: str | Path,
    budgets: Sequence[str],
    *,
    engine: str | None = None,
    text_field: str | None = None,
    max_tokens: int = 16384,
    evaluations: int = 60,
) -> Result:
    """Search for the members that lose least within budgets, as `nestling search --budget` does.

    Args:
        model: the model folder.
        data: the text on which members are compared.
        budgets: such as "params=0.5", "bytes=40MB"; all are kept. "params" alone asks for the frontier.
        engine: one that must hold the member: hf, padded, vllm, sglang, llama.cpp or mlx.
        text_field: field that holds the text; None is the one that the model was trained on.
        max_tokens: tokens to measure on.
        evaluations: members to measure, at most.

    Returns:
        What was measured; `best.member` goes to `extract` as text.
    """
    source = data if isinstance(data, str) else str(one_path("data", data))
    request = Request(
        budgets=texts("budgets", budgets),
        data=source,
        text_field=text_field,
        engine=engine,
        max_tokens=whole_number("max_tokens", max_tokens),
        evaluations=whole_number("evaluations", evaluations),
    )
    if not request.budgets:
        raise UsageError('budgets=[] names none; give one or more, as in ["params=0.5"]')
    return choose(one_path("model", model), request).result


def extract(
    model: str | Path,
    granularity: str,
    out: str | Path,
    *,
    form: str | None = None,
    dtype: str | None = None,
) -> Path:
    """Cut a member out as a stock Hugging Face folder, as `nestling extract` does; return the folder.

    Args:
        model: the model folder.
        granularity: a name of the family, or written out: "ffn=0.25,heads=0.5,layers=0:3:5".
        out: the new folder.
        form: stock, ragged or padded: how the folder holds unequal layers; None is ragged for those.
        dtype: int8 or int4 for matrices in few bits, as compressed-tensors; None keeps the dtype on disk.
    """
    if dtype not in (None, *BITS):
        raise UsageError(f"dtype={show(dtype)} is not one of {', '.join(BITS)}; choose one of them")
    if not isinstance(granularity, str):
        raise UsageError(f'granularity={show(granularity)} is no text; give one, as in "S" or "ffn=0.5"')
    folder = load_model(one_path("model", model), mapped=True)
    member = Granularity.parse(granularity, folder.family)
    return extraction.extract(folder, member, one_path("out", out), form=form, dtype=dtype)
