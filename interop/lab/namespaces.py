"""Namespaces that die with their process: whatever the lab makes is inside, and nothing of it outlives the lab.

``enter()`` splits the program: the parent only waits, and the child goes on as the first process of a new PID
namespace, with its own network, its own mounts and an empty ``/run``. When either is killed, SIGKILL included,
the kernel ends every process inside, and with the last of them go devices, rules, names and files under
``FOLDER``.

Source: unshare(2), pid_namespaces(7), network_namespaces(7).
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
PR_SET_PDEATHSIG = 1

NAMES = Path("/run/netns")  # where `ip netns` keeps them
FOLDER = Path("/run/lab")
PACKAGES = {"ip": "iproute2", "nft": "nftables", "nsenter": "util-linux"}

NETLINK_NETFILTER = 12
CTNETLINK_DELETE = (1 << 8) | 2
NLM_REQUEST_ACK = 1 | 4
NLMSG_ERROR = 2

_libc = ctypes.CDLL(None, use_errno=True)


class LabError(Exception):
    """The lab cannot be built here, or something in it broke; the text says what would help."""


def missing() -> str | None:
    """What this machine lacks for the lab, as one line; None if nothing that can be seen from here."""
    if not sys.platform.startswith("linux"):
        return "the lab needs Linux: it is made of network namespaces"
    packages = sorted(package for tool, package in PACKAGES.items() if shutil.which(tool) is None)
    if packages:
        return f"the lab needs commands that are not installed: apt-get install {' '.join(packages)}"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except FileNotFoundError:
        return "the lab needs TUN devices: modprobe tun"
    except OSError:
        who = "it must run as root: sudo make lab" if os.geteuid() else "this container does not allow it"
        return f"the lab needs /dev/net/tun, which cannot be opened: {who}"
    return None


def enter() -> None:
    """Go on in namespaces of our own. Call it first, before there are threads.

    Without root it tries a user namespace. The caller's process stays outside as the parent, and ends as the
    child does; only the child returns from here. Does nothing when it has been called before.

    Raises:
        LabError: the machine lacks something, or does not allow it.
    """
    if is_inside():
        return
    if lacking := missing():
        raise LabError(lacking)
    try:
        if os.geteuid() != 0:
            _become_root()
        _call(_libc.unshare, CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID)
    except OSError as error:
        raise LabError(f"the lab must run as root, for it makes network namespaces: sudo make lab ({error})") from error
    sys.stdout.flush()
    sys.stderr.flush()
    alive, parents_end = os.pipe()
    child = os.fork()
    if child:
        os.close(alive)
        _wait(child)
    os.close(parents_end)
    _settle(alive)


def is_inside() -> bool:
    return os.getpid() == 1 and FOLDER.is_dir()


def _become_root() -> None:
    """Root of a user namespace, where our own user is the only one."""
    user, group = os.geteuid(), os.getegid()
    _call(_libc.unshare, CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def _wait(child: int) -> NoReturn:
    """Wait outside. Ctrl-C reaches the child by itself; other signals need no tidying up: all dies with it."""

    def end(*_: object) -> None:
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _settle(alive: int) -> None:
    """Inside: die with the parent; a /proc and a /run of our own."""
    _call(_libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if select.select([alive], [], [], 0)[0]:
        os._exit(1)  # the parent was gone before prctl
    try:
        _mount("none", "/", None, MS_REC | MS_PRIVATE)
        _mount("proc", "/proc", "proc", 0)
        _mount("lab", "/run", "tmpfs", 0)
    except OSError as error:
        raise LabError(f"the lab must run as root, for it mounts a /proc and a /run of its own ({error})") from error
    NAMES.mkdir()
    FOLDER.mkdir()


def _mount(source: str, target: str, kind: str | None, flags: int) -> None:
    _call(_libc.mount, source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), None)


def _call(function: ctypes._NamedFuncPointer, *arguments: object) -> None:
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function.__name__}: {os.strerror(number)}")


def path(name: str) -> str:
    """The file that stands for a network namespace."""
    return str(NAMES / name)


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread is in the network namespace at the path ``namespace``. Sockets made there stay there.

    Never await within: other tasks would be there too.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call(_libc.setns, there, CLONE_NEWNET)
        try:
            yield
        finally:
            _call(_libc.setns, home, CLONE_NEWNET)
    finally:
        os.close(there)
        os.close(home)


def set_sysctls(name: str, settings: dict[str, str]) -> None:
    """In a namespace. Keys: as ``net/ipv4/ip_forward``."""
    with inside(path(name)):
        for key, value in settings.items():
            Path("/proc/sys", key).write_text(value)


def forget_connections(name: str) -> None:
    """Empty a namespace's connection tracking, as a router does that was switched off.

    Raises:
        OSError: the kernel refused.
    """
    with inside(path(name)), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as netlink:
        # struct nlmsghdr and struct nfgenmsg: every family, no attributes, which stands for all entries
        netlink.send(struct.pack("=IHHIIBBH", 20, CTNETLINK_DELETE, NLM_REQUEST_ACK, 1, 0, 0, 0, 0))
        answer = netlink.recv(4096)
    kind, code = struct.unpack_from("=4xH10xi", answer)
    if kind == NLMSG_ERROR and code:
        raise OSError(-code, f"forgetting connections of {name}: {os.strerror(-code)}")
