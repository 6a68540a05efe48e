"""The command line: `nestling <command>`; `nestling --help` lists the commands.

Each command lives in train/commands/ and imports what it needs when it runs, so that `--help` is instant.
Whatever a user gets wrong ends in one line on stderr and an exit code; so does a defect of ours, whose
traceback goes to a file:

    0 done    1 failed    2 wrong usage    130/143 stopped
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import typer

from models.base.errors import NestlingError, UsageError, is_panic
from train.commands.bench import bench
from train.commands.demo import demo
from train.commands.distill import distill
from train.commands.evaluate import evaluate
from train.commands.extract import extract
from train.commands.failure import (
    Terminated,
    describe_defect,
    describe_environment,
    fail,
    replace_what_cannot_be_encoded,
    unwinding_when_terminated,
)
from train.commands.generate import generate
from train.commands.import_model import import_model
from train.commands.machine import machine
from train.commands.order import order
from train.commands.plan import plan
from train.commands.relay import relay
from train.commands.report import report
from train.commands.search import search
from train.commands.serve import serve
from train.commands.stage import stage
from train.commands.train import PASS_ON, train
from train.commands.train_help import TrainCommand
from train.commands.verify import verify

INTERRUPTED, TERMINATED = 130, 143

app = typer.Typer(
    help="One training run, a whole family of nested language models, and a draft for free.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: Mapping[str, tuple[Callable[..., Any], str]] = {
    "train": (train, "--config demo trainer.max_steps=2000 --out checkpoints/mine"),
    "distill": (distill, "checkpoints/mine/model --config tiny family={} --out checkpoints/student"),
    "import": (import_model, "model-Q4_K_M.gguf --out checkpoints/imported"),
    "order": (order, "checkpoints/imported --data text.jsonl --out checkpoints/ordered"),
    "extract": (extract, "checkpoints/mine/model --granularity ffn=0.5 --out checkpoints/half"),
    "search": (search, "checkpoints/mine/model --draft --data stdlib"),
    "generate": (generate, 'checkpoints/mine/model --draft S --prompt "Once upon a time"'),
    "serve": (serve, "checkpoints/mine/model --draft auto --port 8000"),
    "stage": (stage, "checkpoints/mine/model --layers 0-3 --port 8100"),
    "relay": (relay, "--listen 8001 --to 127.0.0.1:8000 --rtt 50"),
    "plan": (plan, "split --rtt 20 --alpha 0.9 --target-ms 40 --draft-ms 4"),
    "evaluate": (evaluate, "checkpoints/mine/model --data stdlib --granularity ffn=0.5,layers=0-2"),
    "verify": (verify, "checkpoints/mine/model --draft S --verifier block"),
    "bench": (bench, "checkpoints/mine/model --data stdlib, or nestling bench --train --config demo"),
    "report": (report, "checkpoints/mine"),
    "machine": (machine, "--refresh"),
    "demo": (demo, "--out checkpoints/demo"),
}
"""The commands in the order of `--help`, each with an example of its arguments."""
TRAINING = ("train", "distill")
PATHS = ("--json", "--out", "--plot", "--prompts", "--config", "--data", "--resume", "--latency-table")
TAKE_KEYS = (*TRAINING, "bench", "demo")

for name, (command, example) in COMMANDS.items():
    app.command(
        name,
        cls=TrainCommand if name in TRAINING else None,
        context_settings=PASS_ON if name in TAKE_KEYS else None,
        epilog=f"Example: nestling {name} {example}",
    )(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    replace_what_cannot_be_encoded()
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    run = typer.main.get_command(app)
    try:
        _refuse_blank(arguments)
        with unwinding_when_terminated():
            code = run(arguments, prog_name="nestling", standalone_mode=False)
    except NestlingError as error:
        return fail(str(error), error.exit_code)
    except typer.TyperException as error:
        return fail(_wrong_flag(error, arguments), error.exit_code)
    except Terminated:
        code = TERMINATED
    except BaseException as error:  # the outermost handler: no user meets a traceback
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        return fail(describe_environment(error) or describe_defect(error, arguments), 1)
    if code in (INTERRUPTED, TERMINATED):
        print("nestling: stopped", file=sys.stderr)
    return code or 0


def _refuse_blank(arguments: Sequence[str]) -> None:
    """Raise UsageError for a blank path, which would mean the current folder."""
    for flag, value in zip(arguments, [*arguments[1:], " "], strict=True):
        name, equals, text = flag.partition("=")
        if name in PATHS and not (text if equals else value):
            raise UsageError(f"{name} '' is blank; give a path, or leave {name} out")


def _wrong_flag(error: typer.TyperException, arguments: Sequence[str]) -> str:
    """Return Typer's message in one line, with the value, which it leaves out, and where to look."""
    message = " ".join(error.format_message().split())
    flags = error.param.opts if isinstance(error, typer.BadParameter) and error.param else []
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        name, equals, text = flag.partition("=")
        if name in flags and (text if equals else value) not in message:
            message += f", got {(text if equals else value)!r}"
    command = next((word for word in arguments if word in COMMANDS), None)
    return f"{message} (see {'nestling' if command is None else f'nestling {command}'} --help)"
