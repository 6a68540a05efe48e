"""How engines run a draft with its target: exact lines for the releases that they were read from.

    vLLM 0.33, SGLang 0.5.23, llama.cpp 0c1e570, transformers 5.23, MLX-LM 0.32

Engines keep a drafted token by different rules, so that one pair has several acceptances: by rejection
sampling (vLLM with probabilistic drafting, transformers), or where the draft's likeliest token is what the
target draws (SGLang, llama.cpp, MLX-LM). Greedily all of them keep it where it is the target's likeliest.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLED, MATCHED = "sampled", "sample_and_match"
RULES = {"vllm": SAMPLED, "sglang": MATCHED, "llama.cpp": MATCHED, "transformers": SAMPLED, "mlx": MATCHED}
"""Engine -> the rule by which it keeps a drafted token."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line that runs a pair, or why there is none."""

    command: str | None
    note: str | None = None


def launch_lines(
    target: Path, draft: Path, num_tokens: Mapping[str, int], *, ragged: bool = False
) -> dict[str, Line]:
    """Return engine -> the line that runs the pair.

    Args:
        target: its folder, or its file for llama.cpp.
        draft: likewise.
        num_tokens: engine -> tokens that a round drafts.
        ragged: whether one of them has unequal layers in their true shapes, which need code of their own.
    """
    if target.suffix == ".gguf":
        return {"llama.cpp": _llama(target, draft, num_tokens["llama.cpp"])}
    return {
        "vllm": _vllm(target, draft, num_tokens["vllm"], ragged),
        "sglang": _sglang(target, draft, num_tokens["sglang"], ragged),
        "transformers": _transformers(target, draft, ragged),
        "mlx": _mlx(target, draft, num_tokens["mlx"], ragged),
    }


def draft_settings(num_tokens: int) -> dict[str, Any]:
    """Return what stands in a draft's generation_config.json: transformers reads it from there.

    Its own defaults would draft up to 20 tokens, a changing number, and stop where the draft is unsure.
    """
    return {
        "num_assistant_tokens": num_tokens,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }


def _vllm(target: Path, draft: Path, num_tokens: int, ragged: bool) -> Line:
    # Greedy drafting is the default, which needs another rule and keeps fewer tokens when sampling.
    config = json.dumps(
        {
            "method": "draft_model",
            "model": str(draft),
            "num_speculative_tokens": num_tokens,
            "draft_sample_method": "probabilistic",
        }
    )
    trust = " --trust-remote-code" if ragged else ""
    note = "unequal layers run on its Transformers backend" if ragged else None
    command = f"vllm serve {_quoted(target)}{trust} --speculative-config {shlex.quote(config)}"
    return Line(command=command, note=note)


def _sglang(target: Path, draft: Path, num_tokens: int, ragged: bool) -> Line:
    if ragged:
        return Line(command=None, note="it sizes heads by the whole model; take --form padded")
    return Line(
        command=f"python -m sglang.launch_server --model-path {_quoted(target)} "
        f"--speculative-algorithm STANDALONE --speculative-draft-model-path {_quoted(draft)} "
        f"--speculative-num-steps {num_tokens} --speculative-eagle-topk 1 "
        f"--speculative-num-draft-tokens {num_tokens + 1}"
    )


def _llama(target: Path, draft: Path, num_tokens: int) -> Line:
    # Without --spec-type a plain draft is not used.
    return Line(
        command=f"llama-server -m {_quoted(target)} -md {_quoted(draft)} --spec-type draft-simple "
        f"--spec-draft-n-max {num_tokens} --spec-draft-p-min 0.0"
    )


def _transformers(target: Path, draft: Path, ragged: bool) -> Line:
    trust = ", trust_remote_code=True" if ragged else ""
    code = (
        "from transformers import AutoModelForCausalLM as A, AutoTokenizer; "
        f"t = AutoTokenizer.from_pretrained({str(target)!r}); "
        f"p, q = (A.from_pretrained(x{trust}) for x in ({str(target)!r}, {str(draft)!r})); "
        "x = t('Once upon a time', return_tensors='pt', return_token_type_ids=False); "
        "print(t.decode(p.generate(**x, assistant_model=q, max_new_tokens=64, do_sample=False)[0]))"
    )
    plain = not {*code} & {'"', "$", "`", "\\", "!"}
    return Line(
        command=f'python -c "{code}"' if plain else f"python -c {shlex.quote(code)}",
        note="one text at a time; the length of a round is in the draft's generation_config.json",
    )


def _mlx(target: Path, draft: Path, num_tokens: int, ragged: bool) -> Line:
    if ragged:
        return Line(command=None, note="it loads drafts without their own code; take --form padded")
    return Line(
        command=f"mlx_lm.generate --model {_quoted(target)} --draft-model {_quoted(draft)} "
        f"--num-draft-tokens {num_tokens} --prompt 'Once upon a time'"
    )


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
