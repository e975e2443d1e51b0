"""Models whose files come from peers: clients and nodes that have nothing but a name."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import trio

from client.errors import UnknownModel
from client.models.bloom import DistributedBloomForCausalLM
from compute.checkpoint import Checkpoint
from compute.errors import CheckpointError
from compute.peer_models import MAX_TRIED, find_at_peers, read_manifest
from net.errors import FetchFailed
from net.files import models as travel
from net.files.manifest import ModelManifest
from net.files.models import MODELS_FOLDER, SAID_DIGITS, Offer, PeerModels, offers_of, split_pin
from net.files.part import LEFT_BYTES
from net.files.pieces import FileId, Hashes, hash_file
from net.files.remembered import RememberedHashes
from net.files.server import FileServer
from tests.checkpoints import make_checkpoint
from tests.mem.conftest import Reference
from tests.mem.swarms import RunningNode, TestSwarm, blocking, generate, swarm_of, until
from tests.unit.announcements import node as announced

PROMPT = torch.tensor([[40, 41, 90, 17, 200]])
NEW = 6
SHARD = "model-0000{}-of-00004.safetensors"
SMALL = {
    "config.json",
    "generation_config.json",
    "manifest",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
LAST_S = 30.0


@pytest.fixture
def manifest_of(tmp_path: Path) -> Callable[[Path], ModelManifest]:
    def read(folder: Path) -> ModelManifest:
        found = read_manifest(Checkpoint.open(folder), RememberedHashes(tmp_path / "hashes-of-tests"))
        assert found is not None
        return found[0]

    return read


def kept(home: Path) -> dict[str, Path]:
    """What has come into a home, by name."""
    return {path.name: path for path in (home / MODELS_FOLDER).glob("*/*")}


def expected(odd: Reference) -> list[list[int]]:
    return generate(odd.model, PROMPT, max_new_tokens=NEW, do_sample=False)


async def tokens(model: DistributedBloomForCausalLM) -> list[list[int]]:
    return await blocking(lambda: generate(model, PROMPT, max_new_tokens=NEW, do_sample=False))


async def offered(swarm: TestSwarm, count: int) -> None:
    """Wait until so many nodes offer files."""
    with trio.fail_after(LAST_S):
        while sum(node.files is not None for node in await swarm.client.nodes()) < count:  # noqa: ASYNC110  others announce
            await trio.sleep(0.01)


# Clients


async def test_a_client_with_nothing_but_a_name(
    odd: Reference,
    manifest_of: Callable[[Path], ModelManifest],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, "compute.peer_models")
    seen: dict[str, tuple[int, int]] = {}
    root = str(manifest_of(odd.folder).file_id)
    async with swarm_of(odd.folder, [(0, 2), (2, 5)], home=tmp_path) as swarm:
        model = await swarm.client.model(
            "odd-bloom", progress=lambda name, done, total: seen.update({name: (done, total)})
        )
        assert await tokens(model) == expected(odd)
        assert await blocking(lambda: model.tokenizer("In the beginning").input_ids)
        [note] = [record.getMessage() for record in caplog.records if record.name == "compute.peer_models"]
        assert note.endswith(f"say odd-bloom@{root[:32]}")
        files = kept(tmp_path / "client")
        names = {path.name for path in odd.folder.iterdir()}
        assert set(files) == (SMALL & {*names, "manifest"}) | {SHARD.format(1), SHARD.format(4)}  # and no other blocks
        assert {path.parent.name for path in files.values()} == {root}
        for name, path in files.items():
            if name != "manifest":
                assert path.read_bytes() == (odd.folder / name).read_bytes()
                assert seen[name] == (path.stat().st_size,) * 2
        # Another time it is all there, and pinned nothing needs to be said.
        seen.clear()
        caplog.clear()
        again = await swarm.client.model(f"odd-bloom@{root[:32]}", progress=lambda *_: seen.update({"any": (0, 0)}))
        assert await tokens(again) == expected(odd)
        assert not seen
        assert not [record for record in caplog.records if record.name == "compute.peer_models"]


async def test_a_full_disk_is_said_and_leaves_what_was_there(
    odd: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with swarm_of(odd.folder, [(0, 5)], home=tmp_path) as swarm:
        usage = shutil.disk_usage(tmp_path)
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "disk_usage", lambda _: usage._replace(free=LEFT_BYTES + 40_000))
            with pytest.raises(CheckpointError, match=r"the disk has \d+ left; make room and try again"):
                await swarm.client.model("odd-bloom")
        small = kept(tmp_path / "client")
        assert {"config.json", "manifest"} <= set(small)
        assert not [name for name in small if name.endswith(".part")]
        before = {name: path.stat().st_mtime_ns for name, path in small.items()}
        assert await tokens(await swarm.client.model("odd-bloom")) == expected(odd)
        assert {name: small[name].stat().st_mtime_ns for name in small} == before


async def test_what_was_damaged_here_is_fetched_again(odd: Reference, tmp_path: Path) -> None:
    async with swarm_of(odd.folder, [(0, 5)], home=tmp_path) as swarm:
        await swarm.client.model("odd-bloom")
        files = kept(tmp_path / "client")
        shard = files[SHARD.format(1)]
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
        files["config.json"].unlink()
        elsewhere = tmp_path / "elsewhere"
        elsewhere.write_bytes(files["tokenizer.json"].read_bytes())
        files["tokenizer.json"].unlink()
        files["tokenizer.json"].symlink_to(elsewhere)
        assert await tokens(await swarm.client.model("odd-bloom")) == expected(odd)
        assert shard.read_bytes() == (odd.folder / shard.name).read_bytes()
        assert not files["tokenizer.json"].is_symlink()


async def test_pins(
    odd: Reference,
    manifest_of: Callable[[Path], ModelManifest],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    manifest = manifest_of(odd.folder)
    async with swarm_of(odd.folder, [(0, 5)], home=tmp_path) as swarm:
        await offered(swarm, 1)
        caplog.set_level(logging.WARNING, "compute.peer_models")
        for pin in (manifest.digest[:8], manifest.digest, str(manifest.file_id), str(manifest.file_id)[:8].upper()):
            caplog.clear()
            assert await tokens(await swarm.client.model(f"odd-bloom@{pin}")) == expected(odd)
            notes = [record for record in caplog.records if record.name == "compute.peer_models"]
            assert len(notes) == manifest.digest.startswith(pin)  # which says nothing of what is in weights
        with pytest.raises(UnknownModel) as caught:
            await swarm.client.model("odd-bloom@00000000")
        assert f"begin with 00000000; there is odd-bloom@{str(manifest.file_id)[:32]}" in str(caught.value)
        for name in ("odd-bloom@0000000", "odd-bloom@", "odd-bloom@xyzxyzxyz"):  # no pins
            with pytest.raises(UnknownModel, match="nobody serves odd-bloom@"):
                await swarm.client.model(name)


async def test_the_model_that_ships_is_found_here_unless_another_is_pinned(tiny: Reference, tmp_path: Path) -> None:
    digest = Checkpoint.open(tiny.folder).digest
    root = hash_root(tiny.folder, tmp_path)
    async with swarm_of(tiny.folder, [(0, 8)], home=tmp_path) as swarm:
        for name in ("bloom-tiny", f"bloom-tiny@{digest[:20]}", f"bloom-tiny@{root}"):
            await swarm.client.model(name)
        assert not kept(tmp_path / "client")
        with pytest.raises(UnknownModel, match="begin with 0123456789"):
            await swarm.client.model("bloom-tiny@0123456789")


def hash_root(folder: Path, tmp_path: Path) -> str:
    found = read_manifest(Checkpoint.open(folder), RememberedHashes(tmp_path / "other-hashes"))
    assert found is not None
    return str(found[0].file_id)


async def test_nobody_gives_files(odd: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(travel, "OFFERED_S", 0.0)
    async with swarm_of(odd.folder, [(0, 5)]) as swarm:
        with pytest.raises(
            UnknownModel, match=r"files are not on this machine .* no node of the swarm gives the files"
        ):
            await swarm.client.model("odd-bloom")


async def test_only_nodes_that_may_be_used_are_asked(odd: Reference, tmp_path: Path) -> None:
    async with swarm_of(odd.folder, [(0, 5)], home=tmp_path) as swarm:
        with pytest.raises(UnknownModel, match="no node of the swarm gives the files"):
            await swarm.client.model("odd-bloom", block=[swarm.nodes[0].peer_id])


async def test_pickles_are_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(travel, "OFFERED_S", 0.0)
    folder = make_checkpoint(tmp_path / "bin-bloom", layers=1, format="bin")
    async with swarm_of(folder, [(0, 1)], home=tmp_path) as swarm:
        with pytest.raises(UnknownModel, match="no node of the swarm gives the files"):
            await swarm.client.model("bin-bloom")


# Nodes


async def test_nodes_with_nothing_but_a_name_pass_files_on(odd: Reference, tmp_path: Path) -> None:
    odd_files = [path.name for path in odd.folder.iterdir()]
    async with swarm_of(odd.folder, [(0, 5)], home=tmp_path) as swarm:
        second = await swarm.add_node("odd-bloom", (2, 4), home=tmp_path / "second")
        for_clients = {SHARD.format(1), SHARD.format(4), *SMALL} & {"manifest", *odd_files}
        await until(lambda: set(kept(tmp_path / "second")) == {SHARD.format(3), *for_clients})
        await offered(swarm, 2)
        assert second.offer.weights == Checkpoint.open(odd.folder).load_span(2, 4).digest
        await swarm.nodes[0].leave()
        third = await swarm.add_node("odd-bloom", (3, 4), home=tmp_path / "third")
        assert kept(tmp_path / "third")[SHARD.format(3)].read_bytes() == (odd.folder / SHARD.format(3)).read_bytes()
        assert third.offer.digest == second.offer.digest
        lacks = r"odd-bloom@.*model-00002-of-00004\.safetensors cannot be had .* does not have it; .*try again later"
        with pytest.raises(CheckpointError, match=lacks):
            await swarm.add_node("odd-bloom", (0, 1), home=tmp_path / "fourth")


async def test_a_whole_swarm_out_of_one_node(odd: Reference, tmp_path: Path) -> None:
    async with swarm_of(odd.folder, [(0, 5)], home=tmp_path) as swarm:
        for number, span in enumerate([(0, 2), (2, 4), (4, 5)], 1):
            await swarm.add_node("odd-bloom", span, home=tmp_path / f"new-{number}")
        homes = [tmp_path / f"new-{number}" for number in (1, 2, 3)]
        await until(lambda: all(path in kept(home) for home in homes for path in (SHARD.format(1), SHARD.format(4))))
        await swarm.nodes[0].leave()
        model = await swarm.client.model("odd-bloom", block=[swarm.nodes[0].peer_id])
        assert await tokens(model) == expected(odd)


async def test_what_came_before_is_given_again_after_a_restart(odd: Reference, tmp_path: Path) -> None:
    async with swarm_of(odd.folder, [(0, 5)], home=tmp_path) as swarm:
        node = await swarm.add_node("odd-bloom", (2, 4), home=tmp_path / "second")
        await node.leave()
        await swarm.add_node("odd-bloom", (0, 1), home=tmp_path / "second")
        await swarm.nodes[0].leave()
        await swarm.add_node("odd-bloom", (3, 4), home=tmp_path / "third")  # whose shard the first run got


# What is offered and no use


class Offered:
    """A node that serves the model and offers what a test makes."""

    def __init__(self, node: RunningNode) -> None:
        self.node = node
        self.server = FileServer(node.host)

    async def offer(self, manifest: ModelManifest | bytes, files: list[Path]) -> None:
        for path in files:
            await self.server.add(path)
        data = manifest if isinstance(manifest, bytes) else manifest.to_bytes()
        self.node.node._files = self.server.add_bytes(data)
        await self.node.node._announce()


@pytest.mark.parametrize(
    "kind", ["another name", "another digest", "other config", "no msgpack", "oversize", "flipped"]
)
async def test_offers_that_are_no_use_are_passed_over_and_said(
    kind: str, odd: Reference, manifest_of: Callable[[Path], ModelManifest], tmp_path: Path
) -> None:
    good = manifest_of(odd.folder)
    bad: ModelManifest | bytes
    folder = odd.folder
    if kind == "another name":
        bad = replace(good, name="other-bloom")
    elif kind == "another digest":
        bad = replace(good, digest="0" * 64)
    elif kind == "no msgpack":
        bad = b"\xc1"
    elif kind == "oversize":
        large = Hashes.of(50 << 20, bytes(32 * 50)).file
        bad = replace(good, files={**good.files, SHARD.format(1): large})
    elif kind == "flipped":  # tokenizers are in no model's digest, but a root is a root
        file = good.files["config.json"]
        bad = replace(
            good, files={**good.files, "config.json": FileId(bytes([file.root[0] ^ 1]) + file.root[1:], file.size)}
        )
    else:
        folder = Path(shutil.copytree(odd.folder, tmp_path / "changed" / "odd-bloom"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 0.5}))
        bad = replace(good, files={**good.files, "config.json": hash_file(folder / "config.json").file})
    async with swarm_of(home=tmp_path) as swarm:
        node = Offered(await swarm.add_node(odd.folder, (0, 5)))
        await node.offer(bad, sorted(folder.iterdir()))
        with pytest.raises(CheckpointError, match="odd-bloom: the files that nodes offer are of no use"):
            await swarm.client.model("odd-bloom")
        assert not [name for name in kept(tmp_path / "client") if name.endswith(".safetensors")]
        # Others offer what is good: a single one is enough, whoever is in the majority.
        for number in range(2):
            other = Offered(await swarm.add_node(odd.folder, (0, 5)))
            await other.offer(*((bad, []) if number else (good, sorted(odd.folder.iterdir()))))
        assert await tokens(await swarm.client.model("odd-bloom")) == expected(odd)


async def test_a_node_that_lies_is_blamed_and_the_others_send(odd: Reference, tmp_path: Path) -> None:
    """Its file was changed beneath it in a way that it does not notice."""
    async with swarm_of(odd.folder, [(0, 5), (0, 5)], home=tmp_path) as swarm:
        await offered(swarm, 2)
        liar = swarm.nodes[0]
        entries = liar.host._handlers["/raceme/files/1"].__self__._entries  # type: ignore[attr-defined]
        for root, entry in list(entries.items()):
            if entry.path is not None and entry.path.name == SHARD.format(1):
                data = bytearray(entry.path.read_bytes())
                data[-1] ^= 1
                entries[root] = Lying(entry, bytes(data))
        for _ in range(8):  # both are asked, and the liar's piece may come second
            shutil.rmtree(tmp_path / "client", ignore_errors=True)
            assert await tokens(await swarm.client.model("odd-bloom")) == expected(odd)
            if liar.peer_id in swarm.client.reputation.avoided():
                break
        assert "wrong bytes for piece 0" in swarm.client.reputation.avoided()[liar.peer_id]


class Lying:
    """A served file whose bytes are others."""

    def __init__(self, entry: Any, data: bytes) -> None:
        self.hashes = entry.hashes
        self._data = data

    def read(self, index: int) -> bytes:
        return self._data


# Choosing


def test_the_offer_of_most_nodes_comes_first() -> None:
    files = [Hashes.of_bytes(bytes([number])).file for number in range(3)]
    nodes = [
        replace(announced(number, 0, 8), files=file)
        for number, file in enumerate([files[0], files[1], files[1], None, files[2], files[1], files[0]])
    ]
    nodes.append(replace(announced(9, 0, 8), model="other", files=files[2]))
    found = offers_of(nodes, "some-bloom")
    assert [(offer.manifest, len(offer.nodes)) for offer in found] == [(files[1], 3), (files[0], 2), (files[2], 1)]
    assert [offer.manifest for offer in offers_of(nodes, "some-bloom", str(files[0])[:8])] == [files[0]]
    assert offers_of(nodes, "some-bloom", nodes[0].digest[:9]) == found
    assert offers_of(nodes, "nothing") == []
    liar = replace(nodes[0], peer_id=announced(8, 0, 8).peer_id, digest=str(files[0]), files=files[1])
    for pin in (str(files[0]), str(files[0])[:SAID_DIGITS]):  # of files: what somebody calls a model is nothing to it
        assert [offer.manifest for offer in offers_of([*nodes, liar], "some-bloom", pin)] == [files[0]]


def test_a_pin_that_fits_several_is_refused() -> None:
    file, other = (Hashes.of_bytes(data).file for data in (b"one", b"other"))
    pin = str(file)[:8]
    nodes = [
        replace(announced(0, 0, 8), files=file),
        replace(announced(1, 0, 8), files=other, digest=pin + "0" * 56),
    ]

    class Fake:
        offers = staticmethod(partial(offers_of, nodes))

    def call(function: Callable[..., Any], *arguments: object) -> Any:
        return function(*arguments)

    with pytest.raises(CheckpointError, match=f"some-bloom@{pin}: several are offered that begin so; give more digits"):
        find_at_peers(cast(PeerModels, Fake), "some-bloom", pin, call)


def test_no_more_offers_are_tried_than_make_sense() -> None:
    files = [Hashes.of_bytes(bytes([number])).file for number in range(MAX_TRIED + 3)]
    most = files[-1]  # offered by two
    numbered = enumerate([*files, most])
    nodes = [replace(announced(number, 0, 8), files=file) for number, file in numbered]
    tried: list[FileId] = []

    class Fake:
        offers = staticmethod(partial(offers_of, nodes))

        @staticmethod
        def manifest(offer: Offer) -> None:
            tried.append(offer.manifest)
            raise FetchFailed("it cannot be had", [])

    def call(function: Callable[..., Any], *arguments: object) -> Any:
        return function(*arguments)

    with pytest.raises(
        CheckpointError, match=r"11 different sets of files .* the 8 that most .* are of no use"
    ) as lack:
        find_at_peers(cast(PeerModels, Fake), "some-bloom", None, call)
    assert len(tried) == len(set(tried)) == MAX_TRIED
    assert tried[0] == most
    left = offers_of(nodes, "some-bloom")[MAX_TRIED]
    assert f"such as some-bloom@{left.short}, " in str(lack.value)
    tried.clear()
    with pytest.raises(CheckpointError, match=r"some-bloom: the files that nodes offer are of no use \(it cannot"):
        find_at_peers(cast(PeerModels, Fake), "some-bloom", left.short, call)
    assert tried == [left.manifest]


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("bloom-tiny", ("bloom-tiny", None)),
        ("bloom-tiny@0123abCD", ("bloom-tiny", "0123abcd")),
        ("bloom-tiny@0123abc", ("bloom-tiny@0123abc", None)),
        ("bloom-tiny@" + "0" * 64, ("bloom-tiny", "0" * 64)),
        ("bloom-tiny@" + "0" * 65, ("bloom-tiny@" + "0" * 65, None)),
        ("./bloom-tiny@0123abcd", ("./bloom-tiny@0123abcd", None)),
        ("owner/bloom@0123abcd", ("owner/bloom@0123abcd", None)),
        ("", ("", None)),
    ],
)
def test_names_with_digests(given: str, parts: tuple[str, str | None]) -> None:
    assert split_pin(given) == parts
