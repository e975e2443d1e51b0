"""One node of a session's chain: the stream to it, and how it is kept.

A node keeps a session whose connection broke for a while. So whoever is lost is looked for where it was and where it
announces itself now, and the session goes on there without sending anything again; and one that is reached through a
relay is left for a direct connection as soon as there is one.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
import trio

from client.errors import InvalidInput, UnknownModel
from client.routing import Hop
from compute.tensors import to_wire
from compute.tuning import SpanTuning
from compute.wire_forms import CODEC, Account, Form, Sender
from net import errors
from net.host import Host
from net.mux.base import Stream
from net.nurseries import open_service_nursery
from net.protocol import session as wire
from net.protocol.announcement import NodeAnnouncement
from net.rpc import lane, packing
from net.rpc.framing import Message, Tensor, encode
from net.rpc.messages import MessageStream, Pieces
from net.swarm import Connection

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 8.0
MOVE_TIMEOUT_S = 4.0
CLOSE_TIMEOUT_S = 1.0
CHECK_S = 0.5  # of waiting, after which a node has to show that it is there
RETURN_S = 12.0  # for a node whose connection broke; it keeps the session for 15
PATIENCE_S = 1.5  # the same, where others could take its place
LISTEN_S = 0.05  # between looks whether a node that was asked has answered
AGAIN_S = 0.25  # before the next try to reach it
TELL_S = 2.0  # of waiting, after which whoever looks at warnings hears why
LOOK_S = 1.0  # before the next look at what it announces
BUSY_TRIES = 5
MAX_RETRY_AFTER_S = 10.0  # a node that wants to be left alone for longer is asked again all the same
MAX_LEAVING_S = 3600.0
SENT_TIMEOUT_S = 2.0
# What a node may blame the caller for when a session is opened. Steps are checked here before they are sent, so that
# a node that refuses one is itself at fault.
CALLERS_FAULT = frozenset({"bad-input", "bad-value", "too-long"})
TUNING_PIECE = 1 << 15  # numbers: 128 KiB, which what else goes to the node waits for
TUNING_WINDOW = 8  # pieces on their way
TUNING_PIECE_S = 8.0  # for one to be taken; whoever is slower is not waited for
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

    def leg_uploading(self, leg: Leg) -> None:
        """It is not open yet, but what its session adds is being taken."""

    def leg_failed(self, leg: Leg, error: errors.PeerFailed) -> None:
        """It is over."""

    def leg_refused(self, leg: Leg, error: InvalidInput) -> None:
        """The node does not open such a session, and that is the caller's fault."""

    def leg_lost(self, leg: Leg) -> None:
        """The connection broke; it is being looked for."""

    def leg_silent(self, leg: Leg) -> None:
        """Its node was asked to show that it is there, and has not."""

    def leg_heard(self, leg: Leg) -> None:
        """It has, after all."""

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
        request: what the node is asked for.
        account: of what it has been sent.
    """

    def __init__(
        self,
        key: int,
        hop: Hop,
        request: wire.Open,
        host: Host,
        find_nodes: FindNodes,
        events: LegEvents,
        form: Form,
        tuning: SpanTuning | None = None,
    ) -> None:
        """Begin.

        Args:
            key: the core's number of it.
            hop: which blocks, and who has them.
            request: what the node is asked for.
            host: dials.
            find_nodes: where the node is now.
            events: who is told.
            form: in which it is sent hidden states.
            tuning: what the session adds within the hop's blocks, where the request says so.
        """
        self.key = key
        self.hop = hop
        self.account = Account(form)
        self.request = request
        self._sender = Sender(
            form, may_compress=CODEC in hop.node.codecs, measures_error=request.measures, account=self.account
        )
        self._host = host
        self._node = hop.node
        self._find_nodes = find_nodes
        self._events = events
        self._tuning = tuning
        self._window = trio.Semaphore(TUNING_WINDOW)
        self._stream: Stream | None = None
        self._messages: MessageStream | None = None
        self._connection: Connection | None = None
        self._token = b""  # by which the session can be resumed, once it is open
        self._opened: trio.Event | None = None  # the question whether it can be has been answered
        self._refused: errors.RpcError | None = None  # in this way
        self._asks_first = trio.Event()  # what is to be sent goes behind that question
        self._numbers = itertools.count(OWN_QUESTIONS)
        self._sent: wire.Sent | None = None
        self._said_sent = trio.Event()
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

    async def run(self) -> None:
        """Open the session, and keep it until :meth:`end` or the node's failure.

        Cancellation: frees the session on its node, within a second.
        """
        try:
            with self._scope:
                self._stream, self._connection = await self._open_stream(OPEN_TIMEOUT_S)
                self._messages = MessageStream(self._stream, self._connection.line)
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
            self._said_sent.set()
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

    def send_hidden(self, hidden: torch.Tensor, fields: Mapping[str, Any]) -> None:
        """Have hidden states sent.

        Args:
            hidden: in any numerics; not to be changed afterwards.
            fields: of the message.

        Shapes:
            hidden: [b, t, d]

        Raises:
            BadInput: the leg's form has no room for these values.
            LocalProtocolError: they are too many.
        """
        connection = self._connection or self._host.swarm.connection(self._node.peer_id)
        said, tensor = self._sender.message(hidden, None if connection is None else connection.line.bytes_per_s)
        self.send(Message(header={**fields, **said}, tensors=[tensor]))

    def link(self, following: Leg) -> None:
        """Have its node reach another leg's."""
        node = following.hop.node
        token = following.request.push_token
        link = wire.Link(peer_id=node.peer_id, addresses=node.addresses, token=token, codecs=node.codecs)
        self._question("link", following.key, link.to_fields())

    def ask_where(self, number: int) -> None:
        """Have its node say where a step is."""
        self._question("where", number, {"of": number})

    async def ask_sent(self) -> wire.Sent | None:
        """What its node has sent of the session; ``None`` if it does not say soon."""
        self._sent, self._said_sent = None, trio.Event()
        self._question("sent", 0, {})
        with trio.move_on_after(SENT_TIMEOUT_S):
            await self._said_sent.wait()
        return self._sent

    def _question(self, method: str, about: int, fields: Mapping[str, Any]) -> None:
        self._outbox.send_nowait(self._asking(method, about, fields))

    def _asking(self, method: str, about: int, fields: Mapping[str, Any], tensors: Sequence[Tensor] = ()) -> Pieces:
        number = next(self._numbers)
        self._asked[number] = method, about
        return encode(Message(header={**fields, "m": method, "id": number}, tensors=tensors))

    # The stream

    async def _open(self) -> None:
        """Have the session opened, again while the node is busy; what is to be sent goes right behind the question.

        Raises:
            PeerFailed: the node does not want it.
            InvalidInput: it is too much for the node.
        """
        peer_id, why = self._node.peer_id, ""
        for tries_left in reversed(range(BUSY_TRIES)):
            self._opened, self._refused = trio.Event(), None
            opened = self._opened
            if self._messages is not None and self._tuning is not None:
                await self._upload(self._messages, self._tuning, opened)
            if self._messages is not None and not opened.is_set():
                await self._messages.send(self._asking("open", 0, self.request.to_fields()))
            if self._refused is None:
                self._asks_first.set()
            with trio.move_on_after(OPEN_TIMEOUT_S) as scope:
                await self._opened.wait()
            if scope.cancelled_caught:
                raise errors.PeerFailed(peer_id, f"no answer to 'open' in {OPEN_TIMEOUT_S:g} s")
            refused = self._refused
            if refused is None:
                return
            if refused.code in CALLERS_FAULT:
                raise InvalidInput(refused.message) from refused
            if refused.retry_after_s is None:
                raise errors.PeerFailed(peer_id, str(refused)) from refused
            why = refused.message
            if tries_left:
                await trio.sleep(min(refused.retry_after_s, MAX_RETRY_AFTER_S))
        raise errors.PeerFailed(peer_id, f"put off {BUSY_TRIES} times in a row: {why}")

    async def _upload(self, messages: MessageStream, tuning: SpanTuning, refused: trio.Event) -> None:
        """Send what the session adds, no further than the node takes it.

        Raises:
            PeerFailed: it takes it too slowly.
        """
        self._window = trio.Semaphore(TUNING_WINDOW)
        hop, flat, what = self.hop, tuning.flat(), tuning.form.to_fields()
        for at in range(0, max(1, len(flat)), TUNING_PIECE):
            with trio.move_on_after(TUNING_PIECE_S) as scope:
                await self._window.acquire()
                if refused.is_set():
                    return
                dtype, shape, data = to_wire(flat[at : at + TUNING_PIECE])
                tune = wire.Tune(digest=self.request.digest, start=hop.start, end=hop.end, at=at)
                tensor = Tensor(dtype=dtype, shape=shape, data=data)
                await messages.send(self._asking("tune", 0, {**tune.to_fields(), **what}, [tensor]))
            if scope.cancelled_caught:
                raise errors.PeerFailed(self._node.peer_id, "does not take what the session adds")

    def _take_uploaded(self, refused: errors.RpcError | None) -> None:
        """Raises:
        RemoteProtocolError: a piece of what is in use is refused.
        """
        if refused is None:
            self._events.leg_uploading(self)
        elif self._token:
            raise errors.RemoteProtocolError(f"has opened the session, and then: {refused}")
        else:
            self._take_opening({}, refused)
        self._window.release()

    def _take_opening(self, header: Mapping[str, Any], refused: errors.RpcError | None) -> None:
        """Raises:
        RemoteProtocolError: opened without a token, or in another form.
        """
        if refused is None:
            opened = wire.Opened.from_fields(header)
            if opened.form != self.request.form:
                raise errors.RemoteProtocolError(f"opened the session in {opened.form}, not in {self.request.form}")
            self._token = opened.token
            self._events.leg_opened(self)
        elif self._refused is None:  # of several, the first one says why
            self._refused = refused
            if refused.retry_after_s is not None:
                self._asks_first = trio.Event()
                self._asked.clear()
                self._unsend()
                self._events.leg_interrupted(self)  # what came right behind the question has been refused, too
        if self._opened is not None:
            self._opened.set()

    def _unsend(self) -> None:
        """Drop what has not been sent yet: it is decided anew."""
        self._outbox.close()
        self._outbox, self._outlet = trio.open_memory_channel[Pieces](math.inf)

    async def _open_stream(self, timeout_s: float, *, at_once: bool = False) -> tuple[Stream, Connection]:
        """Raises:
        PeerFailed: no connection, or no stream on it.
        """
        node = self._node
        try:
            with trio.fail_after(timeout_s):
                connection = await self._host.connect(node.peer_id, node.addresses, at_once=at_once)
                stream = await self._host.open_lazily_over(connection, wire.PROTOCOL_ID)
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
        """Send and read until that is not possible any more; why.

        Raises:
            InvalidInput: the session is too much for the node.
        """
        failure: errors.PeerFailed | InvalidInput = errors.PeerFailed(self._node.peer_id, "the stream is over")
        with trio.CancelScope() as scope:
            async with open_service_nursery() as nursery:

                async def guarded(task: Callable[[], Awaitable[None]]) -> None:
                    nonlocal failure
                    try:
                        await task()
                    except (errors.PeerFailed, InvalidInput) as error:
                        if not scope.cancel_called:
                            failure = error
                    except (errors.NetError, trio.ClosedResourceError) as error:
                        if not scope.cancel_called:
                            failure = errors.PeerFailed(self._node.peer_id, str(error) or "the stream is closed")
                            failure.__cause__ = error
                    scope.cancel()

                async def begin() -> None:
                    if not self._token:
                        await self._open()
                    await trio.sleep_forever()

                nursery.start_soon(guarded, begin)
                nursery.start_soon(guarded, self._write)
                nursery.start_soon(guarded, self._read)
                nursery.start_soon(guarded, self._watch)
                nursery.start_soon(guarded, self._wait_for_end)
        if isinstance(failure, InvalidInput):
            raise failure
        return failure

    async def _write(self) -> None:
        messages = self._messages
        while messages is not None:
            await self._asks_first.wait()
            outlet = self._outlet
            with suppress(trio.EndOfChannel):
                pieces = await outlet.receive()
                if outlet is self._outlet:
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
        if method == "open":
            self._take_opening(header, refused)
        elif method == "link":
            self._events.leg_linked(self, about, refused)
        elif method == "where" and refused is None:
            self._events.leg_placed(self, about, packing.field(header, "state", str, max_length=16))
        elif method == "tune":
            self._take_uploaded(refused)
        elif method == "sent":
            self._sent = None if refused is not None else wire.Sent.from_fields(header)
            self._said_sent.set()

    async def _watch(self) -> None:
        """Notice when the node is lost, though nothing says so, and leave relays."""
        connection, is_silent = self._connection, False
        while connection is not None:
            self._stirred = trio.Event()
            if connection.ended.is_set():
                raise errors.ConnectionLost("the connection is lost")
            best = self._host.swarm.connection(self._node.peer_id)
            if connection.relayed and best is not None and not best.relayed:
                raise errors.ConnectionLost("there is a direct way now")
            now, doubt_at = trio.current_time(), connection.mux.doubt_at
            owes = doubt_at < math.inf and (not self._is_idle or not self._token)
            if is_silent != (owes and now >= doubt_at):
                is_silent = not is_silent
                (self._events.leg_silent if is_silent else self._events.leg_heard)(self)
            if owes:  # it was asked to show that it is there; when the stream was opened, too
                with trio.move_on_at(now + LISTEN_S):
                    await self._stirred.wait()
                continue
            with trio.CancelScope(deadline=math.inf if self._is_idle else now + CHECK_S) as self._check:
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
        return bool(self._token) and isinstance(error.__cause__, errors.ConnectionLost | errors.StreamReset)

    async def _move(self) -> None:
        """Go on with the session over another stream.

        Raises:
            PeerFailed: it cannot be had; the leg is as it was.
        """
        stream, connection = await self._open_stream(MOVE_TIMEOUT_S, at_once=True)
        messages = MessageStream(stream, connection.line)
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
            self._unsend()
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
        for fresh in itertools.chain([False], itertools.repeat(True)):
            try:
                nodes = await self._find_nodes(fresh=fresh)
            except (errors.NetError, UnknownModel) as error:
                logger.info("no news of %s: %s", self._node.peer_id, error)
            else:
                known = self._node
                self._node = next((node for node in nodes if node.peer_id == known.peer_id), known)
                if self._node.addresses != known.addresses:
                    self._attempt.cancel()  # perhaps nobody is there any more, and no answer will come
                if self._events.leg_replaceable(self, nodes):
                    scope.deadline = min(scope.deadline, began + PATIENCE_S)
            if fresh:
                await trio.sleep(LOOK_S)
