"""The options of the nbd backend, and of those that are made of it."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from typing import Annotated

import pydantic

from cachefs.backends.remote import RemoteConfig
from cachefs.layers.base import Options
from cachefs.nbd.address import parse_uri
from cachefs.units import Duration, LocalPath, Size


def _check_uri(uri: str) -> str:
    parse_uri(uri)
    return uri


def _check_command(command: tuple[str, ...]) -> tuple[str, ...]:
    if not command or not command[0]:
        raise ValueError("is empty: write a program and its arguments, such as [nbdkit, file, /srv/vm1.raw]")
    if any("\0" in word for word in command):
        raise ValueError("has a NUL in it, which no program can be given")
    if os.path.basename(command[0]) == "qemu-nbd" and "--fork" in command:  # may answer before its parent ends
        raise ValueError("has --fork: leave it out, the daemon has to know when its server ends")
    return command


class TlsConfig(Options):
    ca: LocalPath | None = None
    """Certificates of those who may sign the server's, PEM. Default: those that the system trusts."""
    cert: LocalPath | None = None
    """The client's own certificate, PEM, where the server asks for one."""
    key: LocalPath | None = None
    """Its key, PEM. Default: it stands in the file `cert`."""


class ClientOptions(RemoteConfig):
    """What every backend over NBD takes."""

    connections: Annotated[int, pydantic.Field(ge=1, le=16)] = 4
    """How many connections are made to a server that allows several; one to any other."""
    unflushed: Annotated[Size, pydantic.Field(ge=4 << 20, le=16 << 30)] = 64 << 20
    """Memory for changes that the server may lose, as no flush has made them durable; when it is full, one does."""


class NbdConfig(ClientOptions):
    model_config = pydantic.ConfigDict(json_schema_extra={"oneOf": [{"required": ["uri"]}, {"required": ["command"]}]})

    uri: Annotated[str, pydantic.AfterValidator(_check_uri)] | None = None
    """nbd://host/export, nbds://host/export (TLS) or nbd+unix:///export?socket=/path. Default port: 10809."""
    command: Annotated[tuple[str, ...], pydantic.AfterValidator(_check_command)] | None = None
    """Instead of uri: a server to start, such as [nbdkit, file, /srv/vm1.raw]; it is given its socket (LISTEN_FDS)."""
    fence: Annotated[Duration, pydantic.Field(ge=0, le=3600)] = 30.0
    """How long after a lost connection something that was sent over it may still reach the disk; not for a command."""
    tls: TlsConfig | None = None
    """Certificates for nbds://."""

    @property
    def remote_store(self) -> str | None:
        if self.uri is None:
            return f"what `{shlex.join(self.command or ())}` serves"
        address = parse_uri(self.uri)
        return f"export {replace(address, socket=os.path.realpath(address.socket)) if address.socket else address}"

    @pydantic.model_validator(mode="after")
    def _check_whole(self) -> NbdConfig:
        if self.uri is None and self.command is None:
            raise ValueError("has neither 'uri' nor 'command': it needs one of them")
        if self.uri is not None and self.command is not None:
            raise ValueError("has both 'uri' and 'command': keep one of them")
        if self.tls is None:
            return self
        if self.uri is None or not parse_uri(self.uri).tls:
            raise ValueError("tls is given, and no URI with nbds://: nothing would be encrypted")
        if self.tls.key is not None and self.tls.cert is None:
            raise ValueError("tls.key needs tls.cert")
        return self
