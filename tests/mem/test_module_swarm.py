"""Modules as a client sees them: listed, obtained by reference or path, refused for another model."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from client.errors import UnknownModel
from client.modules.description import Description
from client.modules.obtaining import obtain
from client.modules.tensors import read_tensors
from client.swarm import AsyncSwarm
from net.dht.service import Dht
from net.errors import ModuleError
from net.host import open_host
from net.identity import Identity
from net.transports.memory import MemoryNetwork
from tests.mem.conftest import Reference
from tests.mem.swarms import swarm_of
from tests.mem.test_modules import AUTHOR, OTHER_AUTHOR, Member, members
from tests.modules import DIGEST, make_module, shapes, sign


@asynccontextmanager
async def client_of(member: Member, network: MemoryNetwork, home: Path) -> AsyncIterator[AsyncSwarm]:
    async with (
        open_host(Identity.generate(), transports=[network.transport()]) as host,
        trio.open_nursery() as nursery,
    ):
        dht = Dht(host, server=False)
        await dht.join(member.host.peer_addresses)
        yield AsyncSwarm(host, dht, nursery, home=home)
        nursery.cancel_scope.cancel()


def as_expected(folder: Path) -> None:
    read_tensors(folder, shapes())


def kept(home: Path) -> list[str]:
    return os.listdir(home / "modules") if (home / "modules").exists() else []


async def test_a_module_is_obtained_once(tmp_path: Path) -> None:
    network, home = MemoryNetwork(), tmp_path / "home"
    async with members(2, tmp_path, network=network) as (publisher, other):
        manifest = await publisher.publish(make_module(tmp_path / "mine"))
        short = f"my-adapter@{manifest.hash[:8]}"
        async with client_of(other, network, home) as swarm:
            (listed,) = await swarm.modules(DIGEST)
            assert listed.manifest == manifest
            told: list[tuple[int, int]] = []
            module = await obtain(swarm, short, DIGEST, check=as_expected, progress=lambda *each: told.append(each))
            assert module.manifest == manifest
            assert told[-1] == (manifest.total_bytes, manifest.total_bytes)
            assert kept(home) == [manifest.hash]
            assert (await swarm.get_module("my-adapter")).folder == module.folder
            await publisher.leave()
            assert await obtain(swarm, short, DIGEST, check=as_expected) == module  # nobody is needed any more
            assert await obtain(swarm, "my-adapter", DIGEST) == module
            weights = module.folder / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
            with pytest.raises(ModuleError, match="damaged, or changed"):
                await obtain(swarm, short, DIGEST)


async def test_a_holder_that_lies_is_avoided(tmp_path: Path) -> None:
    network, home = MemoryNetwork(), tmp_path / "home"
    async with members(2, tmp_path, network=network) as (liar, other), client_of(other, network, home) as swarm:
        manifest = await liar.publish(make_module(tmp_path / "mine"))
        entry = liar.files._entries[manifest.files[0].root]
        liar.files._entries[manifest.files[0].root] = replace(entry, path=None, data=bytes(manifest.files[0].size))
        with pytest.raises(ModuleError, match="cannot be had"):
            await obtain(swarm, str(manifest), DIGEST)
        assert "wrong bytes for piece 0" in swarm.reputation.avoided()[liar.host.peer_id]


async def test_what_must_not_be_used_is_not_kept(tmp_path: Path) -> None:
    network, home = MemoryNetwork(), tmp_path / "home"
    async with members(1, tmp_path, network=network) as (publisher,):
        wide = await publisher.publish(make_module(tmp_path / "wide", rank=4), name="wide")
        foreign = await publisher.publish(make_module(tmp_path / "mine"), name="foreign", model_digest="cd" * 32)
        async with client_of(publisher, network, home) as swarm:
            with pytest.raises(ModuleError, match=r"has shape \[4, 8\], expected \[2, 8\]"):
                await obtain(swarm, f"wide@{wide.hash}", DIGEST, check=as_expected)
            with pytest.raises(
                ModuleError, match="trained on bloom-tiny with digest cdcdcdcdcdcd, but this model has abab"
            ):
                await obtain(swarm, f"foreign@{foreign.hash}", DIGEST, check=as_expected)
            for wrong in ("..@12345678", "wide@123", "", "a b"):
                with pytest.raises(ModuleError, match="names no module"):
                    await obtain(swarm, wrong, DIGEST)
            with pytest.raises(ModuleError, match="nobody has the module nobody"):
                await obtain(swarm, "nobody", DIGEST)
            assert kept(home) == []


async def test_names_that_several_have(tmp_path: Path) -> None:
    network, home = MemoryNetwork(), tmp_path / "home"
    async with members(1, tmp_path, network=network) as (publisher,):
        first = await publisher.publish(make_module(tmp_path / "one"))
        async with client_of(publisher, network, home) as swarm:
            assert (await obtain(swarm, "my-adapter", DIGEST)).manifest == first
            second = await publisher.publish(make_module(tmp_path / "two", seed=1), OTHER_AUTHOR)
            with pytest.raises(ModuleError, match="may be any of 2"):  # one of them is here
                await obtain(swarm, "my-adapter", DIGEST)
            assert (await obtain(swarm, f"my-adapter@{second.hash[:8]}", DIGEST)).manifest == second
            with pytest.raises(ModuleError, match="may be any of 2"):  # both are
                await obtain(swarm, "my-adapter", DIGEST)
            assert (await obtain(swarm, f"my-adapter@{first.hash[:8]}", DIGEST)).manifest == first
            assert first.author == AUTHOR.peer_id


async def test_folders(tmp_path: Path) -> None:
    network = MemoryNetwork()
    async with members(1, tmp_path, network=network) as (someone,), client_of(someone, network, tmp_path) as swarm:
        folder = make_module(tmp_path / "mine")
        module = await obtain(swarm, folder, DIGEST, check=as_expected)
        assert (module.folder, module.manifest) == (folder, None)
        assert (await obtain(swarm, str(folder), DIGEST)).folder == folder
        with pytest.raises(ModuleError, match="has shape"):
            await obtain(swarm, make_module(tmp_path / "wide", rank=4), DIGEST, check=as_expected)
        Description(model="bloom-tiny", model_digest="cd" * 32, method="lora").write(folder)
        with pytest.raises(ModuleError, match="cannot be used"):
            await obtain(swarm, folder, DIGEST)
        with pytest.raises(ModuleError, match="nowhere: no such folder"):
            await obtain(swarm, tmp_path / "nowhere", DIGEST)
        (tmp_path / "empty").mkdir()
        with pytest.raises(ModuleError, match=r"is no module: it has no adapter_config\.json"):
            await obtain(swarm, tmp_path / "empty", DIGEST)


async def test_a_folders_name_without_a_slash_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = MemoryNetwork()
    monkeypatch.chdir(tmp_path)
    make_module(tmp_path / "mine")
    async with members(1, tmp_path, network=network) as (someone,), client_of(someone, network, tmp_path) as swarm:
        with pytest.raises(ModuleError, match=r"nobody has the module mine now.*here, write \./mine"):
            await obtain(swarm, "mine", DIGEST)


async def test_a_module_that_was_damaged_here_comes_again(tmp_path: Path) -> None:
    network, home = MemoryNetwork(), tmp_path / "home"
    async with members(2, tmp_path, network=network) as (publisher, other), client_of(other, network, home) as swarm:
        manifest = await publisher.publish(make_module(tmp_path / "mine"))
        weights = (await obtain(swarm, str(manifest), DIGEST)).folder / "adapter_model.safetensors"
        for _ in range(2):  # more than once, too
            weights.write_bytes(b"\0" * weights.stat().st_size)
            module = await obtain(swarm, str(manifest), DIGEST, check=as_expected)
            assert module.folder / "adapter_model.safetensors" == weights
            as_expected(module.folder)
        assert len(kept(home)) == 3  # nothing of what was there is deleted


async def test_a_module_that_was_damaged_here_stays_where_nobody_has_it(tmp_path: Path) -> None:
    network, home = MemoryNetwork(), tmp_path / "home"
    async with members(1, tmp_path, network=network) as (other,), client_of(other, network, home) as swarm:
        folder = make_module(tmp_path / "mine")
        manifest = sign(AUTHOR, folder)
        stored = swarm.module_store.copy_in(manifest, {file.name: folder / file.name for file in manifest.files})
        weights = stored.folder / "adapter_model.safetensors"
        weights.write_bytes(b"\0" * weights.stat().st_size)
        with pytest.raises(ModuleError, match="was damaged, or changed, and it cannot be fetched again: nobody has"):
            await obtain(swarm, str(manifest), DIGEST)
        assert kept(home) == [manifest.hash]


async def test_a_model_goes_by_every_name_that_its_nodes_give_it(odd: Reference, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(odd.folder, tmp_path / "copied" / "a-copy"))
    async with swarm_of(odd.folder, [(0, odd.n_blocks)], home=tmp_path) as swarm:
        for name in (odd.folder.name, "a-copy", "a-copy"):
            if name == "a-copy":
                await swarm.add_node(copy, (0, 1), home=tmp_path / str(len(swarm.nodes)))
            [served] = await swarm.client.models()
            for known in served.names:
                assert await swarm.client.modules(known) == []
        assert served.names == {odd.folder.name, "a-copy"}
        assert served.name == "a-copy"  # two of three say so
        model = await swarm.client.model(odd.folder.name)
        assert model.served.name == odd.folder.name


async def test_modules_of_a_model_by_its_name(odd: Reference) -> None:
    async with swarm_of(odd.folder, [(0, odd.n_blocks)]) as swarm:
        assert await swarm.client.modules(odd.folder.name) == []
        assert await swarm.client.modules(DIGEST) == []
        with pytest.raises(UnknownModel, match="nobody serves other now"):
            await swarm.client.modules("other")
