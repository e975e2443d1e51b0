"""``client.connect``: the blocking face, from wherever people call it."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import trio

import client
from client.blocking import Swarm
from client.errors import ClientError, InvalidInput, UnknownModel
from client.swarm import AsyncSwarm
from compute.checkpoint import Checkpoint
from compute.node import Node
from compute.node_settings import NodeSettings
from net.addresses import parse
from net.dht.service import Dht
from net.errors import AddressError, DialError, PeerIdMismatch
from net.host import open_host
from net.identity import Identity
from net.reputation import PRIOR_CHANCE, Reputation
from tests.mem.conftest import Reference
from tests.mem.swarms import ENGINE, generate

T = TypeVar("T")
PROMPT = torch.tensor([[40, 41, 90, 17]])
PEER = str(Identity.generate(bytes(32)).peer_id)


@asynccontextmanager
async def loopback_swarm(theirs: Reference) -> AsyncIterator[str]:
    """A relay and a node of the whole model in one host, on loopback TCP; yields its address."""
    async with (
        open_host(Identity.generate(), listen=[parse("/ip4/127.0.0.1/tcp/0")]) as host,
        trio.open_nursery() as nursery,
    ):
        dht = Dht(host, server=True)
        await dht.join([])
        settings = NodeSettings(span=(0, theirs.n_blocks), engine=ENGINE)
        await nursery.start(Node(host, dht, Checkpoint.open(theirs.folder), settings).run)
        yield str(host.peer_addresses[0])
        nursery.cancel_scope.cancel()


@contextmanager
def served(theirs: Reference) -> Iterator[str]:
    """``loopback_swarm`` in a thread of its own."""
    ready = threading.Event()
    address: list[str] = []
    tokens: list[trio.lowlevel.TrioToken] = []
    scope = trio.CancelScope()

    async def main() -> None:
        with scope:
            async with loopback_swarm(theirs) as where:
                address.append(where)
                tokens.append(trio.lowlevel.current_trio_token())
                ready.set()
                await trio.sleep_forever()

    thread = threading.Thread(target=trio.run, args=(main,), daemon=True)
    thread.start()
    try:
        assert ready.wait(20)
        yield address[0]
    finally:
        tokens[0].run_sync_soon(scope.cancel)
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(odd: Reference) -> Iterator[str]:
    with served(odd) as where:
        yield where


def raceme_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "raceme-client"]


def generates(address: str, theirs: Reference) -> None:
    with client.connect(address) as swarm:
        [model_served] = swarm.models()
        assert (model_served.name, model_served.missing) == ("odd-bloom", [])
        [peer] = swarm.peers()
        assert peer.problem == ""
        assert peer.round_trip_s is not None
        assert 0 < peer.round_trip_s < 5
        model = swarm.model(str(theirs.folder))
        options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
        assert generate(model, PROMPT, **options) == generate(theirs.model, PROMPT, **options)
    assert raceme_threads() == []


def test_from_the_main_thread(address: str, odd: Reference) -> None:
    generates(address, odd)


def test_from_another_thread(address: str, odd: Reference) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            generates(address, odd)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert failures == []


def test_inside_a_running_asyncio_loop(address: str, odd: Reference) -> None:
    """As a cell of a Jupyter notebook."""

    async def cell() -> None:
        generates(address, odd)

    asyncio.run(cell())


async def test_inside_trio_it_says_what_to_use(address: str) -> None:
    with pytest.raises(ClientError, match=r"inside trio, use client\.open_swarm"):
        client.connect(address)
    async with client.open_swarm(address) as swarm:
        assert [served.name for served in await swarm.models()] == ["odd-bloom"]
    blocking: Swarm = await trio.to_thread.run_sync(client.connect, address)
    with pytest.raises(ClientError, match=r"inside trio, use client\.open_swarm"):
        blocking.models()
    await trio.to_thread.run_sync(blocking.close)


def test_its_arguments_are_those_of_the_asynchronous_face(address: str) -> None:
    assert inspect.signature(Swarm.model) == inspect.signature(AsyncSwarm.model)
    assert inspect.getdoc(Swarm.model) == inspect.getdoc(AsyncSwarm.model)
    options: dict[str, Any] = {"modul": "a@12345678"}
    with client.connect(address) as swarm, pytest.raises(TypeError, match="unexpected keyword argument 'modul'"):
        swarm.model("nobody-serves-it", **options)


def test_several_addresses_one_of_which_answers(address: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        dead = f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}/p2p/{Identity.generate().peer_id}"
    with client.connect([dead, address]) as swarm:
        assert len(swarm.models()) == 1


def test_close_twice_and_use_afterwards(address: str, odd: Reference) -> None:
    swarm = client.connect(address)
    model = swarm.model(str(odd.folder))
    session = model.session()
    generate(model, PROMPT, max_new_tokens=2, session=session)
    swarm.close()
    swarm.close()
    assert raceme_threads() == []
    uses: list[Callable[[], Any]] = [
        swarm.models,
        swarm.peers,
        lambda: swarm.model("odd-bloom"),
        model.session,
        lambda: generate(model, PROMPT, max_new_tokens=2),
        lambda: generate(model, PROMPT, max_new_tokens=2, session=session),
    ]
    for use in uses:
        with pytest.raises(ClientError, match="closed"):
            use()
    session.close()  # nothing to free any more, and no error: it is what ``with`` does


def test_closed_by_another_thread_in_the_middle(address: str, odd: Reference) -> None:
    swarm = client.connect(address)
    model = swarm.model(str(odd.folder))

    class Closes:
        """A streamer that closes the swarm after the first token."""

        def __init__(self) -> None:
            self.seen = 0

        def put(self, value: torch.Tensor) -> None:
            self.seen += 1
            if self.seen == 2:
                closer = threading.Thread(target=swarm.close)
                closer.start()
                closer.join(10)

        def end(self) -> None:
            """Nothing to do."""

    with pytest.raises(ClientError, match="closed"):
        generate(model, PROMPT, max_new_tokens=50, streamer=Closes())


def test_errors_of_connecting(address: str) -> None:
    before = threading.active_count()
    peer_id = address.rpartition("/")[2]
    stranger = str(Identity.generate().peer_id)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    cases: list[tuple[Any, type[Exception], str]] = [
        ("nonsense", AddressError, "not a multiaddr"),
        ("", AddressError, "."),
        ([], AddressError, "no address"),
        ("/ip4/127.0.0.1/tcp/4001", AddressError, "must end in /p2p/PEERID"),
        (f"/ip4/127.0.0.1/udp/4001/p2p/{peer_id}", AddressError, "no address that can be dialled"),
        (f"/ip4/127.0.0.1/tcp/{port}/p2p/{peer_id}", DialError, "refused"),
        (address.replace(peer_id, stranger), PeerIdMismatch, f"{peer_id}, not {stranger}"),
    ]
    for bootstrap, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            client.connect(bootstrap)
        assert "\n" not in str(caught.value)
    assert raceme_threads() == []
    assert threading.active_count() <= before + 2  # trio keeps idle workers for a while


WRONG: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (123, {}, TypeError, "bootstrap is an address or a list of addresses, each a str, not int"),
    (None, {}, TypeError, "each a str, not NoneType"),
    (b"/ip4/127.0.0.1/tcp/1", {}, TypeError, "each a str, not bytes"),
    ({"a": 1}, {}, TypeError, "each a str, not dict"),
    ([b"/ip4/127.0.0.1/tcp/1"], {}, TypeError, "each a str, but one is bytes"),
    ("", {"timeout_s": -1}, InvalidInput, "timeout_s is -1: give a number of seconds above 0"),
    ("", {"timeout_s": 0}, InvalidInput, "above 0"),
    ("", {"timeout_s": float("nan")}, InvalidInput, "timeout_s is nan"),
    ("", {"timeout_s": "5"}, TypeError, "timeout_s is a number of seconds, not str"),
    ("", {"timeout_s": None}, TypeError, "timeout_s is a number of seconds, not NoneType"),
    ("/ip4/127.0.0.1/tcp/1/p2p/" + PEER, {"home": 3}, TypeError, "home is the path of a folder, not int"),
    ("/ip4/127.0.0.1/tcp/1/p2p/" + PEER, {"remember": "no"}, TypeError, "remember is True or False, not str"),
]


@pytest.mark.parametrize(("bootstrap", "options", "kind", "says"), WRONG)
def test_arguments_of_connect_that_make_no_sense(
    bootstrap: Any, options: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says) as caught:
        client.connect(bootstrap, **options)
    assert type(caught.value) is kind
    assert raceme_threads() == []


def test_what_was_seen_of_nodes_is_kept_and_read_again(address: str, odd: Reference, tmp_path: Path) -> None:
    home = tmp_path / "home"
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
    with client.connect(address, home=home, remember=False) as swarm:
        generate(swarm.model(str(odd.folder)), PROMPT, **options)
    assert not home.exists()
    with client.connect(address, home=home) as swarm:
        generate(swarm.model(str(odd.folder)), PROMPT, **options)
        [node] = {peer.announcement.peer_id for peer in swarm.peers()}
    kept = home / "reputation.json"
    assert kept.stat().st_mode & 0o777 == 0o600
    known = Reputation(kept)
    assert len(known) == 1
    assert known.failure_chance(node) < PRIOR_CHANCE
    with client.connect(address, home=str(home)) as swarm:
        assert swarm._swarm.reputation.failure_chance(node) < PRIOR_CHANCE


def test_spaces_around_an_address_and_names_that_are_none(address: str, odd: Reference) -> None:
    with client.connect(f" {address}\n") as swarm:
        for name in (odd.folder, 3, None):
            with pytest.raises(TypeError, match="a model's name, or its folder's path, is a str, not "):
                swarm.model(name)  # type: ignore[arg-type]


def test_a_folder_that_is_called_like_a_model_is_not_taken_for_it(
    address: str, odd: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(odd.folder.parent)
    with client.connect(address) as swarm:
        with pytest.raises(UnknownModel, match=r"with a / in its path, as \./odd-bloom"):
            swarm.model("odd-bloom")
        assert swarm.model("./odd-bloom").served.name == "odd-bloom"


def test_a_bootstrap_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(DialError, match=r"no node of the swarm answered within 0\.3 s"):
            client.connect(f"/ip4/127.0.0.1/tcp/{port}/p2p/{Identity.generate().peer_id}", timeout_s=0.3)


def run_script(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def interrupted_at_the_first_line(script: str, *arguments: str) -> tuple[int, str]:
    process = run_script(script, *arguments)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    return process.returncode, errors


def test_ctrl_c_in_connect() -> None:
    script = """
