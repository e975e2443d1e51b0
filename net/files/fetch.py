"""Getting a file from several holders at once.

Each holder is asked over a few lanes, one at first, and more when it turns out to be quick. A holder that sends what is
not the file's is dropped at once; one that breaks off or falls silent is asked again as long as it has given something
since the last time. Whatever goes wrong with a holder is a ``PeerFailed`` (a ``PeerLied``, where it must have known);
whatever goes wrong here, a ``StorageError``.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

import trio

from net import errors
from net.addresses import Multiaddr
from net.files import wire
from net.files.part import Part
from net.files.pieces import HASH_BYTES, MAX_FILE_BYTES, FileId, Hashes, Wanted
from net.identity import PeerId
from net.rpc.lane import Lane

if TYPE_CHECKING:
    from net.host import Host

logger = logging.getLogger(__name__)

LOCKED_S: Final = 0.25  # until it is tried again to get hold of what another one is fetching
AGAIN_S: Final = 0.5  # before a holder that broke off is asked again
_HASHES_S: Final = 30.0  # for half a megabyte of hashes

Progress = Callable[[int, int], None]


class Holder(Protocol):
    """Who may have a file. Announcements of nodes are such."""

    @property
    def peer_id(self) -> PeerId: ...

    @property
    def addresses(self) -> Sequence[Multiaddr]: ...


@dataclass(frozen=True, kw_only=True)
class FetchSettings:
    """How a file is fetched. Figures are our own.

    Attributes:
        holders: Asked at once; the others take their place when they fail.
        lanes: To each of them, at most: so many pieces are on their way.
        connect_s: Until a holder has to be connected, and its lane open.
        piece_s: For a piece to come: 17 kB/s.
        quick_s: What comes in less deserves another lane.
        busy_s: For how long a holder may say that it is busy, without giving anything meanwhile.
    """

    holders: int = 8
    lanes: int = 3
    connect_s: float = 15.0
    piece_s: float = 60.0
    quick_s: float = 5.0
    busy_s: float = 60.0


class _Place(Protocol):
    """Where pieces go; its methods run in a thread."""

    def survey(self, hashes: Hashes) -> set[int]: ...

    def put(self, hashes: Hashes, index: int, data: bytes | memoryview) -> bool: ...


class _Memory:
    """A file that is kept in memory."""

    def __init__(self, size: int) -> None:
        self._pieces: dict[int, bytes] = {}
        self._size = size

    def survey(self, hashes: Hashes) -> set[int]:
        return set()

    def put(self, hashes: Hashes, index: int, data: bytes | memoryview) -> bool:
        if not hashes.fits(index, data):
            return False
        self._pieces[index] = bytes(data)
        return True

    def join(self) -> bytes:
        return b"".join(data for _, data in sorted(self._pieces.items()))


async def fetch(
    host: Host,
    file: FileId,
    holders: Sequence[Holder],
    target: Path,
    *,
    max_bytes: int = MAX_FILE_BYTES,
    progress: Progress | None = None,
    on_failure: Callable[[errors.PeerFailed], None] | None = None,
    settings: FetchSettings | None = None,
) -> Hashes:
    """Get a file to ``target``, whose folder is made and which is replaced as a whole.

    What has come lies in ``NAME.part`` beside it until then, and is used by the next try. If the file is at ``target``
    already, nothing is asked for.

    Args:
        host: Ours.
        file: Which.
        holders: Who may have it, the best first; those that do not are passed over.
        target: Where it is to be; the caller's to choose, nobody else's.
        max_bytes: What is larger is refused before anybody is asked.
        progress: Called with (bytes that are here, bytes in all), first when it is known what is here already.
        on_failure: Told of every holder that is dropped, whether or not the file comes from others.
        settings: How.

    Returns:
        The file's hashes, with which it can be served.

    Raises:
        FetchFailed: no holder gave what is missing; says who was asked and why not.
        StorageError: too large, or the disk or the folder refuses.
    Cancellation: as after a failure, what has come stays.
    """
    name = target.name
    _check_size(file, max_bytes, name)
    while (part := await trio.to_thread.run_sync(Part.open, target)) is None:  # noqa: ASYNC110  another process may
        await trio.sleep(LOCKED_S)
    try:
        hashes = await trio.to_thread.run_sync(part.find_whole, file.size)
        if hashes is not None and hashes.file == file:
            await trio.to_thread.run_sync(part.discard)
            _tell(progress, file.size, file.size)
            return hashes
        getting = _Getting(host, file, name, part, progress, on_failure, settings or FetchSettings())
        try:
            hashes = await getting.run(holders)
        finally:
            if getting.surveyed and not getting.done_bytes:
                await _tidy_up(part.discard)
        await trio.to_thread.run_sync(part.finish, file.size)
        return hashes
    finally:
        await _tidy_up(part.close)


async def fetch_bytes(
    host: Host,
    file: FileId,
    holders: Sequence[Holder],
    *,
    max_bytes: int,
    name: str = "the file",
    on_failure: Callable[[errors.PeerFailed], None] | None = None,
    settings: FetchSettings | None = None,
) -> bytes:
    """Get a small file into memory.

    Args and Raises: as :func:`fetch`; ``name`` is what errors call it.
    """
    _check_size(file, max_bytes, name)
    memory = _Memory(file.size)
    await _Getting(host, file, name, memory, None, on_failure, settings or FetchSettings()).run(holders)
    return memory.join()


async def _tidy_up(work: Callable[[], None]) -> None:
    """In a thread, and to its end: whoever is cancelled leaves nothing open, either."""
    with trio.CancelScope(shield=True):
        await trio.to_thread.run_sync(work)


def _check_size(file: FileId, max_bytes: int, name: str) -> None:
    if file.size > max_bytes:
        raise errors.StorageError(
            f"{name}: {file.size} bytes, more than the {max_bytes} that are taken; nothing is kept"
        )


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


@dataclass(eq=False)
class _Source:
    """A holder, and what it has given."""

    peer_id: PeerId
    addresses: Sequence[Multiaddr]
    given: int = 0
    lanes: int = 0


class _Refused(errors.PeerFailed):
    """A holder that will not send it."""


class _Getting:
    """One file being fetched."""

    def __init__(
        self,
        host: Host,
        file: FileId,
        name: str,
        place: _Place,
        progress: Progress | None,
        on_failure: Callable[[errors.PeerFailed], None] | None,
        settings: FetchSettings,
    ) -> None:
        self._host = host
        self._file = file
        self._name = name
        self._place = place
        self._progress = progress
        self._on_failure = on_failure
        self._settings = settings
        self._failures: dict[object, errors.PeerFailed] = {}
        self._refused: errors.StorageError | None = None  # by our disk
        self._changed = trio.lowlevel.ParkingLot()  # whoever waits for a piece to ask for
        self.surveyed = False
        self.done_bytes = 0

    async def run(self, holders: Sequence[Holder]) -> Hashes:
        """Get all pieces that the place does not have.

        Raises: as :func:`fetch`.
        """
        own = self._host.peer_id
        sources = {each.peer_id: _Source(each.peer_id, each.addresses) for each in holders if each.peer_id != own}
        hashes = await self._find_hashes(list(sources.values()))
        have = await trio.to_thread.run_sync(self._place.survey, hashes)
        self.surveyed, self.done_bytes = True, sum(self._file.piece_bytes(index) for index in have)
        _tell(self._progress, self.done_bytes, self._file.size)
        wanted = Wanted(self._file.n_pieces, have)
        if wanted.left:
            left = [source for peer_id, source in sources.items() if peer_id not in self._failures]
            await self._each(left, lambda source: self._empty(source, hashes, wanted), lambda: not wanted.left)
        if self._refused is not None:
            raise self._refused
        if wanted.left:
            raise self._failed()
        return hashes

    async def _each(
        self, sources: list[_Source], use: Callable[[_Source], Awaitable[None]], is_done: Callable[[], bool]
    ) -> None:
        """Use several holders at once, until it is done or all of them have failed."""
        waiting = deque(sources)

        async def use_one_after_another() -> None:
            while waiting:
                source = waiting.popleft()
                try:
                    await use(source)
                except errors.PeerFailed as error:
                    self._drop(error)
                except errors.StorageError as error:
                    self._refused = error
                if is_done() or self._refused is not None:
                    nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for _ in range(min(self._settings.holders, len(sources))):
                nursery.start_soon(use_one_after_another)

    def _drop(self, error: errors.PeerFailed) -> None:
        self._failures[error.peer_id] = error
        logger.info("%s: not from %s", self._name, error)
        if self._on_failure is not None:
            self._on_failure(error)

    def _failed(self) -> errors.FetchFailed:
        kept = "; what has come is kept for the next try" if self.done_bytes else ""
        what = f"{self._name} cannot be had ({self.done_bytes} of {self._file.size} bytes are here{kept})"
        return errors.FetchFailed(what, list(self._failures.values()))

    # The list of hashes

    async def _find_hashes(self, sources: list[_Source]) -> Hashes:
        """From whoever is the first to give the right ones."""
        found: list[Hashes] = []

        async def ask(source: _Source) -> None:
            async with AsyncExitStack() as stack:
                lane = await self._open(source, stack)
                found.append(await self._receive_hashes(lane, source))

        if not self._file.size:  # nobody has to be asked for nothing
            try:
                return Hashes(self._file, b"")
            except ValueError as error:
                raise errors.FetchFailed(f"{self._name}: no file of 0 bytes has this root", []) from error
        await self._each(sources, ask, lambda: bool(found))
        if not found:
            raise self._failed()
        return found[0]

    async def _receive_hashes(self, lane: Lane, source: _Source) -> Hashes:
        joined = bytearray()
        while (first := len(joined) // HASH_BYTES) < self._file.n_pieces:
            count = min(wire.HASHES_AT_ONCE, self._file.n_pieces - first)
            fields = {**wire.fields_of(self._file), "first": first, "count": count}
            joined += await self._call(lane, source, "hashes", fields, HASH_BYTES * count, _HASHES_S)
        try:
            return Hashes(self._file, bytes(joined))
        except ValueError as error:
            raise errors.PeerLied(source.peer_id, f"sent {error}") from error

    # The pieces

    async def _empty(self, source: _Source, hashes: Hashes, wanted: Wanted) -> None:
        """Have a holder send pieces, until there are none that it is to send.

        Raises:
            PeerFailed: it is of no more use.
            StorageError: our disk refuses.
        """
        while True:
            given = source.given
            try:
                return await self._use_lanes(source, hashes, wanted)
            except (_Refused, errors.PeerLied):
                raise
            except errors.PeerFailed:
                if source.given == given:
                    raise
            await trio.sleep(AGAIN_S)

    async def _use_lanes(self, source: _Source, hashes: Hashes, wanted: Wanted) -> None:
        failed: list[errors.NetError] = []

        async def work() -> None:
            """One lane."""
            try:
                async with AsyncExitStack() as stack:
                    lane = await self._open(source, stack)
                    while wanted.left:
                        index = wanted.take(source.peer_id)
                        if index is None:
                            await self._changed.park()
                            continue
                        began = trio.current_time()
                        try:
                            await self._get(lane, source, index, hashes, wanted)
                        finally:
                            wanted.give_up(index, source.peer_id)
                            self._changed.unpark_all()
                        quick = trio.current_time() - began < self._settings.quick_s
                        if quick and source.lanes < self._settings.lanes and wanted.left:
                            source.lanes += 1
                            nursery.start_soon(work)
                nursery.cancel_scope.cancel()  # what is still under way is not needed any more
            except (errors.PeerFailed, errors.StorageError) as error:
                failed.append(error)
                nursery.cancel_scope.cancel()

        source.lanes = 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
        if failed:
            raise next((error for error in failed if not isinstance(error, errors.PeerFailed)), failed[0])

    async def _get(self, lane: Lane, source: _Source, index: int, hashes: Hashes, wanted: Wanted) -> None:
        """Ask for a piece, and put it where it belongs."""
        size = self._file.piece_bytes(index)
        fields = {**wire.fields_of(self._file), "index": index}
        data = await self._call(lane, source, "piece", fields, size, self._settings.piece_s)
        if not await trio.to_thread.run_sync(self._place.put, hashes, index, data):
            raise errors.PeerLied(source.peer_id, f"sent wrong bytes for piece {index}")
        source.given += 1
        if wanted.finish(index):
            self.done_bytes += size
            _tell(self._progress, self.done_bytes, self._file.size)

    # Calls

    async def _open(self, source: _Source, stack: AsyncExitStack) -> Lane:
        """A lane to a holder.

        Raises:
            PeerFailed: it cannot be had.
        """
        patience_s = self._settings.connect_s
        with trio.move_on_after(patience_s):
            try:
                stream = await self._host.open_stream(source.peer_id, [wire.PROTOCOL_ID], source.addresses)
            except errors.ProtocolNotSupported as error:
                raise _Refused(source.peer_id, "does not serve files") from error
            except errors.PeerFailed:
                raise
            except errors.NetError as error:
                raise errors.PeerFailed(source.peer_id, str(error)) from error
            return await stack.enter_async_context(Lane(stream, source.peer_id))
        raise errors.PeerFailed(source.peer_id, f"no connection in {patience_s:g} s")

    async def _call(
        self, lane: Lane, source: _Source, method: str, fields: dict[str, object], size: int, timeout_s: float
    ) -> memoryview:
        """The bytes that a holder answers with; waited for, within bounds, while it is busy.

        Raises:
            PeerFailed: there are none.
        """
        busy_until = trio.current_time() + self._settings.busy_s
        while True:
            try:
                return wire.bytes_of(await lane.call(method, fields, timeout_s=timeout_s), size)
            except errors.RemoteProtocolError as error:
                raise errors.PeerLied(source.peer_id, f"sent {error}") from error
            except errors.RpcError as error:
                if error.code == wire.NO_FILE:
                    raise _Refused(source.peer_id, "does not have it") from error
                pause_s = max(0.1, error.retry_after_s or 1.0)
                if error.code != wire.BUSY or trio.current_time() + pause_s > busy_until:
                    raise _Refused(source.peer_id, error.message) from error
            await trio.sleep(pause_s)
