"""Who we are: an Ed25519 key, kept in a file that only its owner can read.

The file holds libp2p's protobuf of the private key (the form that go-libp2p and others read). A
lock keeps two processes from being the same peer at once. Beside the key lies ``FILE.seq``, the
last sequence number that was signed, so that sequence numbers rise across restarts whatever the
clock says.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.keys import KeyPair, KeyType
from libp2p.crypto.serialization import deserialize_private_key
from libp2p.peer.id import ID as PeerId

from net.errors import IdentityError

__all__ = ["Identity", "PeerId"]

MAX_KEY_FILE_BYTES = 4096


class Identity:
    """A key pair, its PeerId, and its rising sequence of signed records.

    Use ``Identity.generate()`` for a peer that is forgotten at exit, ``Identity.load(path)`` for one
    that lasts, ``Identity.default(folder, name)`` for "the same as last time, if nobody is using it".
    """

    def __init__(self, key_pair: KeyPair, path: Path | None = None, lock_fd: int | None = None) -> None:
        self.key_pair = key_pair
        self.peer_id: PeerId = PeerId.from_pubkey(key_pair.public_key)
        self.path = path
        self._lock_fd = lock_fd
        self._sequence = self._stored_sequence()

    @classmethod
    def generate(cls, seed: bytes | None = None) -> Identity:
        """A new key in memory; ``seed`` (32 bytes) makes it the same each time, for tests."""
        return cls(create_new_key_pair(seed))

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read the key at ``path``, or make one there (mode 0600) when there is none.

        Raises:
            IdentityError: not a key, not readable, readable by others, or locked by another process.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                _make_key_file(path)
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise IdentityError(f"identity {path}: {error.strerror}; name another file with --identity") from error
        try:
            return cls._load_locked(path, fd)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def _load_locked(cls, path: Path, fd: int) -> Identity:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise IdentityError(
                f"identity {path} is in use by another process; stop it or name another file with --identity"
            ) from error
        if os.fstat(fd).st_mode & 0o077:
            raise IdentityError(f"identity {path} can be read by others; run: chmod 600 {path}")
        data = os.read(fd, MAX_KEY_FILE_BYTES)
        if not data:
            raise IdentityError(f"identity {path} is empty; put the key back, or delete the file to get a new PeerId")
        try:
            private = deserialize_private_key(data)
            if private.get_type() != KeyType.Ed25519:
                raise ValueError("not an Ed25519 key")
            pair = KeyPair(private, private.get_public_key())
        except Exception as error:  # the library raises many types for bytes that are no key
            raise IdentityError(f"identity {path} is not a libp2p Ed25519 private key; move it away") from error
        return cls(pair, path, fd)

    @classmethod
    def default(cls, folder: Path, name: str, slots: int = 64) -> Identity:
        """The first of ``name.key``, ``name-1.key``, ... in ``folder`` that no process is using."""
        for slot in range(slots):
            path = folder / (f"{name}-{slot}.key" if slot else f"{name}.key")
            try:
                return cls.load(path)
            except IdentityError as error:
                if "in use" not in str(error):
                    raise
        raise IdentityError(f"all {slots} identities {name}*.key in {folder} are in use; name a file with --identity")

    def close(self) -> None:
        """Give the key file's lock back. The identity may go on signing, unguarded."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def sign(self, data: bytes) -> bytes:
        return bytes(self.key_pair.private_key.sign(data))

    def next_sequence(self) -> int:
        """A number greater than every one before it, in this process and in those before.

        The clock (milliseconds since 1970) only helps those without a file: it is never trusted to rise.
        """
        self._sequence = max(self._sequence + 1, int(time.time() * 1000))
        if self._sequence_path is not None:
            temporary = self._sequence_path.with_suffix(".seq-new")
            temporary.write_text(str(self._sequence))
            temporary.replace(self._sequence_path)
        return self._sequence

    @property
    def _sequence_path(self) -> Path | None:
        return self.path.with_name(self.path.name + ".seq") if self.path is not None else None

    def _stored_sequence(self) -> int:
        path = self._sequence_path
        if path is None or not path.exists():
            return 0
        try:
            return int(path.read_text())
        except ValueError as error:
            raise IdentityError(f"{path} does not hold a number; delete it") from error


def _make_key_file(path: Path) -> None:
    """A new key at ``path``, whole from the first moment; one that appears there meanwhile is left as it is.

    Raises:
        OSError: it cannot be written.
    """
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(create_new_key_pair().private_key.serialize())
            file.flush()
            os.fsync(fd)
        with suppress(FileExistsError):  # another process was faster
            os.link(name, path)
    finally:
        os.unlink(name)
