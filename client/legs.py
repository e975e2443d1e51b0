"""One node of a session's chain: the stream to it, and how it is kept.

A node keeps a session whose connection broke for a while. So whoever is lost is looked for where it was and where it
announces itself now, and the session goes on there without sending anything again; and one that is reached through a
relay is left for a direct connection as soon as there is one.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import trio

from client.errors import InvalidInput, UnknownModel
from client.routing import Hop
from net import errors
from net.host import Host
from net.mux.base import Stream
from net.nurseries import open_service_nursery
from net.protocol import session as wire
from net.protocol.announcement import NodeAnnouncement
from net.rpc import lane, packing
from net.rpc.framing import Message, encode
from net.rpc.messages import MessageStream, Pieces
from net.swarm import Connection

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 8.0
MOVE_TIMEOUT_S = 4.0
CLOSE_TIMEOUT_S = 1.0
CHECK_S = 0.5  # of waiting, after which a node has to show that it is there
RETURN_S = 12.0  # for a node whose connection broke; it keeps the session for 15
PATIENCE_S = 1.5  # the same, where others could take its place
AGAIN_S = 0.25  # before the next try to reach it
TELL_S = 2.0  # of waiting, after which whoever looks at warnings hears why
LOOK_S = 1.0  # before the next look at what it announces
BUSY_TRIES = 5
MAX_RETRY_AFTER_S = 10.0  # a node that wants to be left alone for longer is asked again all the same
MAX_LEAVING_S = 3600.0
# What a node may blame the caller for when a session is opened. Steps are checked here before they are sent, so that
# a node that refuses one is itself at fault.
CALLERS_FAULT = frozenset({"bad-input", "bad-value", "too-long"})
OWN_QUESTIONS = 2**52  # from here on: numbers of questions that are no steps


class FindNodes(Protocol):
    """Who serves the model."""

    async def __call__(self, *, fresh: bool = True) -> list[NodeAnnouncement]:
        """Those who serve it now, or, where that is not ``fresh``, a moment ago.

        Raises:
            UnknownModel: nobody does.
            NetError: nobody could be asked.
        """


class LegEvents(Protocol):
    """Who is told what happens to a leg; nothing of it may raise."""

    def leg_opened(self, leg: Leg) -> None:
        """Its session is open."""

    def leg_failed(self, leg: Leg, error: errors.PeerFailed) -> None:
        """It is over."""

    def leg_refused(self, leg: Leg, error: InvalidInput) -> None:
        """The node does not open such a session, and that is the caller's fault."""

    def leg_lost(self, leg: Leg) -> None:
        """The connection broke; it is being looked for."""

    def leg_interrupted(self, leg: Leg) -> None:
        """It goes on over another stream."""

    def leg_leaving(self, leg: Leg, seconds: float) -> None:
        """Its node will serve for so long and no longer."""

    def leg_answered(self, leg: Leg, number: int, message: Message) -> None:
        """A step's answer, or what came instead of one."""

    def leg_replaceable(self, leg: Leg, nodes: list[NodeAnnouncement]) -> bool:
        """Whether others of these could take its place."""

    def leg_linked(self, leg: Leg, following: int, error: errors.RpcError | None) -> None:
        """Its node can hand on to another leg's, or cannot."""

    def leg_placed(self, leg: Leg, number: int, state: str) -> None:
        """Its node has said where a step is."""


