"""Sessions that are forked, saved, and taken up by another process."""

from __future__ import annotations

import json
import os
import stat
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from hypothesis import given
from hypothesis import strategies as st

from client.errors import ClientError, InvalidInput
from client.models.saved import ModelMark, SavedSession
from tests.checkpoints import make_checkpoint
from tests.mem.conftest import Reference
from tests.mem.swarms import blocking, generate, swarm_of
from tests.mem.test_parity import PADDED, PADDED_MASK, PROMPT, ROWS

TWO = [(0, 2), (2, 5)]


def greedy(model: Any, ids: torch.Tensor, new: int, **options: Any) -> torch.Tensor:
    return torch.tensor(generate(model, ids, max_new_tokens=new, do_sample=False, **options))


# Forks


@pytest.mark.parametrize("ids", [PROMPT, ROWS], ids=["one-row", "three-rows"])
async def test_forks_go_their_own_ways(odd: Reference, ids: torch.Tensor) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        model = await swarm.model(odd.folder)

        def fork() -> None:
            with model.session() as trunk:
                first = greedy(model, ids, 6, session=trunk)
                with trunk.fork() as branch:
                    assert torch.equal(branch.ids, trunk.ids)
                    assert torch.equal(trunk.ids, first)
                    other = torch.cat([first, torch.full((len(ids), 2), 77)], dim=1)
                    assert torch.equal(greedy(model, other, 5, session=branch), greedy(odd.model, other, 5))
                    assert torch.equal(greedy(model, first, 5, session=trunk), greedy(odd.model, ids, 11))
                    assert branch.position == other.shape[1] + 4
                    twig = branch.fork()
                branch_is_closed = pytest.raises(ClientError, match="the session is closed")
                with branch_is_closed:
                    branch.fork()
                with twig:
                    twig.crop(-5)
                    assert torch.equal(greedy(model, other, 5, session=twig), greedy(odd.model, other, 5))

        await blocking(fork)


async def test_forks_share_what_the_nodes_have(odd: Reference) -> None:
    ids = torch.randint(3, 300, (1, 600), generator=torch.Generator().manual_seed(3))
    async with swarm_of(odd.folder, TWO) as swarm:
        model = await swarm.model(odd.folder)

        async def shared() -> list[int]:
            engines = [serving.engine for node in swarm.nodes for serving in node.node._servings]
            return [max(engine._slots.place(key).shared for key in engine._sessions) for engine in engines]

        def fork() -> list[int]:
            with model.session() as trunk:
                first = greedy(model, ids, 3, session=trunk)
                with trunk.fork() as branch:
                    assert torch.equal(greedy(model, first, 2, session=branch), greedy(odd.model, ids, 5))
                    found: list[int] = trio.from_thread.run(shared)
            return found

        assert await blocking(fork) == [512, 512]


async def test_a_fork_of_beams_has_the_rows_as_they_are_now(odd: Reference) -> None:
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3}
    async with swarm_of(odd.folder, TWO) as swarm:
        model: Any = await swarm.model(odd.folder)

        def fork() -> None:
            with model.session() as trunk:
                greedy(model, PROMPT, 6, session=trunk, **options)
                rows = trunk.ids
                assert rows.shape == (3, trunk.position)
                with trunk.fork() as branch, torch.inference_mode():
                    more = torch.tensor([[5], [6], [7]])
                    ours = model(more, past_key_values=branch).logits
                    theirs = odd.model(torch.cat([rows, more], dim=1)).logits[:, -1:]
                    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)

        await blocking(fork)


# Files


async def test_another_process_goes_on(odd: Reference, tmp_path: Path) -> None:
    file = tmp_path / "story.session"
    cases: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
        "one row": (PROMPT, {}),
        "three rows": (ROWS, {}),
        "padded": (PADDED, {"attention_mask": PADDED_MASK}),
    }
    for name, (ids, options) in cases.items():
        async with swarm_of(odd.folder, TWO) as swarm:
            model = await swarm.model(odd.folder)

            def begin(model: Any = model, ids: torch.Tensor = ids, options: dict[str, Any] = options) -> None:
                with model.session() as session:
                    greedy(model, ids, 6, session=session, **options)
                    session.save(file)

            await blocking(begin)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        async with swarm_of(odd.folder, [(0, 3), (3, 5)]) as swarm:
            model = await swarm.model(odd.folder)

            def go_on(model: Any = model, ids: torch.Tensor = ids, options: dict[str, Any] = options) -> torch.Tensor:
                with model.load_session(file) as session:
                    had = session.ids
                    assert torch.equal(had, greedy(odd.model, ids, 6, **options))
                    more = {"attention_mask": torch.cat([PADDED_MASK, torch.ones_like(PADDED_MASK)], dim=1)}
                    return greedy(model, had, 5, session=session, **(more if options else {}))

            assert torch.equal(await blocking(go_on), greedy(odd.model, ids, 11, **options)), name
    assert os.listdir(tmp_path) == ["story.session"]


