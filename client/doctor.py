"""``raceme doctor``: one thing after another that a node needs, in words, and what to do about those that fail."""

from __future__ import annotations

import argparse
import enum
import importlib.util
import os
import shutil
import stat
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from net import console

if TYPE_CHECKING:
    from net.addresses import Multiaddr, PeerAddress
    from net.dht.service import Dht
    from net.host import Host
    from net.nat.mapping import PortMapper
    from net.nat.reachability import Reachability
    from net.security.swarm_key import SwarmKey

# Of the 15 seconds in all, the first ten go to what is found out step by step, two to what peers say about themselves,
# and two are kept for the router to take its ports back.
BOOTSTRAP_S = 4.0
JOIN_S = 3.0
OUTSIDE_S = 10.0  # since the beginning, to find out how we can be reached; AutoNAT's dials take 4 s if nobody answers
PATIENCE_S = 3.0
PEERS_S = 2.0
GPU_S = 12.0  # torch takes seconds to be loaded
MAX_ASKED = 8  # peers, whether they are relays
LEAST_DISK_BYTES = 2 * 1000**3
MAX_NAMED = 3  # of what is kept, the largest
SHOWN_DIGITS = 12  # of the name of its folder
CLOCK_S = 3600.0  # records of who is further off are not believed
SYMBOLS = {"ok": "ok  ", "note": "note", "bad": "BAD "}
HOP_PROTOCOL = "/libp2p/circuit/relay/0.2.0/hop"