class Leg:
    """A hop, while a session is open on it. Start :meth:`run` in a nursery; it ends by itself when the leg is over.

    Attributes:
        key: the core's number of it.
        hop: which blocks, and who has them.
        push_token: by which other nodes may hand on to it; known once it is open.
    """

    def __init__(self, key: int, hop: Hop, host: Host, find_nodes: FindNodes, events: LegEvents) -> None:
        self.key = key
        self.hop = hop
        self.push_token = b""
        self._host = host
        self._node = hop.node
        self._find_nodes = find_nodes
        self._events = events
        self._stream: Stream | None = None
        self._messages: MessageStream | None = None
        self._connection: Connection | None = None
        self._token = b""
        self._numbers = itertools.count(OWN_QUESTIONS)
        self._asked: dict[int, tuple[str, int]] = {}  # questions that are no steps: of what kind, about what
        self._outbox, self._outlet = trio.open_memory_channel[Pieces](math.inf)
        self._is_idle = True
        self._check = trio.CancelScope()  # ends when the node has to show that it is there
        self._stirred = trio.Event()  # there is something to look at before
        self._attempt = trio.CancelScope()  # at reaching a node that is lost
        self._scope = trio.CancelScope()

    @property
    def round_trip_s(self) -> float | None:
        """To the node and back, as its connection measures it; ``None`` until it has."""
        return None if self._connection is None else self._connection.mux.round_trip_s

    async def run(self, request: wire.Open) -> None:
        """Open the session, and keep it until :meth:`end` or the node's failure.

        Cancellation: frees the session on its node, within a second.
        """
        try:
            with self._scope:
                await self._open(request)
                self._events.leg_opened(self)
                while True:
                    error = await self._talk()
                    if not self._may_return(error):
                        raise error
                    self._events.leg_lost(self)
                    await self._return(error)
                    self._events.leg_interrupted(self)
        except errors.PeerFailed as error:
            self._events.leg_failed(self, error)
        except InvalidInput as error:
            self._events.leg_refused(self, error)
        finally:
            with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                if self._stream is not None:
                    await self._stream.aclose()

    def end(self) -> None:
        """Free the session on its node, soon."""
        self._scope.cancel()

    def set_idle(self, is_idle: bool) -> None:
        """Whether nothing is waited for: then nobody has to show that it is there."""
        if is_idle != self._is_idle:
            self._is_idle = is_idle
            self._check.deadline = math.inf if is_idle else trio.current_time() + CHECK_S
            if is_idle and self._connection is not None and self._connection.relayed:
                self._stirred.set()

    # What it is told

    def send(self, message: Message) -> None:
        """Have a message sent.

        Raises:
            LocalProtocolError: it is too large.
        """
        self._outbox.send_nowait(encode(message))

    def link(self, following: Leg) -> None:
        """Have its node reach another leg's."""
        link = wire.Link(
            peer_id=following.hop.node.peer_id, addresses=following.hop.node.addresses, token=following.push_token
        )
        self._question("link", following.key, link.to_fields())

    def ask_where(self, number: int) -> None:
        """Have its node say where a step is."""
        self._question("where", number, {"of": number})

    def _question(self, method: str, about: int, fields: Mapping[str, Any]) -> None:
        number = next(self._numbers)
        self._asked[number] = method, about
        self.send(Message(header={**fields, "m": method, "id": number}))

    # The stream

    async def _open(self, request: wire.Open) -> None:
        """Begin the session.

        Raises:
            PeerFailed: the node cannot be reached, or does not want it.
            InvalidInput: it is too much for the node.
        """
        peer_id = self._node.peer_id
        self._stream, self._connection = await self._open_stream(OPEN_TIMEOUT_S)
        self._messages = MessageStream(self._stream)
        try:
            answer = await self._ask(self._messages, "open", request.to_fields(), OPEN_TIMEOUT_S)
        except errors.RpcError as error:
            if error.code in CALLERS_FAULT:
                raise InvalidInput(error.message) from error
            raise errors.PeerFailed(peer_id, str(error)) from error
        try:
            self._token = wire.read_token(answer.header)
            self.push_token = wire.read_token(answer.header, "push_token")
        except errors.RemoteProtocolError as error:
            raise errors.PeerFailed(peer_id, f"opened a session with {error}") from error

    async def _open_stream(self, timeout_s: float, *, at_once: bool = False) -> tuple[Stream, Connection]:
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
        return stream, connection

    async def _ask(self, messages: MessageStream, method: str, fields: Mapping[str, Any], timeout_s: float) -> Message:
        """Ask on a stream that nobody else reads, again while the node is busy.

        Raises:
            RpcError: refused.
            PeerFailed: no answer in time, or no way to get one.
        """
        why = ""
        for tries_left in reversed(range(BUSY_TRIES)):
            number = next(self._numbers)
            try:
                with trio.fail_after(timeout_s):
                    await messages.send(encode(Message(header={**fields, "m": method, "id": number})))
                    answer = await messages.receive()
                    while answer is not None and answer.header.get("id") != number:
                        answer = await messages.receive()  # a notice
                if answer is None:
                    raise errors.PeerFailed(self._node.peer_id, f"ended the stream instead of answering {method!r}")
                if "e" not in answer.header:
                    return answer
                refused = lane.read_refusal(answer.header)
            except trio.TooSlowError as error:
                raise errors.PeerFailed(self._node.peer_id, f"no answer to {method!r} in {timeout_s:g} s") from error
            except trio.ClosedResourceError as error:
                raise errors.PeerFailed(self._node.peer_id, "the stream was closed here") from error
            except errors.PeerFailed:
                raise
            except errors.NetError as error:
                raise errors.PeerFailed(self._node.peer_id, str(error)) from error
            if refused.retry_after_s is None:
                raise refused
            why = refused.message
            if tries_left:
                await trio.sleep(min(refused.retry_after_s, MAX_RETRY_AFTER_S))
        raise errors.PeerFailed(self._node.peer_id, f"put off {BUSY_TRIES} times in a row: {why}")

    async def _talk(self) -> errors.PeerFailed:
        """Send and read until that is not possible any more; why."""
        failure = errors.PeerFailed(self._node.peer_id, "the stream is over")
        with trio.CancelScope() as scope:
            async with open_service_nursery() as nursery:

                async def guarded(task: Callable[[], Awaitable[None]]) -> None:
                    nonlocal failure
                    try:
                        await task()
                    except (errors.NetError, trio.ClosedResourceError) as error:
                        if not scope.cancel_called:
                            failure = errors.PeerFailed(self._node.peer_id, str(error) or "the stream is closed")
                            failure.__cause__ = error
                    scope.cancel()

                nursery.start_soon(guarded, self._write)
                nursery.start_soon(guarded, self._read)
                nursery.start_soon(guarded, self._watch)
                nursery.start_soon(guarded, self._wait_for_end)
        return failure

    async def _write(self) -> None:
        messages = self._messages
        async for pieces in self._outlet:
            if messages is not None:
                await messages.send(pieces)

    async def _read(self) -> None:
        while self._messages is not None and (message := await self._messages.receive()) is not None:
            try:
                self._take(message)
            except errors.RemoteProtocolError as error:
                raise errors.RemoteProtocolError(f"says what makes no sense: {error}") from error
        raise errors.NetError("ended the session")

    def _take(self, message: Message) -> None:
        header = message.header
        if "id" not in header:
            if "leaving" in header:
                self._events.leg_leaving(self, packing.number(header, "leaving", 0.0, MAX_LEAVING_S))
            return
        number = wire.read_id(header)
        if number < OWN_QUESTIONS:
            self._events.leg_answered(self, number, message)
            return
        method, about = self._asked.pop(number, ("", 0))
        refused = lane.read_refusal(header) if "e" in header else None
        if method == "link":
            self._events.leg_linked(self, about, refused)
        elif method == "where" and refused is None:
            self._events.leg_placed(self, about, packing.field(header, "state", str, max_length=16))

    async def _watch(self) -> None:
        """Notice when the node is lost, though nothing says so, and leave relays."""
        connection = self._connection
        while connection is not None:
            self._stirred = trio.Event()
            if connection.ended.is_set():
                raise errors.ConnectionLost("the connection is lost")
            best = self._host.swarm.connection(self._node.peer_id)
            if connection.relayed and best is not None and not best.relayed:
                raise errors.ConnectionLost("there is a direct way now")
            deadline = math.inf if self._is_idle else trio.current_time() + CHECK_S
            with trio.CancelScope(deadline=deadline) as self._check:
                await self._stirred.wait()
            if self._check.cancelled_caught:
                connection.mux.check()

    async def _wait_for_end(self) -> None:
        if self._connection is not None:
            await self._connection.ended.wait()
            self._stirred.set()
            await trio.sleep_forever()

    # A node that is lost

    def _may_return(self, error: errors.PeerFailed) -> bool:
        """Whether the connection broke, and the node may be well."""
        return isinstance(error.__cause__, errors.ConnectionLost | errors.StreamReset)

    async def _move(self) -> None:
        """Go on with the session over another stream.

        Raises:
            PeerFailed: it cannot be had; the leg is as it was.
        """
        stream, connection = await self._open_stream(MOVE_TIMEOUT_S, at_once=True)
        messages = MessageStream(stream)
        # A node that was asked gives the session to this stream, and to no other: nobody must break it off in between.
        with trio.move_on_after(MOVE_TIMEOUT_S, shield=True) as scope:
            try:
                await self._ask(messages, "resume", {"token": self._token}, MOVE_TIMEOUT_S)
            except errors.RpcError as error:
                await stream.aclose()
                raise errors.PeerFailed(self._node.peer_id, str(error)) from error
            except BaseException:
                await stream.aclose()
                raise
            old, self._stream, self._messages, self._connection = self._stream, stream, messages, connection
            self._asked.clear()
            while True:  # what was to be sent on the old one is decided anew
                try:
                    self._outlet.receive_nowait()
                except trio.WouldBlock:
                    break
            logger.info("goes on with %s at %s", self._node.peer_id, connection.remote)
            if old is not None:
                await old.aclose()
        if scope.cancelled_caught:
            raise errors.PeerFailed(self._node.peer_id, f"did not take the session up in {MOVE_TIMEOUT_S:g} s")

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
                if self._events.leg_replaceable(self, nodes):
                    scope.deadline = min(scope.deadline, began + PATIENCE_S)
            await trio.sleep(LOOK_S)
