"""What all tests rely on."""

from __future__ import annotations

import signal

# Shells start what runs in their background with SIGINT ignored, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