class State(enum.Enum):
    OK = "ok"
    NOTE = "note"  # it works, or cannot be told; something could be better
    BAD = "bad"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What came of one check; ``advice`` is what the person could do."""

    name: str
    state: State
    text: str
    advice: str = ""


def add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check what a node needs, and say what to do",
        description="Check what a node needs: disk, GPU, ports; and with --bootstrap, whether others can reach this "
        "machine, through which NAT, relays, the clock. Ends with 0 if everything that is needed works. Takes at most "
        "15 seconds.",
    )
    console.add_bootstrap(doctor, is_required=False)
    doctor.add_argument(
        "--listen",
        metavar="MULTIADDR",
        action="append",
        help=f"where a node would accept connections; may be repeated (default: {' and '.join(console.ANY_PORT)}, any "
        "free port)",
    )
    console.add_port_mapping(doctor)
    console.add_swarm_key(doctor)
    console.add_json(doctor, "what was found")
    console.add_common(doctor)
    doctor.set_defaults(run=run_doctor, default_listen=console.ANY_PORT)


def run_doctor(options: argparse.Namespace) -> int:
    bootstrap = console.bootstrap_addresses(options)
    listen = console.listen_addresses(options)
    findings: list[Finding] = []

    def tell(finding: Finding) -> None:
        findings.append(finding)
        if not options.json:
            print(f"{SYMBOLS[finding.state.value]} {finding.name}: {finding.text}", flush=True)
            if finding.advice:
                print(f"     {finding.advice}", flush=True)

    if not _examine(bootstrap, listen, console.port_mapper(options), console.swarm_key(options), tell):
        return console.EXIT_INTERRUPTED
    is_well = all(finding.state is not State.BAD for finding in findings)
    if options.json:
        console.print_json({"ok": is_well, "checks": [_as_json(finding) for finding in findings]})
    return 0 if is_well else console.EXIT_FAILURE


def _as_json(finding: Finding) -> dict[str, Any]:
    state = finding.state.value
    return {"name": finding.name, "state": state, "text": finding.text, "advice": finding.advice}


def _examine(
    bootstrap: Sequence[PeerAddress],
    listen: Sequence[Multiaddr],
    mapper: PortMapper | None,
    swarm_key: SwarmKey | None,
    tell: Callable[[Finding], None],
) -> bool:
    """All checks, in order. Returns: whether nobody interrupted them."""
    import trio

    from net.errors import AddressError
    from net.files.models import MODELS_FOLDER
    from net.identity import Identity
    from net.modules.store import MODULES_FOLDER

    is_done = False

    async def examine(host: Host) -> None:
        nonlocal is_done
        async with trio.open_nursery() as nursery:
            gpu = _later(nursery, check_gpu)
            tell(Finding(name="ports", state=State.OK, text=f"can listen at {_spelled(host.listening)}"))
            if bootstrap:
                await _check_network(host, bootstrap, mapper, tell)
            else:
                text = "not checked: they need a node of a swarm"
                advice = "give one to be checked against: raceme doctor --bootstrap ADDR"
                tell(Finding(name="network", state=State.NOTE, text=text, advice=advice))
            tell(await gpu())
        is_done = True

    for folder in (console.data_folder(), model_cache()):
        tell(check_folder(folder))
    for kind in (MODELS_FOLDER, MODULES_FOLDER):
        tell(check_kept(console.data_folder() / kind, kind))
    try:
        console.run_host(examine, Identity.generate(), listen=listen, swarm_key=swarm_key)
    except AddressError as error:
        advice = "choose another port or address with --listen, or stop the program that has it"
        tell(Finding(name="ports", state=State.BAD, text=str(error), advice=advice))
        is_done = True
    return is_done


def _later(nursery: Any, work: Callable[[], Awaitable[Finding]]) -> Callable[[], Awaitable[Finding]]:
    """Begin now; what is returned waits for the result."""
    import trio

    done = trio.Event()
    found: list[Finding] = []

    async def run() -> None:
        found.append(await work())
        done.set()

    async def result() -> Finding:
        await done.wait()
        return found[0]

    nursery.start_soon(run)
    return result


# This machine


def model_cache() -> Path:
    """Where checkpoints from the hub are kept."""
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(home) / "hub"


def check_folder(folder: Path) -> Finding:
    """Whether files can be put there, and how many."""
    name = "disk"
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        advice = f"give yourself the right to write to {there}, or choose another folder (RACEME_HOME, HF_HOME)"
        return Finding(name=name, state=State.BAD, text=f"{folder} cannot be written to", advice=advice)
    free = shutil.disk_usage(there).free
    text = f"{folder} can be written to; {free / 1000**3:.1f} GB are free"
    if free < LEAST_DISK_BYTES:
        return Finding(name=name, state=State.BAD, text=text, advice="make room: models take gigabytes")
    return Finding(name=name, state=State.OK, text=text)


def check_kept(folder: Path, kind: str) -> Finding:
    """How much there is of what peers have given, or what was published here, which nothing deletes.

    Args:
        folder: with one for each model or module.
        kind: ``models`` or ``modules``.
    """
    name = f"{kind} kept"
    sizes = {place: _total_bytes(place) for place in (folder.iterdir() if folder.is_dir() else ())}
    if not sizes:
        return Finding(name=name, state=State.OK, text=f"{folder} holds none")
    largest = sorted(sizes, key=lambda place: (-sizes[place], place))[:MAX_NAMED]
    named = ", ".join(f"{_name_kept(place)} of {_spell_bytes(sizes[place])}" for place in largest)
    text = f"{folder} holds {_spell_bytes(sum(sizes.values()))}, the largest: {named}"
    advice = (
        "nothing deletes them: to make room, delete folders there that no running node or client uses; what others "
        "still have comes again when it is needed"
    )
    return Finding(name=name, state=State.OK, text=text, advice=advice)


def _name_kept(place: Path) -> str:
    """The folder's name, short enough to be found by, and which model it holds, where it says so."""
    from net.errors import RemoteProtocolError
    from net.files.manifest import MAX_MANIFEST_BYTES, ModelManifest

    try:
        with (place / "manifest").open("rb") as file:
            return f"{place.name[:SHOWN_DIGITS]} ({ModelManifest.from_bytes(file.read(MAX_MANIFEST_BYTES)).name})"
    except (OSError, RemoteProtocolError):  # a module's is another one
        return place.name[:SHOWN_DIGITS]


