"""Ways to reach a peer: one module each, all behind ``base.Transport``."""
