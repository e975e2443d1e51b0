"""Our hosts against those of other libp2p implementations: ``python -m interop``."""
