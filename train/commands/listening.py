"""What commands that listen check before they open a model: the address, who may ask, the memory."""

from pathlib import Path
from typing import TYPE_CHECKING

from train.commands.common import check_at_least, check_file

if TYPE_CHECKING:
    from models.serve.listen import Address


def make_address(
    host: str,
    port: int,
    cert: Path | None,
    key: Path | None,
    token_file: Path | None,
    *,
    insecure: bool,
    drain: int,
) -> "Address":
    """Return where a server listens.

    Raises:
        NestlingError: if nothing can listen there, or not safely.
    """
    for flag, path in (("--cert", cert), ("--key", key), ("--token-file", token_file)):
        if path is not None:
            check_file(flag, path)
    from models.serve.listen import Address, check_port, read_token

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
    return address


def kv_bytes(kv_memory: int | None) -> int:
    """Return the bytes of keys and values that `--kv-memory` allows."""
    from models.base.processor import free_memory_bytes

    if kv_memory is None:
        return free_memory_bytes() // 4
    check_at_least(1, kv_memory=kv_memory)
    return kv_memory * 2**20
