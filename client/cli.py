"""The command ``raceme``: which commands there are, on all floors.

Little is imported before ``main``, so that Ctrl-C has somebody to hear it almost from the start.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn

from client import shadowing

if TYPE_CHECKING:
    import argparse


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point; exits with 0 only on success. Without ``arguments``, the command line is the process's own."""
    with _silent_interrupts():
        try:
            shadowing.check()
        except ImportError as error:
            sys.exit(f"raceme: error: {error}")
        from compute import spinning
        from net import console

        spinning.spin_briefly()
        parser = build_parser()
        options = parser.parse_args(arguments)
        if options.run is None:
            parser.print_help()
            sys.exit(console.EXIT_USAGE)
        status = console.run(lambda: options.run(options), verbose=options.verbose)
        if arguments is None:
            _leave(status)
        sys.exit(status)


def _leave(status: int) -> NoReturn:
    """End the process without taking the interpreter down.

    A thread that was left to itself inside torch (what it loads may take minutes) would abort the process meanwhile.
    """
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()
    os._exit(status)


@contextlib.contextmanager
def _silent_interrupts() -> Iterator[None]:
    """Ctrl-C ends the process at once and without a word, but where ``console.interruptible`` says that there is
    something to tidy up.

    An exception instead would come in the middle of an import, for seconds, and torch and transformers make something
    else of it there, or nothing at all.
    """
    usual = signal.default_int_handler
    if signal.getsignal(signal.SIGINT) is not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def build_parser() -> argparse.ArgumentParser:
    import argparse

    import client.commands
    import client.doctor
    import client.modules.cli
    import client.tuning.cli
    import compute.cli
    import net.cli

    parser = argparse.ArgumentParser(
        prog="raceme",
        description="Run large language models together, on machines that none of you could run them on alone.",
        epilog="Start with: raceme demo",
    )
    parser.add_argument("--version", action="store_const", const=_print_version, dest="run", help="print the version")
    parser.set_defaults(run=None, verbose=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    client.commands.add_demo(commands)
    net.cli.add_commands(commands)
    compute.cli.add_commands(commands)
    client.commands.add_generate(commands)
    client.tuning.cli.add_tune(commands)
    client.commands.add_status(commands)
    client.modules.cli.add_publish(commands)
    client.modules.cli.add_modules(commands)
    client.doctor.add_doctor(commands)
    return parser


def _print_version(options: argparse.Namespace) -> int:
    from net.version import VERSION

    print(f"raceme {VERSION}")
    return 0
