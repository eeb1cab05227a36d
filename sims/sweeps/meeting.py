"""Processes of one run find each other before JAX connects them.

JAX ends a process without an exception if another does not come. So the first process waits at its address until all
others have said their number, and then tells them to go on; who is missing after a while is named.

Nor does JAX raise anything if one is lost later: it ends the others by a signal, minutes afterwards. So the connections
stay open, and whoever sees one break ends with a message (:func:`watch`); what is finished is on disk.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping

__all__ = ["attend", "gather", "leave", "watch"]

GO = b"go\n"
BYE, FAILED = b".", b"!"
"""What a process says that has finished its part, or has failed."""

GRACE = 3.0

PATIENCE = 5.0
"""Seconds that the first process listens to one connection: others wait meanwhile."""


def gather(port: int, num_processes: int, wait: float, told: Callable[[str], None]) -> dict[int, socket.socket]:
    """As the first process, wait until all others have come, and let them go on; returns the connections, open.

    ``told`` is given a line that says who is awaited. ``ValueError`` after ``wait`` seconds, with the numbers of those
    that did not come, and if the port cannot be used.
    """
    deadline = time.monotonic() + wait
    missing = set(range(1, num_processes))
    if not missing:
        return {}
    told(f"waiting up to {wait:g} s for {_named(missing)} at port {port}")
    here: dict[int, socket.socket] = {}
    try:
        with _server(port) as server:
            while missing:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    raise ValueError(
                        f"{_named(missing)} of {num_processes} did not come to port {port} within {wait:g} s. Start "
                        "them, or wait longer (--wait SECONDS)."
                    ) from None
                number = _number(connection, num_processes, min(PATIENCE, max(0.01, deadline - time.monotonic())))
                if number is None:
                    connection.close()
                else:
                    here[number] = connection
                    missing.discard(number)
        # The port is free again, for JAX.
        for connection in here.values():
            connection.sendall(GO)
            connection.settimeout(None)
    except BaseException as error:
        for connection in here.values():
            connection.close()
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise ValueError(f"cannot wait for the other processes at port {port}: {reason}.") from error
        raise
    return here


def attend(
    host: str, port: int, number: int, num_processes: int, wait: float, told: Callable[[str], None], advice: str
) -> socket.socket:
    """As process ``number``, come to the first one and wait until all are there; returns the connection, open.

    ``ValueError`` that ends in ``advice`` after ``wait`` seconds.
    """
    deadline = time.monotonic() + wait
    told(f"waiting up to {wait:g} s for process 0 at {host}:{port}")
    reason = "nobody answers"
    while (left := deadline - time.monotonic()) > 0:
        connection = None
        try:
            connection = socket.create_connection((host, port), timeout=left)
            reason = "somebody answers, but not as the first process of this run"
            connection.sendall(f"dae-theory {number} of {num_processes}\n".encode())
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            if connection.recv(len(GO)) == GO:
                connection.settimeout(None)
                return connection
            connection.close()
        except OSError as error:
            if connection is not None:
                connection.close()
            if isinstance(error, ConnectionError | socket.gaierror):
                reason = str(error)
        time.sleep(min(0.1, max(0.0, deadline - time.monotonic())))
    raise ValueError(f"no process answers at {host}:{port} within {wait:g} s ({reason}). {advice}")


def watch(connections: Mapping[int, socket.socket]) -> None:
    """End this process, with a line and exit code 2, as soon as the connection to a process breaks that has not left.

    JAX could not go on without it. The operating system closes the connections of a process that is killed; a machine
    that loses its power is noticed by JAX alone.
    """

    def listen(number: int, connection: socket.socket) -> None:
        try:
            said = connection.recv(len(BYE))
        except OSError:
            said = b""
        if said == BYE:
            return
        if said == FAILED:
            # Its failure may reach this process in another way too, with more words.
            time.sleep(GRACE)
        how = "has failed; see its message" if said == FAILED else "is lost"
        line = f"\nerror: {_named({number})} {how}; what is finished is kept, and the same commands resume.\n"
        os.write(2, line.encode())
        os._exit(2)

    for number, connection in connections.items():
        threading.Thread(target=listen, args=(number, connection), daemon=True).start()


def leave(connections: Mapping[int, socket.socket], *, failed: bool = False) -> None:
    """Tell the others that this process has finished its part, or has ``failed``."""
    for connection in connections.values():
        with contextlib.suppress(OSError):
            connection.sendall(FAILED if failed else BYE)


def _server(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _number(connection: socket.socket, num_processes: int, patience: float) -> int | None:
    """The number that a connection says; None if it says something else, or nothing."""
    connection.settimeout(patience)
    try:
        said = re.fullmatch(rb"dae-theory (\d{1,9}) of (\d{1,9})\n", connection.recv(64))
    except OSError:
        return None
    if said is None or int(said[2]) != num_processes or not 0 < int(said[1]) < num_processes:
        return None
    return int(said[1])


def _named(numbers: set[int]) -> str:
    shown = ", ".join(map(str, sorted(numbers)[:8]))
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"process {shown}" if len(numbers) == 1 else f"processes {shown}{more}"
