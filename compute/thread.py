"""A thread for what blocks for long, beside the event loop that hands it one job after another.

On a GPU it works in one stream of its own, so that nothing waits for what others do there in the default one, and what
it does itself needs no other order than its own.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import trio

from compute.errors import EngineStopped

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Call:
    """A function, and who waits for it. ``abandoned`` is read in the thread."""

    done: trio.Event = field(default_factory=trio.Event)
    abandoned: bool = False
    error: BaseException | None = None


class ModelThread:
    """Runs jobs in the order in which they come, under ``torch.inference_mode``.

    Attributes:
        is_stopping: Nothing new is begun. Set in the event loop, read in the thread.
    """

    def __init__(self, threads: int | None, last: Callable[[], None], devices: Sequence[torch.device] = ()) -> None:
        """Note what to do; nothing runs yet.

        Args:
            threads: That torch may use within a job; ``None`` for its own choice.
            last: What to do in the thread before it ends.
            devices: Where jobs compute; the first one is that of what names no other.
        """
        self.is_stopping = False
        self._threads = threads
        self._last = last
        self._gpus = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
        self._streams: list[torch.cuda.Stream] = []
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._token: trio.lowlevel.TrioToken | None = None
        self._calls: set[_Call] = set()
        self._ended = trio.Event()

    @property
    def calls(self) -> int:
        """Functions that wait or run."""
        return len(self._calls)

    def start(self) -> None:
        """Begin, once GPUs have all that was sent there before; to be called in the event loop that :meth:`tell` speaks
        to.

        Raises:
            RuntimeError: A GPU does not work (any more).
        """
        self._token = trio.lowlevel.current_trio_token()
        for device in self._gpus:
            torch.cuda.synchronize(device)
            self._streams.append(torch.cuda.Stream(device))
        threading.Thread(target=self._run, name="raceme-engine", daemon=True).start()

    def put(self, job: Callable[[], None]) -> None:
        """Queue a job, which must not raise."""
        self._jobs.put(job)

    async def run(self, function: Callable[[Callable[[], bool]], T]) -> T:
        """Run a function as a job.

        Args:
            function: Gets another one that says whether anybody still waits.

        Raises: what it raises.
            EngineStopped: The thread stopped before.

        Cancellation: it runs on until it asks.
        """
        call, results = _Call(), list[T]()

        def job() -> None:
            try:
                results.append(function(lambda: not call.abandoned and not self.is_stopping))
            except BaseException as exc:  # noqa: BLE001  # whoever waits raises it
                call.error = exc
            self.tell(functools.partial(self._end, call))

        self._calls.add(call)
        self.put(job)
        try:
            await call.done.wait()
        finally:
            call.abandoned = True
        if call.error is not None:
            raise call.error
        return results[0]

    def _end(self, call: _Call) -> None:
        self._calls.discard(call)
        call.done.set()

    def tell(self, function: Callable[[], None]) -> None:
        """Have the event loop call ``function``; if the loop is gone, so is everyone who would care."""
        try:
            if self._token is not None:
                self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            _log.debug("the event loop ended before the engine")

    async def stop(self) -> None:
        """End the thread after the job that runs, because torch cannot be interrupted. What waits is not begun.

        Cancellation:
            Shielded.
        """
        self.is_stopping = True
        self._jobs.put(None)
        with trio.CancelScope(shield=True):
            await self._ended.wait()
        for call in list(self._calls):
            call.error = EngineStopped("the engine has stopped")
            self._end(call)

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        for stream in self._streams:
            torch.cuda.set_stream(stream)  # of this thread, on the stream's device, which is the current one then
        if self._gpus:
            torch.cuda.set_device(self._gpus[0])
        with torch.inference_mode():
            while (job := self._jobs.get()) is not None and not self.is_stopping:
                job()
            self._last()
        self.tell(self._ended.set)