def _total_bytes(place: Path) -> int:
    """Of a file, or of all files in a folder."""
    total = 0
    for path in (place, *(Path(top) / name for top, _, names in os.walk(place) for name in names)):
        with suppress(OSError):  # gone meanwhile
            status = path.lstat()
            total += status.st_size * stat.S_ISREG(status.st_mode)
    return total


def _spell_bytes(count: int) -> str:
    return f"{count / 1000**3:.1f} GB" if count >= 1000**3 // 10 else f"{count / 1000**2:.1f} MB"


ASK_TORCH = """
import torch
cards = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
found = [torch.cuda.get_device_properties(card) for card in cards]
print(torch.__version__, *(f"{each.name}, {each.total_memory / 1000**3:.0f} GB" for each in found), sep="\\n")
"""


async def check_gpu() -> Finding:
    """What torch finds. In a process of its own, for what loads torch cannot be interrupted."""
    import trio

    if importlib.util.find_spec("torch") is None:
        return _no_gpu("torch is not installed")
    with trio.move_on_after(GPU_S):
        done = await trio.run_process(
            [sys.executable, "-c", ASK_TORCH], capture_stdout=True, capture_stderr=True, check=False
        )
        version, *cards = done.stdout.decode(errors="replace").splitlines() or [""]
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            return _no_gpu(f"torch cannot be loaded ({last})")
        if cards:
            return Finding(name="GPU", state=State.OK, text="; ".join(cards))
        return _no_gpu(f"torch {version} finds none")
    return _no_gpu(f"torch is not loaded after {GPU_S:g} s")


def _no_gpu(why: str) -> Finding:
    advice = (
        "blocks run on the CPU, which is slower; with an NVIDIA GPU, check its driver (nvidia-smi) and torch's build"
    )
    return Finding(name="GPU", state=State.NOTE, text=f"none is used: {why}", advice=advice)


# The network


async def _check_network(
    host: Host, bootstrap: Sequence[PeerAddress], mapper: PortMapper | None, tell: Callable[[Finding], None]
) -> None:
    import trio

    from net.nat.reachability import Reachability, ReachabilitySettings

    reachability = Reachability(host, mapper=mapper, settings=ReachabilitySettings(look_s=1.0, patience_s=PATIENCE_S))
    deadline = trio.current_time() + OUTSIDE_S
    async with _running(reachability):
        if not await _check_bootstraps(host, bootstrap, tell):
            return
        dht = await _join(host, bootstrap)
        await _wait_until_known(reachability, deadline)
        tell(nat_finding(reachability))
        if mapper is not None:
            tell(mapping_finding(mapper))
        async with trio.open_nursery() as nursery:
            clock = _later(nursery, partial(_check_clock, dht))
            relays = await _count_relays(host)
            tell(outside_finding(reachability))
            tell(relays_finding(relays, is_needed=reachability.kind.value == "relay-only"))
            tell(await clock())


@asynccontextmanager
async def _running(reachability: Reachability) -> AsyncIterator[None]:
    from net.nurseries import open_service_nursery

    async with open_service_nursery() as nursery:
        await nursery.start(reachability.run)
        yield
        nursery.cancel_scope.cancel()


async def _check_bootstraps(host: Host, bootstrap: Sequence[PeerAddress], tell: Callable[[Finding], None]) -> bool:
    """All at once, told in order. Returns: whether any answers."""
    import trio

    async with trio.open_nursery() as nursery:
        checks = [_later(nursery, partial(_check_bootstrap, host, peer)) for peer in bootstrap]
        findings = [await check() for check in checks]
    for finding in findings:
        tell(finding)
    return any(finding.state is State.OK for finding in findings)


