"""What all commands share: options and their values, one-line errors, signals, a host, where files go.

This module and those it imports are light, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import trio
    from rich.progress import Progress, TaskID

    from net.addresses import Multiaddr, PeerAddress
    from net.dht.service import Dht
    from net.host import Host
    from net.identity import Identity
    from net.mdns import Mdns
    from net.nat.mapping import PortMapper
    from net.security.swarm_key import SwarmKey

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Something that the person at the terminal can mend; the text is one line that says how."""


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every command."""
    parser.add_argument("--verbose", "-v", action="store_true", help="log what happens, and show tracebacks")


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--json", action="store_true", help=f"print {what} as one JSON object")


def add_bootstrap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bootstrap", metavar="ADDR", action="append", required=True, help="a node of the swarm; may be repeated"
    )


def add_node(parser: argparse.ArgumentParser, listen: Sequence[str], explained: str = "") -> None:
    """Options of what others connect to; ``node_identity`` and ``listen_addresses`` read them.

    Args:
        parser: of the command.
        listen: where it accepts connections by default.
        explained: said after the default.
    """
    parser.add_argument(
        "--listen",
        metavar="MULTIADDR",
        action="append",
        help=f"where to accept connections; may be repeated (default: {' and '.join(listen)}{explained})",
    )
    parser.add_argument(
        "--identity",
        type=Path,
        metavar="FILE",
        help="the key that decides the PeerId; made if missing (default: one kept under the data folder)",
    )
    parser.add_argument(
        "--until-eof", action="store_true", help="end also when standard input ends, as a program's child should"
    )
    parser.add_argument(
        "--no-mdns", action="store_true", help="neither announce this node in its own network nor look for others there"
    )
    add_port_mapping(parser)
    add_swarm_key(parser)
    parser.set_defaults(default_listen=listen)


def add_swarm_key(parser: argparse.ArgumentParser) -> None:
    """The option that ``swarm_key`` reads."""
    parser.add_argument(
        "--swarm-key",
        type=Path,
        metavar="FILE",
        help="the key of a private swarm, which all of its nodes and clients have; nobody else can connect",
    )


def add_port_mapping(parser: argparse.ArgumentParser) -> None:
    """The option that ``port_mapper`` reads."""
    parser.add_argument(
        "--no-port-mapping",
        action="store_true",
        help="do not ask the router (by UPnP, NAT-PMP or PCP) to let others in",
    )


def whole(least: int, most: int) -> Callable[[str], int]:
    """The type of an option: a whole number within bounds, which its error names."""

    def read(text: str) -> int:
        digits = text.lstrip("0") or "0"
        if text.isascii() and text.isdigit() and len(digits) <= len(str(most)) and least <= int(digits) <= most:
            return int(digits)
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a whole number from {least} to {most}")

    return read


def utf8(text: str) -> str:
    """The type of an argument that is text: its bytes read as UTF-8, whatever the locale says."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not UTF-8 text") from None


def read_stdin() -> str:
    """All of standard input, read as UTF-8 text.

    Raises:
        UserError: it is closed, or no text.
    """
    if sys.stdin is None:
        raise UserError("standard input is closed: nothing can be read from it")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError("what standard input gives is not UTF-8 text") from error


