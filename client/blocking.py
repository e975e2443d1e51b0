"""The blocking face of a swarm: trio runs in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import trio

from client.portal import Portal
from client.swarm import AsyncSwarm, Peer, ServedModel, open_swarm

if TYPE_CHECKING:
    from client.models.bloom import DistributedBloomForCausalLM

CLOSE_S = 5.0


class Swarm:
    """Made by ``client.connect``, which says what it takes. Any thread may use it."""

    def __init__(self, bootstrap: str | Sequence[str], *, timeout_s: float) -> None:
        self._stop: trio.Event | None = None
        ready: queue.SimpleQueue[tuple[AsyncSwarm, Portal] | BaseException] = queue.SimpleQueue()

        async def main() -> None:
            stop = self._stop = trio.Event()
            async with open_swarm(bootstrap, timeout_s=timeout_s) as swarm:
                ready.put((swarm, Portal(trio.lowlevel.current_trio_token())))
                await stop.wait()

        def thread() -> None:
            try:
                trio.run(main)
            except BaseException as error:  # noqa: BLE001  handed to the thread that waits
                ready.put(error)

        self._thread = threading.Thread(target=thread, name="raceme-client", daemon=True)
        self._thread.start()
        outcome = ready.get()
        if isinstance(outcome, BaseException):
            raise outcome
        self._swarm, self._portal = outcome

    def models(self) -> list[ServedModel]:
        """What is being served, block by block."""
        return self._portal.call(self._swarm.models)

    def peers(self) -> list[Peer]:
        """The nodes, each with a round trip measured now."""
        return self._portal.call(self._swarm.peers)

    def model(self, name: str) -> DistributedBloomForCausalLM:
        """A model of the swarm, as a transformers ``GenerationMixin`` with its ``.tokenizer``.

        Args:
            name: as served, or the folder of its checkpoint (see ``AsyncSwarm.model``).

        Raises:
            UnknownModel: nobody serves it, or its files are not on this machine.
        """
        from client.models.bloom import load

        return load(name, self.models(), self._swarm, self._portal)

    def close(self) -> None:
        """End all sessions and connections. Closing twice is fine."""
        stop = self._stop
        if self._thread.is_alive() and stop is not None:

            async def set_stop() -> None:
                stop.set()

            try:
                self._portal.call(set_stop)
            except Exception as error:
                if not isinstance(error.__cause__, trio.RunFinishedError):
                    raise
            self._thread.join(CLOSE_S)

    def __enter__(self) -> Swarm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
