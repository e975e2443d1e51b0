"""The blocking face of a swarm: trio runs in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING

import trio

from client.portal import Portal, refuse_in_trio
from client.swarm import AsyncSwarm, Peer, ServedModel, open_swarm

if TYPE_CHECKING:
    from client.models.bloom import DistributedBloomForCausalLM
    from client.modules.obtaining import ObtainedModule
    from client.tuning.methods import Method
    from net.files.models import FileProgress
    from net.identity import PeerId
    from net.modules.finding import FoundModule

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

    def modules(self, model: str) -> list[FoundModule]:
        """The modules that somebody has for a model: see ``AsyncSwarm.modules``."""
        return self._portal.call(self._swarm.modules, model)

    def get_module(self, module: str) -> ObtainedModule:
        """A module that somebody has published: see ``AsyncSwarm.get_module``."""
        return self._portal.call(self._swarm.get_module, module)

    def peers(self) -> list[Peer]:
        """The nodes, each with a round trip measured now."""
        return self._portal.call(self._swarm.peers)

    def model(
        self,
        name: str,
        *,
        allow: Iterable[str | PeerId] | None = None,
        block: Iterable[str | PeerId] = (),
        pins: Mapping[tuple[int, int], str | PeerId] | None = None,
        mixed_numerics: bool = False,
        local_blocks: int = 0,
        tuning: Method | Sequence[Method] | None = None,
        module: str | PathLike[str] | None = None,
        progress: FileProgress | None = None,
    ) -> DistributedBloomForCausalLM:
        """A model of the swarm, as a transformers ``GenerationMixin`` with its ``.tokenizer``.

        Args:
            name: as served, or the path of its checkpoint's folder, or ``NAME@DIGEST`` (see ``AsyncSwarm.model``).
            allow: the only peers to use, by PeerId; all by default.
            block: peers not to use.
            pins: who must compute certain blocks: ``{(start, end): PeerId}``.
            mixed_numerics: whether a chain may compute some blocks with other numerics than the rest where it cannot be
                had otherwise (a warning says so): the tokens are then those of no one machine.
            local_blocks: compute so many of the first blocks, and of the last ones, here, in fp32 on the CPU. Nodes
                then see hidden states from within the model alone. Where they compute with other numerics, the tokens
                are those of blocks that are mixed so.
            tuning: what to train: a method of ``client.tuning`` such as ``LoRA(rank=8)``, or several in a list. Its
                parameters are ``model.tuned.parameters()``.
            module: what was trained before, to be used or trained further: the folder that ``save_pretrained`` or PEFT
                wrote, or what somebody has published: ``NAME@HASH``, or ``NAME`` if there is but one. Whoever has it
                sends it; what is not as its author signed it, or does not fit, is refused.
            progress: called in another thread with (name, bytes that are here, bytes in all) of files that nodes give.

        Raises:
            UnknownModel: nobody serves it, or its files are not on this machine and nobody gives them.
            TypeError, InvalidInput: options that cannot be, and what to do.
        """
        from client.models.loading import load

        return load(
            name,
            self.models(),
            self._swarm,
            self._portal,
            allow=allow,
            block=block,
            pins=pins,
            mixed_numerics=mixed_numerics,
            local_blocks=local_blocks,
            tuning=tuning,
            module=module,
            progress=progress,
        )

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
