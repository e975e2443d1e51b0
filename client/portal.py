"""From threads into the event loop: how blocking code calls asynchronous code."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

import trio

from client.errors import ClientError, SwarmClosed

T = TypeVar("T")


class Portal:
    """Runs functions in the event loop of ``token`` from any other thread."""

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        self._token = token

    def call(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        """``await function(*args)`` over there; blocks here. Ctrl-C here cancels it there.

        Raises:
            SwarmClosed: the event loop has ended.
            ClientError: the caller is in an event loop of trio.
        """
        refuse_in_trio()
        scope = trio.CancelScope()

        async def work() -> T:
            with scope:
                await trio.lowlevel.checkpoint_if_cancelled()  # else it might begin when what follows is over
                return await function(*args)
            raise ClientError("interrupted")  # for nobody: who would have waited has been interrupted

        try:
            return trio.from_thread.run(work, trio_token=self._token)
        except (trio.RunFinishedError, trio.Cancelled) as error:
            raise SwarmClosed("the swarm was closed; connect again with client.connect()") from error
        except KeyboardInterrupt:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(scope.cancel)
            raise


def refuse_in_trio() -> None:
    """For what blocks: a task that calls it would wait for itself.

    Raises:
        ClientError: called from a task of trio.
    """
    if trio.lowlevel.in_trio_task():
        raise ClientError(
            "this call blocks: inside trio, use client.open_swarm() and trio.to_thread.run_sync(model.generate, ...)"
        )
