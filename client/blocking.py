"""The blocking face of a swarm: trio runs in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from contextlib import suppress
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING

import trio

from client.portal import Portal, refuse_in_trio
from client.swarm import AsyncSwarm, Peer, ServedModel, open_swarm

if TYPE_CHECKING:
    from client.models.bloom import DistributedBloomForCausalLM

CLOSE_S = 5.0


class Swarm:
    """Made by ``client.connect``, which says what it takes. Any thread may use it."""

    def __init__(
        self,
        bootstrap: str | Sequence[str],
        *,
        timeout_s: float,
        swarm_key: str | PathLike[str] | None = None,
        home: str | PathLike[str] | None = None,
        remember: bool = True,
    ) -> None:
        refuse_in_trio()
        self._closed = False
        self._scope = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken | None = None
        ready: queue.SimpleQueue[tuple[AsyncSwarm, Portal] | BaseException] = queue.SimpleQueue()

        async def main() -> None:
            self._token = trio.lowlevel.current_trio_token()
            if self._closed:
                return
            with self._scope:
                async with open_swarm(
                    bootstrap, timeout_s=timeout_s, swarm_key=swarm_key, home=home, remember=remember
                ) as swarm:
                    ready.put((swarm, Portal(self._token)))
                    await trio.sleep_forever()

        def thread() -> None:
            try:
                trio.run(main)
            except BaseException as error:  # noqa: BLE001  handed to the thread that waits
                ready.put(error)

        self._thread = threading.Thread(target=thread, name="raceme-client", daemon=True)
        self._thread.start()
        try:
            outcome = ready.get()
        except BaseException:  # Ctrl-C
            self.close()
            raise
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
            name: as served, or the path of its checkpoint's folder (see ``AsyncSwarm.model``).

        Raises:
            UnknownModel: nobody serves it, or its files are not on this machine.
        """
        from client.models.bloom import load

        return load(name, self.models(), self._swarm, self._portal)

    def close(self) -> None:
        """End all sessions and connections. Closing twice is fine."""
        self._closed = True
        if self._token is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._scope.cancel)
        self._thread.join(CLOSE_S)

    def __enter__(self) -> Swarm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
