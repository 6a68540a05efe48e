"""`nestling generate --remote`: MODEL drafts here, a server verifies; see models/serve/remote.py."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.base.errors import UsageError
from train.commands.common import check_file
from train.commands.console import make_console

if TYPE_CHECKING:
    from rich.console import Console

    from models.decode.decoder import Decoder
    from models.decode.text import TextStream
    from train.commands.generate_many import Encode

WINDOW, GAMMA = 2, 4


def check_remote(
    remote: str | None,
    prompt: str | None,
    *,
    window: int | None,
    token_file: Path | None,
    ca: Path | None,
    others: Mapping[str, Any],
) -> None:
    """Raise UsageError for flags that do not go together.

    Args:
        remote: value of the flag.
        prompt: likewise, as the next three.
        window: see above.
        token_file: see above.
        ca: see above.
        others: flags that have no effect with `--remote`, with their values.
    """
    needs = {"--window": window, "--token-file": token_file, "--ca": ca}
    given = [flag for flag, value in needs.items() if value is not None]
    if remote is None and given:
        raise UsageError(f"{given[0]} has an effect with --remote only; add it, or leave this out")
    if window is not None and window < 1:
        raise UsageError(f"--window must be at least 1, got {window}")
    for flag, path in (("--token-file", token_file), ("--ca", ca)):
        if path is not None:
            check_file(flag, path)
    useless = [f"--{name}" for name, value in others.items() if value is not None]
    if remote is not None and prompt is None:
        raise UsageError("--remote continues one text; give --prompt")
    if remote is not None and useless:
        raise UsageError(f"{useless[0]} has no effect with --remote; leave one of them out")
    if remote is not None:
        from models.serve.remote import Remote

        Remote(url=remote)  # which refuses what is no address before the model is opened


def continue_remotely(
    decoder: "Decoder",
    server: "tuple[str, Any, int | None, Path | None, Path | None]",
    prompt: str,
    encode: "Encode",
    options: Mapping[str, Any],
    *,
    show: "Callable[[TextStream, Console], None]",
) -> dict[str, Any]:
    """Continue a prompt with drafts of the decoder's model, and return the results for JSON."""
    from models.decode.engine.generation_config import changed
    from models.decode.summary import summarize
    from models.decode.text import TextBuilder, TextStream, encode_prompt
    from models.serve.listen import read_token
    from models.serve.remote import Remote, stream_remote

    url, gamma, window, token_file, ca = server
    remote = Remote(
        url=url,
        token=None if token_file is None else read_token(token_file),
        ca=ca,
        gamma=gamma if isinstance(gamma, int) else GAMMA,
        window=WINDOW if window is None else window,
    )
    model, config = decoder.folder.model, changed(decoder.config, options)
    ids = encode_prompt(model, decoder.tokenizer, encode(prompt))
    tokens = stream_remote(remote, model, decoder.tokenizer, ids, config)
    pieces = TextStream(tokens, TextBuilder(decoder.tokenizer, ids, config.stop_texts))
    show(pieces, make_console())
    result = pieces.result()
    how = f"drafted here, verified at {url}, gamma {remote.gamma}, window {remote.window}"
    make_console(stderr=True).print(summarize(result.report, how), style="dim", markup=False, soft_wrap=True)
    return {
        "prompt": prompt,
        **result.as_dict(),
        "remote": url,
        "window": remote.window,
        "gamma": remote.gamma,
        "draft": str(decoder.folder.path),
        "verifier": "coupled",
    }
