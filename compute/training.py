"""The node's side of training calls: whole sequences through its blocks, forwards and back.

Nothing is kept between two calls but what clients train inside of blocks, for as long as there is room. What a client
sends is held within a budget, its own and the node's, of what has really come.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch
import trio
from torch import Tensor

from compute.bloom import BloomConfig
from compute.errors import BadInput
from compute.metrics import Metrics
from compute.room import Room
from compute.serving import Serving, Wanted, converted, refusals
from compute.tensors import from_wire, to_wire
from compute.tuning import SpanTuning, TuningForm, tuning_key
from compute.wire_forms import Form, decode, encode
from net import errors
from net.errors import RpcError
from net.identity import PeerId
from net.mux.base import Stream
from net.nurseries import open_service_nursery
from net.protocol import training as wire
from net.protocol.session import read_id
from net.rpc import framing, lane
from net.rpc.framing import Message
from net.rpc.parcel_stream import ParcelStream
from net.rpc.parcels import NoRoom, tensor_bytes
from net.swarm import Connection

__all__ = ["Training"]

logger = logging.getLogger(__name__)

IDLE_S: Final = 600.0  # a stream on which nothing is asked for
ANSWER_S: Final = 1800.0  # for an answer to be read: who is slower holds what others need
NODE_BYTES: Final = 1 << 30  # of calls that have come and were not answered; a call takes some times that while it runs
PEER_BYTES: Final = wire.MAX_CALL_BYTES
TUNING_BYTES: Final = 1 << 30  # of all tunings
RETRY_AFTER_S: Final = 1.0  # where there is no room


class Node(Protocol):
    """Who has servings; :class:`compute.node.Node`."""

    metrics: Metrics | None

    def serving_for(self, request: Wanted) -> Serving:
        """Raises:
        RpcError: another model, blocks that are not served here, or nothing is served now.
        """


class Tunings:
    """Those of all streams: of each the last few, and where there are too many, fewer of the peer that has the most."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: dict[object, OrderedDict[bytes, tuple[SpanTuning, int]]] = {}
        self._peers: dict[object, PeerId] = {}  # by stream
        self._bytes: Counter[PeerId] = Counter()

    def get(self, stream: object, key: bytes) -> SpanTuning | None:
        """One of a stream's own, which is kept the longer for it."""
        kept = self._kept.get(stream)
        if kept is None or key not in kept:
            return None
        kept.move_to_end(key)
        return kept[key][0]

    def put(self, stream: object, peer_id: PeerId, key: bytes, tuning: SpanTuning, size: int) -> None:
        """Keep one of a peer's stream, of so many bytes; others may go for it, of whichever peer has most."""
        kept = self._kept.setdefault(stream, OrderedDict())
        self._peers[stream] = peer_id
        if key in kept:
            self._bytes[peer_id] -= kept.pop(key)[1]
        kept[key] = tuning, size
        self._bytes[peer_id] += size
        while len(kept) > wire.MAX_TUNINGS:
            self._drop_oldest(stream)
        while self._bytes.total() > self._max_bytes:
            others = [each for each in self._kept if each is not stream or len(kept) > 1]
            if not others:
                break
            self._drop_oldest(max(others, key=lambda each: self._bytes[self._peers[each]]))

    def forget(self, stream: object) -> None:
        """The stream is over."""
        while stream in self._kept:
            self._drop_oldest(stream)

    def _drop_oldest(self, stream: object) -> None:
        kept, peer_id = self._kept[stream], self._peers[stream]
        _, (_, size) = kept.popitem(last=False)
        self._bytes[peer_id] -= size
        if not kept:
            del self._kept[stream], self._peers[stream]
        if not self._bytes[peer_id]:
            del self._bytes[peer_id]


