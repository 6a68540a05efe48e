"""`nestling serve`: a model folder over HTTP, with OpenAI's routes; see models/serve/ and docs/serving.md."""

from typing import Annotated

import typer

from models.base.errors import UsageError
from train.commands.common import check_at_least, check_gamma
from train.commands.console import make_console
from train.commands.listening import kv_bytes, make_address
from train.commands.options import (
    LIMITS,
    CertOption,
    DtypeOption,
    HostOption,
    InsecureOption,
    KeyOption,
    KvMemoryOption,
    ModelArgument,
    PortOption,
    ServerTokenOption,
    draft_option,
    gamma_option,
)

NameOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Name of the model for clients; members are NAME:MEMBER. Default: the run's."
    ),
]
DraftOption = Annotated[str | None, draft_option("auto; no text depends on it")]
GammaOption = Annotated[str | None, gamma_option("auto, which drafts the more the fewer clients there are")]
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
    token_file: ServerTokenOption = None,
    insecure: InsecureOption = False,
    batch: BatchOption = 16,
    queue: QueueOption = 64,
    kv_memory: KvMemoryOption = None,
    drain: DrainOption = 30,
) -> None:
    """Serve a model and its family over HTTP as OpenAI's API does, with the texts of nestling generate."""
    check_at_least(1, batch=batch, drain=drain)
    check_at_least(0, queue=queue)
    if name is not None and (not name or not name.isprintable()):
        raise UsageError(f"--name {name!r} is no name; give one of printable characters")
    number = check_gamma(gamma, least=0)
    address = make_address(host, port, cert, key, token_file, insecure=insecure, drain=drain)
    budget = kv_bytes(kv_memory)
    from models.decode.decoder import open_decoder
    from models.serve.served import default_name
    from models.serve.server import Server
    from models.serve.worker import Limits

    decoder = open_decoder(model, draft=draft, gamma=number, dtype=dtype)
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
