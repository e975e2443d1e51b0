"""What a session is to add within its blocks, as it comes from its client, in pieces. No I/O."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compute.bloom.config import BloomConfig
from compute.errors import BadInput
from compute.room import Room
from compute.tensors import from_wire
from compute.tuning import SpanTuning, TuningForm
from net.errors import RpcError
from net.identity import PeerId
from net.protocol.session import Tune
from net.rpc import framing

RETRY_AFTER_S = 1.0  # where there is no room


class Upload:
    """A tuning, as far as it has come. It holds what has come, and no more; :meth:`clear` lets go.

    Attributes:
        of: The model's digest and the blocks.
        form: What it is.
    """

    def __init__(self, tune: Tune, form: TuningForm, config: BloomConfig, room: Room, peer_id: PeerId) -> None:
        """Begin one whose form and blocks have been looked at.

        Args:
            tune: As the first piece says.
            form: Likewise.
            config: Of the model.
            room: Holds its bytes.
            peer_id: On whose account.

        Raises:
            BadInput: ``too-long``: there is never so much room.
        """
        self.of = (tune.digest, tune.start, tune.end)
        self.form = form
        self._config = config
        self._count = form.n_elements(config, tune.start, tune.end)
        if 4 * self._count > room.peer_bytes:
            raise BadInput("too-long", f"a tuning of {4 * self._count} bytes, at most {room.peer_bytes} are served")
        self._room = room
        self._peer_id = peer_id
        self._pieces: list[Tensor] = []  # [m] each
        self._received = 0

    def add(self, tune: Tune, form: TuningForm, tensors: Sequence[framing.Tensor]) -> None:
        """Take the next piece.

        Raises:
            RpcError: ``busy``: there is no room.
            BadInput: ``bad-value``: it is of another tuning, or not the next; ``bad-dtype``; ``bad-shape``: there are
                no such numbers, or too many.
        """
        if (tune.digest, tune.start, tune.end) != self.of or form != self.form or tune.at != self._received:
            raise BadInput(
                "bad-value", f"numbers from {tune.at} on of a tuning that has {self._received}, or another's"
            )
        if len(tensors) != 1 or tensors[0].dtype != "f32":
            raise BadInput("bad-dtype", "a piece of a tuning is one tensor in f32")
        (piece,) = tensors
        (count,) = piece.shape if len(piece.shape) == 1 else (self._count + 1,)
        if count > self._count - self._received:
            raise BadInput("bad-shape", f"such a tuning is [{self._count}]")
        if not self._room.take(self._peer_id, piece.n_bytes):
            raise RpcError("busy", "too much is being sent", RETRY_AFTER_S)
        self._received += count
        self._pieces.append(from_wire(piece.dtype, piece.shape, piece.data))

    def tuning(self) -> SpanTuning:
        """All of it.

        Raises:
            BadInput: ``bad-shape``: it has not come whole.
        """
        if self._received != self._count:
            raise BadInput("bad-shape", f"{self._received} numbers of a tuning that is [{self._count}]")
        _, start, end = self.of
        return SpanTuning.from_flat(self.form, self._config, start, end, torch.cat(self._pieces))

    def clear(self) -> None:
        """Hold nothing any more."""
        self._room.give_back(self._peer_id, 4 * self._received)
        self._pieces, self._received = [], 0
