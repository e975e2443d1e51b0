"""Raceme's client: reach a swarm, and use its models as if they were here.

    import client

    with client.connect("/ip4/203.0.113.7/tcp/4001/p2p/12D3Koo...") as swarm:
        model = swarm.model("bloom-tiny")
        ids = model.tokenizer("In the beginning", return_tensors="pt").input_ids
        print(model.tokenizer.decode(model.generate(ids, max_new_tokens=32)[0]))

Importing this loads neither torch nor transformers; asking for a model does.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from os import PathLike
from typing import TYPE_CHECKING

from client import shadowing

if TYPE_CHECKING:
    from client.blocking import Swarm
    from client.swarm import AsyncSwarm

__all__ = ["connect", "open_swarm"]


def connect(
    bootstrap: str | Sequence[str],
    *,
    timeout_s: float = 10.0,
    swarm_key: str | PathLike[str] | None = None,
    home: str | PathLike[str] | None = None,
    remember: bool = True,
) -> Swarm:
    """Join a swarm through the nodes at ``bootstrap``, blocking. Use it as a context manager, or ``close()`` it.

    Works in any thread, also where an event loop runs already (Jupyter): the network has a thread of its own.

    Args:
        bootstrap: one address or several, each ending in ``/p2p/PEERID``; one that answers is enough.
        timeout_s: after which to give up; above 0.
        swarm_key: the file with the key of a private swarm.
        home: the folder in which is kept, in ``reputation.json``, how well each node did; by default the one of the
            command ``raceme``: ``$RACEME_HOME``, or ``raceme`` in the user's data folder. Several programs may use one:
            the file is replaced as a whole, and the last one that writes it wins. Models' files that came from nodes
            are kept there, too, in ``models``.
        remember: false to read and keep nothing of how nodes did.

    Raises:
        TypeError: ``bootstrap`` is neither, ``timeout_s`` is no number, ``home`` no path, or ``remember`` no truth
            value.
        client.errors.InvalidInput: ``timeout_s`` is not above 0.
        net.errors.AddressError: an address that cannot be read.
        net.errors.IdentityError: no key can be read from ``swarm_key``.
        net.errors.DialError: nobody answered, or somebody else than the address says.
    """
    shadowing.check()
    from client.blocking import Swarm

    return Swarm(bootstrap, timeout_s=timeout_s, swarm_key=swarm_key, home=home, remember=remember)


def open_swarm(
    bootstrap: str | Sequence[str],
    *,
    timeout_s: float = 10.0,
    swarm_key: str | PathLike[str] | None = None,
    home: str | PathLike[str] | None = None,
    remember: bool = True,
) -> AbstractAsyncContextManager[AsyncSwarm]:
    """As ``connect``, for trio: ``async with client.open_swarm(address) as swarm``."""
    shadowing.check()
    from client.swarm import open_swarm

    return open_swarm(bootstrap, timeout_s=timeout_s, swarm_key=swarm_key, home=home, remember=remember)
