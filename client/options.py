"""Options that several of the client's commands have, and what they say."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any, Final

from client.errors import InvalidInput
from net import console

if TYPE_CHECKING:
    from client.blocking import Swarm

CONNECT_TIMEOUT_S: Final = 8.0
MAX_TOKENS: Final = 2**20  # the longest session that there can be
MAX_BLOCKS: Final = 512  # of any model, at either end

seed = console.whole(0, 2**63 - 1)


def connect(options: argparse.Namespace) -> Swarm:
    """To the swarm that ``--bootstrap`` and ``--swarm-key`` name.

    Raises: as ``client.connect``.
    """
    import client

    return client.connect(options.bootstrap, timeout_s=CONNECT_TIMEOUT_S, swarm_key=options.swarm_key)


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Options that say which nodes to use; ``read_choices`` reads them."""
    nodes = parser.add_argument_group("which nodes")
    nodes.add_argument(
        "--allow", action="append", type=_peer, metavar="PEER", help="use only this peer, and others so named"
    )
    nodes.add_argument(
        "--block", action="append", type=_peer, default=[], metavar="PEER", help="do not use this peer; may be repeated"
    )
    nodes.add_argument(
        "--pin",
        action="append",
        type=_pin,
        default=[],
        metavar="START:END=PEER",
        help="have blocks START to END - 1 computed by this peer; may be repeated",
    )
    nodes.add_argument(
        "--local-blocks",
        type=console.whole(0, MAX_BLOCKS),
        default=0,
        metavar="K",
        help="compute the first K blocks and the last K here, in fp32 on the CPU: nodes see less, and have less to do",
    )
    nodes.add_argument(
        "--mixed-numerics",
        action="store_true",
        help="where no chain of one kind is left, mix nodes that compute with different numerics; says so",
    )


def _peer(text: str) -> str:
    from client.choices import read_peer

    try:
        return str(read_peer(text))
    except InvalidInput as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _pin(text: str) -> tuple[tuple[int, int], str]:
    match = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})=(.+)", text.strip(), re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not START:END=PEER, such as 0:4=12D3Koo...")
    return (int(match[1]), int(match[2])), _peer(match[3])


def read_choices(options: argparse.Namespace) -> dict[str, Any]:
    """What ``add_choices`` has asked for, as arguments of ``swarm.model``.

    Raises:
        UserError: the same blocks are pinned twice.
    """
    pins = dict(options.pin)
    if len(pins) < len(options.pin):
        raise console.UserError("--pin names the same blocks twice: give each block to one peer at most")
    return {
        "allow": options.allow,
        "block": options.block,
        "pins": pins,
        "mixed_numerics": options.mixed_numerics,
        "local_blocks": options.local_blocks,
    }
