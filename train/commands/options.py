"""Flags and arguments that several commands take, declared once; a flag of one command stands in its file."""

from pathlib import Path
from typing import Annotated, Any

import typer

from train.recipe.shipped import find_recipe

SAMPLING, DRAFTING = "Sampling", "Speculative decoding"
SAFETY, LIMITS = "Who may ask", "Limits"


def find_recipes(paths: list[Path] | None) -> list[Path] | None:
    """Take a recipe's name for the recipe of that name that comes with the package."""
    return paths and [find_recipe(path) for path in paths]


def draft_option(default: str, *, lookup: bool = False, several: bool = False) -> Any:
    """Make `--draft` for a command with this default."""
    copies = ", copies of earlier text (lookup)" if lookup else ""
    return typer.Option(
        metavar=f"G[@q4_0|int4|int8|bf16]|auto|{'lookup|' if lookup else ''}none|DIR",
        rich_help_panel=DRAFTING,
        help=f"Draft model: a member of the family, the best one on this machine (auto){copies}, none, or "
        f"another model folder{'; repeatable' if several else ''}. Default: {default}.",
    )


def gamma_option(default: str) -> Any:
    """Make `--gamma` for a command with this default."""
    return typer.Option(
        metavar="N|auto",
        rich_help_panel=DRAFTING,
        help="Number of tokens to draft in each round; auto adapts it to what it measures, and is hardly "
        f"slower than plain decoding whatever drafts. Default: {default}.",
    )


def token_file_option(panel: str) -> Any:
    """Make `--token-file` in this panel of the help."""
    return typer.Option(
        metavar="FILE",
        rich_help_panel=panel,
        help="File with the token of the server, which clients send as their API key.",
    )


def temperature_option(default: str = "") -> Any:
    """Make `--temperature`; a command that takes several tells the default."""
    several = f"; repeatable. Default: {default}" if default else ""
    return typer.Option(rich_help_panel=SAMPLING, help=f"Sampling temperature; 0 decodes greedily{several}.")


# ---------------------------------------------------------------- the model


ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", help="Model folder (the model/ of a run, or any stock one) or GGUF file."
    ),
]
DTYPES = "auto|file|fp32|bf16|int8"
DtypeOption = Annotated[
    str,
    typer.Option(
        metavar=DTYPES,
        help="Data type of the weights; file runs them as they are stored, int8 quantizes the model. auto "
        "decodes a quantized GGUF file as it is stored, and else takes the faster of fp32 and bf16.",
    ),
]

# ---------------------------------------------------------------- text


PromptsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="File with many texts to continue: one JSON object a line, with a field prompt, turns or text.",
    ),
]
NumPromptsOption = Annotated[int, typer.Option(help="Maximum number of prompts.")]
MaxNewTokensOption = Annotated[int, typer.Option(help="Maximum number of tokens to generate for each text.")]
DataOption = Annotated[
    str,
    typer.Option(metavar="FILE", help="Text to measure on: a .txt, .jsonl or .parquet file, or stdlib."),
]
TextFieldOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Field of --data's rows that holds the text. Default: the one that the model was trained on.",
    ),
]

# ---------------------------------------------------------------- runs and results


SeedOption = Annotated[int, typer.Option(help="Random seed.")]
RttOption = Annotated[float, typer.Option(metavar="MS", help="Milliseconds of a round trip.")]
JsonOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="PATH",
        help="File to write the results to, as JSON; - prints them last.",
    ),
]
ConfigOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--config",
        metavar="FILE",
        callback=find_recipes,
        help="A recipe, or the name of one that comes with the package; later ones override earlier ones.",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Run folder. Default: checkpoints/ and the recipe's name."),
]
ResumeOption = Annotated[
    str,
    typer.Option(
        "--resume",
        metavar="auto|never|PATH",
        help="State to go on from: the newest, none, or that of a folder.",
    ),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would run, and make nothing.")]

# ---------------------------------------------------------------- servers


HostOption = Annotated[
    str, typer.Option(help="Address to listen at; any but loopback needs --cert, --key and --token-file.")
]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes one that is free.")]
CertOption = Annotated[
    Path | None, typer.Option(metavar="PEM", rich_help_panel=SAFETY, help="Certificate for TLS.")
]
KeyOption = Annotated[
    Path | None, typer.Option(metavar="PEM", rich_help_panel=SAFETY, help="Private key for TLS.")
]
ServerTokenOption = Annotated[Path | None, token_file_option(SAFETY)]
InsecureOption = Annotated[
    bool,
    typer.Option(
        "--insecure", rich_help_panel=SAFETY, help="Listen beyond loopback without TLS or token all the same."
    ),
]
KvMemoryOption = Annotated[
    int | None,
    typer.Option(
        metavar="MIB",
        rich_help_panel=LIMITS,
        help="Memory for keys and values in MiB. Default: a quarter of what is free.",
    ),
]
