"""``raceme serve``."""

from __future__ import annotations

import argparse
import re
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

from net import console
from net.modules import pinning

if TYPE_CHECKING:
    import torch
    import trio

    from compute.checkpoint import Checkpoint
    from compute.metrics import Metrics
    from compute.node import Node
    from net.dht.service import Dht
    from net.files.models import PeerModels
    from net.files.remembered import RememberedHashes
    from net.files.server import FileServer
    from net.host import Host
    from net.protocol.announcement import NodeAnnouncement

MAX_BLOCKS = 1024  # the most that an announcement can name
MAX_CACHE_TOKENS = 2**30  # far more than fit into memory
MAX_LENGTH_TOKENS = 2**20  # what the session protocol can ask for
MAX_THREADS = 256  # far more than help; torch falls over at some thousands
MAX_PORT = 65_535
MAX_KEPT_GB = 1_000_000
FORMS = ("fp32", "fp16", "bf16", "int8", "nf4", "nf4-double", "llm-int8")  # compute.linear.BACKENDS, without torch


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve blocks of a model",
        description="Serve blocks of a model to the swarm. MODEL is the name of a model that ships (bloom-tiny), the "
        "path of a folder with a Hugging Face checkpoint, a name on the Hugging Face hub (owner/model), or the name of "
        "a model that the swarm serves, whose files then come from its nodes (NAME@DIGEST for these files and no "
        "others). A path has a / in it: ./bloom-tiny is a folder, bloom-tiny is always the model that ships. Only the "
        "files that hold the served blocks are read. Ctrl-C withdraws the announcement and ends it.",
    )
    serve.add_argument("model", metavar="MODEL")
    console.add_bootstrap(serve)
    which = serve.add_mutually_exclusive_group()
    which.add_argument(
        "--blocks",
        metavar="FIRST:END",
        type=_span,
        help="serve blocks FIRST up to, not including, END (default: those that the swarm lacks most)",
    )
    which.add_argument(
        "--max-blocks",
        metavar="N",
        type=console.whole(1, MAX_BLOCKS),
        help="without --blocks: how many to take (default: as many as fit into memory)",
    )
    serve.add_argument(
        "--cache-tokens",
        metavar="N",
        type=console.whole(1, MAX_CACHE_TOKENS),
        help="KV cache, all sessions, rows counted apart (default: what fits into half of the memory that is "
        "free once the blocks are loaded, two thirds on a GPU)",
    )
    serve.add_argument(
        "--quantize",
        metavar="FORM",
        choices=("auto", *FORMS),
        default="auto",
        help=f"form of the weights: {', '.join(FORMS)}, or auto: that of the model's other nodes, since all nodes of "
        "a generation need the same, else fp16 or fp32, whichever is faster here, and nf4 on a GPU (default: auto)",
    )
    serve.add_argument(
        "--device",
        metavar="WHERE",
        default="auto",
        help="cpu, cuda for all GPUs, some of them such as cuda:0,cuda:1, or auto: all GPUs, or the CPU where there is "
        "none (default: auto)",
    )
    serve.add_argument(
        "--keep-gb",
        metavar="N",
        type=console.whole(0, MAX_KEPT_GB),
        default=200,
        help="disk space for quantised weights, which make the next start quick; 0 for none (default: 200)",
    )
    serve.add_argument(
        "--max-length",
        metavar="N",
        type=console.whole(1, MAX_LENGTH_TOKENS),
        default=2048,
        help="most tokens that a session keeps; its last token is never kept (default: 2048)",
    )
    serve.add_argument(
        "--share-prefixes",
        choices=("peer", "all", "none"),
        default="peer",
        help="compute and hold beginnings once that sessions have in common: those of one peer, of all (by the "
        "time that its steps take, a peer can then find out what others have asked), or none (default: peer)",
    )
    serve.add_argument(
        "--threads",
        metavar="N",
        type=console.whole(1, MAX_THREADS),
        help="CPU threads for the model (default: torch's)",
    )
    serve.add_argument(
        "--metrics",
        metavar="HOST:PORT",
        type=_host_port,
        help="serve figures for Prometheus there, under /metrics, such as 127.0.0.1:9100 (default: nowhere)",
    )
    serve.add_argument(
        "--pause-when-gpu-busy",
        action="store_true",
        help="serve nobody while other programs use the GPU; weights stay in its memory. (SIGUSR1 pauses, too, and the "
        "next one ends that)",
    )
    pinning.add_pins(serve)
    console.add_node(serve, console.ANY_PORT, ", any free port")
    console.add_json(serve, "what is served, once it is,")
    console.add_common(serve)
    serve.set_defaults(run=run_serve)


