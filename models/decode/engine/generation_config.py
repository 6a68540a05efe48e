"""Settings of a continuation: one frozen value from the command line down to the engine."""

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from models.base.errors import UsageError
from models.base.kinds import show, whole_number
from models.decode.sampling.params import GREEDY, SamplingParams
from models.decode.sampling.verifiers import Verifier


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of a continuation; the names are those of Hugging Face and vLLM.

    Functions that take one also take its fields as keyword arguments, which then replace its own.
    """

    params: SamplingParams = GREEDY
    """The processors between logits and probabilities."""
    verifier: str | Verifier = "block"
    """`token`, `block`, `coupled` or a function like the first two; greedy decoding has no use for it."""
    max_new_tokens: int = 128
    """The most tokens to write; the context's end may come first."""
    max_length: int | None = None
    """The most tokens of prompt and output together; if it is given, `max_new_tokens` has no part."""
    eos_token_ids: Collection[int] | int | None = None
    """Tokens that end the output (and are its last token); one may stand alone; None means the model's."""
    stop: Collection[str] | str | None = ()
    """Texts that end the output, wherever they begin or end; they are not part of it. One may stand alone."""
    seed: int = 0
    """Random seed; each row of a batch derives its own random numbers from it."""

    def __post_init__(self) -> None:
        if not isinstance(self.params, SamplingParams):
            raise UsageError(
                f"params={show(self.params)} is not SamplingParams; give SamplingParams(temperature=1.0), or "
                "its settings by name"
            )
        checked = {
            "max_new_tokens": whole_number("max_new_tokens", self.max_new_tokens),
            "max_length": None if self.max_length is None else whole_number("max_length", self.max_length),
            "eos_token_ids": _token_ids(self.eos_token_ids),
            "stop": _stop(self.stop),
            "seed": whole_number("seed", self.seed),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}")

    @property
    def end_tokens(self) -> Collection[int] | None:
        """The end tokens as a collection; None means the model's."""
        return (self.eos_token_ids,) if isinstance(self.eos_token_ids, int) else self.eos_token_ids

    @property
    def stop_texts(self) -> Collection[str]:
        """The stop strings as a collection."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()


def _token_ids(value: Any) -> Collection[int] | int | None:
    if value is None or (isinstance(value, Collection) and not value and not isinstance(value, str)):
        return value if value is None else ()
    tokens = value.tolist() if hasattr(value, "tolist") else value  # of NumPy or torch
    if isinstance(tokens, Iterable) and not isinstance(tokens, str | bytes | Mapping):
        return tuple(whole_number("eos_token_id", token) for token in tokens)
    return whole_number("eos_token_id", tokens)


def _stop(value: Any) -> Collection[str] | str | None:
    if value is None or isinstance(value, str):
        return value
    stops = () if isinstance(value, bytes | Mapping) or not isinstance(value, Iterable) else tuple(value)
    is_empty = isinstance(value, Collection) and not len(value)
    if not all(isinstance(stop, str) for stop in stops) or not (stops or is_empty):
        raise UsageError(f'stop={show(value)} is neither a text nor several; give one, as in stop=["END"]')
    return stops


DEFAULT = GenerationConfig()
ALIASES = {"eos_token_id": "eos_token_ids", "stop_strings": "stop"}
"""Hugging Face's names of fields that are called otherwise here."""
FROM_TRANSFORMERS = ("do_sample", "pad_token_id")
NONE_COUNTS = ("eos_token_ids", "stop")
"""Settings for which None is a value of its own."""


def changed(config: GenerationConfig, changes: Mapping[str, Any]) -> GenerationConfig:
    """Return a config with other settings: its own fields, and those of `SamplingParams`.

    As in transformers, a None is not set (but `stop=None` is no stop string, `eos_token_id=None` the
    model's), `max_new_tokens` wins over `max_length`, and `do_sample=False` is greedy. `do_sample=True` takes
    the temperature, or 1.0 where there is none. `pad_token_id` has no effect, since nothing is padded.

    Raises:
        UsageError: for a setting that is none, naming the nearest one.

    >>> changed(DEFAULT, {"temperature": 0.7, "stop_strings": "END"}).params.temperature
    0.7
    """
    changes = {ALIASES.get(name, name): value for name, value in changes.items()}
    changes = {name: value for name, value in changes.items() if value is not None or name in NONE_COUNTS}
    changes.pop("pad_token_id", None)
    changes |= _temperature(changes.pop("do_sample", None), changes, config)
    if "max_new_tokens" in changes:
        changes["max_length"] = None
    own = {field.name for field in fields(GenerationConfig)}
    sampling = {field.name for field in fields(SamplingParams)}
    for name in changes.keys() - own - sampling:
        near = difflib.get_close_matches(name, [*own, *sampling, *ALIASES, *FROM_TRANSFORMERS], n=1)
        hint = f"did you mean {near[0]}?" if near else f"give one of {', '.join(sorted(own | sampling))}"
        raise UsageError(f"{name} is no setting of a continuation; {hint}")
    of_params = {name: value for name, value in changes.items() if name in sampling}
    of_config = {name: value for name, value in changes.items() if name in own}
    config = replace(config, **of_config)
    return replace(config, params=replace(config.params, **of_params)) if of_params else config


def _temperature(do_sample: Any, changes: Mapping[str, Any], config: GenerationConfig) -> dict[str, float]:
    """Return the temperature that `do_sample` asks for, if it asks for another."""
    if do_sample is None:
        return {}
    if not isinstance(do_sample, bool):
        raise UsageError(f"do_sample={show(do_sample)} is neither True nor False; give one of them")
    if not do_sample:
        return {"temperature": 0.0}
    if "temperature" not in changes:
        config = replace(config, params=changes.get("params", config.params))
        return {"temperature": config.params.temperature or 1.0}
    if changes["temperature"] == 0:
        raise UsageError("do_sample=True with temperature=0, which is greedy; leave one of them out")
    return {}
