"""``raceme tune``: data, the loop, checkpoints. It trains whatever model has the face of ``loop.Tunable``."""
