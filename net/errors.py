"""Every error of the networking floor, and whose fault it is.

Blame lives in the type: ``LocalProtocolError`` is our bug, ``RemoteProtocolError`` is the peer's,
``PeerFailed`` names a peer that can no longer be relied on. Everything derives from ``NetError``,
whose text is one line fit to be shown to a person.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

MAX_TOLD: Final = 4  # peers that a text names


class NetError(Exception):
    """Base of all errors of this floor."""


class AddressError(NetError):
    """An address that cannot be read, listened on, or dialled by any transport."""


class IdentityError(NetError):
    """A key file that is missing, unreadable, not a key, or in use by another process."""


class LocalProtocolError(NetError):
    """We broke a protocol's rules: a bug of ours, never to be blamed on a peer."""


class RemoteProtocolError(NetError):
    """The peer broke a protocol's rules."""


class ConnectionLost(NetError):
    """The connection under a stream ended before the stream did."""


class StreamReset(NetError):
    """The stream was ended abruptly, by either side. What was in flight may be lost."""


class LimitExceeded(NetError):
    """A budget of ours is used up; the text says which."""


class ProtocolNotSupported(NetError):
    """The peer speaks none of the protocols that were offered."""


class RecordError(NetError):
    """A signed record that must not be believed; the text says why."""


class StaleRecord(RecordError):
    """A record that is good but for its time, which differs from our clock's by ``ahead_s``."""

    def __init__(self, message: str, ahead_s: float) -> None:
        super().__init__(message)
        self.ahead_s = ahead_s


class ModuleError(NetError):
    """A published module that cannot be had, or must not be used; the text says why."""


class ModuleDamaged(ModuleError):
    """What lies here of a module is not what its author signed: it was damaged, or changed."""


class DialError(NetError):
    """No connection could be made."""


class ReservationRefused(NetError):
    """A relay gives us no reservation, or one that is not to be believed."""


class PeerIdMismatch(DialError):
    """Somebody else answered at the peer's address."""

    def __init__(self, expected: object, actual: object) -> None:
        super().__init__(f"the peer that answered is {actual}, not {expected}: check the address's last part")
        self.expected = expected
        self.actual = actual


class PeerFailed(NetError):
    """A call to this peer failed for a reason that is the peer's or the path's.

    Attributes:
        peer_id: who failed.
        reason: how.
    """

    def __init__(self, peer_id: object, reason: str) -> None:
        super().__init__(f"peer {peer_id}: {reason}")
        self.peer_id = peer_id
        self.reason = reason


class PeerLied(PeerFailed):
    """This peer sent what cannot be what it was asked for."""


class RpcError(NetError):
    """The other side understood a call and refused it.

    Attributes:
        code: a short word that programs compare (``bad-input``, ``busy``, ``unknown-method``, ...).
        message: one line for people.
        retry_after_s: when to come again, or None.
    """

    def __init__(self, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{message} [{code}]")
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


class StorageError(NetError):
    """A file cannot be read or written here; what was there before is as it was."""


class FetchFailed(NetError):
    """Nobody who was asked gave a file; the text names them and says why.

    Attributes:
        failures: one for each of them.
    """

    def __init__(self, what: str, failures: Sequence[PeerFailed]) -> None:
        told = "; ".join(str(failure) for failure in failures[:MAX_TOLD]) or "there is nobody to ask"
        more = f"; and {len(failures) - MAX_TOLD} more" if len(failures) > MAX_TOLD else ""
        super().__init__(f"{what}: {told}{more}")
        self.failures = tuple(failures)
