"""`nestling serve`: a model folder over HTTP, with OpenAI's routes; see models/serve/ and docs/serving.md."""

from pathlib import Path
from typing import Annotated

import typer

from models.base.errors import UsageError
from train.commands.common import check_at_least, check_file, check_gamma
from train.commands.console import make_console
from train.commands.options import DtypeOption, ModelArgument, draft_option, gamma_option, token_file_option

SAFETY, LIMITS = "Who may ask", "Limits"
NameOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Name of the model for clients; members are NAME:MEMBER. Default: the run's."
    ),
]
DraftOption = Annotated[str | None, draft_option("auto; no text depends on it")]
GammaOption = Annotated[str | None, gamma_option("auto, which drafts the more the fewer clients there are")]
HostOption = Annotated[
    str, typer.Option(help="Address to listen at; any but loopback needs --cert, --key and --token-file.")
]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes one that is free.")]
CertOption = Annotated[
    Path | None, typer.Option(metavar="PEM", rich_help_panel=SAFETY, help="Certificate for TLS.")
]
KeyOption = Annotated[
    Path | None, typer.Option(metavar="PEM", rich_help_panel=SAFETY, help="Private key for TLS.")
]
TokenOption = Annotated[Path | None, token_file_option(SAFETY)]
InsecureOption = Annotated[
    bool,
    typer.Option(
        "--insecure", rich_help_panel=SAFETY, help="Listen beyond loopback without TLS or token all the same."
    ),
]
VerifyOption = Annotated[
    bool,
    typer.Option(
        "--verify", help="Also verify what devices draft: nestling generate --remote, over a WebSocket."
    ),
]
BatchOption = Annotated[
    int, typer.Option(rich_help_panel=LIMITS, help="Number of texts that are written at the same time.")
]
QueueOption = Annotated[
    int,
    typer.Option(rich_help_panel=LIMITS, help="Number of texts that may wait; more are refused with 429."),
]
KvMemoryOption = Annotated[
    int | None,
    typer.Option(
        metavar="MIB",
        rich_help_panel=LIMITS,
        help="Memory for keys and values in MiB. Default: a quarter of what is free.",
    ),
]
DrainOption = Annotated[
    int,
    typer.Option(
        metavar="SECONDS", rich_help_panel=LIMITS, help="Time that texts have to finish after a SIGTERM."
    ),
]


def serve(
    model: ModelArgument,
    *,
    name: NameOption = None,
    draft: DraftOption = None,
    gamma: GammaOption = None,
    dtype: DtypeOption = "auto",
    verify: VerifyOption = False,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    cert: CertOption = None,
    key: KeyOption = None,
    token_file: TokenOption = None,
    insecure: InsecureOption = False,
    batch: BatchOption = 16,
    queue: QueueOption = 64,
    kv_memory: KvMemoryOption = None,
    drain: DrainOption = 30,
) -> None:
    """Serve a model and its family over HTTP as OpenAI's API does, with the texts of nestling generate."""
    check_at_least(1, batch=batch, drain=drain)
    check_at_least(0, queue=queue)
    if kv_memory is not None:
        check_at_least(1, kv_memory=kv_memory)
    if name is not None and (not name or not name.isprintable()):
        raise UsageError(f"--name {name!r} is no name; give one of printable characters")
    number = check_gamma(gamma, least=0)
    for flag, path in (("--cert", cert), ("--key", key), ("--token-file", token_file)):
        if path is not None:
            check_file(flag, path)
    from models.base.processor import free_memory_bytes
    from models.decode.decoder import open_decoder
    from models.serve.listen import Address, check_port, read_token
    from models.serve.served import default_name
    from models.serve.server import Server
    from models.serve.worker import Limits

    address = Address(
        host=host,
        port=port,
        cert=cert,
        key=key,
        token=None if token_file is None else read_token(token_file),
        insecure=insecure,
        drain=drain,
    )
    check_port(address)
    decoder = open_decoder(model, draft=draft, gamma=number, dtype=dtype)
    budget = free_memory_bytes() // 4 if kv_memory is None else kv_memory * 2**20
    console = make_console()

    def on_ready(url: str) -> None:
        from models.decode.summary import describe_draft

        names = ", ".join(server.models)
        console.print(f"{names} at {url}/v1 · {describe_draft(decoder, in_batch=False)}", soft_wrap=True)
        console.file.flush()

    limits = Limits(batch=batch, queue=queue, kv_bytes=budget)
    server = Server(decoder, name or default_name(decoder), address, limits, on_ready, verifies=verify)
    server.run()
    make_console(stderr=True).print("all texts are finished; stopped", style="dim")