async def _check_bootstrap(host: Host, peer: PeerAddress) -> Finding:
    import trio

    from net.errors import NetError
    from net.ping import ping_once

    problem = f"no answer in {BOOTSTRAP_S:g} s"
    with trio.move_on_after(BOOTSTRAP_S):
        try:
            await host.connect(peer.peer_id, [peer.address])
            round_trip_s = await ping_once(host, peer.peer_id)
        except NetError as error:
            problem = str(error)
        else:
            text = f"{peer.address} answers in {round_trip_s * 1000:.1f} ms"
            return Finding(name="bootstrap", state=State.OK, text=text)
    advice = "check that the node runs, its address (up to its PeerId), and that no firewall is between"
    return Finding(name="bootstrap", state=State.BAD, text=f"{peer.address}: {problem}", advice=advice)


async def _join(host: Host, bootstrap: Sequence[PeerAddress]) -> Dht:
    """Meet more peers, who see us from elsewhere."""
    import trio

    from net.dht.service import Dht
    from net.errors import NetError

    dht = Dht(host, server=False)
    with trio.move_on_after(JOIN_S):
        try:
            await dht.join(bootstrap)
        except NetError:
            pass  # one of them answered a moment ago; what can be found out without the others is told
    return dht


async def _wait_until_known(reachability: Reachability, deadline: float) -> None:
    import trio

    from net.nat.mapping import MappingState
    from net.nat.verdicts import Verdict

    def is_known() -> bool:
        mapper = reachability.mapper
        if mapper is not None and mapper.state is MappingState.SEARCHING:
            return False
        verdicts = reachability.evidence.verdicts.values()
        return bool(verdicts) and Verdict.UNKNOWN not in verdicts

    def is_seen() -> bool:
        return bool(reachability.evidence.outer_ips)

    with trio.move_on_at(deadline):
        with trio.move_on_after(PATIENCE_S):
            while not is_seen():
                await reachability.wait_for_change()
        while is_seen() and not is_known():  # else nobody outside is there to find anything out
            await reachability.wait_for_change()


def nat_finding(reachability: Reachability) -> Finding:
    """What kind of NAT there is."""
    from net.nat.observed import Mapping

    evidence = reachability.evidence
    if not evidence.outer_ips:
        text = "no peer outside of this network has told where it sees this machine"
        return Finding(name="NAT", state=State.NOTE, text=text, advice="normal where a swarm stays within one network")
    seen = ", ".join(map(str, evidence.outer_ips[:2]))
    words = {
        Mapping.NONE: "no NAT",
        Mapping.ENDPOINT_INDEPENDENT: "a NAT that gives this machine one port for all peers (others can meet it)",
        Mapping.ADDRESS_DEPENDENT: "a NAT that gives this machine another port for each peer (symmetric)",
    }
    kinds = [f"{words[kind]} for {name}" for name, kind in _kinds(evidence.tcp, evidence.udp) if kind in words]
    text = f"others see this machine at {seen}: " + ("; ".join(kinds) or "too few of them to tell what NAT there is")
    if Mapping.ADDRESS_DEPENDENT in (evidence.tcp, evidence.udp):
        advice = "relays will carry the traffic; a port forwarded by the router, or IPv6, would be faster"
        return Finding(name="NAT", state=State.NOTE, text=text, advice=advice)
    return Finding(name="NAT", state=State.OK, text=text)


def _kinds(tcp: Any, udp: Any) -> list[tuple[str, Any]]:
    return [("TCP", tcp), ("UDP", udp)]


def mapping_finding(mapper: PortMapper) -> Finding:
    """Whether the router lets others in when asked to."""
    from net.nat.mapping import MappingState

    name = "port mapping"
    if mapper.state is MappingState.MAPPED:
        where = ", ".join(f"{port} at {outer}" for port, outer in mapper.mapped.items())
        return Finding(name=name, state=State.OK, text=f"the router opens ports by {mapper.protocol}: {where}")
    if mapper.state is MappingState.OFF:
        return Finding(name=name, state=State.OK, text="not needed: no port here is behind this network's router")
    text = mapper.problem or "the router has not answered yet"
    advice = {
        MappingState.INNER: "forwarding would have to be set up at the outer router as well; providers often refuse",
        MappingState.REFUSED: "allow UPnP or NAT-PMP for this machine in the router, or forward a port by hand",
    }.get(mapper.state, "switch UPnP or NAT-PMP on in the router, or forward a port by hand, and give it as --listen")
    return Finding(name=name, state=State.NOTE, text=text, advice=advice)


