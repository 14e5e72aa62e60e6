"""The page on an address: who may come in from where, and a server beside other work."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.applications import Starlette

from rlhf_lightning.errors import StateError
from rlhf_lightning.people.access import Door, named, tokens_beside

if TYPE_CHECKING:
    from uvicorn import Server


def door_of(store: Path, host: str, annotators: str | None) -> Door:
    """Who may come in: anybody on this machine, or who has a token.

    Args:
        store: beside which the tokens are kept.
        host: address to listen on.
        annotators: names, with commas between; None where everybody on this machine may.

    Raises:
        SettingError: other machines could reach the page and nobody is named, or a name cannot be one.
    """
    names = named(host, annotators)
    return Door(tokens_beside(store, names) if names else None)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        StateError: the address cannot be had.
    """
    bare = host.strip("[]")
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((bare, port))
        made.listen(128)
    except OSError as error:
        made.close()
        raise StateError(
            "port-unavailable",
            f"cannot listen on {host}, port {port} ({error.strerror}): name another --port",
        ) from error
    return made


def say_where(listening: socket.socket, host: str, door: Door) -> None:
    """Print the address, or each annotator's."""
    port = listening.getsockname()[1]
    shown = f"[{host}]" if ":" in host and not host.startswith("[") else host
    if shown in ("0.0.0.0", "[::]"):
        shown = socket.gethostname()
    base = f"http://{shown}:{port}"
    if door.tokens is None:
        print(f"label at {base}/   results at {base}/results   Ctrl+C stops; every label is kept", flush=True)
        return
    for name, token in door.tokens.items():
        print(f"{name:<16}{base}/enter?token={token}", flush=True)
    print(f"the owner's results: {base}/results   Ctrl+C stops; every label is kept", flush=True)


def make_server(app: Starlette) -> Server:
    """A server of the page, not yet running."""
    import uvicorn

    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", server_header=False)
    return uvicorn.Server(config)


@contextmanager
def served(app: Starlette, listening: socket.socket) -> Iterator[int]:
    """Serve the page in a thread while the block runs; gives the port. The socket is closed in the end."""
    server = make_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="page", daemon=True)
    with closing(listening):
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.005)
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(timeout=30)
