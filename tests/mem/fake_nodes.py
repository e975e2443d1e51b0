"""Nodes without a model, as a session sees them: for tests of sessions under virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import torch
import trio

from net.addresses import parse
from net.errors import RpcError
from net.identity import Identity, PeerId
from net.mux.base import Stream
from net.nurseries import open_service_nursery
from net.protocol import session as wire
from net.protocol.announcement import NodeAnnouncement, Numerics
from net.rpc import lane
from net.rpc.framing import Message, Tensor, encode
from net.rpc.messages import MessageStream
from net.swarm import Connection
from tests.mem.lines import Line


@dataclass(kw_only=True, eq=False)
class FakeNode:
    """Answers each step with what came; keeps sessions as long as it lives.

    Attributes:
        arrivals: what it was asked for, and when.
        calls: what it has begun to do, and when.
        held: sessions that wait for somebody, or that somebody has.
        open_s, step_s, resume_s: how long these take.
        refuses: what it says instead to every step.
        busy: what it says instead to those who want to open a session, one after another.
        puts_off: what it says instead to who wants to resume.
        moving: set when somebody has asked for that.
        talks: streams of those who have a session here, or want one.
        width: of the hidden states that came last.
    """

    identity: Identity
    span: tuple[int, int]
    port: int
    line: Line = field(default_factory=Line)
    arrivals: list[tuple[str, float]] = field(default_factory=list)
    calls: list[tuple[str, float]] = field(default_factory=list)
    held: dict[bytes, object] = field(default_factory=dict)
    freed: int = 0
    open_s: float = 0.0
    step_s: float = 0.0
    resume_s: float = 0.0
    refuses: RpcError | None = None
    busy: list[RpcError] = field(default_factory=list)
    puts_off: RpcError | None = None
    moving: trio.Event = field(default_factory=trio.Event)
    talks: list[MessageStream] = field(default_factory=list)
    width: int = 8

    @property
    def peer_id(self) -> PeerId:
        return self.identity.peer_id

    @property
    def offer(self) -> NodeAnnouncement:
        start, end = self.span
        return NodeAnnouncement(
            peer_id=self.peer_id,
            addresses=(parse(f"/memory/{self.port}"),),
            model="some-bloom",
            digest="d" * 64,
            blocks=4,
            start=start,
            end=end,
            weights="0" * 64,
            numerics=Numerics(dtype="float32", quantization="none", backend="cpu"),
            decode_tokens_per_s=10.0,
            cache_tokens_left=1000,
            max_length=100,
            state="online",
            agent="test",
        )

    async def work(self, tokens: int) -> None:
        """Compute a step."""
        await trio.sleep(self.step_s)

    async def tell(self, notice: Message) -> None:
        """Say something to all who have a session here."""
        for messages in list(self.talks):
            await messages.send(encode(notice))

    def count(self, method: str) -> int:
        return sum(name == method for name, _ in self.calls)

    async def serve(self, connection: Connection, stream: Stream) -> None:
        owner = object()
        mine: list[bytes] = []

        async def open_one(message: Message) -> Message:
            self._note("open")
            await trio.sleep(self.open_s)
            if self.busy:
                raise self.busy.pop()
            token = len(self.calls).to_bytes(wire.TOKEN_BYTES, "big")
            self.held[token] = owner
            mine.append(token)
            return Message(header={"token": token})

        async def resume(message: Message) -> Message:
            self._note("resume")
            self.moving.set()
            await trio.sleep(self.resume_s)
            if self.puts_off is not None:
                raise self.puts_off
            token = wire.read_token(message.header)
            if token not in self.held:
                raise RpcError("no-session", "there is no such session (any more)")
            self.held[token] = owner
            mine.append(token)
            return Message(header={})

        async def step(message: Message) -> Message:
            if not mine:
                raise RpcError("bad-input", "no session is open on this stream")
            self._note("step")
            [tensor] = message.tensors
            await self.work(tensor.shape[1])
            if self.refuses is not None:
                raise self.refuses
            count = min(tensor.shape[1], message.header["keep"])
            shape = (1, count, tensor.shape[2])
            self.width = tensor.shape[2]
            kept = memoryview(tensor.data)[tensor.n_bytes - 4 * count * tensor.shape[2] :]
            return Message(header={}, tensors=[Tensor(dtype=tensor.dtype, shape=shape, data=kept)] if count else [])

        async def link(_: Message) -> Message:
            raise RpcError("unreachable", "nodes of this world do not know each other")

        async def resend(message: Message) -> Message:
            """All that was ever sent was ones, and comes out as it went in."""
            count = min(message.header["end"] - message.header["position"], message.header["keep"])
            shape = (1, count, self.width)
            data = torch.ones(shape).numpy().tobytes()
            return Message(header={}, tensors=[Tensor(dtype="f32", shape=shape, data=data)])

        async def where(_: Message) -> Message:
            return Message(header={"state": "running"})

        methods: dict[str, Callable[[Message], Awaitable[Message]]] = {
            "open": open_one,
            "resume": resume,
            "step": step,
            "resend": resend,
            "link": link,
            "where": where,
        }
        messages = MessageStream(stream)
        self.talks.append(messages)

        async def answer(message: Message) -> None:
            number = wire.read_id(message.header)
            try:
                given = await methods[message.header["m"]](message)
            except RpcError as error:
                given = Message(header=lane.refusal(error))
            await messages.send(encode(Message(header={**given.header, "id": number}, tensors=given.tensors)))

        async def answer_in_order(message: Message, before: trio.Event, after: trio.Event) -> None:
            await before.wait()
            await answer(message)
            after.set()

        try:
            async with open_service_nursery() as nursery:
                opening = trio.Event()
                opening.set()
                while (message := await messages.receive()) is not None:
                    self.arrivals.append((message.header["m"], trio.current_time()))
                    before, after = opening, trio.Event()
                    if message.header["m"] == "open":
                        opening = after
                    nursery.start_soon(answer_in_order, message, before, after)
                nursery.cancel_scope.cancel()
        finally:
            self.talks.remove(messages)
        for token in mine:  # ended, not broken
            if self.held.get(token) is owner:
                del self.held[token]
                self.freed += 1

    def _note(self, method: str) -> None:
        self.calls.append((method, trio.current_time()))
