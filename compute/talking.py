"""The node's side of the streams that a session's steps come on: its client's, and that of the node before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final, Protocol

import trio

from compute.pushing import PushLink
from compute.serving import Ask, Held, Serving, refusals, session_over
from compute.tuning import SpanTuning, TuningForm
from compute.upload import Upload
from compute.wire_forms import CODEC
from net import errors
from net.errors import RpcError
from net.hearsay import worth_dialling
from net.host import Host
from net.mux.base import Stream
from net.protocol import session as wire
from net.rpc import lane
from net.rpc.framing import Message, encode
from net.rpc.messages import MessageStream
from net.swarm import Connection

SESSION_IDLE_S: Final = 600.0  # a session nobody uses
MAX_LINKS: Final = 30  # of one stream, in so many seconds: each may be a dial, to whom the client says
LINKS_S: Final = 60.0
PUSH_WAIT_S: Final = 2.0  # for a session to be opened that another node is to hand on to: its client is on its way


class Node(Protocol):
    """Who has servings; :class:`compute.node.Node`."""

    def serving_for(self, request: wire.Open | wire.Tune) -> Serving:
        """Raises:
        RpcError: another model, blocks that are not served here, or nothing is served now.
        """

    def find_held(self, token: bytes) -> Held | None:
        """A session, wherever it is."""

    def find_pushed(self, push_token: bytes) -> Held | None:
        """The session that who has this token may hand steps on to."""

    opened: trio.Event
    """Set, and replaced, when a session has been opened."""


class ClientTalk:
    """A client's stream."""

    def __init__(self, node: Node, host: Host, connection: Connection, stream: Stream) -> None:
        self._node = node
        self._host = host
        self._connection = connection
        self._peer_id = connection.peer_id
        self._stream = stream
        self._messages = MessageStream(stream, connection.line)
        self._held: Held | None = None
        self._upload: Upload | None = None  # what the session is to add
        self._linked_at: deque[float] = deque(maxlen=MAX_LINKS)
        self._reaching = trio.CancelScope()  # ends when another node is to be reached instead

    @property
    def bytes_per_s(self) -> float | None:
        """Of the line to the client, if it has been slow enough to be noticed."""
        return self._messages.line.bytes_per_s

    async def serve(self) -> None:
        """Answer until the stream ends, or nothing is asked for too long.

        Raises:
            RemoteProtocolError: no messages come, or they come or our answers are read too slowly.
            StreamReset, ConnectionLost: the stream is broken.
        """
        broken = True  # by an error, or cancelled together with the connection to the relay that carries it
        try:
            while True:
                with trio.move_on_after(SESSION_IDLE_S) as scope:
                    message = await self._messages.receive()
                if scope.cancelled_caught or message is None:
                    broken = False
                    return
                await self._take(message)
        finally:
            with trio.CancelScope(shield=True):
                await self._end(broken=broken)

    async def send(self, message: Message) -> None:
        """Say something; a client that does not read is cut off."""
        try:
            await self._messages.send_bounded(encode(message))
        except (errors.NetError, trio.ClosedResourceError):
            self._stream.reset()  # ``serve`` ends, too, and knows why

    async def _take(self, message: Message) -> None:
        number = wire.read_id(message.header)
        methods: dict[object, Callable[[Message], Awaitable[Message | None]]] = {
            "tune": self._tune,
            "open": self._open,
            "resume": self._resume,
            "link": self._link,
            "step": self._step,
            "resend": self._resend,
            "where": self._where,
            "sent": self._sent,
        }
        method = methods.get(message.header.get("m"))
        try:
            if method is None:
                raise RpcError("unknown-method", f"no method {str(message.header.get('m'))[:64]!r} here")
            answer = await method(message)
        except RpcError as refused:
            answer = Message(header=lane.refusal(refused))
        except errors.RemoteProtocolError as error:
            answer = Message(header=lane.refusal(RpcError("bad-input", str(error))))
        if answer is not None:
            await self.send(Message(header={**answer.header, "id": number}, tensors=answer.tensors))

    async def _tune(self, message: Message) -> Message:
        """Take a piece of what the session is to add."""
        if self._held is not None:
            raise RpcError("bad-input", "the session is open already")
        try:
            tune = wire.Tune.from_fields(message.header)
            serving = self._node.serving_for(tune)
            with refusals(serving.metrics):
                form = TuningForm.from_fields(message.header)
                if not tune.at:
                    self._drop_upload()
                    self._upload = Upload(tune, form, serving.span.config, serving.room, self._peer_id)
                if self._upload is None:
                    raise RpcError("bad-input", "a tuning begins with its first number")
                self._upload.add(tune, form, message.tensors)
        except BaseException:
            self._drop_upload()
            raise
        return Message(header={})

    def _drop_upload(self) -> None:
        if self._upload is not None:
            self._upload.clear()
        self._upload = None

    def _uploaded(self, request: wire.Open) -> SpanTuning | None:
        """What a session is to add."""
        if not request.tuned:
            return None
        if self._upload is None or self._upload.of != (request.digest, request.start, request.end):
            raise RpcError("bad-input", "no tuning of these blocks has come")
        return self._upload.tuning()

    async def _open(self, message: Message) -> Message:
        """Begin a session."""
        if self._held is not None:
            raise RpcError("bad-input", "the session is open already")
        try:
            request = wire.Open.from_fields(message.header)
            serving = self._node.serving_for(request)
            with refusals(serving.metrics):
                tuning = self._uploaded(request)
                held = self._held = await serving.open(request, self._peer_id, self, tuning)
        finally:
            self._drop_upload()
        self._node.opened.set()
        self._node.opened = trio.Event()
        stats = serving.engine.stats
        left = stats.cache_max_tokens - stats.cache_used_tokens
        opened = wire.Opened(token=held.token, form=str(held.sender.form))
        return Message(header={"cache_tokens_left": left, **opened.to_fields()})

    async def _resume(self, message: Message) -> Message:
        """Take over a session of the same peer from a stream that broke, or that the peer wants to leave."""
        if self._held is not None:
            raise RpcError("bad-input", "the session is open already")
        held = self._node.find_held(wire.read_token(message.header))
        if held is None or held.peer_id != self._peer_id:
            raise RpcError("no-session", "there is no such session (any more)")
        held.holder = self
        self._held = held
        return Message(header={})

    async def _link(self, message: Message) -> None:
        """Reach the next node; answered when it has been, or not. The one that was named last is, where it is or where
        the client may have us dial.
        """
        held, serving = self._mine()
        link, number = wire.Link.from_fields(message.header), wire.read_id(message.header)
        now = trio.current_time()
        if len(self._linked_at) == MAX_LINKS and now < self._linked_at[0] + LINKS_S:
            raise RpcError("busy", f"more than {MAX_LINKS} nodes to be reached in {LINKS_S:g} s")
        self._linked_at.append(now)
        link = replace(link, addresses=tuple(worth_dialling(link.addresses, self._connection.now_at)))
        self._reaching.cancel()
        self._reaching, held.linking = trio.CancelScope(), trio.Event()
        serving.start_soon(self._reach, held, held.linking, link, number, self._reaching)

    async def _reach(self, held: Held, done: trio.Event, link: wire.Link, number: int, scope: trio.CancelScope) -> None:
        try:
            with scope:
                opened = await PushLink.open(self._host, link, held.sender.alike(may_compress=CODEC in link.codecs))
            if scope.cancelled_caught:
                raise errors.PeerFailed(link.peer_id, "another node is to be reached instead")
        except errors.NetError as error:
            done.set()
            await held.answer(Message(header={**lane.refusal(RpcError("unreachable", str(error))), "id": number}))
            return
        if held.link is not None:
            held.link.end()
        held.link = opened
        done.set()
        if held.serving is None:
            opened.end()
            return
        try:
            await opened.agree()
        except errors.NetError as error:
            await held.answer(Message(header={**lane.refusal(RpcError("unreachable", str(error))), "id": number}))
            return
        await held.answer(Message(header={"id": number}))
        await opened.watch()

    async def _step(self, message: Message) -> None:
        """Run the next tokens."""
        held, _ = self._mine()
        await held.ask(_step(message))

    async def _resend(self, message: Message) -> None:
        """Hand on again what steps gave before."""
        held, _ = self._mine()
        step = wire.Step.from_fields(message.header)
        await held.ask(Ask(step=step, end=wire.read_end(message.header, step.position)))

    async def _where(self, message: Message) -> Message:
        """How far a step has come."""
        held, _ = self._mine()
        return Message(header={"state": held.where(wire.read_id(message.header, "of"))})

    async def _sent(self, _message: Message) -> Message:
        """What the session has sent from here."""
        held, _ = self._mine()
        return Message(header=held.sender.account.summary().to_fields())

    def _mine(self) -> tuple[Held, Serving]:
        held = self._held
        if held is None:
            raise RpcError("bad-input", "no session is open on this stream")
        if held.holder is not self or held.serving is None:
            raise session_over()
        return held, held.serving

    async def _end(self, *, broken: bool) -> None:
        """The stream is over; what broke may be resumed."""
        self._drop_upload()
        held = self._held
        if held is not None and held.holder is self and held.serving is not None:
            await (held.serving.keep(held) if broken else held.serving.free(held))


