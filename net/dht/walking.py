"""Driving a look-up: whoever it names is asked, side by side, until it is over."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable

import trio

from net import errors
from net.dht.lookup import Lookup
from net.dht.table import Contact

logger = logging.getLogger(__name__)


async def walk(
    lookup: Lookup,
    ask: Callable[[Contact], Awaitable[Iterable[Contact]]],
    *,
    note_silence: Callable[[Contact], None],
    look_s: float,
    is_enough: Callable[[], bool] = lambda: False,
) -> None:
    """Return when the look-up is over.

    Args:
        lookup: a new one.
        ask: asks one server who is nearer. Raises: NetError, which is that server's failure.
        note_silence: told of each that failed, and of those that were waited for in vain.
        look_s: the longest between two looks at the time.
        is_enough: whether it is over early, looked at after each answer.
    """
    async with trio.open_nursery() as nursery:

        async def put(contact: Contact) -> None:
            try:
                closer = await ask(contact)
            except errors.NetError as error:
                logger.debug("look-up: %s: %s", contact.peer_id, error)
                lookup.failed(contact.peer_id)
                note_silence(contact)
            else:
                lookup.answered(contact.peer_id, closer)
            go_on()

        async def watch_the_time() -> None:
            while True:
                await trio.sleep_until(min(lookup.deadline, trio.current_time() + look_s))
                go_on()

        def go_on() -> None:
            lookup.pass_time(trio.current_time())
            for contact in lookup.next_queries(trio.current_time()):
                nursery.start_soon(put, contact)
            if lookup.is_done or is_enough():
                nursery.cancel_scope.cancel()

        nursery.start_soon(watch_the_time)
        go_on()
    for contact in lookup.slow:
        note_silence(contact)