def data_folder() -> Path:
    """Where what must last is kept: ``$RACEME_HOME``, or ``raceme`` in the user's data folder."""
    if home := os.environ.get("RACEME_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "raceme"


def run(command: Callable[[], int | None], *, verbose: bool) -> int:
    """Run a command to its exit status; every failure becomes one line on standard error.

    A failure that is nobody's fault but ours is told as a bug.
    """
    try:
        _set_up_output(verbose=verbose)
        status = command() or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # what cannot be written is a failure as well
        return status
    except BaseException as error:
        leaf = _first_leaf(error)
        if isinstance(leaf, KeyboardInterrupt):
            return EXIT_INTERRUPTED
        if isinstance(leaf, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: no complaint at exit
            return EXIT_FAILURE
        if isinstance(leaf, SystemExit):
            return leaf.code if isinstance(leaf.code, int) else EXIT_FAILURE
        if verbose:
            logging.getLogger(__name__).error("failed", exc_info=error)
        if sys.stderr is not None:  # else it would go to standard output
            print(f"raceme: error: {describe(leaf)}", file=sys.stderr)
        return EXIT_FAILURE


def _set_up_output(*, verbose: bool) -> None:
    """What a terminal cannot show becomes a question mark, never an error; the log goes to standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not when it is closed
        sys.stdout.reconfigure(errors="replace")
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.ERROR,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    for noisy in ("libp2p", "multiaddr", "quic", "httpx", "httpcore", "urllib3", "filelock", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def tell_warnings(logger: str, *, least: int = logging.WARNING) -> None:
    """Show this logger's warnings to the user, as notes on standard error. With ``--verbose`` the log has them.

    Args:
        logger: its name.
        least: the level from which on it is shown, where less than warnings is of interest, too.
    """
    own = logging.getLogger(logger)
    if logging.getLogger().isEnabledFor(logging.WARNING) or sys.stderr is None:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("\nraceme: note: %(message)s"))  # text may be in the middle of a line
    handler.setLevel(least)
    own.setLevel(least)
    own.addHandler(handler)
    own.propagate = False


def describe(error: BaseException) -> str:
    """An error as one line. Our own errors are fit to be shown; others are bugs, or the machine's."""
    text = " ".join(str(error).split()) or type(error).__name__
    module = type(error).__module__.partition(".")[0]
    if module in ("net", "compute", "client"):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {text} (this is a bug in Raceme; --verbose shows where)"


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person sees it; a stream that was closed from the beginning is None."""
    return stream is not None and stream.isatty()


class Bars:
    """Bars of what is under way. Any thread may show one. Made by :func:`bars`."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def show(self, what: str, done: int, total: int, unit: str) -> None:
        """How far it is, in a unit; bytes are shown in megabytes. What is done, and a file, is shown no more."""
        scale, shown = (1e6, "MB") if unit == "bytes" else (1, unit)
        text = f"{done / scale:.{scale > 1:d}f}/{total / scale:.{scale > 1:d}f} {shown}"
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, amount=text)
        is_shown = done < total or unit != "bytes"
        self._progress.update(self._tasks[what], completed=done, total=total, amount=text, visible=is_shown)

    def show_file(self, name: str, done: int, total: int) -> None:
        """How much of a file has come."""
        self.show(f"fetching {name}", done, total, "bytes")


@contextmanager
def bars() -> Iterator[Bars]:
    """Shown while it lasts, where a person can see them."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        console=Console(stderr=True),
        disable=not is_terminal(sys.stderr),
    ) as progress:
        yield Bars(progress)


def _first_leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def bootstrap_addresses(options: argparse.Namespace) -> list[PeerAddress]:
    """What ``--bootstrap`` says.

    Raises:
        AddressError: one cannot be read.
    """
    from net import addresses

    return [addresses.parse_peer(text) for text in options.bootstrap]


def listen_addresses(options: argparse.Namespace) -> list[Multiaddr]:
    """What ``--listen`` says.

    Raises:
        AddressError: one cannot be read.
        UserError: one names a peer.
    """
    from net import addresses

    # What a private swarm cannot have is left out of what we choose ourselves, not of what somebody asks for.
    default = [text for text in options.default_listen if options.swarm_key is None or "/quic" not in text]
    found = [addresses.parse(text) for text in options.listen or default]
    for address in found:
        where, named, _ = str(address).partition("/p2p/")
        if named:
            raise UserError(
                f"--listen {address}: says where to listen, not who: leave /p2p/... out, as in --listen {where} "
                f"(who this is comes from --identity)"
            )
    return found


def swarm_key(options: argparse.Namespace) -> SwarmKey | None:
    """What ``--swarm-key`` names.

    Raises:
        IdentityError: it cannot be used.
    """
    from net.security.swarm_key import SwarmKey

    return None if options.swarm_key is None else SwarmKey.load(options.swarm_key)


async def start_presence(
    options: argparse.Namespace, host: Host, dht: Dht, bootstrap: Sequence[PeerAddress], nursery: trio.Nursery
) -> None:
    """Be found and reached, as ``--no-port-mapping`` and ``--no-mdns`` allow, until ``nursery`` ends."""
    from net.presence import run_presence

    await nursery.start(partial(run_presence, host, dht, bootstrap=bootstrap, mapper=port_mapper(options)))
    if (found := mdns(options, host)) is not None:
        await nursery.start(found.run)


def mdns(options: argparse.Namespace, host: Host) -> Mdns | None:
    """What looks for peers of the same network, unless ``--no-mdns`` says not to."""
    from net.mdns import Mdns

    return None if options.no_mdns else Mdns(host)


def port_mapper(options: argparse.Namespace) -> PortMapper | None:
    """What asks the router for ports, unless ``--no-port-mapping`` says not to."""
    from net.nat.mapping import PortMapper

    return None if options.no_port_mapping else PortMapper()


def node_identity(options: argparse.Namespace, name: str) -> Identity:
    """Who ``--identity`` says that we are; by default the first of our keys called ``name`` that nobody uses.

    Raises:
        IdentityError: the key cannot be used.
    """
    from net.identity import Identity

    return Identity.default(data_folder(), name) if options.identity is None else Identity.load(options.identity)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, Ctrl-C raises KeyboardInterrupt, for something has to be tidied up. (Elsewhere it ends the process.)"""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_host(
    work: Callable[[Host], Awaitable[None]],
    identity: Identity,
    *,
    listen: Sequence[Multiaddr] = (),
    until_eof: bool = False,
    swarm_key: SwarmKey | None = None,
) -> None:
    """Open a host and run ``work`` on it, until it ends, or SIGINT or SIGTERM comes, or standard input ends.

    The host lives on while ``work`` is cancelled and cleans up. A second signal cancels that as well.

    Args:
        work: gets the host.
        identity: the host's.
        listen: where it accepts connections.
        until_eof: whether the end of standard input counts as a signal.
        swarm_key: of a private swarm.
    """
    import trio

    from net.host import open_host
    from net.nurseries import open_service_nursery

    async def watch_signals(
        stop: trio.Event, whole: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for _ in signals:
                if stop.is_set():
                    whole.cancel()
                stop.set()

    async def watch_stdin(stop: trio.Event) -> None:
        await trio.to_thread.run_sync(_wait_for_eof, abandon_on_cancel=True)
        stop.set()

    async def main() -> None:
        stop = trio.Event()
        async with trio.open_nursery() as watchers:
            await watchers.start(watch_signals, stop, watchers.cancel_scope)
            if until_eof:
                watchers.start_soon(watch_stdin, stop)
            async with (
                open_host(identity, listen=listen, swarm_key=swarm_key) as host,
                open_service_nursery() as nursery,
            ):

                async def cancel_on_stop() -> None:
                    await stop.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(cancel_on_stop)
                await work(host)
                nursery.cancel_scope.cancel()
            watchers.cancel_scope.cancel()

    with interruptible():
        trio.run(main)


def _wait_for_eof() -> None:
    if sys.stdin is None:  # closed from the beginning; its number may be another file's by now
        return
    with suppress(OSError):  # what cannot be read has ended
        while os.read(sys.stdin.fileno(), 65536):
            pass


def print_json(value: Any) -> None:
    print(json.dumps(value), flush=True)
