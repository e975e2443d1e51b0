"""Our port mapping against Debian's miniupnpd, on a router made of network namespaces.

    stranger 77.9.0.2 --- 77.9.0.1 [router: miniupnpd, nftables] 192.168.1.1 --- 192.168.1.10 [home: our node]

For UPnP, PCP and NAT-PMP in turn: the node maps its TCP and UDP port, a stranger gets through, the mapping is renewed,
and after the node has left nobody gets through any more. Then `raceme doctor` at home meets three relays outside, with
and without mapping, and must say what is so. Needs root, miniupnpd, iproute2 and nftables
(apt-get install miniupnpd); everything lives in namespaces that end with this program.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import trio

from net.nat.gateway import Gateway, Port
from net.nat.mapping import FindGateway, MappingSettings, MappingState, PortMapper
from net.nat.pcp import PcpGateway, find_pcp
from net.nat.upnp import find_upnp

OUTER, STRANGER, INNER, HOME = "77.9.0.1", "77.9.0.2", "192.168.1.1", "192.168.1.10"
OTHERS = ["77.9.0.3", "77.9.0.4"]  # of the stranger as well: an address each for three relays
PORT = 4001
LIFETIME_S = 120.0  # the least that miniupnpd gives
PATIENCE_S = 15.0
INSIDE = "RACEME_INSIDE_NAMESPACES"
TOOLS = {"unshare": "util-linux", "ip": "iproute2", "nft": "nftables", "miniupnpd": "miniupnpd"}

ROUTER = """
table inet filter {
  chain forward {
    type filter hook forward priority 0; policy drop;
    ct state established,related accept
    iifname "lan0" accept
    jump miniupnpd
  }
  chain input {
    type filter hook input priority 0; policy drop;
    ct state established,related accept
    iifname != "wan0" accept
  }
  chain miniupnpd { }
  chain prerouting { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }
  chain postrouting {
    type nat hook postrouting priority 100;
    jump postrouting_miniupnpd
    oifname "wan0" ip saddr 192.168.1.0/24 masquerade
  }
  chain prerouting_miniupnpd { }
  chain postrouting_miniupnpd { }
}
"""
MINIUPNPD = """
ext_ifname=wan0
listening_ip=lan0
enable_natpmp=yes
enable_upnp=yes
secure_mode=yes
min_lifetime=120
max_lifetime=86400
upnp_table_name=filter
upnp_nat_table_name=filter
upnp_forward_chain=miniupnpd
upnp_nat_chain=prerouting_miniupnpd
upnp_nat_postrouting_chain=postrouting_miniupnpd
uuid=4d1ba36d-5b7c-4a4b-8c63-6a3a2f7f0d11
friendly_name=lab
allow 1024-65535 192.168.1.0/24 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m interop.mapping", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output and nothing else")
    parser.add_argument("--at-home", choices=sorted(FINDERS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.at_home:
        return trio.run(_at_home, options.at_home)
    lacking = sorted(package for tool, package in TOOLS.items() if shutil.which(tool) is None)
    if lacking or os.geteuid():
        print(f"needs root, and: apt-get install {' '.join(lacking)}" if lacking else "needs root", file=sys.stderr)
        return 2
    if INSIDE not in os.environ:
        command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        again = [sys.executable, "-m", "interop.mapping", *sys.argv[1:]]
        return subprocess.run([*command, *again], env={**os.environ, INSIDE: "1"}, check=False).returncode
    with tempfile.TemporaryDirectory(prefix="raceme-") as folder, router(Path(folder)):
        results = [{"protocol": name, **trio.run(_check, name)} for name in FINDERS]
        results.append({"protocol": "doctor", **trio.run(_check_doctor, Path(folder))})
    if options.json:
        print(json.dumps({"results": results}))
    return 0 if all(result["failure"] is None for result in results) else 1


# The network


@contextmanager
def router(folder: Path) -> Iterator[None]:
    """The three machines; this process is on the router, which runs miniupnpd."""
    subprocess.run(["mount", "-t", "tmpfs", "lab", "/run"], check=True)
    plan = [
        "netns add home",
        "netns add stranger",
        "link set lo up",
        "link add lan0 type veth peer name eth0 netns home",
        "link add wan0 type veth peer name eth0 netns stranger",
        f"addr add {INNER}/24 dev lan0",
        f"addr add {OUTER}/24 dev wan0",
        "link set lan0 up",
        "link set wan0 up",
        f"route add default via {STRANGER}",
    ]
    _ip(plan)
    _ip([*_up(HOME), f"route add default via {INNER}"], "home")
    _ip([*_up(STRANGER), f"route add default via {OUTER}"], "stranger")
    _ip([f"addr add {ip}/24 dev eth0" for ip in OTHERS], "stranger")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    subprocess.run(["nft", "-f", "-"], input=ROUTER.encode(), check=True)
    config = folder / "miniupnpd.conf"
    config.write_text(MINIUPNPD)
    command = ["miniupnpd", "-d", "-f", str(config), "-P", str(folder / "pid")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as daemon:
        try:
            yield
        finally:
            daemon.terminate()


def _up(ip: str) -> list[str]:
    return ["link set lo up", f"addr add {ip}/24 dev eth0", "link set eth0 up"]


def _ip(plan: list[str], namespace: str | None = None) -> None:
    command = ["ip", *(["-n", namespace] if namespace else []), "-batch", "-"]
    subprocess.run(command, input="\n".join(plan).encode(), check=True)


# What is checked


async def _check(name: str) -> dict[str, object]:
    """One protocol, from the router: a node at home maps, a stranger tries, the node leaves."""
    found: dict[str, object] = {"failure": None}
    with trio.move_on_after(60):
        async with at_home(name) as home:
            try:
                mapped = await home.answer()
                found["map_s"] = mapped["seconds"]
                _must(mapped["state"] == "mapped", f"the node says {mapped}")
                ports = {kind: int(port) for kind, port in dict(mapped["ports"]).items()}
                for kind in ("tcp", "udp"):
                    _must(await reaches(kind, ports[kind]), f"a stranger does not get through by {kind}")
                await home.tell("renew")
                _must((await home.answer())["state"] == "mapped", "the renewal failed")
                _must(await reaches("tcp", ports["tcp"]), "a stranger does not get through after the renewal")
                await home.tell("leave")
                found["leave_s"] = (await home.answer())["seconds"]
                for kind in ("tcp", "udp"):
                    _must(not await reaches(kind, ports[kind]), f"a stranger gets through by {kind} after the end")
                rules = await trio.run_process(["nft", "list", "ruleset"], capture_stdout=True)
                _must(f"dnat ip to {HOME}" not in rules.stdout.decode(), "the router still has a rule")
            except _Failure as failure:
                found["failure"] = str(failure)
            print(name, json.dumps(found), file=sys.stderr, flush=True)
            return found
    return {"failure": "took more than 60 s"}


async def _check_doctor(folder: Path) -> dict[str, object]:
    """What a person at home is told, with the router's help and without."""
    found: dict[str, object] = {"failure": "took more than 100 s"}
    with trio.move_on_after(100):
        async with trio.open_nursery() as nursery:
            relays: list[str] = []
            for ip in (STRANGER, *OTHERS):
                options = ["--listen", f"/ip4/{ip}/tcp/4001", "--listen", f"/ip4/{ip}/udp/4001/quic-v1", "--json"]
                known = [part for relay in relays[:1] for part in ("--bootstrap", relay)]
                command = _raceme("stranger", folder / ip, "relay", "--no-port-mapping", *options, *known)
                start = partial(trio.run_process, command, stdout=subprocess.PIPE, check=False)
                relays.append((await Home(await nursery.start(start)).answer())["address"])
            try:
                for options, expected in (([], "mapped: "), (["--no-port-mapping"], "punchable: ")):
                    known = [part for relay in relays for part in ("--bootstrap", relay)]
                    command = _raceme("home", folder / "home", "doctor", "--json", *options, *known)
                    began = trio.current_time()
                    done = await trio.run_process(command, capture_stdout=True, check=False)
                    said = {check["name"]: check["text"] for check in json.loads(done.stdout)["checks"]}
                    _must(said["from outside"].startswith(expected), f"expected {expected}got {said}")
                    _must(expected != "mapped: " or "confirmed: " in said["from outside"], f"not confirmed: {said}")
                    found[expected.strip(": ") + "_s"] = round(trio.current_time() - began, 1)
                found["failure"] = None
            except _Failure as failure:
                found["failure"] = str(failure)
            nursery.cancel_scope.cancel()
    print("doctor", json.dumps(found), file=sys.stderr, flush=True)
    return found


def _raceme(namespace: str, home: Path, *arguments: str) -> list[str]:
    within = ["ip", "netns", "exec", namespace, "env", f"RACEME_HOME={home}"]
    return [*within, sys.executable, "-m", "client", *arguments]


class _Failure(Exception):
    pass


def _must(condition: bool, words: str) -> None:
    if not condition:
        raise _Failure(words)


async def reaches(kind: str, port: int) -> bool:
    """Whether a stranger has an answer from the node at home, through the router's outer address."""
    script = (
        "import socket,sys; kind,port=sys.argv[1],int(sys.argv[2]);"
        "s=socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind=='tcp' else socket.SOCK_DGRAM);"
        f"s.settimeout(2); s.connect(({OUTER!r},port)); s.send(b'?'); sys.exit(s.recv(1)!=b'!')"
    )
    command = ["ip", "netns", "exec", "stranger", sys.executable, "-c", script, kind, str(port)]
    done = await trio.run_process(command, check=False, stderr=subprocess.DEVNULL)
    return done.returncode == 0


class Home:
    """The node at home, a process of its own: words there, and a line of JSON back for each."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._received = bytearray()

    async def tell(self, word: str) -> None:
        if self._process.stdin is not None:
            await self._process.stdin.send_all(word.encode() + b"\n")

    async def answer(self) -> dict[str, Any]:
        while b"\n" not in self._received and self._process.stdout is not None:
            part = await self._process.stdout.receive_some()
            _must(bool(part), "the node at home has ended")
            self._received += part
        line, _, rest = bytes(self._received).partition(b"\n")
        self._received = bytearray(rest)
        answer: dict[str, Any] = json.loads(line)
        return answer


@asynccontextmanager
async def at_home(name: str) -> AsyncIterator[Home]:
    command = ["ip", "netns", "exec", "home", sys.executable, "-m", "interop.mapping", "--at-home", name]
    async with trio.open_nursery() as nursery:
        start = partial(trio.run_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, check=False)
        process: trio.Process = await nursery.start(start)
        yield Home(process)
        nursery.cancel_scope.cancel()


# At home


async def _at_home(name: str) -> int:
    """Map, say so, and do what standard input says."""
    commands = trio.lowlevel.FdStream(os.dup(0))
    async with trio.open_nursery() as node:
        await _serve(node)
        mapper = PortMapper(finders=[FINDERS[name]], settings=MappingSettings(lifetime_s=LIFETIME_S))
        mapper.want([Port(transport="tcp", number=PORT), Port(transport="udp", number=PORT)])
        known = trio.Event()
        mapper.tell(lambda: None if mapper.state is MappingState.SEARCHING else known.set())
        async with trio.open_nursery() as nursery:
            began = trio.current_time()
            await nursery.start(mapper.run)
            with trio.move_on_after(PATIENCE_S):
                await known.wait()
            _tell(mapper, trio.current_time() - began)
            await commands.receive_some()
            known = trio.Event()
            mapper.network_changed()  # it looks for the router again and maps again: a renewal, to the router
            with trio.move_on_after(PATIENCE_S):
                await known.wait()
            _tell(mapper, 0)
            await commands.receive_some()
            began = trio.current_time()
            nursery.cancel_scope.cancel()
        _tell(mapper, trio.current_time() - began)
        await commands.receive_some()
        node.cancel_scope.cancel()
    return 0


def _tell(mapper: PortMapper, seconds: float) -> None:
    ports = {port.transport: outer.port for port, outer in mapper.mapped.items()}
    answer = {"state": mapper.state.value, "problem": mapper.problem, "ports": ports, "seconds": round(seconds, 3)}
    print(json.dumps(answer), flush=True)


async def _serve(nursery: trio.Nursery) -> None:
    """Answer ! to whatever comes, on TCP and UDP."""

    async def answer_stream(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)
        await stream.send_all(b"!")

    channel = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    await channel.bind(("0.0.0.0", PORT))

    async def answer_datagrams() -> None:
        while True:
            _, where = await channel.recvfrom(64)
            await channel.sendto(b"!", where)

    await nursery.start(trio.serve_tcp, answer_stream, PORT)
    nursery.start_soon(answer_datagrams)


async def _find_natpmp() -> Gateway:
    """As a node does that finds a router which knows NAT-PMP alone."""
    return PcpGateway(router=IPv4Address(INNER), is_pcp=False)


FINDERS: dict[str, FindGateway] = {"UPnP": find_upnp, "PCP": find_pcp, "NAT-PMP": _find_natpmp}

if __name__ == "__main__":
    sys.exit(main())