async def serve_pushes(stream: Stream, node: Node) -> None:
    """Take what another node hands on, until its stream or the session ends.

    Raises:
        RemoteProtocolError: no messages come, or they make no sense.
        StreamReset, ConnectionLost: the stream is broken.
    """
    messages = MessageStream(stream)
    first = await messages.receive()
    held = None if first is None else await _find_pushed(node, wire.read_token(first.header))
    while held is not None:
        with trio.move_on_after(SESSION_IDLE_S) as scope:
            message = await messages.receive()
        if scope.cancelled_caught or message is None:
            return
        ask = _step(message)
        if ask.step.every:
            raise errors.RemoteProtocolError("results of every block are for the client to ask for")
        try:
            await held.ask(ask)
        except RpcError:
            return  # the session is over, and its client knows


async def _find_pushed(node: Node, push_token: bytes) -> Held | None:
    """The session that is handed on to; it may be about to be opened."""
    with trio.move_on_after(PUSH_WAIT_S):
        while (held := node.find_pushed(push_token)) is None:
            await node.opened.wait()
        return held
    return None


def _step(message: Message) -> Ask:
    """Raises:
    RemoteProtocolError: missing or out of bounds.
    """
    return Ask(step=wire.Step.from_fields(message.header), fields=message.header, tensors=tuple(message.tensors))
