"""What a user says about which nodes compute."""

from __future__ import annotations

from typing import Any

import pytest

from client.choices import NO_CHOICES, Choices
from client.errors import InvalidInput
from client.pricing import Pin
from tests.unit.session_worlds import PEERS

A, B, C = PEERS[:3]


def test_texts_and_peer_ids() -> None:
    choices = Choices.read(8, allow=[str(A), B, f" {C}\n"], block=(str(C),), pins={(0, 4): str(A), (6, 8): B})
    assert choices.allow == frozenset((A, B, C))
    assert choices.block == frozenset((C,))
    assert set(choices.pins) == {Pin(start=0, end=4, peer_id=A), Pin(start=6, end=8, peer_id=B)}
    wishes = choices.to_wishes()
    assert [wishes.permits_peer(peer) for peer in (A, B, C, PEERS[3])] == [True, True, False, False]


def test_nothing_said() -> None:
    assert Choices.read(8) == NO_CHOICES
    assert all(Choices.read(8).to_wishes().permits_peer(peer) for peer in PEERS)


def test_a_session_changes_what_the_model_was_made_with() -> None:
    model = Choices.read(8, allow=[A, B], block=[C], local_blocks=2)
    assert model.changed(8) == model
    changed = model.changed(8, allow=[A], pins={(2, 3): A}, mixed=True)
    assert changed.allow == frozenset((A,))
    assert changed.block == frozenset((C,))
    assert (changed.local_blocks, changed.mixed_numerics) == (2, True)
    with pytest.raises(InvalidInput, match="pinned to"):
        model.changed(8, pins={(2, 3): C})


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"allow": []}, InvalidInput, "name at least one peer"),
    ({"allow": str(A)}, TypeError, "allow is a list of PeerIds, not str"),
    ({"allow": A}, TypeError, "allow is a list of PeerIds"),
    ({"allow": 3}, TypeError, "allow is a list of PeerIds, not int"),
    ({"block": [3]}, TypeError, "a PeerId is a str, not int"),
    ({"block": ["somebody"]}, InvalidInput, "'somebody' is no PeerId: give what raceme status shows"),
    ({"block": [""]}, InvalidInput, "is no PeerId"),
    ({"block": ["x" * 1000]}, InvalidInput, "is no PeerId"),
    ({"block": [f"{A}/p2p-circuit"]}, InvalidInput, "is no PeerId"),
    ({"allow": [A], "block": [A, B]}, InvalidInput, "all peers that are allowed are blocked, too"),
    ({"pins": [((0, 1), A)]}, TypeError, "a mapping"),
    ({"pins": {0: A}}, TypeError, "a pair of block numbers"),
    ({"pins": {(0, "1"): A}}, TypeError, "a pair of block numbers"),
    ({"pins": {(True, 2): A}}, TypeError, "a pair of block numbers"),
    ({"pins": {(0, 1, 2): A}}, TypeError, "a pair of block numbers"),
    ({"pins": {(2, 2): A}}, InvalidInput, "blocks 2:2 cannot be pinned: the model has blocks 0:8"),
    ({"pins": {(0, 9): A}}, InvalidInput, "cannot be pinned"),
    ({"pins": {(-1, 3): A}}, InvalidInput, "cannot be pinned"),
    ({"pins": {(0, 4): A, (3, 5): B}}, InvalidInput, "block 3 is pinned twice: give each block to one peer"),
    ({"pins": {(0, 4): A}, "block": [A]}, InvalidInput, "allow it, or pin them to somebody else"),
    ({"pins": {(0, 4): A}, "allow": [B]}, InvalidInput, "allow it, or pin them to somebody else"),
    ({"mixed_numerics": 1}, TypeError, "mixed_numerics is True or False, not int"),
    ({"local_blocks": -1}, InvalidInput, "give 0 to 3"),
    ({"local_blocks": 4}, InvalidInput, "at least one is left to nodes"),
    ({"local_blocks": True}, TypeError, "a number of blocks, not bool"),
    ({"local_blocks": 1.0}, TypeError, "a number of blocks, not float"),
]


@pytest.mark.parametrize(("given", "kind", "says"), WRONG)
def test_what_cannot_be(given: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        Choices.read(8, **given)
    assert type(caught.value) is kind
