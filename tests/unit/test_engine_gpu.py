"""What the engine's thread does with GPUs, as torch is told."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
import trio
from torch import Tensor

from compute import engine as engine_module
from compute.bloom import BloomSpan
from compute.engine import EngineSettings
from compute.errors import OutOfCache
from compute.thread import ModelThread
from tests.unit.engines import hidden_states, make_span, running

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object, bool]]:
    """What torch is told: the function, its argument, and whether it was in the engine's thread."""
    calls: list[tuple[str, object, bool]] = []

    def note(name: str) -> Any:
        def call(argument: object) -> object:
            calls.append((name, argument, threading.current_thread().name == "raceme-engine"))
            return f"stream of {argument}"

        return call

    for name in ("synchronize", "Stream", "set_stream", "set_device"):
        monkeypatch.setattr(torch.cuda, name, note(name))
    return calls


async def run_thread(devices: list[torch.device]) -> list[str]:
    """What a job saw in a thread for these devices."""
    seen: list[str] = []
    done = trio.Event()
    thread = ModelThread(None, lambda: None, devices)
    thread.start()

    def job() -> None:
        seen.append(threading.current_thread().name)
        thread.tell(done.set)

    thread.put(job)
    await done.wait()
    await thread.stop()
    return seen


async def test_on_gpus_the_thread_works_in_streams_of_its_own(told: list[tuple[str, object, bool]]) -> None:
    assert await run_thread([FIRST, SECOND, FIRST]) == ["raceme-engine"]
    assert told == [
        ("synchronize", FIRST, False),  # what was loaded is there
        ("Stream", FIRST, False),
        ("synchronize", SECOND, False),
        ("Stream", SECOND, False),
        ("set_stream", f"stream of {FIRST}", True),
        ("set_stream", f"stream of {SECOND}", True),
        ("set_device", FIRST, True),
    ]


async def test_on_the_cpu_there_are_no_streams(told: list[tuple[str, object, bool]]) -> None:
    await run_thread([CPU])
    async with running(make_span()) as engine:
        session = await engine.open_session(batch=1, max_length=8)
        await engine.step(session, hidden_states(1, 1), 0)
    assert told == []


async def test_an_engine_has_streams_where_its_span_is(
    told: list[tuple[str, object, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BloomSpan, "devices", [SECOND])
    async with running(make_span(), EngineSettings(cache_tokens=64)):
        pass
    assert ("set_stream", f"stream of {SECOND}", True) in told


async def test_an_engine_has_the_cache_that_there_is_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    token_bytes = (2 * 3 + 1) * 64 * 4
    monkeypatch.setattr(engine_module, "cache_bytes", lambda device: 777 * token_bytes)
    async with running(make_span(), EngineSettings(cache_tokens=None)) as engine:
        assert engine.stats.cache_max_tokens == 777


async def test_a_gpu_that_does_not_work_is_said_at_the_start(
    told: list[tuple[str, object, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    with pytest.raises(RuntimeError, match="launch failure"):
        await run_thread([FIRST])


async def test_memory_that_is_out_is_given_back_before_anybody_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the step had made so far is let go, although the error remembers where it came from."""
    events: list[str] = []
    made: list[weakref.ref[Tensor]] = []

    class Large(BloomSpan):
        def forward(self, hidden: Tensor, *args: Any) -> Tensor:
            halfway = hidden.clone()
            made.append(weakref.ref(halfway))
            raise torch.OutOfMemoryError("CUDA out of memory")

    def empty_cache() -> None:
        gc.collect()
        events.append("empty" if made[0]() is None else "too early")

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    inner = make_span()
    async with running(Large(inner.config, 0, inner.blocks)) as engine:  # type: ignore[arg-type]
        session = await engine.open_session(batch=1, max_length=8)
        with pytest.raises(OutOfCache) as caught:
            await engine.step(session, hidden_states(1, 1), 0)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert events == ["empty"]
