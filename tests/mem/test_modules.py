"""Modules between hosts in memory: published, held by volunteers, found, fetched, and refused."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from net import errors, records
from net.addresses import PeerAddress
from net.dht import keys
from net.dht.service import Dht
from net.errors import ModuleError
from net.files.part import Part
from net.files.pieces import Hashes
from net.files.server import FileServer
from net.host import Host, open_host
from net.identity import Identity
from net.modules import announcement, wire
from net.modules.announcement import Holder
from net.modules.finding import FoundModule, ModuleFinder
from net.modules.manifest import Manifest, Reference
from net.modules.service import ModuleService, ModuleSettings
from net.modules.store import ModuleStore, StoredModule, check_files
from net.mux.base import Stream
from net.rpc import lane
from net.rpc.framing import Message
from net.rpc.lane import Lane
from net.swarm import Connection
from net.transports.memory import MemoryNetwork
from tests.mem.swarms import until
from tests.modules import DIGEST, make_module, sign
from tests.net_helpers import MEMORY_ANY, seeded

AUTHOR = seeded(50)
OTHER_AUTHOR = seeded(51)


@dataclass(kw_only=True)
class Member:
    """A host that holds modules."""

    host: Host
    dht: Dht
    store: ModuleStore
    files: FileServer
    modules: ModuleService
    left: trio.Event
    gone: trio.Event

    @property
    def finder(self) -> ModuleFinder:
        return self.modules.finder

    @property
    def holder(self) -> Holder:
        return Holder(self.host.peer_id, tuple(self.host.addresses))

    async def publish(self, folder: Path, author: Identity = AUTHOR, **fields: Any) -> Manifest:
        manifest = sign(author, folder, **fields)
        await self.modules.serve(
            self.store.copy_in(manifest, {file.name: folder / file.name for file in manifest.files})
        )
        return manifest

    async def leave(self) -> None:
        await self.dht.withdraw()
        await self.die()

    async def die(self) -> None:
        """Without a word: what it has announced stays."""
        self.left.set()
        await self.gone.wait()


async def _be_member(
    number: int,
    network: MemoryNetwork,
    bootstrap: Sequence[PeerAddress],
    folder: Path,
    settings: ModuleSettings | None,
    *,
    task_status: trio.TaskStatus[Member],
) -> None:
    gone = trio.Event()
    async with (
        open_host(seeded(number), listen=[MEMORY_ANY], transports=[network.transport()]) as host,
        trio.open_nursery() as nursery,
    ):
        dht = Dht(host, server=True)
        await dht.join(bootstrap)
        await nursery.start(dht.run)
        store, files = ModuleStore(folder / f"store-{number}"), FileServer(host)
        member = Member(
            host=host,
            dht=dht,
            store=store,
            files=files,
            modules=ModuleService(host, dht, store, files, settings),
            left=trio.Event(),
            gone=gone,
        )
        task_status.started(member)
        await member.left.wait()
        nursery.cancel_scope.cancel()
    gone.set()


@asynccontextmanager
async def members(
    count: int,
    folder: Path,
    settings: ModuleSettings | None = None,
    *,
    network: MemoryNetwork | None = None,
    bootstrap: Sequence[PeerAddress] = (),
) -> AsyncIterator[list[Member]]:
    """Servers that have met the first one, or ``bootstrap``."""
    network = network or MemoryNetwork()
    async with trio.open_nursery() as nursery:
        found: list[Member] = []
        for number in range(1, count + 1):
            known = bootstrap or (found[0].host.peer_addresses if found else [])
            found.append(await nursery.start(_be_member, number, network, known, folder, settings))
        yield found
        nursery.cancel_scope.cancel()


def reference(manifest: Manifest, digits: int = 12) -> Reference:
    return Reference.read(f"{manifest.name}@{manifest.hash[:digits]}")


def entries(store: ModuleStore) -> list[str]:
    return os.listdir(store.folder) if store.folder.exists() else []


async def test_what_is_here_by_now_is_checked_as_what_is_fetched(tmp_path: Path) -> None:
    async with members(2, tmp_path) as (publisher, user):
        manifest = await publisher.publish(make_module(tmp_path / "mine"))
        found = await user.finder.resolve(reference(manifest))
        stored = await user.finder.fetch(found, user.store)
        checked: list[Path] = []
        await user.finder.fetch(found, user.store, check=checked.append)
        assert checked == [stored.folder]
        damage(stored)
        assert await user.finder.fetch(found, user.store) == stored  # fetched again
        check_files(manifest, stored.folder)
        assert len(entries(user.store)) == 2  # what was there is there still


def damage(module: StoredModule) -> None:
    """Change bytes, and no size."""
    weights = module.folder / "adapter_model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))


async def test_the_event_loop_never_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, waits = threading.get_ident(), []

    def watch(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            if threading.get_ident() == loop:
                waits.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    async with members(2, tmp_path) as (publisher, user):
        folder = make_module(tmp_path / "mine")
        manifest = sign(AUTHOR, folder)
        module = publisher.store.copy_in(manifest, {file.name: folder / file.name for file in manifest.files})
        for owner, name in (
            *((shutil, "rmtree"), (shutil, "disk_usage"), (Path, "stat"), (Path, "glob"), (Path, "mkdir")),
            *((Part, "open"), (Part, "close"), (Part, "discard"), (Part, "finish")),
        ):
            watch(owner, name)
        await publisher.modules.serve(module)
        found = await user.finder.resolve(reference(manifest))
        await user.finder.fetch(found, user.store)
        with trio.CancelScope() as scope:
            other = ModuleStore(tmp_path / "other")
            await user.finder.fetch(found, other, progress=lambda *_: scope.cancel())
        assert scope.cancelled_caught
        assert waits == []


@pytest.mark.parametrize("digits", [64, 12])
async def test_what_strangers_announce_beside_a_module_does_not_hide_it(
    digits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with members(2, tmp_path) as (publisher, user):
        manifest = await publisher.publish(make_module(tmp_path / "mine"))
        junk = [hashlib.sha256(bytes([number // 256, number % 256])).hexdigest() for number in range(512)]
        strangers = [seeded(number) for number in range(100, 120)]

        async def find(key: bytes, kind: str) -> list[records.Record]:
            """What the DHT gives where strangers say that they have the module, and more that there are not."""
            said: list[tuple[Identity, list[str], tuple[()]]] = [
                (OTHER_AUTHOR, [manifest.hash], ()),  # stands for the publisher
                *((each, [manifest.hash, *junk[:255]], ()) for each in strangers[:10]),
                *((each, junk[255:510], ()) for each in strangers[10:]),
            ]
            return [
                records.sign(who, kind, announcement.write_body(where, hashes), key=key, ttl_s=60)
                for who, hashes, where in said
            ]

        monkeypatch.setattr(user.dht, "find", find)
        asked: list[str] = []
        real = user.finder._ask_all

        async def ask_all(holder: Holder, hashes: Sequence[str], known: dict[str, Manifest]) -> None:
            asked.extend(hashes)
            if holder.peer_id == OTHER_AUTHOR.peer_id:
                holder = publisher.holder
            await real(holder, hashes, known)

        monkeypatch.setattr(user.finder, "_ask_all", ask_all)
        assert (await user.finder.resolve(reference(manifest, digits))).manifest == manifest
        assert set(asked) == {manifest.hash}


async def test_a_module_outlives_its_publisher(tmp_path: Path) -> None:
    folder = make_module(tmp_path / "mine")
    async with members(5, tmp_path) as (publisher, _, volunteer, user, late):
        manifest = await publisher.publish(folder)
        kept = await volunteer.modules.hold(reference(manifest))
        assert volunteer.modules.held == [manifest] == [kept.manifest]
        (found,) = await user.finder.for_model(DIGEST)
        assert found.manifest == manifest
        assert {holder.peer_id for holder in found.holders} == {publisher.host.peer_id, volunteer.host.peer_id}

        await publisher.leave()
        for looked_up in (
            await user.finder.for_model(DIGEST),
            await user.finder.named("my-adapter"),
            [await user.finder.by_hash(manifest.hash)],
        ):
            assert [each and each.holders for each in looked_up] == [(volunteer.holder,)]
        told: list[tuple[int, int]] = []
        found = await user.finder.resolve(reference(manifest))
        stored = await user.finder.fetch(found, user.store, progress=lambda *figures: told.append(figures))
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert (stored.folder / name).read_bytes() == (folder / name).read_bytes()
        assert told[-1] == (manifest.total_bytes, manifest.total_bytes)
        assert sorted(done for done, _ in told) == [done for done, _ in told]
        assert entries(user.store) == [manifest.hash]
        again = await user.finder.fetch(found, user.store)  # from the store
        assert again == stored

        await volunteer.leave()
        assert await user.finder.by_hash(manifest.hash) is None
        with pytest.raises(ModuleError, match="nobody has the module my-adapter@"):
            await late.finder.resolve(reference(manifest))


async def test_a_publisher_that_died_is_passed_over(tmp_path: Path) -> None:
    async with members(4, tmp_path) as (_, publisher, volunteer, user):
        manifest = await publisher.publish(make_module(tmp_path / "mine"))
        await volunteer.modules.hold(reference(manifest))
        await publisher.die()
        found = await user.finder.resolve(reference(manifest))
        assert {holder.peer_id for holder in found.holders} == {publisher.host.peer_id, volunteer.host.peer_id}
        for holders in (found.holders, found.holders[::-1]):
            store = ModuleStore(tmp_path / f"of-{holders[0].peer_id}")
            stored = await user.finder.fetch(FoundModule(manifest=manifest, holders=holders), store)
            check_files(manifest, stored.folder)


async def test_names_that_several_have(tmp_path: Path) -> None:
    async with members(3, tmp_path) as (first, second, user):
        one = await first.publish(make_module(tmp_path / "one"))
        assert (await user.finder.resolve(Reference.read("my-adapter"))).manifest == one
        two = await second.publish(make_module(tmp_path / "two", seed=1), OTHER_AUTHOR, created_s=1_700_100_000)
        with pytest.raises(ModuleError, match="may be any of 2 modules") as refusal:
            await user.finder.resolve(Reference.read("my-adapter"))
        for manifest in (one, two):
            assert f"my-adapter@{manifest.hash[:12]}" in str(refusal.value)
            assert str(manifest.author) in str(refusal.value)
            assert (await user.finder.resolve(reference(manifest, 8))).manifest == manifest
            assert (await user.finder.resolve(reference(manifest, 64))).manifest == manifest
        with pytest.raises(ModuleError, match=f"is {one}, not another"):
            await user.finder.resolve(Reference.read(f"another@{one.hash}"))
        with pytest.raises(ModuleError, match="nobody has the module my-adapter@00000000 now"):
            await user.finder.resolve(Reference.read("my-adapter@00000000"))
        assert [each.manifest for each in await user.finder.for_model(DIGEST)] == [one, two]
        assert await user.finder.for_model("00" * 32) == []


async def test_lineage(tmp_path: Path) -> None:
    async with members(2, tmp_path) as (publisher, user):
        manifests = [await publisher.publish(make_module(tmp_path / "0"), parent="ee" * 32)]
        for number in range(1, 12):  # more than one call asks for
            folder = make_module(tmp_path / str(number), seed=number)
            manifests.append(await publisher.publish(folder, name=f"m{number}", parent=manifests[-1].hash))
        assert await user.finder.lineage(manifests[-1]) == manifests[-2::-1]  # the first one's parent nobody has
        assert len(await user.finder.for_model(DIGEST)) == 12


# What is refused


@pytest.mark.parametrize("store_bytes", [100, 1 << 30])
async def test_an_oversize_module_is_not_fetched(
    store_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: _Usage(free=100))
    async with members(2, tmp_path) as (publisher, user):
        manifest = await publisher.publish(make_module(tmp_path / "mine"))
        small = ModuleStore(tmp_path / "small", max_bytes=store_bytes)
        found = await user.finder.resolve(reference(manifest))
        with pytest.raises(ModuleError, match="at most 100 are taken" if store_bytes == 100 else "has 100 left"):
            await user.finder.fetch(found, small)
        assert entries(small) == []


@dataclass
class _Usage:
    free: int


@pytest.mark.parametrize("where", ["published", "announced"])
async def test_flipped_bytes_are_refused(where: str, tmp_path: Path) -> None:
    """A holder whose file is another one than the manifest says, with the right size."""
    async with members(2, tmp_path) as (liar, user):
        manifest = await liar.publish(make_module(tmp_path / "mine"))
        weights = next(liar.store.folder.glob("*/files/adapter_model.safetensors"))
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        blamed: list[errors.PeerFailed] = []
        user.modules.finder = ModuleFinder(user.host, user.dht, on_failure=blamed.append)
        found = await user.finder.resolve(reference(manifest))
        if where == "published":
            weights.write_bytes(data)
        else:  # and lies about its hashes
            entry = liar.files._entries[manifest.files[1].root]
            liar.files._entries[manifest.files[1].root] = type(entry)(
                hashes=Hashes.of_bytes(bytes(data)), path=None, state=(len(data), 0), data=bytes(data)
            )
        with pytest.raises(ModuleError, match=f"cannot be had: .*{liar.host.peer_id}"):
            await user.finder.fetch(found, user.store)
        assert entries(user.store) == []
        assert [each.peer_id for each in blamed] == [liar.host.peer_id]
        noticed: AbstractContextManager[Any] = pytest.raises(ModuleError, match="damaged, or changed")
        with noticed if where == "published" else nullcontext():
            check_files(manifest, weights.parent)


async def test_what_a_check_refuses_is_not_kept(tmp_path: Path) -> None:
    async with members(2, tmp_path) as (publisher, user):
        manifest = await publisher.publish(make_module(tmp_path / "mine"))
        seen: list[list[str]] = []

        def check(folder: Path) -> None:
            seen.append(sorted(os.listdir(folder)))
            raise ModuleError("a wrong shape")

        with pytest.raises(ModuleError, match="a wrong shape"):
            await user.finder.fetch(await user.finder.resolve(reference(manifest)), user.store, check=check)
        assert seen == [["adapter_config.json", "adapter_model.safetensors"]]
        assert entries(user.store) == []


async def test_nothing_is_left_of_a_fetch_that_was_cancelled(tmp_path: Path) -> None:
    async with members(2, tmp_path) as (publisher, user):
        manifest = await publisher.publish(make_module(tmp_path / "mine"))
        found = await user.finder.resolve(reference(manifest))
        with trio.CancelScope() as scope:
            await user.finder.fetch(found, user.store, progress=lambda *_: scope.cancel())
        assert scope.cancelled_caught
        assert entries(user.store) == []


@pytest.mark.parametrize("kind", ["forged", "another", "garbage", "huge", "too-many", "nothing"])
async def test_holders_that_lie_about_manifests_are_passed_over(kind: str, tmp_path: Path) -> None:
    async with members(6, tmp_path) as (publisher, *liars, user):
        blamed: list[errors.PeerFailed] = []
        user.modules.finder = ModuleFinder(user.host, user.dht, on_failure=blamed.append)
        manifest = await publisher.publish(make_module(tmp_path / "mine"))
        forged = bytearray(manifest.envelope)
        forged[-1] ^= 1
        other = sign(OTHER_AUTHOR, tmp_path / "mine")
        answers = {
            "forged": [bytes(forged)],
            "another": [other.envelope],
            "garbage": [b"\xff" * 100],
            "huge": [b"\xff" * 9000],
            "too-many": [manifest.envelope] * 3,
            "nothing": [b""],
        }[kind]
        for liar in liars:
            liar.host.unhandle(wire.PROTOCOL_ID)
            liar.host.handle(wire.PROTOCOL_ID, _answering(answers))
            for key in announcement.keys_of(manifest):
                body = announcement.write_body(liar.host.addresses, [manifest.hash, other.hash])
                await liar.dht.announce(key, announcement.KIND, lambda body=body: body)  # type: ignore[misc]
        for _ in range(3):
            found = await user.finder.named("my-adapter")
            assert {each.manifest for each in found} <= {manifest} | ({other} if kind == "another" else set())
        blamed.clear()
        assert await user.finder.by_hash(manifest.hash) is not None
        lied = {liar.host.peer_id for liar in liars} if kind != "nothing" else set()
        assert {each.peer_id for each in blamed if isinstance(each, errors.PeerLied)} == lied
        real = FoundModule(manifest=manifest, holders=(liars[0].holder, publisher.holder))
        stored = await user.finder.fetch(real, user.store)  # files come from whoever has them
        assert stored.manifest == manifest
        await publisher.leave()
        with pytest.raises(ModuleError, match="nobody has the module"):
            await user.finder.resolve(reference(manifest, 64))


def _answering(answers: list[bytes]) -> Any:
    async def serve(connection: Connection, stream: Stream) -> None:
        async def manifests(_: Message) -> Message:
            return Message(header={"manifests": answers})

        await lane.serve(stream, connection.peer_id, {"manifests": manifests}, idle_s=10)

    return serve


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"addresses": [], "modules": [b"short"]},
        {"addresses": [], "modules": [b"h" * 33]},
        {"addresses": [], "modules": [b"h" * 32] * 257},
        {"addresses": [b"\xff"], "modules": []},
        {"addresses": [], "modules": ["text"]},
    ],
)
async def test_announcements_that_make_no_sense_are_passed_over(body: dict[str, Any], tmp_path: Path) -> None:
    async with members(3, tmp_path) as (publisher, liar, user):
        manifest = await publisher.publish(make_module(tmp_path / "mine"))
        await liar.dht.announce(announcement.key_of_name("my-adapter"), announcement.KIND, lambda: body)
        (found,) = await user.finder.named("my-adapter")
        assert (found.manifest, found.holders) == (manifest, (publisher.holder,))


async def test_calls_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    async with members(2, tmp_path) as (holder, user):
        for fields in ({}, {"of": [b"short"]}, {"of": [b"h" * 32] * 8}, {"of": "all"}):
            stream = await user.host.open_stream(holder.host.peer_id, [wire.PROTOCOL_ID], holder.host.addresses)
            async with Lane(stream, holder.host.peer_id) as calls:
                with pytest.raises(errors.RpcError, match="bad-input"):
                    await calls.call("manifests", fields, timeout_s=5)


# Volunteers


async def test_a_pin_waits_for_who_has_the_module(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = ModuleSettings(retry_s=0.01, max_retry_s=0.05)
    async with members(3, tmp_path, settings) as (publisher, volunteer, user), trio.open_nursery() as nursery:
        folder = make_module(tmp_path / "mine")
        manifest = sign(AUTHOR, folder)
        caplog.set_level(logging.INFO, "net.modules.service")
        nursery.start_soon(volunteer.modules.pin, reference(manifest))
        await until(lambda: len(caplog.records) >= 4)
        assert volunteer.modules.held == []
        waits = [record.args[1] for record in caplog.records]  # type: ignore[index]
        assert waits[:4] == [0.01, 0.02, 0.04, 0.05]
        await publisher.publish(folder)
        await until(lambda: "is held" in caplog.messages[-1])
        assert volunteer.modules.held == [manifest]
        (told,) = (message for message in caplog.messages if "is held:" in message)
        assert told.startswith(f"{manifest} is held: lora for bloom-tiny, 2 files of {manifest.total_bytes} bytes, by ")
        await publisher.leave()
        (found,) = await user.finder.named("my-adapter")
        assert found.holders == (volunteer.holder,)
        nursery.cancel_scope.cancel()


async def test_what_is_pinned_comes_again_when_it_was_damaged_here(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with members(2, tmp_path) as (publisher, volunteer):
        manifest = await publisher.publish(make_module(tmp_path / "mine"))
        module = await volunteer.finder.fetch(await volunteer.finder.resolve(reference(manifest)), volunteer.store)
        damage(module)
        assert await volunteer.modules.hold(reference(manifest)) == module
        check_files(manifest, module.folder)
        assert volunteer.modules.held == [manifest]
        assert [f"{manifest.hash}.damaged" in message for message in caplog.messages] == [True]


async def test_what_turns_out_to_be_damaged_is_offered_no_more_until_it_has_come_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ModuleSettings(retry_s=0.01)
    async with members(3, tmp_path, settings) as (publisher, volunteer, user), trio.open_nursery() as nursery:
        manifest = await publisher.publish(make_module(tmp_path / "mine"))
        same = sign(AUTHOR, tmp_path / "mine", name="same-files")  # which are served once
        for each in (manifest, same):
            module = volunteer.store.copy_in(each, {file.name: tmp_path / "mine" / file.name for file in each.files})
            nursery.start_soon(volunteer.modules.pin, reference(each))
        await until(lambda: len(volunteer.modules.held) == 2)
        for module in volunteer.store.all():
            damage(module)
        found = FoundModule(manifest=manifest, holders=(volunteer.holder,))
        with pytest.raises(ModuleError, match="does not have it"):
            await user.finder.fetch(found, user.store)
        assert volunteer.modules.held == []
        assert sum("is not held any more" in message for message in caplog.messages) == 2
        await until(lambda: volunteer.modules.held == [manifest])  # nobody has the other one
        assert (await user.finder.fetch(found, user.store)).manifest == manifest
        nursery.cancel_scope.cancel()


async def test_a_store_that_cannot_be_read_ends_no_node(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = ModuleSettings(retry_s=0.01)
    async with members(2, tmp_path, settings) as (publisher, volunteer), trio.open_nursery() as nursery:
        manifest = await publisher.publish(make_module(tmp_path / "mine"))
        volunteer.store.folder.write_text("no folder")
        nursery.start_soon(volunteer.modules.pin, reference(manifest))
        await until(lambda: sum("is not held yet" in message for message in caplog.messages) >= 2)
        assert any("no module here is used" in message for message in caplog.messages)
        volunteer.store.folder.unlink()
        await until(lambda: volunteer.modules.held == [manifest])
        nursery.cancel_scope.cancel()


async def test_a_volunteer_that_comes_back_needs_nobody(tmp_path: Path) -> None:
    async with members(2, tmp_path) as (publisher, volunteer):
        manifest = await publisher.publish(make_module(tmp_path / "mine"))
        await volunteer.modules.hold(reference(manifest))
        await publisher.leave()
        kept = volunteer.store.folder
    async with members(2, tmp_path / "later") as (back, user):
        back.modules._store = ModuleStore(kept)
        await back.modules.hold(reference(manifest))
        assert [each.manifest for each in await user.finder.for_model(DIGEST)] == [manifest]


async def test_what_was_changed_is_not_served(tmp_path: Path) -> None:
    async with members(2, tmp_path) as (publisher, user):
        folder = make_module(tmp_path / "mine")
        manifest = sign(AUTHOR, folder)
        module = publisher.store.copy_in(manifest, {file.name: folder / file.name for file in manifest.files})
        weights = module.folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
        with pytest.raises(ModuleError, match="damaged, or changed"):
            await publisher.modules.serve(module)
        assert publisher.modules.held == [] == await user.finder.named("my-adapter")


async def test_no_more_is_held_than_may_be(tmp_path: Path) -> None:
    assert ModuleSettings().max_held <= announcement.MAX_MODULES
    async with members(1, tmp_path, ModuleSettings(max_held=1)) as (holder,):
        await holder.publish(make_module(tmp_path / "one"))
        with pytest.raises(ModuleError, match="the most allowed"):
            await holder.publish(make_module(tmp_path / "two", seed=2))


async def test_what_lies_under_one_key_can_be_taken_back_alone(tmp_path: Path) -> None:
    """As by a node that pauses: it goes on holding modules."""
    async with members(3, tmp_path) as (node, _, user):
        manifest = await node.publish(make_module(tmp_path / "mine"))
        key = keys.of_name("raceme/nodes/1")
        await node.dht.announce(key, "node", dict)
        assert len(await user.dht.find(key, "node")) == 1
        await node.dht.withdraw(key)
        assert await user.dht.find(key, "node") == []
        assert [each.manifest for each in await user.finder.named("my-adapter")] == [manifest]
        await node.dht.withdraw()
        assert await user.finder.named("my-adapter") == []
