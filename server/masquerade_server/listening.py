"""The port, bound before anything is loaded, so that one in use is told at once."""

from __future__ import annotations

import errno
import os
import socket

from masquerade_masks import MasqueradeError


class PortInUse(MasqueradeError):
    """Another process listens there."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port)
        self.host = host
        self.port = port

    def __str__(self) -> str:
        return (
            f"port {self.port} on {self.host} is in use: another server, perhaps a Masquerade, listens "
            "there; stop it or choose another with --port"
        )


class CannotListen(MasqueradeError):
    """The address is not one of this machine's, or the port needs more rights."""

    def __init__(self, host: str, port: int, reason: str) -> None:
        super().__init__(host, port, reason)
        self.host = host
        self.port = port
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot listen on {self.host}, port {self.port}: {self.reason}"


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes any free one. Raises `PortInUse`, `CannotListen`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise CannotListen(host, port, error.strerror or str(error)) from error
    try:
        if os.name == "posix":  # Windows would let two servers share the port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(2048)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(host, port) from error
        raise CannotListen(host, port, error.strerror or str(error)) from error
    bound.set_inheritable(False)
    return bound


def url_of(bound: socket.socket, host: str) -> str:
    """Where a client on this machine reaches the socket."""
    port = bound.getsockname()[1]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, host)
    return f"http://{f'[{shown}]' if ':' in shown and not shown.startswith('[') else shown}:{port}"
