"""``raceme generate``, ``raceme status``, ``raceme demo``."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client import options as ours
from net import console

if TYPE_CHECKING:
    from client.models.bloom import DistributedBloomForCausalLM
    from client.models.cache import SessionCache
    from client.swarm import Peer, ServedModel

MAX_TOP_K = 2**20  # more tokens than any vocabulary has
MAX_FACTOR = 1e6  # beyond it, and below its inverse, logits leave the range of fp32
PIPE_COLUMNS = 120


def add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Continue a prompt with a model of the swarm, token by token as they come.",
    )
    console.add_bootstrap(generate)
    generate.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="as served, or the path of its checkpoint's folder (with a / in it: ./bloom-tiny is a folder, bloom-tiny "
        "the model that ships); what is not on this machine comes from nodes: NAME@DIGEST takes these files alone",
    )
    generate.add_argument(
        "prompt",
        type=console.utf8,
        help="text to continue; - reads it from standard input, less one newline at its end",
    )
    _add_max_new_tokens(generate)
    generate.add_argument(
        "--module",
        metavar="MODULE",
        help="with what was trained on the model: NAME@HASH as published, or its folder (with a / in it: ./my-adapter)",
    )
    console.add_swarm_key(generate)
    factor = console.number(1 / MAX_FACTOR, MAX_FACTOR)
    generate.add_argument(
        "--temperature", type=factor, metavar="T", help="sample at this temperature (default: greedy)"
    )
    generate.add_argument(
        "--top-p",
        type=console.number(0, 1, is_above=True),
        metavar="P",
        help="sample from the likeliest tokens that make up P",
    )
    generate.add_argument(
        "--top-k", type=console.whole(1, MAX_TOP_K), metavar="K", help="sample from the K likeliest tokens"
    )
    generate.add_argument(
        "--seed", type=ours.seed, metavar="N", help="make sampling repeatable; needs one of the above"
    )
    generate.add_argument(
        "--session",
        type=Path,
        metavar="FILE",
        help="go on where FILE left off, with the prompt (which may be empty then) after it, and save there; begin one "
        "if there is no such file. It holds token ids; random numbers begin anew, or with --seed",
    )
    generate.add_argument("--repetition-penalty", type=factor, metavar="X", help="above 1: repeat less")
    generate.add_argument(
        "--draft",
        choices=("auto", "off"),
        default="off",
        help="auto: send tokens that will probably come before they are asked for, where that pays; same text",
    )
    generate.add_argument(
        "--wire",
        choices=("auto", "bf16", "int8"),
        default="auto",
        help="how hidden states travel: auto loses nothing; bf16 and int8 take fewer bytes, and the text may differ "
        "(default: auto; --verbose shows what it takes)",
    )
    ours.add_choices(generate)
    console.add_json(generate, "text, ids and figures, at the end,")
    console.add_common(generate)
    generate.set_defaults(run=run_generate)


def _add_max_new_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-new-tokens", type=console.whole(1, ours.MAX_TOKENS), default=64, metavar="N", help="default: 64"
    )


def add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    status = commands.add_parser(
        "status", help="show every block and who serves it", description="Show every block and who serves it."
    )
    console.add_bootstrap(status)
    console.add_swarm_key(status)
    console.add_json(status, "it")
    console.add_common(status)
    status.set_defaults(run=run_status)


def add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="a whole swarm on this machine, in under a minute",
        description="Start a relay and three compute nodes as processes of their own on this machine, generate "
        "text through them, and compare it with what one machine gives. Ends by itself.",
    )
    demo.add_argument("--prompt", type=console.utf8, default="In the beginning", help='default: "In the beginning"')
    _add_max_new_tokens(demo)
    console.add_json(demo, "what came of it")
    console.add_common(demo)
    demo.set_defaults(run=run_demo)


def run_demo(options: argparse.Namespace) -> int:
    from client.demo import run

    return run(options.prompt, options.max_new_tokens, as_json=options.json)


def run_generate(options: argparse.Namespace) -> int:
    prompt = _read_prompt() if options.prompt == "-" else options.prompt
    goes_on = options.session is not None and options.session.exists()
    if not prompt and not goes_on:
        raise console.UserError("the prompt is empty: give at least one character")
    how, choices = sampling_options(options), ours.read_choices(options)
    for logger in ("client", "compute.peer_models"):
        console.tell_warnings(logger)
    if options.seed is not None and not how["do_sample"]:
        raise console.UserError(
            "--seed does nothing without sampling: add --temperature, --top-p or --top-k, or leave it out"
        )
    if options.session is not None and not os.access(options.session.absolute().parent, os.W_OK):
        raise console.UserError(f"cannot save in {options.session.absolute().parent}: no folder that can be written to")
    with ours.connect(options) as swarm:
        # Ask for the model's nodes before the slow import: what is missing should be said at once.
        swarm.models()
        with console.bars() as bars:
            model = swarm.model(options.model, module=options.module, progress=bars.show_file, **choices)

        import torch

        from client.streaming import TextPrinter

        if options.seed is not None:
            torch.manual_seed(options.seed)
        ids = torch.tensor([model.tokenizer(prompt).input_ids], dtype=torch.int64)  # [1, t]
        saved = options.session if goes_on else None
        with console.interruptible(), _session(model, saved, options.wire, measures=options.verbose) as session:
            before, pads = session.ids, session.pads or (0,)
            if before.shape[0] > 1:
                raise console.UserError(
                    f"{options.session} holds {before.shape[0]} rows: this command goes on with one"
                )
            if before.numel():
                ids = torch.cat([before, ids], dim=1)
            streamer = None if options.json else TextPrinter(model.tokenizer, skip=before.numel())
            # What cannot be done is said before anything is printed. (The last token is never sent.)
            session.prepare(1, ids.shape[1] + options.max_new_tokens - 1)
            started = time.monotonic()
            try:
                output = model.generate(
                    ids,
                    session=session,
                    draft=None if options.draft == "off" else options.draft,
                    streamer=streamer,
                    attention_mask=(torch.arange(ids.shape[1]) >= pads[0]).long()[None],
                    **how,
                )
            except BaseException:
                if streamer is not None and streamer.began:
                    print(flush=True)  # the complaint begins a line of its own
                raise
            seconds = time.monotonic() - started
            route = session.route
            traffic = session.traffic if options.verbose else []
            if options.session is not None:
                try:
                    session.save(options.session)
                except OSError as error:
                    raise console.UserError(f"cannot save {options.session}: {error.strerror or error}") from error
    for hop in traffic:
        print(hop, file=sys.stderr)
    new_tokens = output.shape[1] - ids.shape[1]
    if options.json:
        console.print_json(
            {
                "text": model.tokenizer.decode(output[0], skip_special_tokens=True),
                "ids": output[0].tolist(),
                "new_tokens": new_tokens,
                "tokens_per_s": new_tokens / seconds,
                "route": [{"peer_id": peer, "start": start, "end": end} for peer, start, end in route],
            }
        )
    return 0


def _session(model: DistributedBloomForCausalLM, saved: Path | None, wire: str, *, measures: bool) -> SessionCache:
    """A new session, or the one that was saved.

    Raises:
        UserError: its file cannot be read.
    """
    if saved is None:
        return model.session(wire=wire, measures_error=measures)
    try:
        return model.load_session(saved, wire=wire, measures_error=measures)
    except OSError as error:
        raise console.UserError(f"cannot read {saved}: {error.strerror or error}") from error


def _read_prompt() -> str:
    """Standard input, less the newline that ends its last line: people mean to continue that line."""
    return re.sub(r"\r?\n\Z", "", console.read_stdin())


def sampling_options(options: argparse.Namespace) -> dict[str, Any]:
    """transformers' arguments of ``generate`` for the command's options."""
    chosen: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "do_sample": False}
    for name in ("temperature", "top_p", "top_k"):
        if (value := getattr(options, name)) is not None:
            chosen |= {"do_sample": True, name: value}
    if options.repetition_penalty is not None:
        chosen["repetition_penalty"] = options.repetition_penalty
    return chosen


def run_status(options: argparse.Namespace) -> int:
    with ours.connect(options) as swarm:
        models, peers = swarm.models(), swarm.peers()
    if options.json:
        console.print_json({"models": [_model_json(model, peers) for model in models]})
        return 0
    if not models:
        print("The swarm serves no model yet. Start a node with: raceme serve MODEL --bootstrap ADDR")
    for model in models:
        print_placement(model, peers)
    return 0


def _unreachable(model: ServedModel, peers: Sequence[Peer]) -> list[tuple[int, int]]:
    """The runs of blocks that no node serves which answers now, whatever is announced."""
    from client.routing import runs_without

    answering = [peer.announcement for peer in peers if not peer.problem]
    return runs_without(model.n_blocks, [node for node in answering if node.digest == model.digest])


def _model_json(model: ServedModel, peers: Sequence[Peer]) -> dict[str, Any]:
    from net.files.models import offers_of

    return {
        "name": model.name,
        "names": sorted(model.names),
        "digest": model.digest,
        "blocks": model.n_blocks,
        "complete": not _unreachable(model, peers),
        "missing": _unreachable(model, peers),
        "files": [
            {"digest": str(offer.manifest), "nodes": len(offer.nodes)} for offer in offers_of(model.nodes, model.name)
        ],
        "placement": [[str(peer_id) for peer_id in block] for block in model.placement],
        "nodes": [
            {
                "peer_id": str(peer.announcement.peer_id),
                "start": peer.announcement.start,
                "end": peer.announcement.end,
                "addresses": [str(address) for address in peer.announcement.addresses],
                "numerics": str(peer.announcement.numerics),
                "decode_tokens_per_s": peer.announcement.decode_tokens_per_s,
                "cache_tokens_left": peer.announcement.cache_tokens_left,
                "max_length": peer.announcement.max_length,
                "reachability": peer.announcement.reachability,
                "round_trip_ms": None if peer.round_trip_s is None else peer.round_trip_s * 1000,
                "problem": peer.problem,
            }
            for peer in peers
            if peer.announcement.digest == model.digest
        ],
    }


def _spell_names(model: ServedModel) -> str:
    others = sorted(model.names - {model.name})
    return f"{model.name} (also called {', '.join(others)})" if others else model.name


def print_placement(model: ServedModel, peers: Sequence[Peer]) -> None:
    """A table of the model's nodes with a bar for the blocks of each, and what is missing."""
    from rich.console import Console
    from rich.table import Table

    from client.routing import spell_runs
    from net.files.models import offers_of

    table = Table(
        title=f"{_spell_names(model)}, {model.n_blocks} blocks, digest {model.digest[:12]}",
        title_justify="left",
        caption="reach: public and mapped nodes can be connected to, punchable ones when both sides dial, relay-only "
        "ones through relays\nspeed: of the node's blocks alone, or of its line if that is slower",
        caption_justify="left",
        box=None,
    )
    for heading in ("blocks", "served", "peer", "reach", "speed", "round trip"):
        table.add_column(
            heading,
            justify="right" if heading in ("speed", "round trip") else "left",
            no_wrap=heading != "peer",
            overflow="fold",  # a narrow terminal folds PeerIds; nothing is lost
        )
    for peer in peers:
        node = peer.announcement
        if node.digest != model.digest:
            continue
        bar = "".join("#" if node.start <= block < node.end else "." for block in range(model.n_blocks))
        if model.n_blocks > 40:
            bar = ""
        round_trip = "no answer" if peer.round_trip_s is None else f"{peer.round_trip_s * 1000:.1f} ms"
        speed = f"{node.decode_tokens_per_s:.0f} tokens/s"
        table.add_row(f"{node.start}:{node.end}", bar, str(node.peer_id), node.reachability, speed, round_trip)
    Console(width=None if console.is_terminal(sys.stdout) else PIPE_COLUMNS).print(table)
    for peer in peers:
        if peer.problem and peer.announcement.digest == model.digest:
            print(f"{peer.announcement.peer_id}: {peer.problem}")
    for name in sorted(model.names):
        for offer in offers_of(model.nodes, name):
            print(f"Files: {name}@{offer.short} from {len(offer.nodes)} node{'s' * (len(offer.nodes) > 1)}")
    if missing := _unreachable(model, peers):
        print(f"Missing: blocks {spell_runs(missing)}. Nobody can use the model until they are served.")
    print()