def _span(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not FIRST:END with FIRST less than END, such as 0:4")
    return int(match[1]), int(match[2])


def _host_port(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+):([0-9]{1,5})", text)
    if match is None or int(match[2]) > MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not HOST:PORT, such as 127.0.0.1:9100")
    return match[1].strip("[]"), int(match[2])


def run_serve(options: argparse.Namespace) -> int:
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # it would end us; who listens for it comes when there is a node
    from compute.engine import EngineSettings
    from compute.linear.kept import KeptWeights
    from compute.metrics import Metrics
    from compute.node import Node
    from compute.node_settings import NodeSettings
    from compute.pausing import pause_on_signal, pause_when_busy
    from compute.peer_models import keep_for_clients, share
    from net.dht.service import Dht
    from net.files.models import HASHES_FOLDER
    from net.files.remembered import RememberedHashes
    from net.files.server import FileServer
    from net.nurseries import open_service_nursery

    for logger in ("compute.node", "compute.peer_models"):
        console.tell_warnings(logger)
    bootstrap = console.bootstrap_addresses(options)
    listen = console.listen_addresses(options)
    folder = console.data_folder()
    remembered = RememberedHashes(folder / HASHES_FOLDER)
    here = _find_here(options.model, remembered)
    if here is not None:
        _check_servable(here, options.blocks)
    devices = _devices(options.device)
    if options.pause_when_gpu_busy and devices[0].type != "cuda":
        raise console.UserError("--pause-when-gpu-busy: the node uses no GPU; leave it out")
    settings = NodeSettings(
        span=options.blocks,
        max_blocks=options.max_blocks,
        linear=None if options.quantize == "auto" else options.quantize,
        devices=devices,
        kept=KeptWeights(folder / "weights", options.keep_gb << 30) if options.keep_gb else None,
        probed=folder,
        engine=EngineSettings(
            cache_tokens=options.cache_tokens,
            max_length_tokens=options.max_length,
            share_prefixes=options.share_prefixes != "none",
            share_between_peers=options.share_prefixes == "all",
            threads=options.threads,
        ),
    )

    metrics = None if options.metrics is None else Metrics()

    async def serve(host: Host) -> None:
        dht = Dht(host, server=True)
        async with _served(metrics, options.metrics), open_service_nursery() as nursery:
            await console.start_presence(options, host, dht, bootstrap, nursery)
            await dht.join(bootstrap)
            await nursery.start(dht.run)
            files = FileServer(host)
            if options.pin:
                pinning.start_pins(options, host, dht, files, nursery)
            with console.bars() as bars:
                checkpoint = here
                if checkpoint is None:
                    models = _peer_models(host, dht, files, remembered, bars)
                    checkpoint = await _find_at_peers(options.model, models)
                    _check_servable(checkpoint, options.blocks)
                node = Node(host, dht, checkpoint, settings, metrics, partial(share, checkpoint, files, remembered))
                await nursery.start(pause_on_signal, node)
                offer = await _start(nursery, node, checkpoint.name, bars)
            nursery.start_soon(keep_for_clients, checkpoint)
            if options.pause_when_gpu_busy:
                nursery.start_soon(pause_when_busy, node, _gpu_uses(settings.devices))
            _tell(offer, [str(address) for address in host.peer_addresses], as_json=options.json)

    identity = console.node_identity(options, "serve")
    key = console.swarm_key(options)
    console.run_host(serve, identity, listen=listen, until_eof=options.until_eof, swarm_key=key)
    return 0


def _find_here(model: str, remembered: RememberedHashes) -> Checkpoint | None:
    """The checkpoint that MODEL names, or ``None`` if that is to be had from peers.

    Raises:
        CheckpointError: neither can be.
    """
    from compute.errors import ModelNotFound
    from compute.models import find_checkpoint
    from compute.peer_models import fits_pin
    from net.files.models import may_be_served, split_pin

    name, pin = split_pin(model)
    try:
        checkpoint = find_checkpoint(name)
    except ModelNotFound:
        if not may_be_served(name):
            raise
        return None
    return checkpoint if pin is None or fits_pin(checkpoint, pin, remembered) else None


def _peer_models(
    host: Host, dht: Dht, files: FileServer, remembered: RememberedHashes, bars: console.Bars
) -> PeerModels:
    """What gets models' files from the swarm's nodes, and gives them to others."""
    from net.dht import keys
    from net.files.models import MODELS_FOLDER, PeerModels
    from net.protocol.announcement import DIRECTORY, KIND, read_all

    async def find_nodes() -> list[NodeAnnouncement]:
        return read_all(await dht.find(keys.of_name(DIRECTORY), KIND))

    folder = console.data_folder() / MODELS_FOLDER
    return PeerModels(host, find_nodes, folder, remembered, server=files, progress=bars.show_file)


async def _find_at_peers(model: str, models: PeerModels) -> Checkpoint:
    """The checkpoint that MODEL names, from peers.

    Raises:
        CheckpointError: nobody gives it.
    """
    from compute.errors import ModelNotFound
    from compute.models import find_checkpoint
    from compute.peer_models import find_at_peers_from_trio
    from net.files.models import split_pin

    name, pin = split_pin(model)
    try:
        return await find_at_peers_from_trio(models, name, pin)
    except ModelNotFound as error:
        if pin is not None:
            raise
        try:
            return find_checkpoint(name)  # says what else could be meant
        except ModelNotFound as lack:
            raise ModelNotFound(f"{lack}; and {error}") from error


def _devices(text: str) -> tuple[torch.device, ...]:
    """Raises:
    UserError: they are not there.
    """
    from compute.devices import read_devices

    try:
        return read_devices(text)
    except ValueError as error:
        raise console.UserError(f"--device {error}") from error


def _gpu_uses(devices: Sequence[torch.device]) -> list[Callable[[], float]]:
    """What says how much others use each of our GPUs.

    Raises:
        UserError: nobody does.
    """
    import torch

    from compute.pausing import GpuError, GpuUse

    try:
        return [GpuUse(f"GPU-{torch.cuda.get_device_properties(gpu).uuid}").others for gpu in devices]
    except GpuError as error:
        raise console.UserError(f"--pause-when-gpu-busy: {error}") from error


@asynccontextmanager
async def _served(metrics: Metrics | None, where: tuple[str, int] | None) -> AsyncIterator[None]:
    """The endpoint for figures, if it is wanted.

    Raises:
        UserError: the address cannot be had.
    """
    if metrics is None or where is None:
        yield
        return
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(metrics.served(*where))
        except OSError as error:
            raise console.UserError(f"--metrics {where[0]}:{where[1]}: {error.strerror or error}") from error
        yield


def _check_servable(checkpoint: Checkpoint, blocks: tuple[int, int] | None) -> None:
    """Raises:
    UserError: the model has no such blocks, or a name that nobody would believe in an announcement.
    """
    from net.protocol.announcement import MAX_NAME_CHARACTERS, NAME

    name = checkpoint.name
    if len(name) > MAX_NAME_CHARACTERS or not NAME.fullmatch(name):
        raise console.UserError(
            f"{name!r:.100} cannot be a model's name in a swarm: rename the folder to at most {MAX_NAME_CHARACTERS} "
            f"of A-Z, a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"
        )
    if blocks is not None and blocks[1] > checkpoint.n_blocks:
        raise console.UserError(f"--blocks {blocks[0]}:{blocks[1]}: {name} has blocks 0:{checkpoint.n_blocks}")


async def _start(nursery: trio.Nursery, node: Node, model: str, bars: console.Bars) -> NodeAnnouncement:
    """Start the node, with a bar for what it loads."""

    def show(done: int, total: int) -> None:
        bars.show(f"loading {model}", done, total, "blocks")

    offer: NodeAnnouncement = await nursery.start(partial(node.run, progress=show))
    return offer


def _tell(offer: NodeAnnouncement, where: list[str], *, as_json: bool) -> None:
    if as_json:
        console.print_json(
            {
                "peer_id": str(offer.peer_id),
                "addresses": where,
                "model": offer.model,
                "digest": offer.digest,
                "start": offer.start,
                "end": offer.end,
                "blocks": offer.blocks,
                "numerics": str(offer.numerics),
                "cache_tokens": offer.cache_tokens_left,
                "decode_tokens_per_s": offer.decode_tokens_per_s,
            }
        )
    else:
        print(
            f"serving blocks {offer.start}:{offer.end} of {offer.blocks} of {offer.model} as {offer.peer_id} "
            f"at {where[0]} (these blocks alone: {offer.decode_tokens_per_s:.0f} tokens/s); Ctrl-C ends it",
            flush=True,
        )