import socket, sys, threading
import client
with socket.create_server(("127.0.0.1", 0)) as silent:
    port = silent.getsockname()[1]
    held = []  # it stays open
    threading.Thread(target=lambda: (held.append(silent.accept()), print("ready", flush=True)), daemon=True).start()
    try:
        client.connect(f"/ip4/127.0.0.1/tcp/{port}/p2p/" + sys.argv[1], timeout_s=60)
    except KeyboardInterrupt:
        left = [thread for thread in threading.enumerate() if thread.name == "raceme-client"]
        sys.exit(40 + len(left))
"""
    status, errors = interrupted_at_the_first_line(script, str(Identity.generate().peer_id))
    assert status == 40, errors
    assert errors == ""


def test_ctrl_c_in_generate(address: str, odd: Reference) -> None:
    """Also: the interrupted step is not carried on behind the user's back, and the swarm goes on."""
    script = """
import sys, torch, client
class Tells:
    seen = 0
    def put(self, value):
        self.seen += 1
        if self.seen == 3:
            print("ready", flush=True)
    def end(self): pass
swarm = client.connect(sys.argv[1])
model = swarm.model(sys.argv[2])
ids = torch.tensor([[40, 41, 90, 17]])
try:
    while True:
        model.generate(ids, max_new_tokens=2000, streamer=Tells(), eos_token_id=-1)
except KeyboardInterrupt:
    after = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert after.shape == (1, 9), after
    sys.exit(40)
"""
    status, errors = interrupted_at_the_first_line(script, address, str(odd.folder))
    assert status == 40, errors


def test_a_program_that_forgets_to_close_ends(address: str) -> None:
    process = run_script("import sys, client; swarm = client.connect(sys.argv[1]); print(len(swarm.models()))", address)
    try:
        output, errors = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, output, errors) == (0, "1\n", "")


def test_importing_the_client_is_light() -> None:
    script = "import sys, client; print([m for m in ('torch', 'transformers', 'libp2p') if m in sys.modules])"
    process = run_script(script)
    assert process.communicate(timeout=20)[0] == "[]\n"
