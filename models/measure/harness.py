"""A member in place as a model of lm-evaluation-harness, so that its tasks score it without an extraction.

Scores are those of the harness's own `hf` loader on the extraction: the same tokens around a text, the same
windows, the same stop strings. The harness is an extra and imported only when it is used:
https://github.com/EleutherAI/lm-evaluation-harness
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.base.errors import NestlingError, UsageError
from models.decode.engine.engine import stream
from models.elastic.view import View

BATCH_TOKENS = 8192
MAX_NEW_TOKENS = 256
"""Tokens that a task may have written where it does not say."""
MISSING = "--tasks needs lm-evaluation-harness; install it with pip install 'nestling[eval]'"


def is_installed() -> bool:
    """Return whether the harness is there."""
    return find_spec("lm_eval") is not None


def find_tasks(texts: Sequence[str]) -> tuple[list[str], Any]:
    """Return names of tasks, and the harness's manager that knows them.

    Args:
        texts: names of the harness's own tasks, or YAML files of one's own.

    Raises:
        NestlingError: if the harness is not installed.
        UsageError: if a task is not there.
    """
    names, folders = [], []
    for text in texts:
        if not text.endswith((".yaml", ".yml")):
            names.append(text)
            continue
        path = Path(text)
        if not path.is_file():
            raise UsageError(f"--tasks {text} does not exist; give a task's YAML file, or a name")
        named = re.search(r"^task:\s*(\S+)", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        if named is None:
            raise UsageError(f"--tasks {text} is no task: it needs a line such as task: my_task")
        names.append(named[1].strip("'\""))
        folders.append(path.resolve().parent)
    if not is_installed():
        raise NestlingError(MISSING)
    from lm_eval.tasks import TaskManager

    only_files = all(text.endswith((".yaml", ".yml")) for text in texts)
    with _naming(texts):
        manager = TaskManager(include_path=folders or None, include_defaults=not only_files)
    for name in names:
        if name not in manager.all_tasks:
            raise UsageError(
                f"--tasks {name} is no task of lm-evaluation-harness; give a name from lm_eval ls tasks, "
                "or the YAML file of your own"
            )
    return names, manager


@torch.no_grad()
def run_tasks(
    view: View, tokenizer: Tokenizer, names: Sequence[str], manager: Any, *, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Return task -> measure -> score of a member.

    Args:
        view: the member.
        tokenizer: the model's.
        names: tasks.
        manager: see `find_tasks`.
        limit: documents of each task; None takes all.
    """
    from lm_eval import simple_evaluate

    with _naming(names):
        found = simple_evaluate(
            model=harness_model(view, tokenizer),
            tasks=list(names),
            task_manager=manager,
            limit=limit,
            log_samples=False,
            bootstrap_iters=0,
        )
    return {name: _scores(found["results"][name]) for name in names if name in found["results"]}


@contextlib.contextmanager
def _naming(tasks: Sequence[str]) -> Iterator[None]:
    """Name the tasks whose file or documents the harness does not take."""
    try:
        yield
    except (NestlingError, MemoryError):
        raise
    except Exception as error:  # the harness, datasets, Jinja and YAML each raise their own kinds
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise NestlingError(
            f"--tasks {', '.join(tasks)}: lm-evaluation-harness cannot run it ({reason}); mend its file or "
            "its documents"
        ) from error


