"""A warm process that trains in forked children, which it kills at random moments; test_faults.py runs it.

Every child is a whole `fit` of the same run folder: start, resume, train, save, measure, write the model.
torch is imported once, and no thread is started before the last fork. At each start a child checks what
the killed one before it left.

    python -c "from tests.train.run.kills import main; main()" FOLDER NUM_KILLS NUM_DAMAGES NUM_DISKS SEED
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

import train.run.fit
from models.base.errors import NestlingError
from models.base.files import read_json
from train.recipe.recipe import Recipe, load_recipe
from train.run.metrics import read_metrics
from train.run.state import newest_state

SETTINGS = """
model.hidden_size=16 model.intermediate_size=32 model.num_hidden_layers=2 model.num_attention_heads=2
model.num_key_value_heads=1 family.S=null family.M=null family.L=null family.D=layers=0 data.vocab_size=270
data.sequence_length=16 data.valid_fraction=0.3 loss.ramp_start=1 loss.ramp_steps=2 optim.warmup_steps=2
trainer.max_steps=6 trainer.batch_size=4 trainer.accelerator=cpu trainer.val_check_interval=3
trainer.limit_val_batches=1 trainer.log_every_n_steps=1 trainer.checkpoint_every=1 tracking.wandb=disabled
tracking.tensorboard=false dtype=fp32
"""
REFUSED = 3
"""Exit code of a child that the disk refused."""
CLOCKS = {"seconds", "tokens_per_second", "mfu", "data_wait"}


def make_recipe(folder: Path, *overrides: str) -> Recipe:
    """Six steps of a tiny model, a state after each."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("\n<|endoftext|>\n".join(f"line {n} of a text about nothing" for n in range(200)))
    places = [f"data.source={text}", f"data.cache_dir={folder / 'cache'}"]
    return load_recipe(overrides=[*SETTINGS.split(), *places, *overrides])


def left_over(run: Path) -> list[str]:
    """Hidden files, at any depth."""
    # Not `rglob`, which fails where a folder is renamed while it looks.
    found = (Path(folder, name) for folder, *names in os.walk(run) for name in itertools.chain(*names))
    return [str(path.relative_to(run)) for path in found if path.name.startswith(".")]


def differences(ours: Path, theirs: Path) -> Iterator[str]:
    """What two finished runs do not share, bit for bit; their files may differ in clocks alone."""
    for name in ("steps/00000005", "steps/00000006", "model"):
        for file in sorted((theirs / name).glob("*.safetensors")):
            a, b = load_file(ours / name / file.name), load_file(file)
            if a.keys() != b.keys() or not all(torch.equal(a[key], b[key]) for key in b):
                yield f"{name}/{file.name}"
    states = [read_json(run / "steps/00000006/state.json") for run in (ours, theirs)]
    if states[0] != states[1]:
        yield f"state.json: {states}"
    lines = [
        [{key: value for key, value in line.items() if key not in CLOCKS} for line in read_metrics(path)]
        for path in (ours / "metrics.jsonl", theirs / "metrics.jsonl")
    ]
    if lines[0] != lines[1]:
        yield "metrics.jsonl"
    names = [sorted(str(path.relative_to(run)) for path in run.rglob("*")) for run in (ours, theirs)]
    if names[0] != names[1]:
        yield f"files: {set(names[0]) ^ set(names[1])}"


def start(recipe: Recipe, out: Path) -> int:
    """Fork a child that trains; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    begin = train.run.fit.train

    def tidy_then_train(*arguments: Any) -> int | None:
        assert not left_over(out), left_over(out)
        return begin(*arguments)

    train.run.fit.train = tidy_then_train  # type: ignore[assignment]
    code = 1
    try:
        train.run.fit.fit(recipe, out, console=Console(quiet=True))
        code = 0
    except (NestlingError, OSError) as error:
        print(error, file=sys.stderr)
        code = REFUSED
    except BaseException:  # noqa: BLE001 - whatever it was, the child must not go on as its parent
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int, seconds: float, unless: Callable[[], object] = bool) -> bool:
    """Whether the child ends by itself in time, before `unless`; if so, it must have succeeded."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0, f"a child failed: {status}"
            return True
        if unless():
            return False
        time.sleep(0.0005)
    return False


def run_to_the_end(recipe: Recipe, out: Path) -> float:
    """Train undisturbed; returns the seconds."""
    began = time.monotonic()
    assert ended(start(recipe, out), 300)
    return time.monotonic() - began


