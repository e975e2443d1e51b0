"""A machine of the simulated internet: a network namespace with programs and sockets; and how it is set up."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from interop.lab import namespaces
from interop.lab.namespaces import LabError
from interop.lab.plan import Addresses

ROOT = Path(__file__).parent.parent.parent


class Machine:
    """A network namespace in which programs run."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.addresses = Addresses()
        self.folder = namespaces.FOLDER / name

    @property
    def address(self) -> str:
        """Its IPv4 address, or else its IPv6 address."""
        found = self.addresses.ipv4 or self.addresses.ipv6
        if found is None:
            raise LabError(f"{self.name} has no address yet: the network is not up")
        return found

    def socket(self, family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
        """A socket of this machine, for use in this process."""
        with namespaces.inside(namespaces.path(self.name)):
            return socket.socket(family, kind)

    async def open_process(self, command: Sequence[str], *, stderr: int | None = None) -> trio.Process:
        """Start a program with its standard input and output piped. Its ``RACEME_HOME`` dies with the lab.

        ``raceme`` and ``python`` are those of this interpreter. The caller ends it; else it ends with the lab. Keep
        the process: when it is collected, its standard input ends.
        """
        tools = str(Path(sys.executable).parent)
        environment = {"PATH": f"{tools}:{os.environ['PATH']}", "RACEME_HOME": str(self.folder)}
        return await trio.lowlevel.open_process(
            ["nsenter", f"--net={namespaces.path(self.name)}", "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=ROOT,
            env={**os.environ, **environment},
            start_new_session=True,  # Ctrl-C is for the lab alone
        )

    @asynccontextmanager
    async def process(self, command: Sequence[str], *, stderr: int | None = None) -> AsyncIterator[trio.Process]:
        """As ``open_process``, killed at the end of the block if it still runs."""
        process = await self.open_process(command, stderr=stderr)
        try:
            yield process
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


async def ip(name: str | None, lines: Sequence[str], *, must: bool = True) -> None:
    """Run ``ip`` with these lines, in a namespace if one is named. Raises: LabError unless ``must`` is False."""
    if lines:
        command = ["ip", *(["-n", name] if name else []), *([] if must else ["-force"]), "-batch", "-"]
        await _command(command, "\n".join(lines), must=must)


async def nft(name: str, rules: str) -> None:
    await _command(["nsenter", f"--net={namespaces.path(name)}", "--", "nft", "-f", "-"], rules)


async def _command(command: Sequence[str], told: str, *, must: bool = True) -> None:
    done = await trio.run_process(command, stdin=told.encode(), capture_stdout=True, capture_stderr=True, check=False)
    if done.returncode and must:
        raise LabError(f"{' '.join(command)}: {done.stderr.decode().strip()}\n{told}")
