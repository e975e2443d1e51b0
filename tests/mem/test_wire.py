"""In which form hidden states travel: what arrives, what it takes, and who is believed."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import torch
import zstandard

import client.forms
import client.session
from client.errors import InvalidInput
from client.session import Session
from client.session_core import SessionCore
from compute.bloom import BloomSpan
from compute.checkpoint import Checkpoint
from compute.serving import Serving
from compute.wire_forms import CODEC, Form, encode
from net.identity import PeerId
from net.protocol import session as wire
from net.protocol.session import Sent
from net.rpc.framing import Message, Tensor
from net.rpc.line import LineSpeed
from tests.mem.conftest import Reference
from tests.mem.swarms import RunningNode, TestSwarm, blocking, generate, swarm_of
from tests.mem.test_sessions import refusal

PROMPT = torch.tensor([[40, 41, 90, 17, 200, 33, 12]])
TWO = [(0, 2), (2, 5)]
WIDTH = 48
BYTES = {"auto": 4 * WIDTH, "bf16": 2 * WIDTH, "int8": WIDTH + 2}  # a token's
STEPS = [torch.randn(1, count, WIDTH, generator=torch.Generator().manual_seed(count)) for count in (40, 1, 1, 3, 1, 1)]


async def open_session(swarm: TestSwarm, form: str, **options: Any) -> Session:
    return await swarm.client.session((await swarm.client.models())[0], wire=form, **options)


async def outputs(
    swarm: TestSwarm, form: str, then: Callable[[], Awaitable[None]] | None = None, at: int = 3
) -> list[torch.Tensor]:
    """What all steps give; before step ``at``, something happens."""
    session = await open_session(swarm, form)
    given = []
    for number, hidden in enumerate(STEPS):
        if number == at and then is not None:
            await then()
        given.append(await session.step(hidden))
    await session.aclose()
    return given


def same(given: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(given, expected, strict=True))


@pytest.fixture(params=["push", "through the client"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "push":
        monkeypatch.setattr(client.session, "SessionCore", functools.partial(SessionCore, push=False))


# What arrives, and what it takes


async def test_by_default_the_tokens_are_those_of_one_machine(odd: Reference, way: None) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        model = await swarm.model(odd.folder)
        options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
        expected = generate(odd.model, PROMPT, **options)
        assert await blocking(lambda: generate(model, PROMPT, **options)) == expected
        assert await blocking(lambda: generate(model, PROMPT, wire="auto", **options)) == expected


@pytest.mark.parametrize("form", BYTES)
async def test_sessions_say_what_their_hidden_states_take(odd: Reference, form: str, way: None) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        session = await open_session(swarm, form, measures_error=True)
        for hidden in STEPS:
            await session.step(hidden)
        hops = await session.traffic()
        assert [(hop.hop.start, hop.hop.end) for hop in hops] == TWO
        tokens = sum(hidden.shape[1] for hidden in STEPS)
        for sent in (sent for hop in hops for sent in (hop.to, hop.back)):
            assert sent is not None
            assert (sent.tokens, sent.n_bytes) == (tokens, tokens * BYTES[form])
            assert sent.form == {"auto": "float32", "bf16": "bfloat16"}.get(form, form)
            assert (sent.error is None) == (form == "auto")
            assert sent.error is None or 1e-4 < sent.error < 1e-2
        assert f"blocks 0:2 at {swarm.nodes[0].peer_id}: in: " in str(hops[0])
        await session.aclose()
        assert await session.traffic() == []


async def test_what_computes_in_bfloat16_loses_nothing_by_it(
    odd: Reference, way: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As GPUs do: half the bytes, and the bits that float32 gives."""
    honest = Checkpoint.load_span

    def load(self: Checkpoint, start: int, end: int, **options: Any) -> BloomSpan:
        return honest(self, start, end, **{**options, "linear": None, "dtype": torch.bfloat16})

    monkeypatch.setattr(Checkpoint, "load_span", load)
    async with swarm_of(odd.folder, TWO) as swarm:
        given = await outputs(swarm, "auto")
        session = await open_session(swarm, "auto")
        await session.step(STEPS[0])
        for hop in await session.traffic():
            assert hop.to == hop.back == Sent(form="bfloat16", tokens=40, n_bytes=40 * BYTES["bf16"])
        await session.aclose()
        assert same(await outputs(swarm, "bf16"), given)
        monkeypatch.setattr(client.forms, "default_form", lambda _: Form.FLOAT32)
        assert same(await outputs(swarm, "auto"), given)


