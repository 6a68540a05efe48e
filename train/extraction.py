"""Cut a member out and prove it: equal, in stock transformers, to the member in place."""

from pathlib import Path

from rich.console import Console

from models.checkpoint import ModelFolder
from models.count import count_parameters
from models.errors import NestlingError
from models.extract import Parity, extract, verify_extraction
from models.granularity import Granularity

NUM_NEW_TOKENS = 32


def extract_and_prove(folder: ModelFolder, granularity: Granularity, out: Path, console: Console) -> Parity:
    """Write the member to `out`, open it in transformers, compare, and say how it went.

    Raises:
        UsageError: if the granularity does not fit, its layers differ, or `out` cannot be replaced.
        NestlingError: if the disk refuses, or the two differ, which is a bug of ours.
    """
    extract(folder, granularity, out)
    config = folder.model.config
    num_new_tokens = min(NUM_NEW_TOKENS, config.max_position_embeddings // 2)
    with console.status("comparing it with stock transformers"):
        parity = verify_extraction(folder, granularity, out, num_new_tokens=num_new_tokens)
    if not parity.holds:
        raise NestlingError(
            f"{out} differs from the member in place (greedy ids equal: {parity.ids_equal}, logits "
            f"differ by {parity.difference:.1e} of the largest); do not use it, and please report this"
        )
    parameters, full = count_parameters(config, granularity), count_parameters(config)
    console.print(f"{out}: {granularity}, {parameters:,} of {full:,} parameters", markup=False)
    console.print(
        f"equal in stock transformers: {parity.num_tokens} greedy tokens identical, "
        f"logits differ by {parity.difference:.1g} of the largest"
    )
    return parity