def kill_at_random(recipe: Recipe, folder: Path, num_kills: int, rng: random.Random) -> dict[str, Any]:
    """Runs that are killed again and again until they finish; each must equal the one never killed."""
    whole = folder / "whole"
    run_to_the_end(recipe, folder / "first")  # fills the cache of tokens
    seconds = run_to_the_end(recipe, whole)
    counts = {"kills": 0, "amid_writing": 0, "before_any_state": 0, "finished_and_equal": 0}
    while counts["kills"] < num_kills:
        out = folder / f"killed-{counts['finished_and_equal']}"
        while counts["kills"] < num_kills:
            began, anew = time.monotonic(), not out.exists()
            pid = start(recipe, out)
            writing = partial(left_over, out / "steps")  # every other kill waits for a state half written
            if ended(pid, rng.uniform(0, seconds)) or (counts["kills"] % 2 and ended(pid, 60, writing)):
                if anew:  # the machine may be busier or quieter than before
                    seconds = time.monotonic() - began
                break
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            state, damaged = newest_state(out / "steps")
            assert not damaged, damaged
            counts["kills"] += 1
            counts["amid_writing"] += bool(left_over(out))
            counts["before_any_state"] += state is None
        else:
            run_to_the_end(recipe, out)
        found = list(differences(out, whole))
        assert not found, found
        counts["finished_and_equal"] += 1
        shutil.rmtree(out)
    return counts


def damage(recipe: Recipe, folder: Path, num_damages: int, rng: random.Random) -> dict[str, int]:
    """A bit flipped or the end cut off, of every file of the newest state in turn: the one before serves."""
    whole, out, counts = folder / "whole", folder / "damaged", {"damaged": 0, "finished_and_equal": 0}
    changes: list[Callable[[bytes], bytes]] = [
        lambda content: _flip(content, rng.randrange(len(content)), 1 << rng.randrange(8)),
        lambda content: content[: rng.randrange(len(content))],
    ]
    names = sorted(path.name for path in (whole / "steps/00000006").iterdir())
    for name, change in itertools.islice(itertools.cycle(itertools.product(names, changes)), num_damages):
        shutil.copytree(whole, out)
        shutil.rmtree(out / "model")
        victim = out / "steps/00000006" / name
        victim.write_bytes(change(victim.read_bytes()))
        counts["damaged"] += newest_state(out / "steps")[1] != []
        run_to_the_end(recipe, out)
        found = list(differences(out, whole))
        assert not found, (name, found)
        counts["finished_and_equal"] += 1
        shutil.rmtree(out)
    return counts


def fill_disk(recipe: Recipe, folder: Path, num_disks: int, rng: random.Random) -> dict[str, int] | None:
    """Disks of random size that fill up, then grow; None if this user may not mount any."""
    whole, disk, counts = folder / "whole", folder / "disk", {"full": 0, "finished_and_equal": 0}
    size = sum(path.stat().st_size for path in whole.rglob("*"))
    disk.mkdir()
    for _ in range(num_disks):
        if not _mount(f"size={rng.randrange(4096, 2 * size)}", disk):
            return None
        try:
            _, status = os.waitpid(start(recipe, disk / "run"), 0)
            code = os.waitstatus_to_exitcode(status)
            assert code in (0, REFUSED), code
            assert not newest_state(disk / "run/steps")[1]
            counts["full"] += code == REFUSED
            assert _mount("remount,size=100m", disk)
            run_to_the_end(recipe, disk / "run")
            found = list(differences(disk / "run", whole))
            assert not found, found
            counts["finished_and_equal"] += 1
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return counts


def _mount(options: str, place: Path) -> bool:
    words = ["mount", "-t", "tmpfs", "-o", options, "none", str(place)]
    return subprocess.run(words, check=False, capture_output=True).returncode == 0


def _flip(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]


def main() -> None:
    """Print what happened as JSON; raise if a run did not come back as it should."""
    folder, num_kills, num_damages, num_disks, seed = Path(sys.argv[1]), *map(int, sys.argv[2:6])
    torch.set_num_threads(1)
    rng = random.Random(seed)
    recipe = make_recipe(folder)
    results = {
        "killed": kill_at_random(recipe, folder, num_kills, rng),
        "damaged": damage(recipe, folder, num_damages, rng),
        "filled": fill_disk(recipe, folder, num_disks, rng),
    }
    print(json.dumps(results))
