"""What sessions are to add, as it comes: whole or not at all, and no more memory than has come."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compute.errors import BadInput
from compute.room import Room
from compute.tensors import to_wire
from compute.tuning import TuningForm
from compute.upload import Upload
from net.errors import RpcError
from net.protocol.session import Tune
from net.rpc.framing import Tensor
from tests.net_helpers import seeded
from tests.unit.engines import CONFIG
from tests.unit.tunings import BOTH, QKV, make_tuning

PEER, OTHER = seeded(1).peer_id, seeded(2).peer_id
TUNING = make_tuning(BOTH, start=1)
FLAT = TUNING.flat()


def tune(at: int, *, start: int = 1) -> Tune:
    return Tune(digest="d", start=start, end=3, at=at)


def numbers(start: int, end: int) -> list[Tensor]:
    dtype, shape, data = to_wire(FLAT[start:end])
    return [Tensor(dtype=dtype, shape=shape, data=data)]


def upload(room: Room, form: TuningForm = BOTH) -> Upload:
    return Upload(tune(0), form, CONFIG, room, PEER)


@given(st.lists(st.integers(0, len(FLAT)), max_size=6))
def test_it_may_come_in_any_pieces(cuts: list[int]) -> None:
    room = Room(4 * len(FLAT), 4 * len(FLAT))
    coming = upload(room)
    edges = [0, *sorted(cuts), len(FLAT)]
    for start, end in itertools.pairwise(edges):
        assert room.taken == 4 * start
        coming.add(tune(start), BOTH, numbers(start, end))
    assert coming.tuning().key == TUNING.key
    coming.clear()
    assert room.taken == 0


@dataclass(frozen=True)
class Piece:
    skips: int  # numbers that are left out before it
    count: int
    form: TuningForm
    start: int


PIECES = st.builds(
    Piece,
    skips=st.sampled_from([0, 0, 0, 0, 1, -1]),
    count=st.integers(0, 900),
    form=st.sampled_from([BOTH, BOTH, BOTH, QKV]),
    start=st.sampled_from([1, 1, 1, 0]),
)


@given(st.lists(PIECES, max_size=8), st.integers(0, 1000))
def test_what_does_not_fit_is_not_kept(pieces: list[Piece], others: int) -> None:
    room = Room(4 * len(FLAT) + 400, 4 * len(FLAT))
    assert room.take(OTHER, others)
    coming, received = upload(room), 0
    for piece in pieces:
        at = received + piece.skips
        end = min(len(FLAT), received + piece.count)
        try:
            coming.add(tune(at, start=piece.start), piece.form, numbers(received, end))
        except BadInput:
            assert piece.skips or piece.form is not BOTH or piece.start != 1
        except RpcError as refused:
            assert refused.code == "busy" and refused.retry_after_s
            assert 4 * end + others > 4 * len(FLAT) + 400
        else:
            received = end
        assert room.taken == 4 * received + others
    if received < len(FLAT):
        with pytest.raises(BadInput):
            coming.tuning()
    else:
        assert torch.equal(coming.tuning().flat(), FLAT)
    coming.clear()
    coming.clear()
    assert room.taken == others


def test_what_never_fits_is_said_at_once() -> None:
    with pytest.raises(BadInput) as caught:
        upload(Room(1 << 30, 4 * len(FLAT) - 1))
    assert caught.value.code == "too-long"
