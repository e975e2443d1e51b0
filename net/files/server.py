"""Files that are served to peers. Read in threads, never more of them for one peer than its share.

A piece is checked before it is sent: a file that was changed, or has gone bad on the disk, is served no more.
"""

from __future__ import annotations

import logging
import os
import stat
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from net import errors
from net.files import wire
from net.files.pieces import HASH_BYTES, PIECE_BYTES, FileId, Hashes, hash_file
from net.identity import PeerId
from net.mux.base import Stream
from net.rpc import lane, packing
from net.rpc.framing import Message
from net.swarm import Connection

if TYPE_CHECKING:
    from net.host import Host

logger = logging.getLogger(__name__)

RETRY_AFTER_S: Final = 1.0

OnGone = Callable[[FileId], None]


@dataclass(frozen=True, kw_only=True)
class FileServerSettings:
    """What a server gives. Figures are our own.

    Attributes:
        calls_per_peer: Answered at once: so many megabytes are on their way to a peer. More of its calls wait.
        calls: Of all peers. More are refused.
        streams_per_peer: Open at once. More are reset.
        reads: From disk at once.
        call_s: For an answer to be read and taken; slower peers are cut off.
        idle_s: Without a call, until a stream is closed.
    """

    calls_per_peer: int = 4
    calls: int = 64
    streams_per_peer: int = 16
    reads: int = 4
    call_s: float = 120.0
    idle_s: float = 60.0


