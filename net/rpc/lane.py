"""Calls over one stream, one at a time, answered in order.

A lane is what a client keeps open to a node for as long as a session lasts. A call is a message whose
header has ``"m"``, the method; its answer has the result's fields, or ``"e"`` (a code), ``"why"`` (a line
for people) and perhaps ``"retry_after_s"``. Who wants two calls at once opens two lanes.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from types import TracebackType
from typing import Any

import trio

from net import errors
from net.identity import PeerId
from net.mux.base import Stream
from net.rpc import packing
from net.rpc.framing import Message, encode
from net.rpc.messages import MessageStream, Pieces

logger = logging.getLogger(__name__)

MAX_REASON_CHARACTERS = 500
MAX_RETRY_AFTER_S = 3600.0

Method = Callable[[Message], Awaitable[Message]]


class Lane:
    """The calling side of a stream. Closes it at the end of its block, or when a call fails half-way."""

    def __init__(self, stream: Stream, peer_id: PeerId) -> None:
        self.peer_id = peer_id
        self._stream = stream
        self._messages = MessageStream(stream)
        self._lock = trio.Lock()
        self._broken: errors.NetError | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a call is under way."""
        return self._lock.locked()

    async def call(self, method: str, message: Message | Mapping[str, Any], *, timeout_s: float) -> Message:
        """Send a call, wait for its answer.

        Raises:
            RpcError: the other side refused it; the lane goes on.
            PeerFailed: no answer in time, a broken connection or a broken protocol; the lane is over.
        Cancellation: the lane is over; the other side may or may not have done what was asked.
        """
        if not isinstance(message, Message):
            message = Message(header=message)
        request = Message(header={**message.header, "m": method}, tensors=message.tensors)
        async with self._lock:
            if self._broken is not None:
                raise errors.PeerFailed(self.peer_id, f"the lane is over ({self._broken})")
            self._broken = errors.ConnectionLost("a call was broken off")
            answer: Message | None = None
            try:
                pieces = encode(request)
                with trio.fail_after(timeout_s):
                    await self._messages.send(pieces)
                    answer = await self._messages.receive()
            except trio.TooSlowError as error:
                self._broken = errors.ConnectionLost(f"no answer in {timeout_s:g} s")
                raise errors.PeerFailed(self.peer_id, f"no answer to {method!r} in {timeout_s:g} s") from error
            except trio.ClosedResourceError as error:
                raise errors.PeerFailed(self.peer_id, "the lane was closed here") from error
            except errors.LocalProtocolError:
                self._broken = None  # refused before a byte was sent
                raise
            except errors.NetError as error:
                self._broken = error
                raise errors.PeerFailed(self.peer_id, str(error)) from error
            finally:
                if answer is not None:
                    self._broken = None
                elif self._broken is not None:
                    self._stream.reset()
        if answer is None:
            raise errors.PeerFailed(self.peer_id, f"ended the lane instead of answering {method!r}")
        if "e" not in answer.header:
            return answer
        try:
            refusal = read_refusal(answer.header)
        except errors.RemoteProtocolError as error:
            raise errors.PeerFailed(self.peer_id, f"refused {method!r} without a readable reason: {error}") from error
        raise refusal

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def __aenter__(self) -> Lane:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with trio.CancelScope(shield=True):
            await self.aclose()


async def serve(
    stream: Stream,
    peer_id: PeerId,
    methods: Mapping[str, Method],
    *,
    idle_s: float,
    turn: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
) -> None:
    """Answer calls on a stream until its end, or until ``idle_s`` pass without one. Each call is answered, and the
    answer sent, within a ``turn``.

    A method refuses by raising RpcError. RemoteProtocolError in a method means that the call's fields made
    no sense; it is answered as ``bad-input``. Anything else, an answer that cannot be sent among it, is a bug of
    ours: answered as ``internal``, logged.

    Raises:
        RemoteProtocolError: no messages come, or they come or our answers are read too slowly.
        StreamReset, ConnectionLost: the stream is broken.
    """
    messages = MessageStream(stream)
    while True:
        with trio.move_on_after(idle_s) as scope:
            request = await messages.receive()
        if scope.cancelled_caught or request is None:
            return
        async with turn():
            pieces = await _answer(request, peer_id, methods)
            await messages.send_bounded(pieces)


async def _answer(request: Message, peer_id: PeerId, methods: Mapping[str, Method]) -> Pieces:
    name = request.header.get("m")
    method = methods.get(name) if isinstance(name, str) else None
    try:
        if method is None:
            raise errors.RpcError("unknown-method", f"no method {str(name)[:64]!r} here")
        return encode(await method(request))
    except errors.RpcError as error:
        return _error(error)
    except errors.RemoteProtocolError as error:
        return _error(errors.RpcError("bad-input", str(error)))
    except Exception:
        logger.exception("method %r failed for %s", name, peer_id)
        return _error(errors.RpcError("internal", "the node failed at this call; its log says why"))


def _error(error: errors.RpcError) -> Pieces:
    return encode(Message(header=refusal(error)))


def refusal(error: errors.RpcError) -> dict[str, Any]:
    """The fields that say so."""
    fields: dict[str, Any] = {"e": error.code, "why": error.message[:MAX_REASON_CHARACTERS]}
    if error.retry_after_s is not None:
        fields["retry_after_s"] = error.retry_after_s
    return fields


def read_refusal(fields: Mapping[str, Any]) -> errors.RpcError:
    """What an answer with ``"e"`` says.

    Raises:
        RemoteProtocolError: nothing that can be read.
    """
    code = packing.field(fields, "e", str, max_length=64)
    why = fields.get("why")
    retry = packing.number(fields, "retry_after_s", 0.0, MAX_RETRY_AFTER_S) if "retry_after_s" in fields else None
    text = "".join(c for c in str(why)[:MAX_REASON_CHARACTERS] if c.isprintable())
    return errors.RpcError(code, text, retry)