def outside_finding(reachability: Reachability) -> Finding:
    """Whether others can connect."""
    from net.nat.reachability import WORDS, Kind

    name, kind = "from outside", reachability.kind
    text = f"{kind.value}: {WORDS[kind]}"
    if kind in (Kind.PUBLIC, Kind.MAPPED):
        confirmed = [address for address, found in reachability.evidence.verdicts.items() if found.value == "reachable"]
        proof = f" (confirmed: {_spelled(confirmed)})" if confirmed else " (not confirmed by anybody)"
        return Finding(name=name, state=State.OK, text=text + proof)
    if kind is Kind.UNKNOWN:
        advice = "peers that check this (AutoNAT) must be outside of this network, at public addresses"
        return Finding(name=name, state=State.NOTE, text=text, advice=advice)
    advice = "to be reached directly, forward a port in the router and give it as --listen /ip4/0.0.0.0/tcp/PORT"
    return Finding(name=name, state=State.NOTE, text=text, advice=advice)


async def _count_relays(host: Host) -> int:
    """How many of the peers that we are connected with carry others' traffic."""
    import trio

    from net.errors import NetError
    from net.identify import identify_over

    found = 0

    async def ask(connection: Any) -> None:
        nonlocal found
        try:
            message = await identify_over(host, connection)
        except NetError:
            return  # it has gone, or says nothing: no relay
        found += HOP_PROTOCOL in message.protocols

    with trio.move_on_after(PEERS_S):
        async with trio.open_nursery() as nursery:
            for connection in host.swarm.connections[:MAX_ASKED]:
                nursery.start_soon(ask, connection)
    return found


def relays_finding(relays: int, *, is_needed: bool) -> Finding:
    """Whether there is somebody to carry what cannot go directly."""
    if relays:
        return Finding(name="relays", state=State.OK, text=f"{relays} of the peers met carry others' traffic")
    advice = "somebody at a public address should run: raceme relay"
    state = State.BAD if is_needed else State.NOTE
    return Finding(name="relays", state=state, text="none of the peers met carries others' traffic", advice=advice)


async def _check_clock(dht: Dht) -> Finding:
    """This clock against the times that others wrote into their records."""
    import trio

    from net.dht import keys
    from net.errors import NetError
    from net.protocol.announcement import DIRECTORY, KIND

    ahead_s: list[float] = []
    with trio.move_on_after(PEERS_S):
        try:
            records = await dht.find(keys.of_name(DIRECTORY), KIND)
            ahead_s = [record.issued_s - time.time() for record in records]
        except NetError:
            pass  # nothing to compare with
    return clock_finding([*ahead_s, *dht.stale_by_s])


def clock_finding(ahead_s: Sequence[float]) -> Finding:
    """``ahead_s``: how far others' clocks are before ours; a minute or two is how old their records are."""
    if not ahead_s:
        return Finding(name="clock", state=State.OK, text="not compared: no other node has announced anything")
    middle = statistics.median(ahead_s)
    if abs(middle) < CLOCK_S:
        return Finding(name="clock", state=State.OK, text=f"agrees with {len(ahead_s)} other nodes within an hour")
    text = f"it is {abs(middle) / 3600:.1f} h {'behind' if middle > 0 else 'ahead of'} those of other nodes"
    advice = "set it (on Linux: timedatectl set-ntp true): what this node announces is not believed"
    return Finding(name="clock", state=State.BAD, text=text, advice=advice)


def _spelled(addresses: Sequence[Multiaddr]) -> str:
    return ", ".join(map(str, addresses)) or "no address"
