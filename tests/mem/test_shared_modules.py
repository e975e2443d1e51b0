"""What one has trained, others use: published, held by a volunteer, loaded from there, as good as the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from client.errors import InvalidInput
from client.modules.folders import describe, sign_folder
from client.tuning import LoRA, PromptTuning
from net.errors import ModuleError
from net.identity import Identity
from net.modules.manifest import Manifest
from tests.checkpoints import make_checkpoint
from tests.mem.swarms import TestSwarm, blocking, generate, swarm_of
from tests.mem.test_modules import Member, members, reference
from tests.one_machine import shake

IDS = torch.tensor([[40, 41, 90, 17, 200]])
GREEDY = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("shared") / "made-bloom")


async def publish(swarm: TestSwarm, publisher: Member, folder: Path, out: Path) -> Manifest:
    """Train something, as far as a test needs it, and publish it."""
    torch.manual_seed(0)  # what it begins as: not everything shows in a few tokens
    model = await swarm.client.model(str(folder), tuning=[LoRA(rank=2), PromptTuning(3)])
    assert model.tuned is not None
    shake(model.tuned)
    model.save_pretrained(out)
    told = describe(out, model=None, served={})
    module = sign_folder(
        publisher.store, out, Identity.generate(), name="my-adapter", description=told, licence="CC0-1.0"
    )
    await publisher.modules.serve(module)
    return module.manifest


async def test_a_volunteers_module_gives_the_tokens_of_the_local_file(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    async with (
        swarm_of(folder, [(0, 2), (2, 5)], home=home) as swarm,
        members(2, tmp_path, network=swarm.network, bootstrap=[swarm.bootstrap]) as (publisher, volunteer),
    ):
        manifest = await publish(swarm, publisher, folder, tmp_path / "out")
        assert manifest.method == "lora+prompt"
        await volunteer.modules.hold(reference(manifest))
        await publisher.leave()
        local = await swarm.client.model(str(folder), module=tmp_path / "out")
        fetched = await swarm.client.model(str(folder), module=f"my-adapter@{manifest.hash[:12]}")
        expected = await blocking(lambda: generate(local, IDS, **GREEDY))
        assert await blocking(lambda: generate(fetched, IDS, **GREEDY)) == expected
        plain = await swarm.client.model(str(folder))
        assert await blocking(lambda: generate(plain, IDS, **GREEDY)) != expected
        assert fetched.parent == manifest.hash
        assert local.parent is None
        fetched.save_pretrained(tmp_path / "further")
        assert describe(tmp_path / "further", model=None, served={}).parent == manifest.hash


async def test_a_module_of_another_shape_is_refused_and_not_kept(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    async with (
        swarm_of(folder, [(0, 5)], home=home) as swarm,
        members(1, tmp_path, network=swarm.network, bootstrap=[swarm.bootstrap]) as (publisher,),
    ):
        out = tmp_path / "out"
        model = await swarm.client.model(str(folder), tuning=LoRA(rank=2))
        model.save_pretrained(out)
        config = out / "adapter_config.json"
        config.write_text(config.read_text().replace('"r": 2', '"r": 3'))
        told = describe(out, model=None, served={})
        module = sign_folder(publisher.store, out, Identity.generate(), name="odd", description=told, licence="CC0-1.0")
        await publisher.modules.serve(module)
        with pytest.raises((InvalidInput, ModuleError), match="shape"):
            await swarm.client.model(str(folder), module="odd")
        assert not list((home / "client" / "modules").glob("*"))