async def test_sampling_goes_on_with_the_callers_random_numbers(odd: Reference, tmp_path: Path) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        model: Any = await swarm.model(odd.folder)

        def both() -> None:
            torch.manual_seed(11)
            theirs = generate(odd.model, PROMPT, max_new_tokens=12, do_sample=True, top_k=8)
            torch.manual_seed(11)
            with model.session() as session:
                generate(model, PROMPT, max_new_tokens=5, do_sample=True, top_k=8, session=session)
                session.save(tmp_path / "saved")
            with model.load_session(tmp_path / "saved") as session:
                ids = session.ids
                assert generate(model, ids, max_new_tokens=7, do_sample=True, top_k=8, session=session) == theirs

        await blocking(both)


async def test_saved_beams_are_the_rows_as_they_are_now(odd: Reference, tmp_path: Path) -> None:
    async with swarm_of(odd.folder, TWO) as swarm:
        model: Any = await swarm.model(odd.folder)

        def both() -> None:
            with model.session() as session:
                first = greedy(model, PROMPT, 6, session=session, num_beams=3)
                rows = session.ids
                session.save(tmp_path / "saved")
                assert torch.equal(greedy(model, first, 6, session=session, num_beams=3), again)
            with model.load_session(tmp_path / "saved") as session, torch.inference_mode():
                assert torch.equal(session.ids, rows)
                more = torch.tensor([[5], [6], [7]])
                ours = model(more, past_key_values=session).logits
                theirs = odd.model(torch.cat([rows, more], dim=1)).logits[:, -1:]
                torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
            with model.load_session(tmp_path / "saved") as session:
                assert torch.equal(greedy(model, first, 6, session=session, num_beams=3), again)
                with pytest.raises(InvalidInput, match="the session has 3 rows, not 1"):
                    greedy(model, first, 6, session=session)

        again = greedy(odd.model, greedy(odd.model, PROMPT, 6, num_beams=3), 6, num_beams=3)
        await blocking(both)


async def test_a_session_of_another_model_is_refused(odd: Reference, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other-bloom", layers=3)
    retrained = make_checkpoint(tmp_path / "odd-bloom", seed=5)
    async with swarm_of(odd.folder, TWO) as swarm:
        await swarm.add_node(other, (0, 3))
        model: Any = await swarm.model(odd.folder)

        def save() -> None:
            with model.session() as session:
                with pytest.raises(InvalidInput, match="no tokens that could be saved"):
                    session.save(tmp_path / "saved")
                greedy(model, PROMPT, 2, session=session)
                session.save(tmp_path / "saved")

        await blocking(save)
        for folder in (other, retrained):
            another: Any = await swarm.model(folder)
            with pytest.raises(InvalidInput, match="the session was saved with another model"):
                await blocking(partial(another.load_session, tmp_path / "saved"))
        content = json.loads((tmp_path / "saved").read_bytes())
        content["ids"][0][0] = 320
        (tmp_path / "saved").write_text(json.dumps(content))
        with pytest.raises(InvalidInput, match="token ids that the model does not have"):
            await blocking(partial(model.load_session, tmp_path / "saved"))
        with pytest.raises(FileNotFoundError):
            await blocking(partial(model.load_session, tmp_path / "nowhere"))


MARK = ModelMark(model="some", digest="d" * 64, weights=None, blocks=5)
GOOD = SavedSession(mark=MARK, ids=[[1, 2, 3], [4, 5, 6]], position=2, pads=(0, 1))
WRONG: dict[str, Any] = {
    "ids": [None, [], {}, [[]] * 300, [[1, 2, 3], [1, 2]], [[1, 2, -3]], [[1, 2, True]], [["1", 2, 3]], [[2**31] * 3]],
    "position": [-1, 4, True, "2", None, 2.0],
    "pads": [[0], [0, 2], [0, -1], "00", [0, True]],
    "model": [None, 3, "x" * 300],
    "digest": [None, 3],
    "weights": [3],
    "blocks": [-1, 2**17, "5"],
    "raceme-session": [0, 2, None, "1"],
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_are_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "saved"
    GOOD.write(file)
    assert SavedSession.read(file) == GOOD
    content = json.loads(file.read_bytes())
    for value in WRONG[name]:
        file.write_text(json.dumps({**content, name: value}))
        with pytest.raises(InvalidInput, match="holds no session that can be taken up"):
            SavedSession.read(file)
    file.write_text(json.dumps({key: value for key, value in content.items() if key != name}))
    with pytest.raises(InvalidInput, match="holds no session that can be taken up"):
        SavedSession.read(file)


def test_a_file_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "saved"
    GOOD.write(file)
    before = file.read_bytes()
    monkeypatch.setattr("client.models.saved.MAX_FILE_BYTES", 10)
    with pytest.raises(InvalidInput, match="at most 10 are saved"):
        GOOD.write(file)
    assert file.read_bytes() == before
    with pytest.raises(InvalidInput, match="more than 10 bytes"):
        SavedSession.read(file)


@given(data=st.one_of(st.binary(max_size=60), st.just(b"[" * 100_000), st.just(b'{"raceme-session": 1}')))
def test_whatever_is_in_a_file(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.session"
    file.write_bytes(data)
    with pytest.raises(InvalidInput):
        SavedSession.read(file)
