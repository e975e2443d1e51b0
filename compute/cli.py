"""``raceme serve``."""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial

from net import console

MAX_THREADS = 256  # far more than help; torch falls over at some thousands
DEFAULT_LISTEN = "/ip4/0.0.0.0/tcp/0"


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve blocks of a model",
        description="Serve blocks of a model to the swarm. MODEL is the name of a model that ships (bloom-tiny), a "
        "folder with a Hugging Face checkpoint, or a name on the Hugging Face hub. Only the files that hold the "
        "served blocks are read. Ctrl-C withdraws the announcement and ends it.",
    )
    serve.add_argument("model", metavar="MODEL")
    serve.add_argument(
        "--bootstrap", metavar="ADDR", action="append", required=True, help="a node of the swarm; may be repeated"
    )
    serve.add_argument(
        "--blocks",
        metavar="FIRST:END",
        type=_span,
        help="serve blocks FIRST up to, not including, END (default: those that the swarm lacks most)",
    )
    serve.add_argument(
        "--max-blocks", metavar="N", type=_positive, help="without --blocks: how many to take (default: all)"
    )
    serve.add_argument(
        "--listen",
        metavar="MULTIADDR",
        action="append",
        help=f"where to accept connections; may be repeated (default: {DEFAULT_LISTEN}, any free port)",
    )
    serve.add_argument(
        "--cache-tokens", metavar="N", type=_positive, default=16_384, help="KV cache, all sessions (default: 16384)"
    )
    serve.add_argument(
        "--max-length", metavar="N", type=_positive, default=2048, help="longest session in tokens (default: 2048)"
    )
    serve.add_argument("--threads", metavar="N", type=_threads, help="CPU threads for the model (default: torch's)")
    console.add_identity(serve)
    console.add_json(serve, "what is served, once it is,")
    console.add_common(serve)
    serve.set_defaults(run=run_serve)


def _span(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST:END with FIRST less than END, such as 0:4")
    return int(match[1]), int(match[2])


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _threads(text: str) -> int:
    count = _positive(text)
    if count > MAX_THREADS:
        raise argparse.ArgumentTypeError(f"{count} threads: at most {MAX_THREADS} are started")
    return count


def run_serve(options: argparse.Namespace) -> int:
    import trio
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from compute.engine import EngineSettings
    from compute.models import find_checkpoint
    from compute.node import Node, NodeSettings
    from net import addresses
    from net.dht.service import Dht
    from net.host import open_host
    from net.identity import Identity
    from net.nurseries import open_service_nursery
    from net.protocol.announcement import NodeAnnouncement

    bootstrap = [addresses.parse_peer(text) for text in options.bootstrap]
    listen = [addresses.parse(text) for text in options.listen or [DEFAULT_LISTEN]]
    checkpoint = find_checkpoint(options.model)
    n_blocks = checkpoint.n_blocks
    if options.blocks is not None and options.blocks[1] > n_blocks:
        raise console.UserError(
            f"--blocks {options.blocks[0]}:{options.blocks[1]}: {checkpoint.name} has blocks 0:{n_blocks}"
        )
    settings = NodeSettings(
        span=options.blocks,
        max_blocks=options.max_blocks,
        engine=EngineSettings(
            cache_tokens=options.cache_tokens, max_length_tokens=options.max_length, threads=options.threads
        ),
    )
    if options.identity is not None:
        identity = Identity.load(options.identity)
    else:
        identity = Identity.default(console.data_folder(), "serve")

    async def serve(stop: trio.Event) -> None:
        async with open_host(identity, listen=listen) as host:

            async def work() -> None:
                dht = Dht(host, server=True)
                await dht.join(bootstrap)
                async with open_service_nursery() as nursery:
                    await nursery.start(dht.run)
                    offer = await start_node(nursery, Node(host, dht, checkpoint, settings))
                    tell(offer, [str(address) for address in host.peer_addresses])

            await console.cancel_on(stop, work)

    async def start_node(nursery: trio.Nursery, node: Node) -> NodeAnnouncement:
        with Progress(
            TextColumn(f"loading {checkpoint.name}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("blocks"),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        ) as progress:
            task = progress.add_task("load")

            def show(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            offer: NodeAnnouncement = await nursery.start(partial(node.run, progress=show))
            return offer

    def tell(offer: NodeAnnouncement, where: list[str]) -> None:
        if options.json:
            console.print_json(
                {
                    "peer_id": str(offer.peer_id),
                    "addresses": where,
                    "model": offer.model,
                    "digest": offer.digest,
                    "start": offer.start,
                    "end": offer.end,
                    "blocks": offer.blocks,
                    "decode_tokens_per_s": offer.decode_tokens_per_s,
                }
            )
        else:
            print(
                f"serving blocks {offer.start}:{offer.end} of {offer.blocks} of {offer.model} as {offer.peer_id} "
                f"at {where[0]} ({offer.decode_tokens_per_s:.0f} tokens/s alone); Ctrl-C ends it",
                flush=True,
            )

    trio.run(console.until_signalled, serve)
    return 0
