"""A port at which ranks of this machine meet."""

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A free port of 127.0.0.1 that nobody else is given while the context is open.

    The socket stays bound without listening: the kernel hands its port to no one who asks for any,
    but who names it and sets SO_REUSEADDR, as this socket does and rank 0's store, may listen on
    it.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
