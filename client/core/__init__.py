"""What a session does about what happens, layer on layer; ``client.session_core`` is the whole of it. No I/O."""
