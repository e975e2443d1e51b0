"""When a node pauses for its user's sake."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from compute.pausing import BUSY_S, FREE_S, LOOK_S, BusyWatch, GpuError, GpuUse, pause_on_signal, pause_when_busy


def first_change(watch: BusyWatch, uses: Iterator[float]) -> float | None:
    """After how many seconds it finds otherwise."""
    before = watch.busy
    for second, use in enumerate(uses, start=1):
        if watch.observe(use, float(second)) != before:
            return float(second)
    return None


def test_others_pause_it_and_their_absence_ends_that() -> None:
    watch = BusyWatch()
    began = first_change(watch, iter([0.5] * 100))
    assert began is not None
    assert BUSY_S <= began <= BUSY_S + 2
    ended = first_change(watch, iter([0.0] * 100))
    assert ended is not None
    assert FREE_S <= ended <= FREE_S + 5


@pytest.mark.parametrize("uses", [[0.05] * 1000, [0.9, 0.0, 0.0, 0.0, 0.0] * 100], ids=["a desktop", "now and then"])
def test_a_desktop_does_not(uses: list[float]) -> None:
    assert first_change(BusyWatch(), iter(uses)) is None


def test_a_menu_does_not_end_a_game() -> None:
    watch = BusyWatch()
    first_change(watch, iter([0.9] * 10))
    assert first_change(watch, iter(([0.0] * 40 + [0.9] * 5) * 10)) is None


@given(st.lists(st.floats(0, 1), max_size=300))
def test_it_never_flutters(uses: list[float]) -> None:
    watch, changes = BusyWatch(), list[tuple[float, bool]]()
    for second, use in enumerate(uses):
        before = watch.busy
        if watch.observe(use, float(second)) != before:
            changes.append((float(second), watch.busy))
    assert all(
        later - earlier >= (FREE_S if was_busy else BUSY_S)
        for (earlier, was_busy), (later, _) in itertools.pairwise(changes)
    )


class Recorder:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, float]] = []
        self.calls = trio.Semaphore(0)

    async def pause(self, why: str) -> None:
        self.told.append((f"pause: {why}", trio.current_time()))
        self.calls.release()

    async def resume(self, why: str) -> None:
        self.told.append((f"resume: {why}", trio.current_time()))
        self.calls.release()


async def test_the_node_is_told_once(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    async def here(function: Callable[[], float], **_: object) -> float:
        return function()

    monkeypatch.setattr(trio.to_thread, "run_sync", here)  # a virtual clock does not wait for threads
    node, began = Recorder(), trio.current_time()

    def mine() -> float:
        return 0.0

    seconds = iter(range(10_000))

    def theirs() -> float:
        return 1.0 if next(seconds) < 20 else 0.0

    with trio.move_on_after(200 * LOOK_S):
        await pause_when_busy(node, [mine, theirs])
    assert [what for what, _ in node.told] == ["pause: others use the GPU", "resume: others use the GPU"]
    assert node.told[0][1] - began < 10
    assert FREE_S <= node.told[1][1] - node.told[0][1] <= FREE_S + 30


async def test_a_look_that_fails_does_not_count(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    async def here(function: Callable[[], float], **_: object) -> float:
        return function()

    monkeypatch.setattr(trio.to_thread, "run_sync", here)
    node, uses = Recorder(), iter([1.0] * 5)

    def use() -> float:
        found = next(uses, None)
        if found is None:
            raise GpuError("insufficient size")
        return found

    with trio.move_on_after(200 * LOOK_S):
        await pause_when_busy(node, [use])
    assert [what for what, _ in node.told] == ["pause: others use the GPU"]


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="there are no such signals")
async def test_a_signal_pauses_and_the_next_one_ends_it() -> None:
    node = Recorder()
    async with trio.open_nursery() as nursery:
        await nursery.start(pause_on_signal, node)
        for count in (1, 2, 3):
            os.kill(os.getpid(), signal.SIGUSR1)
            with trio.fail_after(5):
                await node.calls.acquire()
            assert len(node.told) == count
        nursery.cancel_scope.cancel()
    assert [what.split(":")[0] for what, _ in node.told] == ["pause", "resume", "pause"]


class Nvml:
    """The driver, as far as we ask it."""

    class NVMLError(Exception):
        """Its errors."""

    class NVMLError_NotFound(NVMLError):
        """Nobody has used it."""

    def __init__(self, *answers: list[Any] | Exception, pids: tuple[int, ...] = (os.getpid(),)) -> None:
        self._answers = [self.NVMLError_NotFound(), *answers]
        self._pids = pids
        self.asked_since: list[int] = []

    def nvmlInit(self) -> None:
        """Nothing to do."""

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "GPU-1":
            raise self.NVMLError("no such GPU")
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, _: str) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in self._pids]

    def nvmlDeviceGetProcessUtilization(self, _: str, since: int) -> list[Any]:
        self.asked_since.append(since)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def sample(pid: int, use: int, at: int) -> Any:
    return SimpleNamespace(pid=pid, smUtil=use, timeStamp=at)


def test_what_others_use() -> None:
    own = os.getpid()
    nvml = Nvml(
        [sample(own, 90, 5), sample(1, 10, 6), sample(1, 30, 7), sample(2, 5, 4)],
        Nvml.NVMLError_NotFound(),
        [sample(own, 100, 8)],
        [sample(1, 80, 9), sample(2, 70, 9)],
    )
    use = GpuUse("GPU-1", nvml)
    assert use.others() == pytest.approx(0.25)
    assert [use.others(), use.others(), use.others()] == [0.0, 0.0, 1.0]
    assert nvml.asked_since == [0, 0, 7, 7, 8]
    with pytest.raises(GpuError, match="insufficient size"):
        GpuUse("GPU-1", Nvml(Nvml.NVMLError("insufficient size"))).others()


@pytest.mark.parametrize(
    ("uuid", "nvml", "why"),
    [
        ("GPU-2", Nvml(), "no such GPU"),
        ("GPU-1", Nvml(pids=(1, 2)), "--pid=host"),
    ],
)
def test_a_driver_that_does_not_say(uuid: str, nvml: Nvml, why: str) -> None:
    with pytest.raises(GpuError, match=why):
        GpuUse(uuid, nvml)
