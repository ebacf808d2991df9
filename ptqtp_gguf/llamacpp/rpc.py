"""Other machines' memory and cores, by llama.cpp's RPC: addresses, and whether a server there is one of ours.

llama.cpp's own client ends the process where it finds no server or another version, so a server is asked first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import sys
from collections.abc import Sequence

from ..codec import BY_NAME
from ..errors import ServerError
from . import aborts

CONNECT_SECONDS = 10.0
HELLO = 14  # RPC_CMD_HELLO, the same in every version
CAPABILITIES = bytes(24)  # of the transport: none, plain TCP
OURS = 128  # the patched runtime's major version is upstream's and this
HOW = "start the patched runtime's rpc-server there"


def endpoints(texts: Sequence[str]) -> list[str]:
    """["a:1", "b:2,c:3"] -> ["a:1", "b:2", "c:3"]. Raises ServerError where one is not host:port."""
    found = []
    for text in (part.strip() for given in texts for part in given.split(",")):
        host, _, port = text.rpartition(":")
        if not (host and ":" not in host and port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ServerError(
                f"--rpc {text!r}: is not host:port; give a name or an IPv4 address, as in 192.168.1.2:50052"
            )
        if text not in found:
            found.append(text)
    return found


def check(endpoint: str, timeout: float = CONNECT_SECONDS) -> tuple[int, int, int]:
    """Shake hands with the server at "host:port", and leave; returns its protocol's version. timeout in seconds.

    Raises ServerError if there is none, if it is a stock one, or does not answer.
    """
    host, _, port = endpoint.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout) as s:
            s.sendall(struct.pack("<BQ", HELLO, len(CAPABILITIES)) + CAPABILITIES)
            size = struct.unpack("<Q", _exactly(s, 8))[0]
            if not 3 <= size <= 256:
                raise ServerError(f"{endpoint}: what listens there is not an RPC server; {HOW}")
            major, minor, patch = _exactly(s, size)[:3]
    except socket.gaierror:
        raise ServerError(f"{endpoint}: no such host; give a name or an IPv4 address") from None
    except TimeoutError:
        raise ServerError(
            f"{endpoint}: no RPC server answers within {timeout:.0f} s; one that is in use by another program answers "
            "when that ends"
        ) from None
    except (EOFError, ConnectionResetError):
        raise ServerError(
            f"{endpoint}: the server hangs up at the handshake; it is of another version, or no RPC server; {HOW}"
        ) from None
    except OSError as e:
        raise ServerError(f"{endpoint}: no RPC server: {(e.strerror or str(e)).lower()}; {HOW}") from None
    if major < OURS:
        raise ServerError(
            f"{endpoint}: its RPC version {major}.{minor}.{patch} is a stock llama.cpp's, which does not know "
            f"{' and '.join(BY_NAME)}; {HOW}"
        )
    return major, minor, patch


def _exactly(s: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n:
        if not (more := s.recv(n - len(data))):
            raise EOFError
        data += more
    return data


# ---- in this process ----

_used: list[str] = []  # for as long as the process lives: llama.cpp has no way to let go of a server


def attach(
    base: ctypes.CDLL, front: ctypes.CDLL, remote: ctypes.CDLL, wanted: Sequence[str], complaints: Sequence[str]
) -> None:
    """Make servers ("host:port") devices of this process; one that is used already does no harm.

    base, front, remote  the runtime's libraries ggml-base, ggml, ggml-rpc
    complaints           where the runtime's errors are collected meanwhile
    Raises ServerError.
    """
    pointer = ctypes.c_void_p
    base.ggml_set_abort_callback.argtypes, base.ggml_set_abort_callback.restype = [pointer], pointer
    remote.ggml_backend_rpc_add_server.argtypes = [ctypes.c_char_p]
    remote.ggml_backend_rpc_add_server.restype = pointer
    front.ggml_backend_register.argtypes, front.ggml_backend_register.restype = [pointer], None
    for endpoint in wanted:
        if endpoint in _used:
            continue
        check(endpoint)
        base.ggml_set_abort_callback(ctypes.cast(_ABORTED, pointer))
        _used.append(endpoint)
        found = remote.ggml_backend_rpc_add_server(endpoint.encode())
        if not found:
            _used.remove(endpoint)
            why = complaints[0] if complaints else "it offers no device"
            raise ServerError(f"{endpoint}: the RPC server cannot be used: {why}; {HOW}")
        front.ggml_backend_register(found)


def _aborted(message: bytes) -> None:
    """llama.cpp gives up, in whatever thread. For a server's sake: one line and the end; else as it would."""
    text = message.decode(errors="replace")
    with contextlib.suppress(OSError, ValueError):
        if "rpc" not in text.lower():
            aborts.gave_up(text)
            os.write(2, f"{text}\n".encode())
            return
        sys.stdout.flush()
        begin = "\n" if sys.stdout.isatty() else ""
        os.write(2, f"{begin}Error: {lost(_used)}\n".encode())
    os._exit(1)


_ABORTED = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(_aborted)


def lost(servers: Sequence[str]) -> str:
    """The line for a server that was there, and no longer answers."""
    which = f"{servers[0]}: the RPC server" if len(servers) == 1 else f"{', '.join(servers)}: one of these RPC servers"
    return f"{which} died or is out of reach; start it again, then this"