class Training:
    """What a node has of training: one for all streams."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.room = Room(NODE_BYTES, PEER_BYTES)
        self.tunings = Tunings(TUNING_BYTES)

    async def serve(self, connection: Connection, stream: Stream) -> None:
        """Answer a client's calls until its stream ends, or nothing is asked for too long.

        Raises:
            RemoteProtocolError, TooSlowError: no parcels come, or they come or our answers are read too slowly.
            StreamReset, ConnectionLost: the stream is broken.
        """
        await _Talk(self, connection, stream).serve()


@dataclass(kw_only=True, eq=False)
class _Call:
    """A question under way.

    Attributes:
        number: The question's.
        message: It.
        state: As ``where`` is told.
        scope: Of the work.
        cancelled: Whether the client wants it no longer.
        size: Bytes of its tensors or of its answer's, whichever are more, held until it has been answered.
        tunes: The key of the tuning that it brings.
    """

    number: int
    message: Message
    size: int
    state: str = "waiting"
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    cancelled: bool = False
    tunes: bytes | None = None


class _Talk:
    """A client's stream."""

    def __init__(self, training: Training, connection: Connection, stream: Stream) -> None:
        self._training = training
        self._peer_id = connection.peer_id
        self._parcels = ParcelStream(
            stream,
            connection.line,
            max_parcels=2 * wire.MAX_CALLS,  # those that were refused while they came, and what came in their place
            limit=_limit,
            take=self._hold,
            give_back=self._give_back,
        )
        self._held = 0  # bytes of the node's room
        self._calls: dict[int, _Call] = {}
        self._freed = trio.Event()  # a call has been answered
        self._tuning: dict[bytes, trio.Event] = {}  # keys of tunings that have come, and are being looked at

    async def serve(self) -> None:
        """See :meth:`Training.serve`. Calls under way end with the stream."""
        try:
            async with open_service_nursery() as nursery:
                nursery.start_soon(self._parcels.run)
                while (message := await self._next()) is not None:
                    await self._take(message, nursery)
                nursery.cancel_scope.cancel()
        finally:
            self._give_back(self._held)
            self._training.tunings.forget(self)

    async def _next(self) -> Message | NoRoom | None:
        """What is asked next; ``None`` if nothing is any more."""
        while True:
            with trio.move_on_after(IDLE_S) as scope:
                return await self._parcels.receive()
            if scope.cancelled_caught and not self._calls and trio.current_time() - self._parcels.heard_at >= IDLE_S:
                return None

    async def _take(self, message: Message | NoRoom, nursery: trio.Nursery) -> None:
        number, method = read_id(message.header), message.header.get("m")
        size = 0 if isinstance(message, NoRoom) else tensor_bytes(message)
        if isinstance(message, NoRoom):
            self._count("busy")
            await self._refuse(number, RpcError("busy", "too much is being sent", RETRY_AFTER_S))
        elif method in ("where", "cancel"):
            self._give_back(size)
            of = read_id(message.header, "of")
            if method == "where":
                await self._parcels.send(Message(header={"id": number, "state": self._where(of)}))
            else:
                await self._cancel(of)
        else:
            while len(self._calls) >= wire.MAX_CALLS:
                await self._freed.wait()
            if number in self._calls:
                raise errors.RemoteProtocolError(f"question {number} was asked twice")
            call = self._calls[number] = _Call(number=number, message=message, size=size)
            if method == "tune" and isinstance(key := message.header.get("key"), bytes):
                call.tunes = key
                self._tuning.setdefault(key, trio.Event())  # now: calls may follow at once
            nursery.start_soon(self._answer, call)

    def _where(self, number: int) -> str:
        call = self._calls.get(number)
        if call is not None:
            return call.state
        return "waiting" if self._parcels.is_coming(number) else "unseen"

    async def _cancel(self, number: int) -> None:
        call = self._calls.get(number)
        if call is not None:
            call.cancelled = True
            call.scope.cancel()
            return
        was_coming = self._parcels.is_coming(number)
        self._parcels.drop(number)
        if was_coming:
            await self._refuse(number, _cancelled())

    async def _refuse(self, number: int, error: RpcError) -> None:
        await self._parcels.send(Message(header={**lane.refusal(error), "id": number}))

    async def _answer(self, call: _Call) -> None:
        """Do what is asked for, and say what came of it."""
        try:
            answer = await self._try(call)
            call.state = "running"
            with trio.fail_after(ANSWER_S):
                await self._parcels.send(Message(header={**answer.header, "id": call.number}, tensors=answer.tensors))
        finally:
            self._give_back(call.size)
            del self._calls[call.number]
            self._freed.set()
            self._freed = trio.Event()

    async def _try(self, call: _Call) -> Message:
        try:
            with call.scope:
                return await self._do(call)
            raise _cancelled() if call.cancelled else RpcError("stopped", "the node serves nobody now")
        except RpcError as error:
            return Message(header=lane.refusal(error))
        except errors.RemoteProtocolError as error:
            return Message(header=lane.refusal(RpcError("bad-input", str(error))))
        except Exception:
            logger.exception("a training call failed for %s", self._peer_id)
            return Message(header=lane.refusal(RpcError("internal", "the node failed at this call; its log says why")))
        finally:
            if call.tunes is not None and (event := self._tuning.pop(call.tunes, None)) is not None:
                event.set()

    async def _do(self, call: _Call) -> Message:
        method = call.message.header.get("m")
        if method == "tune":
            return await self._tune(call)
        if method not in ("forward", "backward"):
            raise RpcError("unknown-method", f"no method {str(method)[:64]!r} here")
        work, count = wire.Work.from_fields(call.message.header), len(call.message.tensors)
        if count != (1 if method == "forward" else 2):
            raise RpcError("bad-input", f"{method} does not carry {count} tensors")
        tuning = await self._tuning_of(work)
        serving = self._training.node.serving_for(work)
        with refusals(serving.metrics), serving.call(call.scope):
            form = Form.read(work.form)
            serving.engine.check_sequences(work.rows, work.tokens)  # before they are decoded, to up to four times that
            if method == "backward" and tuning is not None:
                self._hold_answer(call, call.size // count + tuning.n_bytes)
            states = await _take_states(call, form, work, serving.span.config.hidden_size)
            call.state = "running"
            asked = {"peer": self._peer_id, "start": work.start, "end": work.end, "tuning": tuning}
            if method == "forward":
                given = await serving.engine.forward(*states, **asked)
                return Message(header={}, tensors=[await converted(lambda: _write(given, form), given)])
            gradients = await serving.engine.backward(*states, **asked)
            answer = [await converted(lambda: _write(gradients.hidden, form), gradients.hidden)]
            if gradients.tuning is not None:
                name, shape, data = to_wire(gradients.tuning)
                answer.append(framing.Tensor(dtype=name, shape=shape, data=data))
            return Message(header={}, tensors=answer)

    async def _tuning_of(self, work: wire.Work) -> SpanTuning | None:
        """What a call names; it may have come a moment ago."""
        if work.key is None:
            return None
        if work.key in self._tuning:
            await self._tuning[work.key].wait()
        tuning = self._training.tunings.get(self, work.key)
        if tuning is None:
            self._count("no-tuning")
            raise RpcError("no-tuning", "no such tuning is here (any more)")
        if (tuning.start, tuning.end) != (work.start, work.end):
            raise RpcError("bad-value", f"a tuning of blocks {tuning.start} to {tuning.end}")
        return tuning

    async def _tune(self, call: _Call) -> Message:
        """Take what is trained inside of blocks."""
        tune, tensors = wire.Tune.from_fields(call.message.header), call.message.tensors
        serving = self._training.node.serving_for(tune)
        with refusals(serving.metrics):
            form = TuningForm.from_fields(call.message.header)
            count = form.n_elements(serving.span.config, tune.start, tune.end)
            if [(each.dtype, each.shape) for each in tensors] != [("f32", (count,))]:
                raise BadInput("bad-shape", f"such a tuning is {count} numbers in f32")
            tuning = await converted(lambda: _tuning(tune, form, serving.span.config, tensors[0]), tensors[0])
        self._training.tunings.put(self, self._peer_id, tune.key, tuning, tensors[0].n_bytes)
        return Message(header={})

    def _hold(self, count: int) -> bool:
        if not self._training.room.take(self._peer_id, count):
            return False
        self._held += count
        return True

    def _hold_answer(self, call: _Call, size: int) -> None:
        """Raises:
        RpcError: there is no room for so large an answer.
        """
        more = size - call.size
        if more > 0:
            if not self._hold(more):
                raise RpcError("busy", "too much is being answered", RETRY_AFTER_S)
            call.size += more

    def _give_back(self, count: int) -> None:
        self._held -= count
        self._training.room.give_back(self._peer_id, count)

    def _count(self, code: str) -> None:
        metrics = self._training.node.metrics
        if metrics is not None:
            metrics.refused(code)


def _limit(_: Mapping[str, Any]) -> int:
    return wire.MAX_CALL_BYTES


def _cancelled() -> RpcError:
    return RpcError("cancelled", "the call was cancelled")


async def _take_states(call: _Call, form: Form, work: wire.Work, width: int) -> list[Tensor]:
    """What a call carries, whose bytes are let go of.

    Shapes:
        returns: [b, t, d] each, float32
    """
    tensors, call.message = list(call.message.tensors), Message(header=call.message.header)
    states = []
    while tensors:
        tensor = tensors.pop(0)
        states.append(await converted(lambda tensor=tensor: _read(tensor, form, work, width), tensor))  # type: ignore[misc]
    return states


def _read(tensor: framing.Tensor, form: Form, work: wire.Work, width: int) -> Tensor:
    """Shapes: returns [b, t, d], float32."""
    if tensor.dtype != "u8" or len(tensor.shape) != 1:
        raise BadInput("bad-dtype", "hidden states travel as bytes here")
    shape = (work.rows, work.tokens, width)
    return decode({}, tensor.data, form, shape, torch.float32, limit=wire.MAX_CALL_BYTES)


def _write(hidden: Tensor, form: Form) -> framing.Tensor:
    """Shapes: hidden [b, t, d]."""
    _, data = encode(hidden, form, limit=wire.MAX_CALL_BYTES)
    return framing.Tensor(dtype="u8", shape=(memoryview(data).nbytes,), data=data)


def _tuning(tune: wire.Tune, form: TuningForm, config: BloomConfig, tensor: framing.Tensor) -> SpanTuning:
    if tuning_key(form, tune.start, tune.end, [memoryview(tensor.data)]) != tune.key:
        raise BadInput("bad-value", "a tuning whose key is another's")
    flat = from_wire(tensor.dtype, tensor.shape, tensor.data)  # [n]
    if not flat.isfinite().all():
        raise BadInput("not-finite", "NaN or infinity in a tuning")
    return SpanTuning.from_flat(form, config, tune.start, tune.end, flat)
