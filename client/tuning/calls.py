"""Training calls: whole sequences through the blocks of one node, forwards and back.

A call is a unit of work that leaves nothing behind on the node, so that a call that failed is made again elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import torch
import trio
from torch import Tensor

from client.errors import InvalidInput
from client.routing import Hop
from client.tuning.call_stream import OPEN_TIMEOUT_S, CallStream
from compute.errors import BadInput
from compute.requests import check_hidden
from compute.tensors import from_wire, to_wire
from compute.tuning import SpanTuning
from compute.wire_forms import Form, decode, default_form, encode
from net import errors
from net.host import Host
from net.identity import PeerId
from net.protocol import training as wire
from net.rpc import framing
from net.rpc.framing import Message

T = TypeVar("T")

BUSY_S: Final = 30.0  # that a node may put a call off, in all
MAX_RETRY_AFTER_S: Final = 10.0
REOPEN_TIMEOUT_S: Final = 3.0  # for a node whose connection broke
UPLOADS: Final = 3  # of one tuning for one call: others may push it out of the node's memory
LONG_BYTES: Final = 1 << 18  # of what is converted in a thread, for others share the loop
_ITEM_BYTES: Final = 4  # of a tuning's number
_BROKEN: Final = (errors.ConnectionLost, errors.StreamReset)


class Caller(Protocol):
    """Who has nodes run whole sequences."""

    async def forward(self, hop: Hop, digest: str, hidden: Tensor, tuning: SpanTuning | None) -> Tensor:
        """What the hop's blocks make of whole sequences.

        Args:
            hop: Which blocks, and who runs them.
            digest: Of the model.
            hidden: Hidden states before the first of these blocks; 16 or 32 bit floats on the CPU, without padding.
            tuning: What is trained inside of these very blocks.

        Shapes:
            hidden: [b, t, d]
            returns: [b, t, d], float32

        Raises:
            PeerFailed: the node cannot be relied on: lost, hung, wrong answer, refused for good, busy for too long.
            InvalidInput: the input cannot be computed anywhere.
        Cancellation: the node does not go on with what it has not begun.
        """

    async def backward(
        self, hop: Hop, digest: str, hidden: Tensor, gradient: Tensor, tuning: SpanTuning | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of what :meth:`forward` was given; the node runs the way forward again.

        Args:
            hop: Which blocks, and who runs them.
            digest: Of the model.
            hidden: What :meth:`forward` was given.
            gradient: With respect to what it returned.
            tuning: What :meth:`forward` was given.

        Shapes:
            hidden, gradient: [b, t, d]
            returns: [b, t, d], float32: with respect to ``hidden``; and [n], float32, in the order of
                ``tuning.flat()``: with respect to the tuning, ``None`` without one

        Raises:
            PeerFailed, InvalidInput: as :meth:`forward`.
        Cancellation: as :meth:`forward`.
        """


@dataclass(frozen=True, kw_only=True, eq=False)
class _Call:
    """What a node is asked for.

    Attributes:
        form: In which hidden states travel.
        states: Those that it gets, [b, t, d] each.
        n_tuning: Numbers of the tuning.
    """

    hop: Hop
    digest: str
    form: Form
    states: tuple[Tensor, ...]
    tuning: SpanTuning | None
    n_tuning: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        b, t, d = self.states[0].shape
        return b, t, d

    @property
    def state_bytes(self) -> int:
        return self.form.n_bytes(self.shape, wire.MAX_CALL_BYTES)

    @property
    def amount(self) -> float:
        """Of work."""
        b, t, _ = self.shape
        return b * t * (self.hop.end - self.hop.start)

    def fields(self) -> Mapping[str, Any]:
        """Of the question."""
        b, t, _ = self.shape
        return wire.Work(
            digest=self.digest,
            start=self.hop.start,
            end=self.hop.end,
            rows=b,
            tokens=t,
            form=str(self.form),
            key=None if self.tuning is None else self.tuning.key,
        ).to_fields()


