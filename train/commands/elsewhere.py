"""Flags of `nestling generate` for work that other machines do: `--remote` and `--stages`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from models.base.errors import UsageError
from train.commands.common import check_file

if TYPE_CHECKING:
    from models.decode.decoder import Decoder
    from models.serve.remote import Remote


class Elsewhere(NamedTuple):
    """Values of the flags; None where one was not given."""

    remote: str | None
    window: int | None
    stages: str | None
    spares: str | None
    token_file: Path | None
    ca: Path | None
    timeout: float | None

    @property
    def peer(self) -> dict[str, Any]:
        """Return what is said of every peer."""
        from models.serve.listen import read_token
        from models.serve.peer import TIMEOUT

        return {
            "token": None if self.token_file is None else read_token(self.token_file),
            "ca": self.ca,
            "timeout": TIMEOUT if self.timeout is None else self.timeout,
        }


def check_elsewhere(away: Elsewhere, prompt: str | None, gamma: int | str | None, **others: Any) -> None:
    """Raise UsageError for flags that do not go together, or are no addresses, before a model is opened.

    Args:
        away: the flags.
        prompt: value of that flag.
        gamma: likewise.
        others: `draft`, `verifier` and `prompts`, of which not all go with them.
    """
    _check_alone(away)
    for flag, path in (("--token-file", away.token_file), ("--ca", away.ca)):
        if path is not None:
            check_file(flag, path)
    if away.remote is not None:
        _check_remote(away, prompt, gamma, others)
    if away.stages is not None:
        _check_stages(away, others)


def _check_alone(away: Elsewhere) -> None:
    if away.remote is not None and away.stages is not None:
        raise UsageError("--remote and --stages are two ways to decode elsewhere; leave one of them out")
    needs: dict[str, tuple[str, bool]] = {
        "window": ("--remote", away.remote is not None),
        "spares": ("--stages", away.stages is not None),
    }
    either = away.remote is not None or away.stages is not None
    needs |= dict.fromkeys(("token_file", "ca", "timeout"), ("--remote or --stages", either))
    for name, (flags, is_there) in needs.items():
        if getattr(away, name) is not None and not is_there:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} has an effect with {flags} only; add it, or leave this out")


def _check_remote(
    away: Elsewhere, prompt: str | None, gamma: int | str | None, others: dict[str, Any]
) -> None:
    if prompt is None:
        raise UsageError("--remote continues one text; give --prompt")
    _refuse("--remote", **others)
    make_remote(away, gamma)  # which refuses what is no address, and numbers beyond the protocol's


def make_remote(away: Elsewhere, gamma: int | str | None) -> "Remote":
    """Return the server of `--remote`."""
    from models.serve.remote import Remote

    numbers = {"gamma": gamma if isinstance(gamma, int) else None, "window": away.window}
    given: dict[str, Any] = {name: number for name, number in numbers.items() if number is not None}
    return Remote(url=away.remote or "", **given, **away.peer)


def _check_stages(away: Elsewhere, others: dict[str, Any]) -> None:
    from models.serve.hop import StagePeer

    _refuse("--stages", draft=others["draft"])
    for address in (*_addresses(away.stages), *_addresses(away.spares)):
        StagePeer.parse(address, **away.peer)


def _refuse(flag: str, **others: Any) -> None:
    for name, value in others.items():
        if value is not None:
            raise UsageError(f"--{name} has no effect with {flag}; leave one of them out")


def _addresses(text: str | None) -> list[str]:
    return [] if text is None else text.split(",")


def open_stages(away: Elsewhere, model: Path, **settings: Any) -> "Decoder":
    """Open a model that is spread over the stages; `settings` are those of `open_spread`."""
    from models.serve.spread import open_spread

    return open_spread(
        model, _addresses(away.stages), spares=_addresses(away.spares), **settings, **away.peer
    )
