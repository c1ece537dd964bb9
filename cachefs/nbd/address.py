"""The URIs by which NBD exports are named.

    nbd://host[:port]/export    nbds://host[:port]/export    nbd+unix:///export?socket=/path

Source: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

PORT = 10809
_MEANT = "nbd://host/export, nbds://host/export or nbd+unix:///export?socket=/path"


@dataclass(frozen=True)
class Address:
    """Where an export is: *host* and *port*, or a *socket* of this machine. str() gives what a log should say."""

    export: str
    host: str = ""
    port: int = PORT
    socket: str = ""
    tls: bool = False

    def __str__(self) -> str:
        place = self.socket or (f"[{self.host}]" if ":" in self.host else self.host) + f":{self.port}"
        return f"{self.export!r} at {place}"


def parse_uri(uri: str) -> Address:
    """Raises: ValueError with a sentence."""
    try:
        parts = urlsplit(uri)
        port, host = parts.port, parts.hostname
    except ValueError as exc:
        raise ValueError(f"{uri!r} is not an NBD URI: {exc}") from None
    export = unquote(parts.path.removeprefix("/"))
    if len(export.encode()) > 4096 or "\0" in export:
        raise ValueError("the name of an export has at most 4096 bytes, and no NUL")
    if parts.username or parts.password or parts.fragment:
        raise ValueError(f"{uri!r} has a user or a fragment, which NBD has no use for: write {_MEANT}")
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.scheme == "nbd+unix":
        socket = query.pop("socket", "")
        if host or query or not socket.startswith("/"):
            raise ValueError(f"{uri!r} must name its socket by an absolute path: write nbd+unix:///export?socket=/path")
        return Address(export, socket=socket)
    if parts.scheme not in ("nbd", "nbds"):
        raise ValueError(f"{uri!r} is not an NBD URI: write {_MEANT}")
    if not host or query:
        raise ValueError(f"{uri!r} must have a host and no query: write {_MEANT}")
    return Address(export, host=host, port=PORT if port is None else port, tls=parts.scheme == "nbds")
