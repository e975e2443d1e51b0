"""The stream of training calls to one node: several at once, and whether the node is still there.

While anything is waited for, the connection has to show twice a second that it is alive; and a node that takes longer
than it usually does is asked where the call is. Nothing heard from it for two seconds then, it is given up.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from net import errors
from net.host import Host
from net.mux.base import Stream
from net.nurseries import open_service_nursery
from net.protocol import training as wire
from net.protocol.announcement import NodeAnnouncement
from net.protocol.session import read_id
from net.rpc import lane
from net.rpc.framing import Message, Tensor
from net.rpc.parcel_stream import ParcelStream
from net.rpc.parcels import NoRoom, tensor_bytes
from net.swarm import Connection

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S: Final = 8.0
CLOSE_TIMEOUT_S: Final = 1.0
CHECK_S: Final = 0.5  # of waiting, after which a node has to show that it is there
PATIENCE_S: Final = 2.0  # before it is asked where a call is; more, where calls usually take long
PATIENCE: Final = 4.0  # times what is usual
SILENCE_S: Final = 2.0  # after that question, without a word
QUEUE_BYTES: Final = 512 * 1024  # what may lie before that question on a slow line
STALL_S: Final = 15.0  # without taking any of what is sent
CALL_S: Final = 600.0  # from when all of a call has been sent until its answer begins, whatever the node says


@dataclass(kw_only=True, eq=False)
class _Pending:
    """A question that was not answered yet.

    Attributes:
        size: Bytes of its tensors or of its answer's, whichever are more: the node has to have room for them.
        limit: Bytes that the answer's tensors may have.
        amount: Of work, in any unit; 0: the time that it takes says nothing.
        done: Set when there is an answer, or none will come.
        unwanted: Whether nobody waits for it any more.
        began_at: When it began to be sent.
        sent_at: When all of it had been sent.
        seen_at: When the node last said that it has it.
    """

    number: int
    method: str
    size: int
    limit: int
    amount: float
    done: trio.Event = field(default_factory=trio.Event)
    answer: Message | None = None
    unwanted: bool = False
    began_at: float = field(default_factory=trio.current_time)
    sent_at: float | None = None
    seen_at: float = 0.0


@dataclass(kw_only=True, eq=False)
class _Upload:
    """A tuning on its way to the node.

    Attributes:
        sent: Set when all of it has been sent, or will not be.
        done: Set when the node has answered, or will not.
        refused: What it said, if not yes.
    """

    sent: trio.Event = field(default_factory=trio.Event)
    done: trio.Event = field(default_factory=trio.Event)
    refused: errors.RpcError | None = None


class CallStream:
    """Start :meth:`run` in a nursery; it ends by itself when the stream is over.

    Attributes:
        answered: Calls so far.
        users: Who is about to call, or calls; for its owner to count.
        connection: Below it, once there is one.
    """

    def __init__(self, host: Host, node: NodeAnnouncement, open_timeout_s: float = OPEN_TIMEOUT_S) -> None:
        self.answered = 0
        self.users = 0
        self._open_timeout_s = open_timeout_s
        self.connection: Connection | None = None
        self._host = host
        self._node = node
        self._parcels: ParcelStream | None = None
        self._failure: errors.PeerFailed | None = None
        self._opened = trio.Event()  # or failed
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._numbers = itertools.count(1)
        self._calls: dict[int, _Pending] = {}
        self._asked: dict[int, tuple[int, float]] = {}  # where a call is: which, and when
        self._uploads: OrderedDict[bytes, _Upload] = OrderedDict()
        self._turn = trio.Lock()
        self._freed = trio.Event()
        self._waited_for = trio.Event()  # there are calls
        self._usual: dict[str, float] = {}  # seconds for an amount of 1, by method

    @property
    def is_over(self) -> bool:
        """Whether it takes no calls any more."""
        return self._failure is not None

    def end(self) -> None:
        """Close it; what is under way fails."""
        self._scope.cancel()

    async def run(self) -> None:
        """Open the stream and keep it."""
        stream: Stream | None = None
        failure = errors.PeerFailed(self._node.peer_id, "the stream was closed here")
        try:
            with self._scope:
                stream, self.connection = await self._open()
                self._parcels = ParcelStream(
                    stream, self.connection.line, max_parcels=wire.MAX_CALLS, limit=self._answer_limit
                )
                failure = await self._talk(self._parcels)
        except errors.PeerFailed as error:
            failure = error
        finally:
            self._fail(failure)
            with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                if stream is not None:
                    await stream.aclose()

    async def call(
        self, method: str, fields: Mapping[str, Any], tensors: Sequence[Tensor], *, limit: int, amount: float = 0.0
    ) -> Message:
        """Have a question answered.

        Args:
            method: Which.
            fields: Of the question.
            tensors: Likewise; not to be changed meanwhile.
            limit: How many bytes the answer's tensors may have.
            amount: Of work, in a unit that is always the same for the method.

        Raises:
            RpcError: the node refuses.
            PeerFailed: no answer, nor will there be one.
        Cancellation: the node is told.
        """
        return await self._call(method, fields, tensors, trio.Event(), limit=limit, amount=amount)

    async def _call(
        self,
        method: str,
        fields: Mapping[str, Any],
        tensors: Sequence[Tensor],
        sent: trio.Event,
        *,
        limit: int,
        amount: float = 0.0,
    ) -> Message:
        size = max(limit, sum(tensor.n_bytes for tensor in tensors))
        await self._opened.wait()
        async with self._turn:
            while self._failure is None and not self._has_room(size):
                await self._freed.wait()
            if self._failure is not None or self._parcels is None or self._nursery is None:
                raise self._failed()
            pending = _Pending(number=next(self._numbers), method=method, size=size, limit=limit, amount=amount)
            self._calls[pending.number] = pending
        self._waited_for.set()
        message = Message(header={**fields, "m": method, "id": pending.number}, tensors=tensors)
        try:
            async with open_service_nursery() as nursery:
                nursery.start_soon(self._hand_over, self._parcels, message, pending, sent)
                await pending.done.wait()
                nursery.cancel_scope.cancel()
        finally:
            sent.set()
            if (pending.answer is None or pending.sent_at is None) and self._nursery is not None:
                pending.unwanted = True
                self._nursery.start_soon(self._tell_cancelled, self._parcels, pending)
        if pending.answer is None:
            raise self._failed()
        if "e" not in pending.answer.header:
            return pending.answer
        try:
            refusal = lane.read_refusal(pending.answer.header)
        except errors.RemoteProtocolError as error:
            raise errors.PeerFailed(self._node.peer_id, f"refused {method!r} without a reason: {error}") from error
        raise refusal

    async def upload(self, key: bytes, make: Callable[[], Awaitable[tuple[Mapping[str, Any], Tensor]]]) -> None:
        """Have the node know a tuning, as far as we know; returns when it has been sent.

        Args:
            key: Its key.
            make: Gives the fields of ``tune``, and its numbers.

        Raises:
            PeerFailed: the stream is over.
        Cancellation: it is sent all the same.
        """
        await self._opened.wait()
        if self._nursery is None:
            raise self._failed()
        upload = self._uploads.get(key)
        if upload is None:
            upload = self._uploads[key] = _Upload()
            if len(self._uploads) > wire.MAX_TUNINGS:
                self._uploads.popitem(last=False)
            self._nursery.start_soon(self._upload, upload, make)
        self._uploads.move_to_end(key)
        await upload.sent.wait()

    async def forget_upload(self, key: bytes) -> errors.RpcError | None:
        """The node does not have it: why, if it has said so. The next :meth:`upload` sends it again."""
        upload = self._uploads.get(key)
        if upload is None:
            return None
        await upload.done.wait()
        if self._uploads.get(key) is upload:
            del self._uploads[key]
        return upload.refused

    async def _upload(self, upload: _Upload, make: Callable[[], Awaitable[tuple[Mapping[str, Any], Tensor]]]) -> None:
        try:
            fields, numbers = await make()
            await self._call("tune", fields, [numbers], upload.sent, limit=0)
        except errors.RpcError as error:
            upload.refused = error
        except errors.PeerFailed:
            pass  # those who wait for anything hear of it
        finally:
            upload.sent.set()
            upload.done.set()

    # The stream

    async def _open(self) -> tuple[Stream, Connection]:
        """Raises:
        PeerFailed: no connection, or no stream on it.
        """
        node = self._node
        try:
            with trio.fail_after(self._open_timeout_s):
                connection = await self._host.connect(node.peer_id, node.addresses)
                return await self._host.open_lazily_over(connection, wire.PROTOCOL_ID), connection
        except trio.TooSlowError as error:
            raise errors.PeerFailed(node.peer_id, f"no connection in {self._open_timeout_s:g} s") from error
        except errors.PeerFailed:
            raise
        except errors.NetError as error:
            raise errors.PeerFailed(node.peer_id, str(error)) from error

    async def _talk(self, parcels: ParcelStream) -> errors.PeerFailed:
        """Send and read until that is not possible any more; why."""
        failure = errors.PeerFailed(self._node.peer_id, "the stream is over")
        with trio.CancelScope() as scope:
            async with open_service_nursery() as nursery:

                async def guarded(task: Callable[[], Awaitable[None]]) -> None:
                    nonlocal failure
                    try:
                        await task()
                    except errors.PeerFailed as error:
                        if not scope.cancel_called:
                            failure = error
                    except (errors.NetError, trio.ClosedResourceError) as error:
                        if not scope.cancel_called:
                            failure = errors.PeerFailed(self._node.peer_id, str(error) or "the stream is closed")
                            failure.__cause__ = error
                    self._fail(failure)
                    scope.cancel()

                self._nursery = nursery
                nursery.start_soon(guarded, parcels.run)
                nursery.start_soon(guarded, self._read)
                nursery.start_soon(guarded, self._watch)
                nursery.start_soon(guarded, self._wait_for_end)
                self._opened.set()
        return failure

    async def _hand_over(self, parcels: ParcelStream, message: Message, pending: _Pending, sent: trio.Event) -> None:
        await parcels.send(message)
        pending.sent_at = pending.seen_at = trio.current_time()
        sent.set()

    async def _tell_cancelled(self, parcels: ParcelStream, pending: _Pending) -> None:
        """That a call is wanted no longer. It is answered all the same, unless nothing of it had been sent: the node
        says so, when it is asked where that call is.
        """
        await parcels.send(Message(header={"m": "cancel", "id": next(self._numbers), "of": pending.number}))
        if pending.number in self._calls:
            pending.sent_at = pending.seen_at = trio.current_time()  # no more of it will be
            await self._ask_place(parcels, pending)

    async def _ask_place(self, parcels: ParcelStream, pending: _Pending) -> None:
        number = next(self._numbers)
        self._asked[number] = pending.number, trio.current_time()
        await parcels.send(Message(header={"m": "where", "id": number, "of": pending.number}))

    def _answer_limit(self, header: Mapping[str, Any]) -> int:
        """How many bytes an answer may have."""
        pending = self._calls.get(read_id(header))
        if pending is None:
            raise errors.RemoteProtocolError("answers what was not asked")
        return pending.limit

    async def _read(self) -> None:
        while self._parcels is not None and (message := await self._parcels.receive()) is not None:
            if isinstance(message, NoRoom):
                continue
            number = read_id(message.header)
            if number in self._asked:
                self._take_place(number, message)
                continue
            pending = self._calls.get(number)
            if pending is None:
                raise errors.RemoteProtocolError("answers what was not asked")
            if tensor_bytes(message) > pending.limit:
                raise errors.RemoteProtocolError(f"an answer of {tensor_bytes(message)} bytes, not {pending.limit}")
            del self._calls[number]
            self._note_time(pending)
            self.answered += 1
            pending.answer = message
            pending.done.set()
            self._note_freed()
        raise errors.ConnectionLost("the node ended the stream")

    def _note_time(self, pending: _Pending) -> None:
        if pending.amount and pending.sent_at is not None and not pending.unwanted:
            took = (trio.current_time() - pending.sent_at) / pending.amount
            before = self._usual.get(pending.method, took)
            self._usual[pending.method] = (3 * before + took) / 4

    async def _wait_for_end(self) -> None:
        if self.connection is not None:
            await self.connection.ended.wait()
        raise errors.ConnectionLost("the connection is lost")

    # Whether the node is there

    async def _watch(self) -> None:
        """Notice when the node is lost, though nothing says so.

        Raises:
            PeerFailed: it is.
        """
        while True:
            await self._waited_for.wait()
            self._waited_for = trio.Event()
            while self._calls:
                await trio.sleep(CHECK_S)
                self._look(trio.current_time())

    def _look(self, now: float) -> None:
        """Raises:
        PeerFailed: the node is no good.
        """
        if self._parcels is None or self.connection is None or self._nursery is None or not self._calls:
            return
        self.connection.mux.check()
        sent = [call for call in self._calls.values() if call.sent_at is not None]
        late = [call for call in sent if call.sent_at is not None and now - call.sent_at > CALL_S]
        if not all(self._parcels.is_coming(call.number) for call in late):  # how fast that comes is looked at there
            raise self._given_up(f"no answer in {CALL_S:g} s")
        life = max(self._parcels.heard_at, self._parcels.handed_at)
        sending = [call for call in self._calls.values() if call.sent_at is None]
        if any(now - max(life, call.began_at) > STALL_S for call in sending):
            raise self._given_up(f"takes nothing of what is sent, for {STALL_S:g} s")
        speed = self._parcels.line.bytes_per_s
        silence = SILENCE_S + (QUEUE_BYTES / speed if speed else 0.0)
        if any(now - max(life, asked_at) > silence for _, asked_at in self._asked.values()):
            raise self._given_up(f"hangs: does not say where a call is, for {silence:.1f} s")
        if self._asked:
            return
        first = min(sent, key=lambda call: call.seen_at, default=None)
        if first is not None and now - first.seen_at > self._patience(first):
            self._nursery.start_soon(self._ask_place, self._parcels, first)

    def _patience(self, call: _Pending) -> float:
        """Seconds before the node is asked where this one is."""
        return max(PATIENCE_S, PATIENCE * call.amount * self._usual.get(call.method, 0.0))

    def _take_place(self, number: int, message: Message) -> None:
        """Raises:
        PeerFailed: the node has lost the call.
        RemoteProtocolError: it does not say.
        """
        about, _ = self._asked.pop(number)
        state = wire.read_state(message.header)
        pending = self._calls.get(about)
        if pending is None:
            return
        if state == "unseen" and pending.unwanted:  # nothing of it had been sent
            del self._calls[about]
            self._note_freed()
        elif state == "unseen":
            raise self._given_up("has lost a call")
        pending.seen_at = trio.current_time()

    # Room for calls

    def _has_room(self, size: int) -> bool:
        under_way = sum(call.size for call in self._calls.values())
        return not self._calls or (len(self._calls) < wire.MAX_CALLS and under_way + size <= wire.MAX_CALL_BYTES)

    def _note_freed(self) -> None:
        self._freed.set()
        self._freed = trio.Event()

    # The end

    def _fail(self, failure: errors.PeerFailed) -> None:
        """Nothing is answered any more."""
        if self._failure is not None:
            return
        self._failure = failure
        self._nursery = None
        self._opened.set()
        for pending in self._calls.values():
            pending.done.set()
        self._note_freed()

    def _given_up(self, reason: str) -> errors.PeerFailed:
        return errors.PeerFailed(self._node.peer_id, reason)

    def _failed(self) -> errors.PeerFailed:
        """The same for each who waits, with a traceback of its own."""
        first = self._failure or errors.PeerFailed(self._node.peer_id, "the stream is over")
        failure = errors.PeerFailed(first.peer_id, first.reason)
        failure.__cause__ = first.__cause__
        return failure
