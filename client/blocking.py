"""The blocking face of a swarm: trio runs in a thread of its own."""

from __future__ import annotations

import inspect
import queue
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import wraps
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import trio

from client.portal import Portal, refuse_in_trio
from client.swarm import AsyncSwarm, Peer, ServedModel, open_swarm

if TYPE_CHECKING:
    from client.models.bloom import DistributedBloomForCausalLM
    from client.modules.obtaining import ObtainedModule
    from net.modules.finding import FoundModule

CLOSE_S = 5.0

P = ParamSpec("P")
T = TypeVar("T")


def _as(
    method: Callable[Concatenate[AsyncSwarm, P], Awaitable[T]],
) -> Callable[[Callable[..., T]], Callable[Concatenate[Swarm, P], T]]:
    """Gives a blocking method the arguments of an asynchronous one, and its docstring: for type checkers, for ``help``,
    and for callers, who hear of a wrong argument before anything takes time.
    """
    signature = inspect.signature(method)

    def decorate(blocking: Callable[..., T]) -> Callable[Concatenate[Swarm, P], T]:
        @wraps(blocking)
        def call(self: Swarm, /, *args: P.args, **kwargs: P.kwargs) -> T:
            signature.bind(self, *args, **kwargs)
            return blocking(self, *args, **kwargs)

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__doc__ = method.__doc__
        return call

    return decorate


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

    @_as(AsyncSwarm.model)
    def model(self, name: str, **options: Any) -> DistributedBloomForCausalLM:
        """See ``AsyncSwarm.model``. Runs in the caller's thread, so that Ctrl-C ends it."""
        from client.models.loading import load

        return load(name, self.models(), self._swarm, self._portal, **options)

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
