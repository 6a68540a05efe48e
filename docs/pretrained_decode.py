"""Measures a draft in place on chat prompts, greedily: tau, and the time beside plain decoding.

python docs/pretrained_decode.py MODEL --tokens N --prompts FILE [--answers FILE --vocabulary 8192] --gamma 3

MODEL is the folder that a run with model.train=owned wrote, N the tokens that its draft learned from. Prompts
are the first turns of FILE, by the model's own chat template. A vocabulary above 0 trims the draft's head to
the tokens that are most frequent in the conversations of --answers, which the draft was trained on. Plain and
drafted decoding alternate, prompt by prompt, in one process; times are the clock's, or with --processor-time
those of the processor, which other programs disturb less. Results are added to
docs/results/pretrained/decoding.json; `python docs/pretrained.py` writes the page.
"""

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from models.decode.decoder import Decoder, open_decoder
from models.decode.engine.draft import Draft
from models.decode.engine.engine import stream
from models.decode.engine.report import Report
from models.decode.tune.draft_plan import DraftSpec
from models.decode.tune.resolve import nested_drafting
from models.elastic.granularity import Granularity
from models.machine.provenance import make_card
from models.packed.quantize import split_precision

RESULTS = Path(__file__).parent / "results" / "pretrained" / "decoding.json"


def main() -> None:
    """Measure one draft with each gamma."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--draft", default="D")
    parser.add_argument("--gamma", type=int, action="append", required=True)
    parser.add_argument("--vocabulary", type=int, default=0)
    parser.add_argument("--num-prompts", type=int, default=80)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--processor-time", action="store_true")
    given = parser.parse_args()
    decoder = open_decoder(given.model, draft="none", dtype=given.dtype)
    lines = given.prompts.read_text().splitlines()[: given.num_prompts]
    config = decoder.folder.model.config
    prompts = [
        list(decoder.encode_chat([{"role": "user", "content": json.loads(line)["turns"][0]}]))
        for line in lines
    ]
    few = frequent(decoder, given.answers, given.vocabulary) if given.vocabulary else None
    draft = nested_drafting(decoder.folder, DraftSpec.parse(given.draft, few), max(given.gamma)).draft
    member = Granularity.parse(split_precision(given.draft)[0], decoder.folder.family)
    layers = len(member.resolve(config).layers)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    clock = time.process_time if given.processor_time else time.perf_counter
    for point in measure(decoder, draft, prompts, given.gamma, given.new_tokens, clock):
        point |= {"tokens": given.tokens, "layers": layers, "draft": given.draft, "dtype": given.dtype}
        point |= {"vocabulary": given.vocabulary, "threads": torch.get_num_threads()}
        card = make_card(dtypes={"model": given.dtype})
        results.append({**point, "card": {**card, "command": without_paths(card["command"])}})
        print(json.dumps(point), flush=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def without_paths(command: str) -> str:
    """Return a command that names files, and not where they lie on somebody's machine.

    >>> without_paths("pretrained_decode.py /home/me/draft --prompts /data/mt_bench.jsonl")
    'python docs/pretrained_decode.py draft --prompts mt_bench.jsonl'
    """
    return "python docs/" + re.sub(r"(?:/[\w.-]+)+/", "", command)


def frequent(decoder: Decoder, answers: Path, count: int) -> tuple[int, ...]:
    """Return the tokens that are most frequent in conversations, and those that end a text."""
    counts: Counter[int] = Counter(decoder.folder.model.config.eos_token_ids)
    for line in answers.read_text().splitlines():
        for message in json.loads(line)["messages"]:
            counts.update(decoder.tokenizer.encode(message["content"]).ids)
    kept = [token for token, _ in counts.most_common(count)]
    rest = (token for token in range(decoder.folder.model.config.vocab_size) if token not in counts)
    return tuple(sorted([*kept, *(next(rest) for _ in range(count - len(kept)))]))


def measure(
    decoder: Decoder,
    draft: Draft,
    prompts: Sequence[list[int]],
    gammas: Sequence[int],
    num_tokens: int,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """Return tau, alpha, and the time of plain decoding over that of drafted, for each gamma."""
    target = decoder.folder.model

    def run(prompt: list[int], gamma: int) -> tuple[Report, list[int], float]:
        start = clock()
        told = stream(target, prompt, draft=draft if gamma else None, gamma=gamma, max_new_tokens=num_tokens)
        ids = [token.id for token in told]
        return told.report, ids, clock() - start

    for gamma in (0, *gammas):  # weights are packed in the first pass
        run(prompts[0][:8], gamma)
    rows = [{gamma: run(prompt, gamma) for gamma in (0, *gammas)} for prompt in prompts]
    return [_point(rows, gamma) for gamma in gammas]


def _point(rows: Sequence[dict[int, tuple[Report, list[int], float]]], gamma: int) -> dict[str, Any]:
    reports = [row[gamma][0] for row in rows]
    plain, drafted = (sum(row[one][2] for row in rows) for one in (0, gamma))
    written = sum(one.num_tokens for one in reports)
    same = sum(row[0][1] == row[gamma][1] for row in rows)
    return {
        "gamma": gamma,
        "prompts": len(rows),
        "tau": (written - len(rows)) / sum(one.rounds for one in reports),
        "alpha": sum(one.overlap for one in reports) / sum(one.reached for one in reports),
        "plain_tokens_per_second": sum(row[0][0].num_tokens for row in rows) / plain,
        "tokens_per_second": written / drafted,
        "speedup": median(row[0][2] / row[gamma][2] for row in rows),
        "texts_equal": same,
    }


if __name__ == "__main__":
    main()
