"""Writes the table of docs/scaling.md: what each of two processes holds and sends, counted and measured.

python docs/scaling.py           measures (two gloo processes on this machine, a few seconds) and writes
python docs/scaling.py --check   exits with 1 if docs/scaling.md says something else
"""

import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from models.elastic.config import ElasticConfig
from models.elastic.count import count_parameters, count_step_traffic
from models.elastic.granularity import FULL, Granularity
from models.elastic.model import ElasticLM
from train.data.batch import Batch
from train.objective.joint_loss import joint_loss
from train.objective.sampler import Slot, StepPlan
from train.recipe.sections import LossConfig
from train.run.fsdp import shard

PAGE = Path(__file__).with_name("scaling.md")
BEGIN, END = "<!-- table:begin -->\n", "<!-- table:end -->"
PROCESSES, ROWS, TOKENS = 2, 8, 64
MEMBERS = {"S": Granularity.parse("ffn=0.25"), "D": Granularity.parse("layers=0-1"), "XL": FULL}
PLAN = StepPlan(full=1.0, exits=("D",), slots=(Slot("S", range(2)),))
CONFIG = ElasticConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=TOKENS,
)
COLLECTIVES = {"gloo:all_reduce": "reduced", "c10d::_allgather_base_": "gathered"}
COLLECTIVES |= {"c10d::_reduce_scatter_base_": "scattered"}
TITLES = {
    "held": "weights, gradients and moments between steps",
    "reduced": "gradients added up for all",
    "gathered": "weights gathered",
    "scattered": "gradients added up in parts",
}


class Step(nn.Module):
    """One micro-batch's loss, as `JointModule.training_step` makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ElasticLM(CONFIG)
        self.model.init_weights(torch.Generator().manual_seed(0))

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss; DDP hooks this method."""
        return self.loss(batch)

    def loss(self, batch: Batch) -> Tensor:
        """Sum of the members' losses."""
        return joint_loss(self.model, MEMBERS, batch, PLAN, LossConfig(ramp_start=0), block=5).total


def measure(rank: int, folder: str) -> None:
    """Train a few steps each way and write down what the last one cost."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES)
    found = {strategy: measure_strategy(strategy, rank) for strategy in ("ddp", "fsdp")}
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


def measure_strategy(strategy: str, rank: int) -> dict[str, int]:
    """Bytes that this process holds, and of each kind of collective in a step."""
    step = Step()
    if strategy == "fsdp":
        shard(step, step.model, init_device_mesh("cpu", (PROCESSES,)), step="loss")
        run: Callable[[Batch], Tensor] = step.loss
    else:
        run = DistributedDataParallel(step, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(step.parameters(), fused=True)
    batch = make_batch(rank)
    for _ in range(2):  # DDP settles its buckets after the first step
        optimizer.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            run(batch).backward()
        optimizer.step()
    found = dict.fromkeys(COLLECTIVES.values(), 0)
    for event in seen.events():
        if event.name in COLLECTIVES:
            found[COLLECTIVES[event.name]] += 4 * largest(event.input_shapes)
    found["reduced"] -= found["scattered"]  # gloo adds up in parts by adding up for all
    return {"held": held(step, optimizer), **found}


def make_batch(rank: int) -> Batch:
    """This process's rows of a step."""
    rows_BT = torch.randint(0, CONFIG.vocab_size, (ROWS, TOKENS + 1), generator=torch.Generator())
    rows_BT = rows_BT[rank::PROCESSES]
    return Batch(rows_BT[:, :-1], rows_BT[:, 1:], 1, rank, ROWS, ROWS * TOKENS, PROCESSES)


def largest(shapes: Any) -> int:
    """Elements of the largest tensor of a collective: all that it puts together."""
    if not isinstance(shapes, list | tuple):
        return 0
    if shapes and all(isinstance(size, int) for size in shapes):
        return math.prod(shapes)
    return max((largest(inner) for inner in shapes), default=0)


def held(step: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of this process's weights, gradients and moments."""
    tensors = [*step.parameters(), *(parameter.grad for parameter in step.parameters())]
    tensors += [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


def count(strategy: str) -> dict[str, int]:
    """The same by arithmetic."""
    sharded = strategy == "fsdp"
    traffic = count_step_traffic(CONFIG, sharded=sharded, passes=[FULL, MEMBERS["S"]])
    states = 16 * count_parameters(CONFIG)
    return {"held": states // (PROCESSES if sharded else 1), **dataclasses.asdict(traffic)}


def table(measured: dict[str, dict[str, int]]) -> str:
    """Counted and measured, in Markdown."""
    lines = [
        "| bytes of one process of two | DDP, counted | DDP, measured | FSDP2, counted | FSDP2, measured |",
        "|---|---:|---:|---:|---:|",
    ]
    for key, title in TITLES.items():
        pairs = [(count(strategy)[key], measured[strategy][key]) for strategy in ("ddp", "fsdp")]
        lines.append(f"| {title} | {' | '.join(f'{number:,}' for pair in pairs for number in pair)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, then write or check the table."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (folder,), nprocs=PROCESSES)
        made = table(json.loads((Path(folder) / "found.json").read_text(encoding="utf-8")))
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    new = before + BEGIN + made + END + after
    print(made)
    if "--check" in sys.argv:
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
