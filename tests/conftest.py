"""What all tests rely on."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile

# What a client or a command keeps is kept for the tests alone.
os.environ["RACEME_HOME"] = tempfile.mkdtemp(prefix="raceme-tests-")
atexit.register(shutil.rmtree, os.environ["RACEME_HOME"], ignore_errors=True)

# Shells start what runs in their background with SIGINT ignored, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