class RemoteCaller:
    """A :class:`Caller` that has one stream to each node, with several calls under way on it."""

    def __init__(self, host: Host, nursery: trio.Nursery, *, form: Form | None = None) -> None:
        """Begin.

        Args:
            host: Dials.
            nursery: Runs the streams; must outlive all calls.
            form: In which hidden states travel; by default, one in which nothing is lost.
        """
        self._host = host
        self._nursery = nursery
        self._form = form
        self._streams: dict[PeerId, CallStream] = {}

    async def forward(self, hop: Hop, digest: str, hidden: Tensor, tuning: SpanTuning | None) -> Tensor:
        """See :class:`Caller`."""
        call = self._make(hop, digest, (hidden,), tuning)
        [given] = await self._ask("forward", call)
        return given

    async def backward(
        self, hop: Hop, digest: str, hidden: Tensor, gradient: Tensor, tuning: SpanTuning | None
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`Caller`."""
        call = self._make(hop, digest, (hidden, gradient), tuning)
        results = await self._ask("backward", call)
        return results[0], results[1] if tuning is not None else None

    def close(self) -> None:
        """Let go of all nodes; calls under way fail."""
        for stream in self._streams.values():
            stream.end()
        self._streams.clear()

    def _make(self, hop: Hop, digest: str, states: tuple[Tensor, ...], tuning: SpanTuning | None) -> _Call:
        """Raises:
        InvalidInput: no node can compute that.
        """
        form = self._form or default_form(hop.node.numerics.dtype)
        n_tuning = 0 if tuning is None else sum(tensor.numel() for tensor in tuning.tensors.values())
        call = _Call(hop=hop, digest=digest, form=form, states=states, tuning=tuning, n_tuning=n_tuning)
        try:
            for state in states:
                check_hidden(state, None, states[0].shape[-1])
            if states[-1].shape != states[0].shape:
                raise BadInput("bad-shape", f"a gradient {list(states[-1].shape)} of {list(states[0].shape)}")
            size = max(len(states) * call.state_bytes, call.state_bytes + _ITEM_BYTES * n_tuning)
        except BadInput as error:
            raise InvalidInput(str(error)) from error
        if size > wire.MAX_CALL_BYTES:
            raise InvalidInput(f"a call of {size} bytes; at most {wire.MAX_CALL_BYTES} travel at once: split the batch")
        if call.shape[0] > wire.MAX_ROWS or call.shape[1] > hop.node.max_length:
            most = f"{wire.MAX_ROWS} sequences of {hop.node.max_length} tokens"
            raise InvalidInput(f"{call.shape[0]} sequences of {call.shape[1]} tokens, at most {most} are taken")
        if tuning is not None and (tuning.start, tuning.end) != (hop.start, hop.end):
            raise InvalidInput(f"a tuning of blocks {tuning.start}:{tuning.end} for {hop.start}:{hop.end}")
        return call

    async def _ask(self, method: str, call: _Call) -> list[Tensor]:
        """What the node makes of it, checked; it is asked again while it is busy, and once on another connection."""
        peer_id, tuning = call.hop.node.peer_id, call.tuning
        tensors = await _converted(lambda: _write(call), call.state_bytes + _ITEM_BYTES * call.n_tuning)

        async def make() -> tuple[Mapping[str, Any], framing.Tensor]:
            if tuning is None:
                raise ValueError("no tuning")
            return await _converted(lambda: _upload(call, tuning), _ITEM_BYTES * call.n_tuning)

        busy_until, uploads, reopened = trio.current_time() + BUSY_S, 0, False
        limit = call.state_bytes + (_ITEM_BYTES * call.n_tuning if method == "backward" else 0)
        while True:
            stream = self._stream_to(call.hop, REOPEN_TIMEOUT_S if reopened else OPEN_TIMEOUT_S)
            stream.users += 1
            try:
                if tuning is not None:
                    await stream.upload(tuning.key, make)
                answer = await stream.call(method, call.fields(), tensors, limit=limit, amount=call.amount)
                break
            except errors.PeerFailed as error:
                if reopened or not stream.answered or not isinstance(error.__cause__, _BROKEN):
                    raise
                reopened = True  # the connection broke, and the node may be well
                continue
            except errors.RpcError as error:
                refused = error
            finally:
                stream.users -= 1
            if refused.code == "no-tuning" and tuning is not None and uploads < UPLOADS:
                uploads += 1
                said = await stream.forget_upload(tuning.key)
                if said is None:
                    continue
                refused = said
            if refused.code == "too-long" and call.shape[0] > 1:
                raise InvalidInput(refused.message) from refused
            if refused.retry_after_s is None:
                raise errors.PeerFailed(peer_id, str(refused)) from refused
            wait_s = min(refused.retry_after_s, MAX_RETRY_AFTER_S)
            if trio.current_time() + wait_s > busy_until:
                raise errors.PeerFailed(peer_id, f"puts calls off for {BUSY_S:g} s: {refused.message}") from refused
            await trio.sleep(wait_s)
        try:
            return await _converted(lambda: _read(method, call, answer), call.state_bytes)
        except BadInput as error:
            raise errors.PeerFailed(peer_id, f"answers {method!r} wrongly: {error}") from error

    def _stream_to(self, hop: Hop, open_timeout_s: float) -> CallStream:
        """The stream to a node; a new one, if that is over, or goes through a relay though there is a better way."""
        node = hop.node
        stream = self._streams.get(node.peer_id)
        if stream is not None and not stream.users and stream.connection is not None and stream.connection.relayed:
            best = self._host.swarm.connection(node.peer_id)
            if best is not None and not best.relayed:
                stream.end()
                stream = None
        if stream is None or stream.is_over:
            stream = self._streams[node.peer_id] = CallStream(self._host, node, open_timeout_s)
            self._nursery.start_soon(stream.run)
        return stream


def _write(call: _Call) -> list[framing.Tensor]:
    """What travels, checked; and the tuning has its key.

    Raises:
        InvalidInput: values that no node takes.
    """
    tensors = []
    tuning = call.tuning
    try:
        if tuning is not None and not all(tensor.isfinite().all() for tensor in tuning.tensors.values()):
            raise BadInput("not-finite", "NaN or infinity in what is trained")
        if tuning is not None:
            _ = tuning.key  # is kept; the first time, all of it is read
        for state in call.states:
            if not state.isfinite().all():
                raise BadInput("not-finite", "NaN or infinity in hidden states, or in a gradient with respect to them")
            _, data = encode(state, call.form, limit=wire.MAX_CALL_BYTES)
            tensors.append(framing.Tensor(dtype="u8", shape=(memoryview(data).nbytes,), data=data))
    except BadInput as error:
        raise InvalidInput(str(error)) from error
    return tensors


def _read(method: str, call: _Call, answer: Message) -> list[Tensor]:
    """What the node answered, checked.

    Shapes:
        returns: [b, t, d], and [n] for a backward call with a tuning; all float32

    Raises:
        BadInput: it is something else.
    """
    tensors, has_tuning = answer.tensors, method == "backward" and call.tuning is not None
    if len(tensors) != 1 + has_tuning or tensors[0].dtype != "u8":
        raise BadInput("bad-shape", f"{[(each.dtype, each.shape) for each in tensors]}")
    results = [decode({}, tensors[0].data, call.form, call.shape, torch.float32, limit=wire.MAX_CALL_BYTES)]
    if has_tuning:
        given = tensors[1].dtype, tensors[1].shape
        if given != ("f32", (call.n_tuning,)):
            raise BadInput("bad-shape", f"a gradient {given}, not f32 [{call.n_tuning}]")
        results.append(from_wire(tensors[1].dtype, tensors[1].shape, tensors[1].data))
    if not all(result.isfinite().all() for result in results):
        raise BadInput("not-finite", "NaN or infinity")
    return results


def _upload(call: _Call, tuning: SpanTuning) -> tuple[Mapping[str, Any], framing.Tensor]:
    """The fields and the tensor of ``tune``."""
    tune = wire.Tune(digest=call.digest, start=tuning.start, end=tuning.end, key=tuning.key)
    name, shape, data = to_wire(tuning.flat())
    return {**tune.to_fields(), **tuning.form.to_fields()}, framing.Tensor(dtype=name, shape=shape, data=data)


async def _converted(convert: Callable[[], T], size: int) -> T:
    """Have many bytes converted in a thread."""
    if size < LONG_BYTES:
        return convert()
    return await trio.to_thread.run_sync(convert)
