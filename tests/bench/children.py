"""The processes of a benchmark: nodes, relays and clients. None outlives it, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import trio

from net.nurseries import open_service_nursery
from tests.bench.child import NONE
from tests.bench.links import Links, Place

START_S = 60.0
MAX_LINE_BYTES = 1 << 20
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
NODE_OPTIONS = ("--quantize", "fp32", "--threads", "1")
NEVER_ALONE = ("--json", "--until-eof", "--no-mdns", "--no-port-mapping")


class ChildFailed(Exception):
    """A process of the benchmark did not do what it should; the text has its last words."""


class Child:
    """One running process that speaks JSON on standard output, a line at a time; what it logs goes to a file.

    Attributes:
        ready: its first line, once ``started`` has returned.
    """

    def __init__(self, name: str, popen: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.pid = popen.pid
        self.ready: dict[str, Any] = {}
        self._popen = popen
        self._log = log
        self._out = _stream(popen.stdout)
        self._in = _stream(popen.stdin)
        self._heard = b""

    async def line(self) -> dict[str, Any]:
        """The next line of standard output.

        Raises:
            ChildFailed: it has ended.
        Cancellation: nothing is lost.
        """
        while b"\n" not in self._heard:
            data = await self._out.receive_some()
            if not data or len(self._heard) > MAX_LINE_BYTES:
                raise ChildFailed(f"{self.name} has ended: {self.last_words()}")
            self._heard += data
        line, self._heard = self._heard.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        return found

    async def tell(self, **order: Any) -> None:
        """Write one line to standard input.

        Raises:
            ChildFailed: it has ended.
        """
        try:
            await self._in.send_all(json.dumps(order).encode() + b"\n")
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ChildFailed(f"{self.name} has ended: {self.last_words()}") from error

    async def ask(self, **order: Any) -> dict[str, Any]:
        """``tell``, and the line that answers."""
        await self.tell(**order)
        return await self.line()

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        self._popen.send_signal(number)

    @property
    def cpu_s(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def has_ended(self) -> bool:
        return self._popen.poll() is not None

    async def ended(self) -> None:
        """Wait for its end."""
        with suppress(ProcessLookupError), _pidfd(self.pid) as fd:
            await trio.lowlevel.wait_readable(fd)
        self._popen.wait()

    def kill(self) -> None:
        """SIGKILL, which also a stopped process obeys."""
        if self._popen.poll() is None:
            self._popen.kill()
            self._popen.wait()

    async def aclose(self) -> None:
        """Kill it, and free what we have of it."""
        self.kill()
        with trio.CancelScope(shield=True):
            await self._out.aclose()
            await self._in.aclose()

    def last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self._popen.poll()}"


def _stream(pipe: IO[bytes] | None) -> trio.lowlevel.FdStream:
    if pipe is None:
        raise ValueError("not piped")
    fd = os.dup(pipe.fileno())
    pipe.close()
    return trio.lowlevel.FdStream(fd)


@contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


class Family:
    """All children of a benchmark, and the folder where they keep their things. Made by ``family``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._running: list[Child] = []

    def start(self, name: str, *arguments: str, place: Place | None = None) -> Child:
        """``python -m ARGUMENTS...``, in the main thread. The name is also that of its data folder.

        One that is started again under its name is the same peer as before.
        """
        announced = NONE if place is None or not place.front else place.announced
        popen = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.bench.child"),
                *(str(os.getpid()), NONE if place is None else place.source, announced, *arguments),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.folder / f"{name}.log").open("ab"),
            env={
                **os.environ,
                "RACEME_HOME": str(self.folder / name),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
            },
            start_new_session=True,  # Ctrl-C is for the benchmark alone
        )
        child = Child(name, popen, self.folder / f"{name}.log")
        self._running.append(child)
        return child

    async def started(self, child: Child) -> Child:
        """Wait for its first line.

        Raises:
            ChildFailed: it ended, or said nothing in time.
        """
        with trio.move_on_after(START_S):
            child.ready = await child.line()
            return child
        raise ChildFailed(f"{child.name} did not start in {START_S:g} s: {child.last_words()}")

    def relay(self, name: str, *, bootstrap: Sequence[str] = (), place: Place | None = None) -> Child:
        """``raceme relay``; its address is ``ready["address"]``."""
        listen = LOOPBACK if place is None else place.listen
        known = [part for address in bootstrap for part in ("--bootstrap", address)]
        return self.start(name, "client", "relay", "--listen", listen, *known, *NEVER_ALONE, place=place)

    def node(
        self,
        name: str,
        span: str,
        *,
        bootstrap: Sequence[str],
        model: str = "bloom-tiny",
        place: Place | None = None,
        options: Sequence[str] = NODE_OPTIONS,
    ) -> Child:
        """``raceme serve``, of blocks ``span`` in fp32."""
        listen = LOOPBACK if place is None else place.listen
        known = [part for address in bootstrap for part in ("--bootstrap", address)]
        command = ("client", "serve", model, "--blocks", span, "--listen", listen, *options, *known, *NEVER_ALONE)
        return self.start(name, *command, place=place)

    def client(self, name: str, *, place: Place | None = None) -> Child:
        """``tests.bench.generating``."""
        return self.start(name, "tests.bench.generating", place=place)

    async def end(self, child: Child) -> None:
        """Kill it, and forget it."""
        self._running.remove(child)
        await child.aclose()

    async def aclose(self) -> None:
        for child in self._running:
            child.kill()
        while self._running:
            await self._running.pop().aclose()


@asynccontextmanager
async def family() -> AsyncIterator[Family]:
    """Children that are all killed at the end of the block, by their process ids; SIGTERM ends the block, too.

    Raises:
        ChildFailed: this system cannot do it.
    """
    if not sys.platform.startswith("linux"):
        raise ChildFailed("this benchmark needs Linux: /proc, and many loopback addresses")
    with tempfile.TemporaryDirectory(prefix="raceme-bench-", ignore_cleanup_errors=True) as folder:
        made = Family(Path(folder))
        try:
            async with open_service_nursery() as nursery:
                nursery.start_soon(_heed_sigterm)
                yield made
                nursery.cancel_scope.cancel()
        finally:
            await made.aclose()


async def _heed_sigterm() -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as coming:
        async for _ in coming:
            raise SystemExit(128 + signal.SIGTERM)


@asynccontextmanager
async def swarm(
    children: Family,
    spans: Sequence[str],
    *,
    links: Links | None = None,
    model: str = "bloom-tiny",
    prefix: str = "",
    options: Sequence[str] = NODE_OPTIONS,
) -> AsyncIterator[tuple[str, list[Child]]]:
    """A relay and nodes; gives the address to start from, and all of the processes. They are killed afterwards."""
    made = []

    async def place(name: str) -> Place | None:
        return None if links is None else await links.place(name)

    try:
        name = f"{prefix}relay"
        made.append(children.relay(name, place=await place(name)))
        address = str((await children.started(made[0])).ready["address"])
        for number, span in enumerate(spans):
            name = f"{prefix}node-{number}"
            at = await place(name)
            made.append(children.node(name, span, bootstrap=[address], model=model, place=at, options=options))
        for child in made[1:]:
            await children.started(child)
        yield address, made
    finally:
        with trio.CancelScope(shield=True):
            for child in made:
                await children.end(child)
