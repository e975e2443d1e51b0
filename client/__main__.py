"""``python -m client`` is ``raceme``."""

from client.cli import main

main()
