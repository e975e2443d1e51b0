"""Files between hosts: from several holders, some of whom lie, vanish or fall silent; and what servers bear."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from net import errors
from net.addresses import Multiaddr
from net.files import wire
from net.files.fetch import FetchSettings, fetch, fetch_bytes
from net.files.part import LEFT_BYTES, Part
from net.files.pieces import PIECE_BYTES, FileId, Hashes
from net.files.server import FileServer, FileServerSettings
from net.host import Host
from net.identity import PeerId
from net.mux.base import Stream
from net.rpc import lane
from net.rpc.framing import Message, encode
from net.swarm import Connection
from tests.net_helpers import memory_hosts

DATA = random.Random(7).randbytes(5 * PIECE_BYTES + 12_345)
HASHES = Hashes.of_bytes(DATA)
FILE = HASHES.file
PATIENCE_S = 20.0

pytestmark = pytest.mark.usefixtures("patience")


@pytest.fixture
async def patience() -> AsyncIterator[None]:
    """Nothing here takes long."""
    with trio.fail_after(PATIENCE_S):
        yield


@dataclass(frozen=True)
class Holder:
    host: Host

    @property
    def peer_id(self) -> PeerId:
        return self.host.peer_id

    @property
    def addresses(self) -> Sequence[Multiaddr]:
        return self.host.addresses


Change = Callable[[str, Message, Message], Awaitable[Message]]


def serve_changed(host: Host, change: Change, data: bytes = DATA) -> None:
    """Serve ``data``, with every answer passed through ``change(method, request, answer)``."""
    hashes = Hashes.of_bytes(data)

    def method(name: str) -> lane.Method:
        async def answer(request: Message) -> Message:
            if name == "hashes":
                first = 32 * request.header["first"]
                good = wire.answer_with(hashes.joined[first : first + 32 * request.header["count"]])
            else:
                at = request.header["index"] * PIECE_BYTES
                good = wire.answer_with(data[at : at + PIECE_BYTES])
            return await change(name, request, good)

        return answer

    async def serve(connection: Connection, stream: Stream) -> None:
        methods = {name: method(name) for name in ("hashes", "piece")}
        await lane.serve(stream, connection.peer_id, methods, idle_s=60)

    host.handle(wire.PROTOCOL_ID, serve)


async def unchanged(_: str, __: Message, answer: Message) -> Message:
    return answer


def flipping(*methods: str) -> Change:
    """Flips a bit in what these methods give."""

    async def change(method: str, request: Message, answer: Message) -> Message:
        if method not in methods:
            return answer
        data = bytearray(answer.tensors[0].data)
        data[len(data) // 2] ^= 1
        return wire.answer_with(bytes(data))

    return change


async def silent(method: str, _: Message, answer: Message) -> Message:
    if method == "piece":
        await trio.sleep_forever()
    return answer


@asynccontextmanager
async def world(*changes: Change | None, data: bytes = DATA) -> AsyncIterator[tuple[Host, list[Holder]]]:
    """Who fetches, and a holder for each change; ``None`` for a proper server."""
    async with memory_hosts(1 + len(changes)) as (host, *others):
        for other, change in zip(others, changes, strict=True):
            if change is None:
                FileServer(other).add_bytes(data)
            else:
                serve_changed(other, change, data)
        yield host, [Holder(other) for other in others]


def left_behind(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


# What comes


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 40 * PIECE_BYTES])
@pytest.mark.parametrize("holders", [1, 3])
async def test_a_file_comes_whole(size: int, holders: int, tmp_path: Path) -> None:
    data = random.Random(size).randbytes(size)
    target = tmp_path / "folder" / "file"
    seen: list[tuple[int, int]] = []
    async with world(*[None] * holders, data=data) as (host, sources):
        file = Hashes.of_bytes(data).file
        hashes = await fetch(host, file, sources, target, progress=lambda *done: seen.append(done))
        assert await fetch_bytes(host, file, sources, max_bytes=size) == data
    assert (hashes, target.read_bytes()) == (Hashes.of_bytes(data), data)
    assert left_behind(target) == ["file"]
    assert (seen[0], seen[-1]) == ((0, size), (size, size))
    assert seen == sorted(seen)


async def test_all_holders_send(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(30 * PIECE_BYTES)
    sent: list[int] = [0, 0, 0]
    ready = trio.Event()

    def counting(number: int) -> Change:
        async def change(method: str, _: Message, answer: Message) -> Message:
            if method == "piece":
                sent[number] += 1
                if all(sent):
                    ready.set()
                await ready.wait()
            return answer

        return change

    async with world(*map(counting, range(3)), data=data) as (host, holders):
        await fetch(host, Hashes.of_bytes(data).file, holders, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == data
    assert sum(sent) >= 30


async def test_what_is_there_already_is_not_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    async with world() as (host, _):
        assert await fetch(host, FILE, [], tmp_path / "file") == HASHES
    assert left_behind(tmp_path / "file") == ["file"]


async def test_another_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(bytes(len(DATA)))
    async with world(flipping("piece")) as (host, holders):
        with pytest.raises(errors.FetchFailed):
            await fetch(host, FILE, holders, target)
    assert target.read_bytes() == bytes(len(DATA))
    assert left_behind(target) == ["file"]
    async with world(None) as (host, holders):
        await fetch(host, FILE, holders, target)
    assert target.read_bytes() == DATA


async def test_two_at_once_fetch_once(tmp_path: Path) -> None:
    asked: list[int] = []

    async def change(method: str, request: Message, answer: Message) -> Message:
        if method == "piece":
            asked.append(request.header["index"])
        return answer

    async with world(change) as (host, holders), trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(fetch, host, FILE, holders, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA
    assert sorted(asked) == list(range(FILE.n_pieces))
    assert left_behind(tmp_path / "file") == ["file"]


# Holders that fail


@pytest.mark.parametrize("lie", ["hashes", "piece"])
async def test_a_flipped_bit_of_one_holder(lie: str, tmp_path: Path) -> None:
    blamed: list[errors.PeerFailed] = []
    asked, found_out = trio.Event(), trio.Event()
    lying = flipping(lie)

    async def liar(method: str, request: Message, answer: Message) -> Message:
        if method == lie:
            asked.set()
        return await lying(method, request, answer)

    async def honest(method: str, _: Message, answer: Message) -> Message:
        await asked.wait()  # the other one has its chance
        if method == lie == "piece":
            await found_out.wait()
        return answer

    def blame(failure: errors.PeerFailed) -> None:
        blamed.append(failure)
        found_out.set()

    async with world(liar, honest) as (host, holders):
        await fetch(host, FILE, holders, tmp_path / "file", on_failure=blame)
    assert (tmp_path / "file").read_bytes() == DATA
    if lie == "piece":  # a list of hashes need not be waited for
        assert [failure.peer_id for failure in blamed] == [holders[0].peer_id]
        assert "wrong bytes for piece" in blamed[0].reason


@pytest.mark.parametrize("lie", ["hashes", "piece"])
async def test_all_lie(lie: str, tmp_path: Path) -> None:
    async with world(flipping(lie), flipping(lie)) as (host, holders):
        with pytest.raises(errors.FetchFailed) as caught:
            await fetch(host, FILE, holders, tmp_path / "file")
    assert {failure.peer_id for failure in caught.value.failures} == {holder.peer_id for holder in holders}
    for holder in holders:
        assert str(holder.peer_id) in str(caught.value)
    assert left_behind(tmp_path / "file") == []  # nothing of it is kept


@pytest.mark.parametrize(
    "answer",
    [
        Message(header={}),
        wire.answer_with(b""),
        wire.answer_with(bytes(PIECE_BYTES + 1)),
        wire.answer_with(bytes(32 * FILE.n_pieces)),
    ],
)
async def test_answers_that_are_none(answer: Message, tmp_path: Path) -> None:
    async def change(_: str, __: Message, ___: Message) -> Message:
        return answer

    async with world(change) as (host, holders):
        with pytest.raises(errors.FetchFailed, match="sent "):
            await fetch(host, FILE, holders, tmp_path / "file")
    assert left_behind(tmp_path / "file") == []


async def test_a_holder_vanishes_half_way_and_the_other_one_goes_on(tmp_path: Path) -> None:
    async with memory_hosts(3) as (host, first, second):
        vanished = trio.Event()

        async def vanishing(method: str, request: Message, answer: Message) -> Message:
            if method == "piece" and request.header["index"] >= 2:
                first.unhandle(wire.PROTOCOL_ID)
                for connection in first.swarm.connections:
                    connection.mux.close()
                vanished.set()
                await trio.sleep_forever()
            return answer

        async def waiting(method: str, _: Message, answer: Message) -> Message:
            await vanished.wait()
            return answer

        serve_changed(first, vanishing)
        serve_changed(second, waiting)
        await fetch(host, FILE, [Holder(first), Holder(second)], tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA


async def test_who_breaks_off_is_asked_again_as_long_as_it_gives(tmp_path: Path) -> None:
    broken = 0

    async with memory_hosts(2) as (host, holder):

        async def breaking(method: str, request: Message, answer: Message) -> Message:
            nonlocal broken
            if method == "piece" and request.header["index"] == 3 and broken < 2:
                broken += 1
                for connection in holder.swarm.connections:
                    connection.mux.close()
                await trio.sleep_forever()
            return answer

        serve_changed(holder, breaking)
        settings = FetchSettings(lanes=1)
        with pytest.raises(errors.FetchFailed, match=r"3145728 of 5255225 bytes are here; what has come is kept"):
            await fetch(host, FILE, [Holder(holder)], tmp_path / "file", settings=settings)
        assert broken == 2
        await fetch(host, FILE, [Holder(holder)], tmp_path / "file", settings=settings)
    assert (tmp_path / "file").read_bytes() == DATA


async def test_a_silent_holder_does_not_decide_when_it_ends(tmp_path: Path) -> None:
    async with world(silent, silent, unchanged) as (host, holders):
        await fetch(host, FILE, holders, tmp_path / "file", settings=FetchSettings(piece_s=1e9))
    assert (tmp_path / "file").read_bytes() == DATA


async def test_a_silent_holder_is_named(tmp_path: Path) -> None:
    async with world(silent) as (host, holders):
        with pytest.raises(errors.FetchFailed, match=r"no answer to 'piece' in 0\.01 s"):
            await fetch(host, FILE, holders, tmp_path / "file", settings=FetchSettings(piece_s=0.01))


async def test_who_does_not_have_it_is_passed_over(tmp_path: Path) -> None:
    async with memory_hosts(4) as (host, without, other, server):
        FileServer(other).add_bytes(b"another")
        FileServer(server).add_bytes(DATA)
        blamed: list[errors.PeerFailed] = []
        nobody = Holder(without)
        with pytest.raises(errors.FetchFailed) as caught:
            await fetch(host, FILE, [nobody, Holder(other)], tmp_path / "file", on_failure=blamed.append)
        assert sorted(failure.reason for failure in blamed) == ["does not have it", "does not serve files"]
        assert caught.value.failures == tuple(blamed)
        with pytest.raises(errors.FetchFailed, match="there is nobody to ask"):
            await fetch(host, FILE, [], tmp_path / "file")
        one_at_a_time = FetchSettings(holders=1)
        everybody = [nobody, Holder(other), Holder(host), Holder(server)]
        await fetch(host, FILE, everybody, tmp_path / "file", settings=one_at_a_time)
    assert (tmp_path / "file").read_bytes() == DATA


# Our own side


class Broken(Exception):
    """What ends a fetch half-way."""


@pytest.mark.parametrize("spoiled", [None, 1])
async def test_the_next_try_goes_on_from_there(spoiled: int | None, tmp_path: Path) -> None:
    target = tmp_path / "file"
    asked: list[int] = []

    async def change(method: str, request: Message, answer: Message) -> Message:
        if method == "piece":
            asked.append(request.header["index"])
        return answer

    def stop(done: int, _: int) -> None:
        if done >= 3 * PIECE_BYTES:
            scope.cancel()

    async with world(change) as (host, holders):
        with trio.CancelScope() as scope:  # as Ctrl-C does
            await fetch(host, FILE, holders, target, progress=stop, settings=FetchSettings(lanes=1))
        assert scope.cancelled_caught
        assert left_behind(target) == ["file.part"]
        if spoiled is not None:
            with (tmp_path / "file.part").open("rb+") as file:
                file.seek(spoiled * PIECE_BYTES)
                file.write(b"spoiled")
        asked.clear()
        await fetch(host, FILE, holders, target)
    assert sorted(asked) == [*([] if spoiled is None else [spoiled]), 3, 4, 5]
    assert target.read_bytes() == DATA
    assert left_behind(target) == ["file"]


async def test_what_lay_there_under_its_name_is_no_use_and_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(bytes(len(DATA) + 2 * PIECE_BYTES))
    async with world(None) as (host, holders):
        await fetch(host, FILE, holders, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA


async def test_too_large_is_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    async with world(None) as (host, holders):
        with pytest.raises(errors.StorageError, match=f"{FILE.size} bytes, more than the {FILE.size - 1}"):
            await fetch(host, FILE, holders, tmp_path / "file", max_bytes=FILE.size - 1)
        with pytest.raises(errors.StorageError, match="more than the"):
            await fetch_bytes(host, FILE, holders, max_bytes=FILE.size - 1)
        assert left_behind(tmp_path / "file") == []
        for size in (FILE.size - 1, FILE.size + 1, PIECE_BYTES):  # whoever says another size has another file
            with pytest.raises(errors.FetchFailed, match="does not have it"):
                await fetch(host, FileId(FILE.root, size), holders, tmp_path / "file")
        with pytest.raises(errors.FetchFailed, match="no file of 0 bytes"):
            await fetch(host, FileId(FILE.root, 0), holders, tmp_path / "file")
    assert left_behind(tmp_path / "file") == []


async def test_no_room_is_said_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=FILE.size + LEFT_BYTES - 1))
    async with world(None) as (host, holders):
        with pytest.raises(errors.StorageError, match=r"the disk has \d+ left; make room and try again"):
            await fetch(host, FILE, holders, tmp_path / "file")
        assert left_behind(tmp_path / "file") == []
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=FILE.size + LEFT_BYTES))
        await fetch(host, FILE, holders, tmp_path / "file")


async def test_a_disk_that_fills_up_leaves_everything_intact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"what was there")
    room = 2
    write = os.pwrite

    def fills_up(fd: int, data: Any, at: int) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room -= 1
        return write(fd, data, at)

    asked: list[int] = []

    async def change(method: str, request: Message, answer: Message) -> Message:
        if method == "piece":
            asked.append(request.header["index"])
        return answer

    async with world(change, change) as (host, holders):
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", fills_up)
            with pytest.raises(errors.StorageError, match="No space left on device"):
                await fetch(host, FILE, holders, target)
        assert target.read_bytes() == b"what was there"
        asked.clear()
        await fetch(host, FILE, holders[:1], target)
    assert target.read_bytes() == DATA
    assert len(asked) == FILE.n_pieces - 2


async def test_folders_that_cannot_be_written_to(tmp_path: Path) -> None:
    async with world(None) as (host, holders):
        (tmp_path / "taken").write_bytes(b"")
        with pytest.raises(errors.StorageError, match="taken"):
            await fetch(host, FILE, holders, tmp_path / "taken" / "file")
        (tmp_path / "folder").mkdir()
        with pytest.raises(errors.StorageError, match="folder"):
            await fetch(host, FILE, holders, tmp_path / "folder")
        os.mkfifo(tmp_path / "pipe.part")
        with pytest.raises(errors.StorageError, match="no regular file"):
            await fetch(host, FILE, holders, tmp_path / "pipe")
        (tmp_path / "elsewhere").write_bytes(b"as it was")
        (tmp_path / "link.part").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(errors.StorageError, match=r"link\.part"):
            await fetch(host, FILE, holders, tmp_path / "link")
    assert (tmp_path / "elsewhere").read_bytes() == b"as it was"


async def test_who_holds_a_part_is_alone(tmp_path: Path) -> None:
    first = Part.open(tmp_path / "file")
    assert first is not None
    assert Part.open(tmp_path / "file") is None
    first.close()
    assert left_behind(tmp_path / "file") == []
    again = Part.open(tmp_path / "file")
    assert again is not None
    again.close()


# Servers


async def call(host: Host, server: Host, method: str, fields: dict[str, object]) -> Message:
    await host.connect(server.peer_id, server.addresses)
    async with lane.Lane(await host.open_stream(server.peer_id, [wire.PROTOCOL_ID]), server.peer_id) as calls:
        return await calls.call(method, fields, timeout_s=10)


@pytest.mark.parametrize(
    ("method", "fields", "code"),
    [
        ("piece", {"root": FILE.root, "size": FILE.size, "index": 6}, "bad-input"),
        ("piece", {"root": FILE.root, "size": FILE.size, "index": -1}, "bad-input"),
        ("piece", {"root": FILE.root, "size": FILE.size}, "bad-input"),
        ("piece", {"root": FILE.root, "size": FILE.size + 1, "index": 0}, "no-file"),
        ("piece", {"root": bytes(32), "size": 1, "index": 0}, "no-file"),
        ("piece", {"root": "../../etc/passwd", "size": 1, "index": 0}, "bad-input"),
        ("piece", {}, "bad-input"),
        ("hashes", {"root": FILE.root, "size": FILE.size, "first": 0, "count": 7}, "bad-input"),
        ("hashes", {"root": FILE.root, "size": FILE.size, "first": 7, "count": 0}, "bad-input"),
        ("files", {}, "unknown-method"),
    ],
)
async def test_calls_that_make_no_sense(method: str, fields: dict[str, object], code: str) -> None:
    async with memory_hosts(2) as (host, other):
        FileServer(other).add_bytes(DATA)
        with pytest.raises(errors.RpcError) as caught:
            await call(host, other, method, fields)
    assert caught.value.code == code


@pytest.mark.parametrize("change", ["touched", "damaged", "gone", "shorter", "a folder"])
async def test_what_has_changed_is_not_served(change: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    fields: dict[str, object] = {**wire.fields_of(FILE), "index": 1}
    async with memory_hosts(2) as (host, other):
        server = FileServer(other)
        assert await server.add(path) == FILE
        assert bytes((await call(host, other, "piece", fields)).tensors[0].data) == DATA[PIECE_BYTES : 2 * PIECE_BYTES]
        times = path.stat()
        if change == "touched":
            os.utime(path, ns=(0, 0))
        elif change == "damaged":
            with path.open("rb+") as file:
                file.seek(PIECE_BYTES + 5)
                file.write(bytes([DATA[PIECE_BYTES + 5] ^ 1]))
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        elif change == "shorter":
            os.truncate(path, 10)
        else:
            path.unlink()
            if change == "a folder":
                path.mkdir()
        with pytest.raises(errors.RpcError, match=wire.NO_FILE):
            await call(host, other, "piece", fields)
        assert server.files == []


async def test_files_that_cannot_be_served(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"short")
    async with memory_hosts(1) as (host,):
        server = FileServer(host)
        for path in (tmp_path, tmp_path / "nothing"):
            with pytest.raises(errors.StorageError, match=str(path)):
                await server.add(path)
        with pytest.raises(errors.StorageError, match="no regular file of"):
            await server.add_known(HASHES, tmp_path / "file")
        assert await server.add(tmp_path / "file") == Hashes.of_bytes(b"short").file
        assert server.files == [Hashes.of_bytes(b"short").file]
        server.remove(server.files[0].root)
        server.remove(bytes(32))
        assert server.files == []
        server.close()
        FileServer(host)


async def test_a_peer_that_takes_nothing_keeps_its_share_and_no_more() -> None:
    """Its answers are not read: no more than its share is read for it, and others get theirs."""
    settings = FileServerSettings(calls_per_peer=2, streams_per_peer=5)
    async with memory_hosts(3) as (greedy, host, other):
        server = FileServer(other, settings)
        server.add_bytes(DATA)
        await greedy.connect(other.peer_id, other.addresses)
        for _ in range(5):
            calls = lane.Lane(await greedy.open_stream(other.peer_id, [wire.PROTOCOL_ID]), other.peer_id)
            request = encode(Message(header={"m": "piece", **wire.fields_of(FILE), "index": 0}))
            for part in request:
                await calls._stream.send_all(part)
        with pytest.raises(errors.NetError):  # a sixth stream is reset
            await call(greedy, other, "piece", {**wire.fields_of(FILE), "index": 0})
        assert server._calls <= 2
        await call(host, other, "piece", {**wire.fields_of(FILE), "index": 0})


async def test_too_many_calls_are_refused_for_now_and_waited_for(tmp_path: Path) -> None:
    async with memory_hosts(2) as (host, other):
        server = FileServer(other, FileServerSettings(calls=0))
        server.add_bytes(DATA)
        with pytest.raises(errors.RpcError) as caught:
            await call(host, other, "piece", {**wire.fields_of(FILE), "index": 0})
        assert (caught.value.code, caught.value.retry_after_s) == ("busy", 1.0)
        with pytest.raises(errors.FetchFailed, match="too many files are being sent"):
            await fetch(host, FILE, [Holder(other)], tmp_path / "file", settings=FetchSettings(busy_s=0.5))