class _Gone(Exception):
    """What lies there is not what was to be served."""


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A file that is served: on disk, as it was when it was hashed, or in memory."""

    hashes: Hashes
    path: Path | None
    state: tuple[int, int]  # size in bytes, time of its last change in ns
    data: bytes = b""
    on_gone: OnGone | None = None

    def read(self, index: int) -> bytes:
        """A piece.

        Raises:
            _Gone: the file is another one now.
            OSError: it cannot be read.
        """
        at = index * PIECE_BYTES
        if self.path is None:
            return self.data[at : at + PIECE_BYTES]
        fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if _state(os.fstat(fd)) != self.state:
                raise _Gone("it was changed")
            data = os.pread(fd, PIECE_BYTES, at)
        finally:
            os.close(fd)
        if not self.hashes.fits(index, data):
            raise _Gone("it is damaged")
        return data


class FileServer:
    """Serves files for as long as the host lives, or until :meth:`close`. All methods belong to its event loop."""

    def __init__(self, host: Host, settings: FileServerSettings | None = None) -> None:
        """Begin, with no files.

        Raises:
            LocalProtocolError: the host serves files already.
        """
        self._host = host
        self._settings = settings or FileServerSettings()
        self._entries: dict[bytes, _Entry] = {}
        self._streams: Counter[PeerId] = Counter()
        self._shares: dict[PeerId, trio.CapacityLimiter] = {}
        self._calls = 0
        self._reads = trio.CapacityLimiter(self._settings.reads)
        host.handle(wire.PROTOCOL_ID, self._serve)

    @property
    def files(self) -> list[FileId]:
        """Those that are served."""
        return [entry.hashes.file for entry in self._entries.values()]

    async def add(self, path: Path) -> FileId:
        """Serve a file, which is read once, in a thread.

        Raises:
            StorageError: it cannot be read, or is no regular file.
        """
        try:
            return await self.add_known(await trio.to_thread.run_sync(hash_file, path, limiter=self._reads), path)
        except (OSError, ValueError) as error:
            raise errors.StorageError(f"{path}: cannot be read ({error})") from error

    async def add_known(self, hashes: Hashes, path: Path, on_gone: OnGone | None = None) -> FileId:
        """Serve a file whose hashes are known. If they are not those of what lies there, it will not be sent.

        Args:
            hashes: its.
            path: where it lies.
            on_gone: told once, when it turns out to be another one now, or damaged, and is served no more.

        Raises:
            StorageError: there is no regular file of that size.
        """
        try:
            status = await trio.to_thread.run_sync(path.stat)
        except OSError as error:
            raise errors.StorageError(f"{path}: cannot be read ({error.strerror})") from error
        if not stat.S_ISREG(status.st_mode) or status.st_size != hashes.file.size:
            raise errors.StorageError(f"{path}: no regular file of {hashes.file.size} bytes")
        self._entries[hashes.file.root] = _Entry(hashes=hashes, path=path, state=_state(status), on_gone=on_gone)
        return hashes.file

    def add_bytes(self, data: bytes) -> FileId:
        """Serve a file that is kept in memory."""
        hashes = Hashes.of_bytes(data)
        self._entries[hashes.file.root] = _Entry(hashes=hashes, path=None, state=(len(data), 0), data=data)
        return hashes.file

    def remove(self, root: bytes) -> None:
        """Serve it no more; again is nothing."""
        self._entries.pop(root, None)

    def close(self) -> None:
        """Serve nothing any more."""
        self._host.unhandle(wire.PROTOCOL_ID)
        self._entries.clear()

    async def _serve(self, connection: Connection, stream: Stream) -> None:
        peer_id = connection.peer_id
        methods: dict[str, lane.Method] = {"hashes": self._give_hashes, "piece": self._give_piece}
        with self._stream_of(peer_id) as share:
            await lane.serve(
                stream, peer_id, methods, idle_s=self._settings.idle_s, turn=partial(self._turn, peer_id, share)
            )

    @contextmanager
    def _stream_of(self, peer_id: PeerId) -> Iterator[trio.CapacityLimiter]:
        """Hold one of a peer's places; gives what its calls share.

        Raises:
            LimitExceeded: it has none left.
        """
        if self._streams[peer_id] >= self._settings.streams_per_peer:
            raise errors.LimitExceeded(f"{self._streams[peer_id]} streams for files are open, the most allowed")
        share = self._shares.setdefault(peer_id, trio.CapacityLimiter(self._settings.calls_per_peer))
        self._streams[peer_id] += 1
        try:
            yield share
        finally:
            self._streams[peer_id] -= 1
            if not self._streams[peer_id]:
                del self._streams[peer_id], self._shares[peer_id]

    @asynccontextmanager
    async def _turn(self, peer_id: PeerId, share: trio.CapacityLimiter) -> AsyncIterator[None]:
        """From a call until its answer has been sent.

        Raises:
            TooSlowError: that takes too long.
        """
        async with share:
            self._calls += 1
            try:
                with trio.fail_after(self._settings.call_s):
                    yield
            finally:
                self._calls -= 1

    async def _give_hashes(self, request: Message) -> Message:
        entry = self._find(request)
        n_pieces = entry.hashes.file.n_pieces
        first = packing.integer(request.header, "first", 0, n_pieces)
        count = packing.integer(request.header, "count", 0, min(n_pieces - first, wire.HASHES_AT_ONCE))
        return wire.answer_with(entry.hashes.joined[first * HASH_BYTES : (first + count) * HASH_BYTES])

    async def _give_piece(self, request: Message) -> Message:
        entry = self._find(request)
        file = entry.hashes.file
        index = packing.integer(request.header, "index", 0, file.n_pieces - 1)
        read: Callable[[], bytes] = partial(entry.read, index)
        try:
            data = await trio.to_thread.run_sync(read, limiter=self._reads)
        except (_Gone, FileNotFoundError) as error:
            if self._entries.get(file.root) is entry:  # not if it has been told, or the file was put back
                logger.warning("%s is not served to peers any more: %s", entry.path, error)
                self.remove(file.root)
                if entry.on_gone is not None:
                    entry.on_gone(file)
            raise _no_file() from error
        except OSError as error:  # too many files are open, for one
            logger.warning("%s cannot be read now: %s", entry.path, error)
            raise errors.RpcError(wire.BUSY, "the file cannot be read now", RETRY_AFTER_S) from error
        return wire.answer_with(data)

    def _find(self, request: Message) -> _Entry:
        """Raises:
        RpcError: it is not here, or there is too much to do.
        RemoteProtocolError: the call makes no sense.
        """
        if self._calls > self._settings.calls:
            raise errors.RpcError(wire.BUSY, "too many files are being sent", RETRY_AFTER_S)
        file = FileId.read(request.header.get("root"), request.header.get("size"))
        entry = self._entries.get(file.root)
        if entry is None or entry.hashes.file != file:
            raise _no_file()
        return entry


def _no_file() -> errors.RpcError:
    return errors.RpcError(wire.NO_FILE, "no such file is served here")


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
