"""What all commands share: one-line errors, --verbose, signals, where files go.

This module and those it imports are light, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import trio

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


def add_identity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--identity",
        type=Path,
        metavar="FILE",
        help="the key that decides the PeerId; made if missing (default: one kept under the data folder)",
    )


def data_folder() -> Path:
    """Where what must last is kept: ``$RACEME_HOME``, or ``raceme`` in the user's data folder."""
    if home := os.environ.get("RACEME_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "raceme"


def run(command: Callable[[], int | None], *, verbose: bool) -> int:
    """Run a command to its exit status; every failure becomes one line on standard error.

    A failure that is nobody's fault but ours is told as a bug.
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.ERROR,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    for noisy in ("libp2p", "httpx", "httpcore", "urllib3", "filelock", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return command() or 0
    except BaseException as error:
        leaf = _first_leaf(error)
        if isinstance(leaf, KeyboardInterrupt):
            return EXIT_INTERRUPTED
        if isinstance(leaf, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: no complaint at exit
            return EXIT_FAILURE
        if isinstance(leaf, SystemExit):
            raise leaf from None
        if verbose:
            logging.getLogger(__name__).error("failed", exc_info=error)
        print(f"raceme: error: {describe(leaf)}", file=sys.stderr)
        return EXIT_FAILURE


def describe(error: BaseException) -> str:
    """An error as one line. Our own errors are fit to be shown; others are bugs, or the machine's."""
    text = " ".join(str(error).split()) or type(error).__name__
    module = type(error).__module__.partition(".")[0]
    if module in ("net", "compute", "client"):
        return text
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {text} (this is a bug in Raceme; --verbose shows where)"


def _first_leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def until_signalled(service: Callable[[trio.Event], Awaitable[None]]) -> None:
    """Run ``service(stop)``; SIGINT or SIGTERM sets ``stop``, and a second one cancels the service outright."""
    import trio

    async with trio.open_nursery() as nursery:
        stop = trio.Event()

        async def watch(*, task_status: trio.TaskStatus[None]) -> None:
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                task_status.started()
                async for _ in signals:
                    if stop.is_set():
                        nursery.cancel_scope.cancel()
                    stop.set()

        await nursery.start(watch)
        await service(stop)
        nursery.cancel_scope.cancel()


async def cancel_on(stop: trio.Event, work: Callable[[], Awaitable[None]]) -> None:
    """Run ``work`` until it ends or ``stop`` is set; what surrounds the call lives on while it cleans up."""
    from net.nurseries import open_service_nursery

    async with open_service_nursery() as nursery:

        async def watch() -> None:
            await stop.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        await work()
        nursery.cancel_scope.cancel()


def print_json(value: Any) -> None:
    print(json.dumps(value), flush=True)