async def test_fewer_bytes_are_nearly_the_same_values(odd: Reference) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        exact = await outputs(swarm, "auto")
        for form, error in (("bf16", 0.01), ("int8", 0.03)):
            given = await outputs(swarm, form)
            assert not same(given, exact)
            for one, other in zip(given, exact, strict=True):
                assert (one - other).norm() < error * other.norm()


@pytest.mark.parametrize("form", BYTES)
async def test_slow_lines_carry_less_and_the_same(
    odd: Reference, form: str, way: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        expected = await outputs(swarm, form)
        monkeypatch.setattr(LineSpeed, "bytes_per_s", 1e4)
        session = await open_session(swarm, form)
        [prompt] = [hidden.repeat(1, 4, 1) for hidden in STEPS[:1]]
        await session.step(prompt)
        for hop in await session.traffic():
            for sent in (hop.to, hop.back):
                assert sent is not None and sent.tokens == prompt.shape[1]
                assert sent.n_bytes <= sent.tokens * BYTES[form]
                assert form == "int8" or sent.n_bytes < 0.97 * sent.tokens * BYTES[form]
        await session.aclose()
        assert same(await outputs(swarm, form), expected)


async def test_who_does_not_decompress_is_sent_nothing_compressed(
    odd: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LineSpeed, "bytes_per_s", 1e4)
    monkeypatch.setattr(client.session, "CODEC", "another-codec")
    async with swarm_of(odd.folder, TWO) as swarm:
        session = await open_session(swarm, "auto")
        await session.step(STEPS[0].repeat(1, 4, 1))
        [first, last] = await session.traffic()
        sizes = [
            None if sent is None else sent.bytes_per_token / BYTES["auto"] for sent in (first.to, last.to, last.back)
        ]
        assert sizes[0] is not None and sizes[0] < 0.97  # the nodes do
        assert sizes[1] is not None and sizes[1] < 0.97
        assert sizes[2] == 1.0
        await session.aclose()


async def test_rows_and_beams_travel_in_any_form(odd: Reference) -> None:
    rows = torch.tensor([[40, 41, 90, 17], [9, 8, 7, 6]])
    async with swarm_of(odd.folder, TWO) as swarm:
        model = await swarm.model(odd.folder)
        for form in ("bf16", "int8"):
            options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "wire": form}
            once = await blocking(lambda: generate(model, rows, **options))  # noqa: B023
            assert await blocking(lambda: generate(model, rows, **options)) == once  # noqa: B023


async def test_a_form_is_fixed_when_a_session_opens(odd: Reference) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        model = await swarm.model(odd.folder)

        def wrong() -> None:
            for bad in ("fp8", "", "BF16", 8, None):
                with pytest.raises(InvalidInput, match="give one of auto, bf16, int8"):
                    model.session(wire=bad)  # type: ignore[arg-type]
            with pytest.raises(InvalidInput, match="give one of auto, bf16, int8"):
                model.generate(PROMPT, wire="zstd", max_new_tokens=2)
            with model.session(wire="int8") as session, pytest.raises(InvalidInput, match=r"give it to model\.session"):
                model.generate(PROMPT, session=session, wire="int8", max_new_tokens=2)

        await blocking(wrong)


async def test_values_that_a_form_has_no_room_for_are_the_callers(odd: Reference) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        session = await open_session(swarm, "bf16")
        before = await session.step(STEPS[0])
        blamed = note_failures(swarm)
        with pytest.raises(InvalidInput, match="beyond the range of bfloat16"):
            await session.step(torch.full((1, 1, WIDTH), torch.finfo(torch.float32).max))
        assert session.position == STEPS[0].shape[1]
        session.rollback(0)
        assert torch.equal(await session.step(STEPS[0]), before)
        assert not blamed
        await session.aclose()


