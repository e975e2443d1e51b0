"""When a node pauses: on a signal of its user, and while others use its GPU."""

from __future__ import annotations

import importlib
import logging
import os
import signal
from collections.abc import Callable
from typing import Any, Final, Protocol

import trio

_log = logging.getLogger(__name__)
LOOK_S: Final = 1.0  # between looks at who uses the GPU
BUSY: Final = 0.10  # of the time, for others: more is somebody's game or training run, less is a desktop
BUSY_S: Final = 3.0  # that long, and we pause
FREE_S: Final = 60.0  # that long without, and we go on: games have menus, training runs load their data
_WEIGHT: Final = 0.5  # of a new look


class Pausable(Protocol):
    """Who is paused; :class:`compute.node.Node`."""

    async def pause(self, why: str) -> None:
        """Serve nobody until each pause has been ended."""

    async def resume(self, why: str) -> None:
        """End a pause."""


class GpuError(Exception):
    """It cannot be known who uses the GPU; the message says why."""


class BusyWatch:
    """Whether others use the GPU too much for us. No I/O.

    Attributes:
        busy: What was found last.
    """

    def __init__(self) -> None:
        """Begin with a GPU that is ours."""
        self.busy = False
        self._use = 0.0
        self._since: float | None = None  # when it began to look otherwise

    def observe(self, use: float, now: float) -> bool:
        """Take note of how much others use it.

        Args:
            use: Part of the time since the last look.
            now: Seconds, on a clock that does not go back.

        Returns:
            Whether it is busy.
        """
        self._use += _WEIGHT * (use - self._use)
        if (self._use > BUSY) == self.busy:
            self._since = None
            return self.busy
        if self._since is None:
            self._since = now
        if now - self._since >= (FREE_S if self.busy else BUSY_S):
            self.busy, self._since = not self.busy, None
        return self.busy


class GpuUse:
    """How much other processes use a GPU, as NVIDIA's driver says."""

    def __init__(self, uuid: str, nvml: Any = None) -> None:
        """Find the GPU. This process must use it already.

        Args:
            uuid: As the driver has it, ``GPU-...``.
            nvml: NVIDIA's management library; its Python binding if ``None``.

        Raises:
            GpuError: The driver does not say who uses it, or does not know this process by its number.
        """
        if nvml is None:
            try:
                nvml = importlib.import_module("pynvml")  # which tells no types, and is wanted here alone
            except ImportError as error:
                raise GpuError("nvidia-ml-py is not installed") from error
        self._nvml = nvml
        self._seen_us = 0
        try:
            nvml.nvmlInit()
            self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            ours = {process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)}
            self.others()
        except nvml.NVMLError as error:
            raise GpuError(f"the driver does not say who uses {uuid}: {error}") from error
        if os.getpid() not in ours:
            raise GpuError("the driver does not know this process by its number, as in a container without --pid=host")

    def others(self) -> float:
        """Part of the time since the last look, 0 to 1.

        Raises:
            GpuError: The driver does not say, which it may again later.
        """
        try:
            samples = self._nvml.nvmlDeviceGetProcessUtilization(self._handle, self._seen_us)
        except self._nvml.NVMLError_NotFound:  # nobody has used it
            return 0.0
        except self._nvml.NVMLError as error:
            raise GpuError(f"the driver does not say who uses the GPU: {error}") from error
        by_process: dict[int, list[float]] = {}
        for sample in samples:
            self._seen_us = max(self._seen_us, sample.timeStamp)
            by_process.setdefault(sample.pid, []).append(sample.smUtil / 100)
        by_process.pop(os.getpid(), None)
        return min(1.0, sum(sum(each) / len(each) for each in by_process.values()))


async def pause_when_busy(node: Pausable, uses: list[Callable[[], float]]) -> None:
    """Pause while others use one of the GPUs, until cancelled.

    Args:
        node: Who pauses.
        uses: How much others have used each GPU since the last call; called in another thread.
    """
    watch, why = BusyWatch(), "others use the GPU"
    while True:
        await trio.sleep(LOOK_S)
        try:
            use = await trio.to_thread.run_sync(lambda: max(each() for each in uses), abandon_on_cancel=True)
        except GpuError as error:
            _log.info("this look does not count: %s", error)
            continue
        before = watch.busy
        if watch.observe(use, trio.current_time()) != before:
            await (node.pause(why) if watch.busy else node.resume(why))


async def pause_on_signal(node: Pausable, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Pause at SIGUSR1, go on at the next, and so forth, until cancelled. Where there are no such signals: nothing."""
    number, why, paused = getattr(signal, "SIGUSR1", None), "SIGUSR1 (once more ends that)", False
    if number is None:
        task_status.started()
        return
    with trio.open_signal_receiver(number) as signals:
        task_status.started()
        async for _ in signals:
            paused = not paused
            await (node.pause(why) if paused else node.resume(why))
