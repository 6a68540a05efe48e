"""`nestling generate --remote`: MODEL drafts here, a server verifies; see models/serve/remote.py."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from train.commands.console import make_console
from train.commands.elsewhere import Elsewhere, make_remote

if TYPE_CHECKING:
    from rich.console import Console

    from models.decode.decoder import Decoder
    from models.decode.text import TextStream
    from train.commands.generate_many import Encode


def continue_remotely(
    decoder: "Decoder",
    away: Elsewhere,
    gamma: int | str | None,
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
    from models.serve.remote import stream_remote

    remote = make_remote(away, gamma)
    model, config = decoder.folder.model, changed(decoder.config, options)
    ids = encode_prompt(model, decoder.tokenizer, encode(prompt))
    tokens = stream_remote(remote, model, decoder.tokenizer, ids, config)
    pieces = TextStream(tokens, TextBuilder(decoder.tokenizer, ids, config.stop_texts))
    show(pieces, make_console())
    result = pieces.result()
    how = f"drafted here, verified at {remote.url}, gamma {remote.gamma}, window {remote.window}"
    make_console(stderr=True).print(summarize(result.report, how), style="dim", markup=False, soft_wrap=True)
    return {
        "prompt": prompt,
        **result.as_dict(),
        "remote": remote.url,
        "window": remote.window,
        "gamma": remote.gamma,
        "draft": str(decoder.folder.path),
        "verifier": "coupled",
    }
