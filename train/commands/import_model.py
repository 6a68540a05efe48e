"""`nestling import`: a GGUF file or a Hugging Face folder becomes a model folder, proved equal."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from models.base.errors import NestlingError, UsageError
from models.base.outputs import check_apart
from models.base.progress import Bar, progress_bar
from train.commands.common import check_json, check_made_by, write_results
from train.commands.console import make_console
from train.commands.options import JsonOption

if TYPE_CHECKING:
    from models.checkpoint.folder import ModelFolder

DTYPES = ("fp32", "bf16", "fp16")


def import_model(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A GGUF file, or a Hugging Face folder.")],
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The new model folder.")],
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="fp32|bf16|fp16",
            help="Dtype of the weights on disk. By default what holds the source exactly: fp32 for a GGUF "
            "file, the folder's own for a folder.",
        ),
    ] = None,
    json: JsonOption = None,
) -> None:
    """Open a pretrained model and write it as a model folder, which every other command takes."""
    check_json(json, SOURCE=source, out=out)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}; choose one of them")
    from models.base.dtypes import DTYPES as TORCH
    from models.checkpoint.folder import load_model
    from models.checkpoint.weights import dtype_name

    console = make_console()
    _check_places(source, out)
    with progress_bar(f"reading {source}", console=make_console(stderr=True)) as bar:
        folder = load_model(source, dtype=None if dtype is None else TORCH[dtype])
        results = {"source": str(source), "out": str(out), **write_and_prove(folder, out, bar)}
    console.print(f"{out}: {_describe(results)}", markup=False, highlight=False)
    console.print(
        f"equal in stock transformers: {results['num_tokens']} greedy tokens identical, "
        f"logits differ by {results['difference']:.1g} of the largest"
    )
    write_results(json, results, dtypes={"weights": dtype_name(folder.model)})


def write_and_prove(folder: "ModelFolder", out: Path, bar: Bar) -> dict[str, Any]:
    """Write a model folder, open it in stock transformers, and compare.

    Raises:
        UsageError: if `out` cannot be replaced.
        NestlingError: if the disk refuses, or transformers computes or tokenizes otherwise.
    """
    from models.checkpoint.extract import verify_extraction
    from models.checkpoint.folder import save_model
    from models.checkpoint.weights import count_elements
    from models.elastic.granularity import FULL

    config = folder.model.config
    bar.show(f"writing {out}", 0, None)
    save_model(
        out,
        folder.model,
        tokenizer=folder.tokenizer,
        family=folder.family,
        members=folder.members,
        provenance={**folder.provenance, "imported_from": str(folder.path)},
        chat_template=folder.chat_template,
        like=folder.path,
    )
    num_new_tokens = min(16, config.max_position_embeddings // 2)
    bar.show("comparing with transformers", 0, num_new_tokens)
    parity = verify_extraction(folder, FULL, out, num_new_tokens=num_new_tokens, progress=bar.advance)
    if not parity.holds:
        raise NestlingError(
            f"{out} computes otherwise in transformers (greedy ids equal: {parity.ids_equal}, logits "
            f"differ by {parity.difference:.1e} of the largest); do not use it, and please report this"
        )
    _check_tokenizer(folder, out)
    return {
        "parameters": count_elements(folder.model),
        "layers": config.num_hidden_layers,
        "quantizations": folder.provenance.get("quantizations", []),
        "tokenizer": folder.tokenizer is not None,
        "chat_template": folder.chat_template is not None,
        "num_tokens": parity.num_tokens,
        "difference": parity.difference,
    }


def _check_places(source: Path, out: Path) -> None:
    if not source.exists():
        raise UsageError(f"SOURCE {source} does not exist; give a GGUF file or a Hugging Face folder")
    check_apart({"--out": out}, {"SOURCE": source})
    check_made_by("import", "imported_from", out)


def _check_tokenizer(folder: "ModelFolder", out: Path) -> None:
    """Raise NestlingError unless transformers cuts a text of many kinds as we do."""
    if folder.tokenizer is None:
        return
    from models.checkpoint.huggingface import load_stock_tokenizer
    from train.data.tokenizer import MIXED_TEXT

    theirs: list[int] = load_stock_tokenizer(out)(MIXED_TEXT, verbose=False)["input_ids"]
    ours: list[int] = folder.tokenizer.encode(MIXED_TEXT).ids
    if ours != theirs:
        raise NestlingError(
            f"{out} tokenizes otherwise in transformers; do not use it, and please report this"
        )


def _describe(results: dict[str, Any]) -> str:
    stored = ", ".join(results["quantizations"])
    parts = [
        f"{results['parameters']:,} parameters in {results['layers']} layers",
        *([f"dequantized from {stored}"] if stored else []),
        "with a tokenizer" if results["tokenizer"] else "without a tokenizer",
        *(["a chat template"] if results["chat_template"] else []),
    ]
    return ", ".join(parts)
