"""A simulated internet on one machine: homes behind NATs, public hosts, and lines with delay, rate and loss.

    from interop import lab

    lab.enter()                                     # at the very start: what follows runs in namespaces of its own
    net = lab.internet()
    relay = net.host("relay", rtt_ms=20)
    alice = net.home(nat="port-restricted", rtt_ms=40).host("alice")
    bob = net.home(nat="symmetric", rtt_ms=40, mbit=20, loss=0.01).host("bob")
    async with net.up():
        async with alice.process(["raceme", "ping", ...]) as ping: ...

``network.py`` has the picture, ``nat.py`` and ``plan.py`` what it means as text; ``namespaces.py``, ``machine.py`` and
``core.py`` make it so; ``probes.py`` and ``lines.py`` hold it to its word. ``make lab`` runs all.
"""

from interop.lab.machine import Machine
from interop.lab.namespaces import LabError, enter
from interop.lab.network import Home, Host, Internet, PublicHost, internet

__all__ = ["Home", "Host", "Internet", "LabError", "Machine", "PublicHost", "enter", "internet"]
