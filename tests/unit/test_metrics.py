"""Figures for Prometheus: what an engine and a node do is in them, and an HTTP client gets them."""

from __future__ import annotations

import argparse
import re
import urllib.request

import pytest
import trio

from compute.cli import _host_port
from compute.engine import Engine, EngineSettings
from compute.errors import BadInput, EngineBusy
from compute.metrics import Metrics
from compute.scheduler import Refused
from compute.serving import refusals
from compute.slots import NoRoom
from net.errors import RpcError
from tests.unit.engines import hidden_states, make_span


def value(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


async def test_what_an_engine_does_is_in_the_figures() -> None:
    metrics = Metrics()
    async with trio.open_nursery() as nursery:
        engine = Engine(make_span(), EngineSettings(cache_tokens=512), metrics)
        metrics.read_from(lambda: engine.stats)
        await nursery.start(engine.run)
        session = await engine.open_session(batch=1, max_length=100)
        await engine.step(session, hidden_states(1, 50), 0)
        await engine.step(session, hidden_states(1, 3), 50)
        await engine.forward(hidden_states(2, 10))
        text = metrics.text()
        nursery.cancel_scope.cancel()
    for kind, tokens in (("prefill", 50), ("decode", 3), ("forward", 20)):
        assert value(text, f'raceme_tokens_total{{kind="{kind}"}}') == tokens
        assert value(text, f'raceme_steps_total{{kind="{kind}"}}') == 1
        assert value(text, f'raceme_batch_rows_count{{kind="{kind}"}}') >= 1
        assert value(text, f'raceme_step_seconds_sum{{kind="{kind}"}}') > 0
        assert value(text, f'raceme_queue_seconds_count{{kind="{kind}"}}') == 1
    assert value(text, "raceme_sessions") == 1
    assert value(text, "raceme_cache_used_tokens") == 64
    assert value(text, "raceme_cache_max_tokens") == 512
    assert value(text, "raceme_waiting") == 0


def test_refusals_are_counted_by_code() -> None:
    metrics = Metrics()
    for _ in range(2):
        with pytest.raises(RpcError), refusals(metrics):
            raise BadInput("too-long", "x")
    with pytest.raises(ZeroDivisionError), refusals(metrics):
        raise ZeroDivisionError
    with pytest.raises(RpcError), refusals(None):
        raise BadInput("too-long", "x")
    assert value(metrics.text(), 'raceme_errors_total{code="too-long"}') == 2
    assert value(metrics.text(), 'raceme_errors_total{code="internal"}') == 1


def test_who_is_put_off_is_told_until_when() -> None:
    for error, code, retry_after_s in (
        (NoRoom("x", 7.0), "out-of-cache", 7.0),
        (Refused("x", 0.5), "busy", 0.5),
        (EngineBusy("x"), "busy", 1.0),
        (BadInput("too-long", "x"), "too-long", None),
    ):
        with pytest.raises(RpcError) as caught, refusals(None):
            raise error
        assert (caught.value.code, caught.value.retry_after_s) == (code, retry_after_s)


async def test_the_endpoint_answers_and_ends() -> None:
    metrics = Metrics()
    metrics.refused("busy")
    async with metrics.served("127.0.0.1", 0) as port:
        url = f"http://127.0.0.1:{port}/metrics"

        def read() -> str:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return str(answer.read().decode())

        assert value(await trio.to_thread.run_sync(read), 'raceme_errors_total{code="busy"}') == 1
        with pytest.raises(OSError, match=r"in use|Address"):
            async with Metrics().served("127.0.0.1", port):
                pass
    with pytest.raises(OSError):
        await trio.to_thread.run_sync(read)


@pytest.mark.parametrize(
    ("text", "expected"), [("127.0.0.1:9100", ("127.0.0.1", 9100)), ("[::1]:80", ("::1", 80)), ("host:0", ("host", 0))]
)
def test_where_the_figures_are_served(text: str, expected: tuple[str, int]) -> None:
    assert _host_port(text) == expected


@pytest.mark.parametrize("text", ["", "9100", ":9100", "host:", "host:65536", "a:b:1", "host:-1", "host:1x"])
def test_nonsense_is_no_address(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="HOST:PORT"):
        _host_port(text)
