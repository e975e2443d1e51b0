"""One node of a session's chain: the stream to it, and how it is kept.

A node keeps a session whose connection broke for a while. So whoever is lost is looked for where it was and where it
announces itself now, and the session goes on there without sending anything again; and one that is reached through a
relay is left for a direct connection as soon as there is one.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from client.errors import InvalidInput, MissingBlocks, UnknownModel
from client.routing import Hop, choose_chain
from net import errors
from net.host import Host
from net.nurseries import open_service_nursery
from net.protocol import session as wire
from net.protocol.announcement import NodeAnnouncement
from net.rpc.framing import Message
from net.rpc.lane import Lane
from net.swarm import Connection

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 8.0
MOVE_TIMEOUT_S = 4.0
CHECK_S = 0.5  # of waiting, after which a node has to show that it is there
RETURN_S = 12.0  # for a node whose connection broke; it keeps the session for 15
PATIENCE_S = 1.5  # the same, where others could take its place
AGAIN_S = 0.25  # before the next try to reach it
TELL_S = 2.0  # of waiting, after which whoever looks at warnings hears why
LOOK_S = 1.0  # before the next look at what it announces
BUSY_TRIES = 5
MAX_RETRY_AFTER_S = 10.0  # a node that wants to be left alone for longer is asked again all the same
# What a node may blame the caller for when a session is opened. Steps are checked here before they are sent, so that
# a node that refuses one is itself at fault.
CALLERS_FAULT = frozenset({"bad-input", "bad-value", "too-long"})

FindNodes = Callable[[], Awaitable[list[NodeAnnouncement]]]


class Leg:
    """A hop, once it has been opened.

    Args:
        host: dials.
        hop: which blocks, and who has them.
        find_nodes: who serves the model now.
    """

    def __init__(self, host: Host, hop: Hop, find_nodes: FindNodes) -> None:
        self.hop = hop
        self._host = host
        self._node = hop.node
        self._find_nodes = find_nodes
        self._lane: Lane | None = None
        self._connection: Connection | None = None
        self._token: bytes | None = None
        self._in_use = trio.Lock()  # by a call, or by what moves it
        self._attempt = trio.CancelScope()  # at reaching a node that is lost

    async def open(self, *, batch: int, max_length: int) -> None:
        """Begin the session.

        Raises:
            PeerFailed: the node cannot be reached, or does not want it.
            InvalidInput: it is too much for the node.
        """
        node = self._node
        request = wire.Open(
            digest=node.digest, start=self.hop.start, end=self.hop.end, batch=batch, max_length=max_length
        )
        self._lane, self._connection = await self._open_lane(OPEN_TIMEOUT_S)
        answer = await _ask(self._lane, "open", Message(header=request.to_fields()), OPEN_TIMEOUT_S)
        try:
            self._token = wire.read_token(answer.header) if "token" in answer.header else None
        except errors.RemoteProtocolError as error:
            raise errors.PeerFailed(node.peer_id, f"opened a session with {error}") from error

    async def call(self, method: str, message: Message, timeout_s: float) -> Message:
        """Ask the node; once more, should the connection break meanwhile.

        Raises:
            PeerFailed: it does not answer, or not any more; the leg is over.
        Cancellation: the leg is over.
        """
        async with self._in_use:
            await self._leave_relay()
            while True:
                lane = self._lane
                if lane is None:
                    raise errors.PeerFailed(self._node.peer_id, "has no session open")
                try:
                    return await _ask(lane, method, message, timeout_s)
                except errors.PeerFailed as error:
                    if not self._may_return(error):
                        raise
                    await self._return(error)

    async def keep(self) -> None:
        """Notice when the node is lost and find it again, and leave relays, until cancelled.

        Raises:
            PeerFailed: it is lost for good.
        """
        while True:
            if not self._in_use.locked():
                async with self._in_use:
                    await self._leave_relay()
            connection = self._connection
            if connection is None:
                return
            with trio.move_on_after(CHECK_S):
                await connection.ended.wait()
            if connection.ended.is_set():
                async with self._in_use:
                    if self._connection is connection:  # no call has noticed before
                        error = errors.PeerFailed(self._node.peer_id, "the connection is lost")
                        if self._token is None:
                            raise error
                        await self._return(error)
            else:
                connection.mux.check()

    async def aclose(self) -> None:
        """Free the session on its node."""
        if self._lane is not None:
            await self._lane.aclose()

    # Reaching the node

    async def _open_lane(self, timeout_s: float, *, at_once: bool = False) -> tuple[Lane, Connection]:
        """Raises:
        PeerFailed: no connection, or no stream on it.
        """
        node = self._node
        try:
            with trio.fail_after(timeout_s):
                connection = await self._host.connect(node.peer_id, node.addresses, at_once=at_once)
                stream = await self._host.open_stream_over(connection, [wire.PROTOCOL_ID])
        except trio.TooSlowError as error:
            raise errors.PeerFailed(node.peer_id, f"no connection in {timeout_s:g} s") from error
        except errors.PeerFailed:
            raise
        except errors.NetError as error:
            raise errors.PeerFailed(node.peer_id, str(error)) from error
        return Lane(stream, node.peer_id), connection

    async def _move(self) -> None:
        """Go on with the session over another stream.

        Raises:
            PeerFailed: it cannot be had; the leg is as it was.
        """
        lane, connection = await self._open_lane(MOVE_TIMEOUT_S, at_once=True)
        # A node that was asked gives the session to this lane, and to no other: nobody must break it off in between.
        with trio.move_on_after(MOVE_TIMEOUT_S, shield=True) as scope:
            try:
                await _ask(lane, "resume", Message(header={"token": self._token}), MOVE_TIMEOUT_S)
            except BaseException:
                await lane.aclose()
                raise
            old, self._lane, self._connection = self._lane, lane, connection
            logger.info("goes on with %s at %s", self._node.peer_id, connection.remote)
            if old is not None:
                await old.aclose()
        if scope.cancelled_caught:
            raise errors.PeerFailed(self._node.peer_id, f"did not take the session up in {MOVE_TIMEOUT_S:g} s")

    async def _leave_relay(self) -> None:
        """Go on over a direct connection, if there is one by now."""
        if self._token is None or self._connection is None or not self._connection.relayed:
            return
        best = self._host.swarm.connection(self._node.peer_id)
        if best is not None and not best.relayed:
            try:
                await self._move()
            except errors.PeerFailed as error:
                logger.info("goes on through the relay: %s", error)

    # A node that is lost

    def _may_return(self, error: errors.PeerFailed) -> bool:
        """Whether the connection broke, and the node may be well."""
        return self._token is not None and isinstance(error.__cause__, errors.ConnectionLost | errors.StreamReset)

    async def _return(self, error: errors.PeerFailed) -> None:
        """Have the session again, wherever the node is now.

        Raises:
            PeerFailed: it does not come back in time, or no longer has the session.
        """
        logger.info("lost: %s", error)
        began = trio.current_time()
        with trio.move_on_after(RETURN_S) as scope:
            async with open_service_nursery() as nursery:
                nursery.start_soon(self._follow, began, scope)
                nursery.start_soon(self._tell_of, scope)
                await self._try_to_move()
                nursery.cancel_scope.cancel()
        if scope.cancelled_caught:
            raise error

    async def _tell_of(self, scope: trio.CancelScope) -> None:
        await trio.sleep(TELL_S)
        start, end, left_s = self.hop.start, self.hop.end, scope.deadline - trio.current_time()
        logger.warning("lost %s (blocks %d:%d); looking for it for %.0f s", self._node.peer_id, start, end, left_s)

    async def _try_to_move(self) -> None:
        while True:
            with trio.CancelScope() as self._attempt:
                try:
                    await self._move()
                    return
                except errors.PeerFailed as reason:
                    logger.info("not resumed yet: %s", reason)
                    if isinstance(reason.__cause__, errors.RpcError):
                        raise
                await trio.sleep(AGAIN_S)

    async def _follow(self, began: float, scope: trio.CancelScope) -> None:
        """Learn where the node is now, and give it less time where others could take its place."""
        while True:
            try:
                nodes = await self._find_nodes()
            except (errors.NetError, UnknownModel) as error:
                logger.info("no news of %s: %s", self._node.peer_id, error)
            else:
                known = self._node
                self._node = next((node for node in nodes if node.peer_id == known.peer_id), known)
                if self._node.addresses != known.addresses:
                    self._attempt.cancel()  # perhaps nobody is there any more, and no answer will come
                try:
                    choose_chain(nodes, avoid={self._node.peer_id: "lost"})
                except MissingBlocks:
                    pass
                else:
                    scope.deadline = min(scope.deadline, began + PATIENCE_S)
            await trio.sleep(LOOK_S)


async def _ask(lane: Lane, method: str, message: Message, timeout_s: float) -> Message:
    """A call whose refusals are sorted: ours, the node's for now, the node's for good."""
    why = ""
    for tries_left in reversed(range(BUSY_TRIES)):
        try:
            return await lane.call(method, message, timeout_s=timeout_s)
        except errors.RpcError as error:
            if method == "open" and error.code in CALLERS_FAULT:
                raise InvalidInput(error.message) from error
            if error.retry_after_s is None:
                raise errors.PeerFailed(lane.peer_id, str(error)) from error
            why = error.message
            if tries_left:
                await trio.sleep(min(error.retry_after_s, MAX_RETRY_AFTER_S))
    raise errors.PeerFailed(lane.peer_id, f"put off {BUSY_TRIES} times in a row: {why}")