def _scores(measured: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores among a task's results, which name their filter; `acc,none` is called acc.

    >>> _scores({"alias": "t", "sample_len": 9, "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1})
    {'acc': 0.5, 'em,strict': 1.0}
    """
    return {
        name.removesuffix(",none"): float(value)
        for name, value in measured.items()
        if "," in name and isinstance(value, int | float) and "stderr" not in name
    }


def harness_model(view: View, tokenizer: Tokenizer) -> Any:
    """Return the harness's kind of model around a member."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import has_bos_prefix

    config = view.model.config
    eos = _end(view)

    class NestlingLM(TemplateLM):  # type: ignore[misc] # an extra without types
        max_length = config.max_position_embeddings
        tokenizer_name = "nestling"

        @property
        def eot_token_id(self) -> int:
            return eos

        @property
        def prefix_token_id(self) -> int:
            return eos if config.bos_token_id is None else config.bos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            if add_special_tokens is None:
                begin = tokenizer.id_to_token(self.prefix_token_id)
                add_special_tokens = not has_bos_prefix(string, begin)
            ids: list[int] = tokenizer.encode(string, add_special_tokens=add_special_tokens).ids
            return ids

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            rows = [
                ((context + continuation)[-(self.max_length + 1) :][:-1], continuation)
                for _, context, continuation in requests
            ]
            return score_rows(view, rows)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            totals = []
            for (text,) in (request.args for request in requests):
                windows = utils.get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, self.max_length, 1
                )
                pairs = [(None, *utils.make_disjoint_window(window)) for window in windows]
                totals.append(sum(score for score, _ in self._loglikelihood_tokens(pairs)))
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            pairs = (request.args for request in requests)
            return [_generate(view, tokenizer, self.tok_encode(text), kwargs) for text, kwargs in pairs]

    return NestlingLM()


def _end(view: View) -> int:
    eos = view.model.config.first_eos_token_id
    if eos is None:
        raise NestlingError("config.json has no eos_token_id, which tasks need; set the one that ends a text")
    return eos


def _generate(view: View, tokenizer: Tokenizer, ids: list[int], settings: Mapping[str, Any]) -> str:
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )

    kwargs = normalize_gen_kwargs(dict(settings), MAX_NEW_TOKENS)
    stops = handle_stop_sequences(kwargs.pop("until", None), eos=tokenizer.id_to_token(_end(view)))
    context = view.model.config.max_position_embeddings
    room = min(int(kwargs.pop("max_gen_toks")), context - 1)
    written = write_until(view, tokenizer, ids[-(context - room) :], stops, room)
    result: str = postprocess_generated_text(written, stops, None)
    return result


def write_until(view: View, tokenizer: Tokenizer, ids: list[int], stops: Sequence[str], room: int) -> str:
    """Return what a member writes greedily, until one of the texts has come or there is no room."""
    written: list[int] = []
    for token in stream(view, ids, max_new_tokens=room):
        written.append(token.id)
        text = tokenizer.decode(written)
        if any(stop in text for stop in stops):
            break
    return str(tokenizer.decode(written))


@torch.no_grad()
def score_rows(view: View, rows: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Return for each row the log-probability of its last tokens, and whether each is the likeliest.

    Args:
        view: the member.
        rows: input, and the tokens that its last positions should predict.
    """
    scores: dict[int, tuple[float, bool]] = {}
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place][0]))
    while order:
        longest = len(rows[order[0]][0])
        few, order = order[: (many := max(1, BATCH_TOKENS // longest))], order[many:]
        tokens_BT = torch.zeros(len(few), longest, dtype=torch.long)
        for number, place in enumerate(few):  # what follows a row does not reach it
            tokens_BT[number, : len(rows[place][0])] = torch.tensor(rows[place][0])
        logits_BTV = view(tokens_BT.to(view.device)).float().cpu()
        for number, place in enumerate(few):
            scores[place] = _score(logits_BTV[number], *rows[place])
    return [scores[place] for place in range(len(rows))]


def _score(logits_TV: Tensor, given: list[int], continuation: list[int]) -> tuple[float, bool]:
    count = len(continuation)
    log_probs_CV = logits_TV[len(given) - count : len(given)].log_softmax(-1)
    target_C = torch.tensor(continuation)
    chosen_C = log_probs_CV.gather(1, target_C[:, None])[:, 0]
    return float(chosen_C.sum()), bool((log_probs_CV.argmax(-1) == target_C).all())
