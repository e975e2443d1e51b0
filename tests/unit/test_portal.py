"""Blocking calls into the event loop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio
import trio.testing

from client.errors import ClientError
from client.portal import Portal


async def test_what_was_interrupted_before_it_began_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []

    def interrupted(work: Callable[[], Awaitable[None]], *, trio_token: trio.lowlevel.TrioToken) -> None:
        async def quietly() -> None:
            with suppress(ClientError):
                await work()

        trio_token.run_sync_soon(trio.lowlevel.spawn_system_task, quietly)
        raise KeyboardInterrupt

    async def begin() -> None:
        begun.append(1)
        await trio.lowlevel.checkpoint()

    def call() -> None:
        with pytest.raises(KeyboardInterrupt):
            portal.call(begin)

    portal = Portal(trio.lowlevel.current_trio_token())
    monkeypatch.setattr(trio.from_thread, "run", interrupted)
    await trio.to_thread.run_sync(call)
    await trio.testing.wait_all_tasks_blocked()
    assert begun == []
