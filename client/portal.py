"""From threads into the event loop: how blocking code calls asynchronous code."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from client.errors import ClientError

T = TypeVar("T")


class Portal:
    """Runs functions in the event loop of ``token`` from any other thread."""

    def __init__(self, token: trio.lowlevel.TrioToken) -> None:
        self._token = token

    def call(self, function: Callable[..., Awaitable[T]], *args: object) -> T:
        """``await function(*args)`` over there; blocks here.

        Raises:
            ClientError: the event loop has ended, or this is its own thread.
        """
        try:
            return trio.from_thread.run(function, *args, trio_token=self._token)
        except trio.RunFinishedError as error:
            raise ClientError("the swarm was closed") from error
        except RuntimeError as error:
            if "deadlock" in str(error) or "from within Trio" in str(error):
                raise ClientError(
                    "this call blocks: inside trio, use trio.to_thread.run_sync(model.generate, ...)"
                ) from error
            raise
