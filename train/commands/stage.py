"""`nestling stage`: some layers of a model, for nestling generate --stages; see models/serve/stage.py."""

from typing import Annotated

import typer

from train.commands.console import make_console
from train.commands.listening import kv_bytes, make_address
from train.commands.options import (
    CertOption,
    DtypeOption,
    HostOption,
    InsecureOption,
    KeyOption,
    KvMemoryOption,
    ModelArgument,
    PortOption,
    ServerTokenOption,
)

DRAIN = 1
"""Seconds that clients have to go; what they lose here they send to a replacement."""
LayersOption = Annotated[
    str, typer.Option(metavar="FIRST-LAST", help="Layers that run here, counted from 0, as 0-3.")
]


def stage(
    model: ModelArgument,
    *,
    layers: LayersOption,
    dtype: DtypeOption = "auto",
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    cert: CertOption = None,
    key: KeyOption = None,
    token_file: ServerTokenOption = None,
    insecure: InsecureOption = False,
    kv_memory: KvMemoryOption = None,
) -> None:
    """Run some layers of a model for clients that have its ends: nestling generate --stages."""
    from models.serve.stage import StageServer, open_stage, parse_layers

    parse_layers(layers)
    budget = kv_bytes(kv_memory)
    address = make_address(host, port, cert, key, token_file, insecure=insecure, drain=DRAIN)
    opened = open_stage(model, layers, dtype)
    console = make_console()

    def on_ready(url: str) -> None:
        of, kind = opened.facts["num_layers"], opened.facts["dtype"]
        where = url.partition("://")[2]
        console.print(f"layers {layers} of {of}, {kind}, at {where}", markup=False, soft_wrap=True)
        console.file.flush()

    StageServer(opened, address, budget, on_ready).run()
    make_console(stderr=True).print("stopped", style="dim")