# What fails changes no token


@pytest.mark.parametrize("form", ["bf16", "int8"])
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize(
    ("victims", "instead"),
    [([0], [(0, 2)]), ([1], [(2, 5)]), ([1], [(2, 4), (4, 5)]), ([0], [(0, 1), (1, 2)]), ([0, 1], [(0, 5)])],
    ids=["first", "last", "last-in-two", "first-in-two", "both-in-one"],
)
async def test_who_dies_changes_nothing(
    odd: Reference, form: str, at: int, victims: list[int], instead: list[tuple[int, int]], way: None
) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        expected = await outputs(swarm, form)
        gone = [swarm.nodes[victim] for victim in victims]

        async def replace() -> None:
            for span in instead:
                await swarm.add_node(odd.folder, span)
            for node in gone:
                await node.die()

        assert same(await outputs(swarm, form, replace, at), expected)


@pytest.mark.parametrize("form", ["bf16", "int8"])
async def test_a_session_that_goes_by_the_client_gives_what_a_pushed_one_gives(
    odd: Reference, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        pushed = await outputs(swarm, form)
        monkeypatch.setattr(client.session, "SessionCore", functools.partial(SessionCore, push=False))
        assert same(await outputs(swarm, form), pushed)


# Who is believed

BOMB = zstandard.ZstdCompressor(level=19).compress(bytes(64 << 20))  # 2 KB that are 64 MiB


def said(data: bytes, **fields: Any) -> tuple[dict[str, Any], Tensor]:
    return fields, Tensor(dtype="u8", shape=(len(data),), data=data)


LIES: dict[str, Callable[[torch.Tensor], tuple[dict[str, Any], Tensor]]] = {
    "bomb": lambda hidden: said(BOMB, form="float32", codec=CODEC, tokens=hidden.shape[1]),
    "garbage": lambda hidden: said(b"no frame", form="float32", codec=CODEC, tokens=hidden.shape[1]),
    "more tokens": lambda hidden: said(bytes(192 * 9999), form="float32", tokens=9999),
    "too few bytes": lambda hidden: said(bytes(7), form="int8", tokens=hidden.shape[1]),
    "another codec": lambda hidden: said(bytes(7), form="float32", codec="lzma", tokens=hidden.shape[1]),
    "another form": lambda hidden: said(bytes(7), form="float8", tokens=hidden.shape[1]),
    "no tokens": lambda hidden: said(bytes(192), form="float32", tokens=-1),
    "infinity": lambda hidden: (
        {},
        Tensor(dtype="f32", shape=tuple(hidden.shape), data=b"\0\0\x80\x7f" * hidden.numel()),
    ),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("victim", [0, 1])
async def test_a_node_that_sends_no_hidden_states_is_replaced(odd: Reference, lie: str, victim: int, way: None) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        expected = await outputs(swarm, "auto")
        liar = swarm.nodes[victim]
        blamed = note_failures(swarm)

        async def replace() -> None:
            await swarm.add_node(odd.folder, TWO[victim])
            make_lie(liar, LIES[lie])

        assert same(await outputs(swarm, "auto", replace), expected)
        assert blamed == {liar.peer_id}


def note_failures(swarm: TestSwarm) -> set[PeerId]:
    """Who is blamed from now on."""
    blamed: set[PeerId] = set()
    honest = swarm.client.reputation.failed

    def failed(peer_id: PeerId, reason: str) -> None:
        blamed.add(peer_id)
        honest(peer_id, reason)

    vars(swarm.client.reputation)["failed"] = failed
    return blamed


def make_lie(node: RunningNode, lie: Callable[[torch.Tensor], tuple[dict[str, Any], Tensor]]) -> None:
    [serving] = node.node._servings

    async def prepare(_sender: Any, hidden: torch.Tensor, _line: float | None) -> tuple[dict[str, Any], Tensor]:
        return lie(hidden)

    vars(serving)["prepare"] = prepare


async def test_a_node_that_answers_in_another_form_is_replaced(odd: Reference) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        expected = await outputs(swarm, "int8")
        liar = swarm.nodes[1]

        async def replace() -> None:
            await swarm.add_node(odd.folder, TWO[1])
            make_lie(
                liar,
                lambda hidden: (
                    {},
                    Tensor(dtype="f32", shape=tuple(hidden.shape), data=encode(hidden, Form.FLOAT32)[1]),
                ),
            )

        assert same(await outputs(swarm, "int8", replace), expected)


async def test_a_node_that_opens_another_form_is_not_used(odd: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Serving.open
    async with swarm_of(odd.folder, [(0, 5)]) as swarm:
        [old] = swarm.nodes[0].node._servings

        async def ignores_it(self: Serving, request: wire.Open, *rest: Any) -> Any:
            fields = request.to_fields()
            if self is old:
                fields.pop("form")
            return await honest(self, wire.Open.from_fields(fields), *rest)

        monkeypatch.setattr(Serving, "open", ignores_it)
        await swarm.add_node(odd.folder, (0, 5))
        for _ in range(3):
            session = await open_session(swarm, "int8")
            await session.step(STEPS[0])
            assert [hop.node.peer_id for hop in session.chain] == [swarm.nodes[1].peer_id]
            await session.aclose()


async def test_what_a_node_refuses(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, 5)]) as swarm:
        [node] = swarm.nodes

        def ask(**changes: Any) -> tuple[str, Message]:
            request = wire.Open(digest=node.offer.digest, start=0, end=5, batch=1, max_length=64)
            return "open", Message(header={**request.to_fields(), **changes})

        def step(data: bytes, **fields: Any) -> tuple[str, Message]:
            header = {"position": 0, "push": 0, "keep": 9, **fields}
            return "step", Message(header=header, tensors=[said(data)[1]])

        async def code(*calls: tuple[str, Message]) -> str:
            return (await refusal(swarm, node, *calls))[0]

        assert await code(ask(form="float8")) == "bad-dtype"
        assert await code(ask(form="")) == "bad-dtype"
        assert await code(ask(form="f" * 99)) == "bad-input"
        assert await code(ask(form=8)) == "bad-input"
        assert await code(ask(codecs=["x"] * 9)) == "bad-input"
        assert await code(ask(codecs=["x" * 17])) == "bad-input"
        assert await code(ask(codecs=CODEC)) == "bad-input"
        assert await code(ask(measures=1)) == "bad-input"
        good = {"form": "float32", "codec": CODEC, "tokens": 2}
        assert await code(ask(), step(BOMB, **good)) == "bad-shape"  # not fewer than the plain bytes
        assert await code(ask(), step(BOMB, **good | {"tokens": 32})) == "bad-value"
        assert await code(ask(), step(b"x", **good)) == "bad-value"
        assert await code(ask(), step(b"x", **good | {"codec": "lzma"})) == "bad-value"
        assert await code(ask(), step(b"x", **good | {"form": "float8"})) == "bad-dtype"
        assert await code(ask(), step(b"x", **good | {"tokens": 2**20 - 1})) == "bad-shape"
        assert await code(ask(), step(b"x", **good | {"tokens": 0})) == "bad-input"
        assert await code(ask(), step(b"x", **good | {"tokens": "2"})) == "bad-input"
        assert await code(ask(), step(b"x", form="int8")) == "bad-input"
        assert await code(ask(), step(bytes(49), form="int8", tokens=1)) == "bad-shape"
        assert await code(ask(), step(bytes(48) + b"\x80\x7f", form="int8", tokens=1)) == "bad-value"
        assert await code(("sent", Message(header={}))) == "bad-input"


async def test_nodes_that_say_nonsense_of_what_they_sent_lose_the_session(
    odd: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        session = await open_session(swarm, "auto")
        before = [await session.step(STEPS[0])]
        blamed = note_failures(swarm)
        monkeypatch.setattr(Sent, "to_fields", lambda _: {"form": "x" * 99, "tokens": -1, "bytes": 2**60})
        [first, last] = await session.traffic()
        assert first.to is not None
        assert (first.back, last.back) == (None, None)
        assert "out: unknown" in str(last)
        assert blamed == {node.peer_id for node in swarm.nodes}
        session.rollback(0)
        assert same([await session.step(STEPS[0])], before)
        await session.aclose()
