"""Many streams over one secure channel: Yamux, as a core without I/O and a trio driver."""
