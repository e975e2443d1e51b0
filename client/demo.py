"""``raceme demo``: a relay and three nodes as processes, a client, and the comparison with one machine.

Nothing outlives it. Its children end when it ends them, and when their standard input ends, which happens however it
dies. Its folder is locked while it lives; who starts next removes those that nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from client.errors import ClientError
from net import console

MODEL = "bloom-tiny"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
SPANS = ("0:3", "3:6", "6:8")
HOW: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.2}  # small models repeat themselves
START_S = 45.0
STOP_S = 5.0
FOLDER_PREFIX = "raceme-demo-"


class DemoFailed(ClientError):
    """A process of the demo did not do what it should."""


def run(prompt: str, max_new_tokens: int, *, as_json: bool) -> int:
    """Returns: 0 if the swarm gave the same tokens as one machine.

    Raises:
        DemoFailed: a process did not start.
    """
    say = (lambda *_, **__: None) if as_json else print
    started = time.monotonic()
    with _signals_that_unwind(), _folder() as folder, _processes(folder) as start:
        say(f"Starting a relay and {len(SPANS)} compute nodes, each a process of its own ...", flush=True)
        relay = start("relay", "relay", "--listen", LOOPBACK)
        address = str(relay.ready()["address"])
        say(f"  relay   {address}", flush=True)
        nodes = [
            start(
                f"node-{index}",
                *("serve", MODEL, "--blocks", span, "--threads", "1", "--quantize", "fp32"),
                *("--bootstrap", address, "--listen", LOOPBACK),
            )
            for index, span in enumerate(SPANS)
        ]
        alone = _Alone(prompt, max_new_tokens)  # loads transformers while the nodes start
        for node in nodes:
            ready = node.ready()
            say(f"  node    blocks {ready['start']}:{ready['end']}  {ready['peer_id']}", flush=True)
        alone.wait_until_loaded()
        outcome = _generate(address, prompt, max_new_tokens, say)
        expected, alone_per_s = alone.result()
        for process in (*nodes, relay):
            process.check_alive()
    same = outcome["ids"] == expected
    outcome |= {"same_tokens": same, "one_machine_tokens_per_s": alone_per_s, "seconds": time.monotonic() - started}
    if as_json:
        console.print_json(outcome)
    else:
        print(
            f"{outcome['new_tokens']} tokens through {len(SPANS)} nodes at {outcome['tokens_per_s']:.1f} tokens/s "
            f"(one machine alone: {alone_per_s:.1f}); {outcome['seconds']:.1f} s in all"
        )
        if same:
            print("Same tokens as on one machine: yes, all of them.")
        else:
            print(f"Same tokens as on one machine: NO.\n  swarm: {outcome['ids']}\n  alone: {expected}")
    return 0 if same else console.EXIT_FAILURE


def _generate(address: str, prompt: str, max_new_tokens: int, say: Any) -> dict[str, Any]:
    import client
    from client.commands import print_placement

    with client.connect(address, remember=False) as swarm:
        model = swarm.model(MODEL)

        import torch

        from client.streaming import TextPrinter

        tokenizer = model.tokenizer
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        say(f"\n{MODEL} continues a prompt, its blocks spread over the nodes:\n", flush=True)
        streamer = None if say is not print else TextPrinter(tokenizer)
        with model.session() as session:
            session.prepare(1)
            started = time.monotonic()
            output = model.generate(
                ids,
                session=session,
                streamer=streamer,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                **HOW,
            )
            seconds = time.monotonic() - started
            route = session.route
        say("")
        if say is print:
            print_placement(model.served, swarm.peers())
    new_tokens = output.shape[1] - ids.shape[1]
    return {
        "text": tokenizer.decode(output[0], skip_special_tokens=True),
        "ids": output[0].tolist(),
        "new_tokens": new_tokens,
        "tokens_per_s": new_tokens / seconds,
        "route": [{"peer_id": peer, "start": start, "end": end} for peer, start, end in route],
    }


class _Alone:
    """The same prompt through transformers' own model, on this machine.

    What is slow to import is imported in a thread, which no signal interrupts: torch and transformers make something
    else of an exception that comes while they are being imported, or nothing at all.
    """

    def __init__(self, prompt: str, max_new_tokens: int) -> None:
        self._prompt = prompt
        self._max_new_tokens = max_new_tokens
        self._loaded: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._load, daemon=True)
        self._thread.start()

    def _load(self) -> None:
        try:
            import torch

            torch.set_num_threads(1)  # more only wait for each other beside the nodes, at this size
            from transformers import AutoTokenizer, BloomForCausalLM
            from transformers.utils import logging

            import client.models.loading  # noqa: F401  what the main thread is going to use
            from compute.models import find_checkpoint

            logging.disable_progress_bar()
            folder = find_checkpoint(MODEL).file("config.json").parent
            model = BloomForCausalLM.from_pretrained(folder, dtype=torch.float32)
            self._loaded = AutoTokenizer.from_pretrained(folder), model.eval()
        except BaseException as error:  # noqa: BLE001  handed to the thread that waits
            self._error = error

    def wait_until_loaded(self) -> None:
        self._thread.join()

    def result(self) -> tuple[list[int], float]:
        """Token ids, and tokens per second. Computed when asked, so that it does not compete with the swarm."""
        self.wait_until_loaded()
        if self._error is not None:
            raise self._error
        import torch

        tokenizer, model = self._loaded
        ids = tokenizer(self._prompt, return_tensors="pt").input_ids
        started = time.monotonic()
        with torch.inference_mode():
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=self._max_new_tokens, **HOW
            )
        return output[0].tolist(), (output.shape[1] - ids.shape[1]) / (time.monotonic() - started)


class _Process:
    """One ``raceme ... --json`` process: its first line, its log, its end."""

    def __init__(self, name: str, log: Path, popen: subprocess.Popen[str]) -> None:
        self._name = name
        self._log = log
        self._popen = popen

    def ready(self) -> dict[str, Any]:
        """The object that it prints when it is up.

        Raises:
            DemoFailed: it ended, or did not print it in time.
        """
        timer = threading.Timer(START_S, self._popen.kill)
        timer.daemon = True  # Ctrl-C may come before it can be cancelled: it must not keep us alive
        try:
            timer.start()
            stdout = self._popen.stdout
            line = stdout.readline() if stdout is not None else ""
        finally:
            timer.cancel()
        if not line:
            raise DemoFailed(f"{self._name} did not start: {self._last_words()}")
        fields: dict[str, Any] = json.loads(line)
        return fields

    def check_alive(self) -> None:
        """Raises:
        DemoFailed: it has ended.
        """
        if self._popen.poll() is not None:
            raise DemoFailed(f"{self._name} ended on its own: {self._last_words()}")

    def interrupt(self) -> None:
        """Tell it to end; ``wait`` for that."""
        self._popen.send_signal(signal.SIGINT)

    def wait(self, timeout_s: float) -> None:
        """Until it has ended; after ``timeout_s`` it is killed."""
        try:
            self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self._popen.wait(STOP_S)}"


@contextlib.contextmanager
def _processes(folder: Path) -> Iterator[Callable[..., _Process]]:
    """Gives what starts a process, by a name and the arguments of ``raceme``.

    At the end, the first process is ended after all others, so that nodes can take leave of the relay. When we are
    interrupted there is no such ceremony: all that they have is in ``folder``.
    """
    running: list[_Process] = []

    def start(name: str, *arguments: str) -> _Process:
        home, log = folder / name, folder / f"{name}.log"
        home.mkdir()
        with log.open("w") as errors:
            popen = subprocess.Popen(  # noqa: S603  our own command, no shell
                [sys.executable, "-m", "client", *arguments, "--json", "--until-eof"],
                stdin=subprocess.PIPE,  # never written to; it ends with us
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "RACEME_HOME": str(home)},
                start_new_session=True,  # Ctrl-C reaches us alone; we end the others in order
            )
        running.append(_Process(name, log, popen))
        return running[-1]

    grace_s = 0.0
    try:
        yield start
        grace_s = STOP_S
    finally:
        _end(running[1:], grace_s)
        _end(running[:1], grace_s)


def _end(processes: Sequence[_Process], grace_s: float) -> None:
    for process in processes:
        process.interrupt()
    deadline = time.monotonic() + grace_s
    for process in processes:
        process.wait(max(0.0, deadline - time.monotonic()))


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """A folder for this demo, locked and removed at the end; those of demos that were killed are removed before."""
    for path in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError), _locked(path):  # another user's, or another demo's that runs
            if any(path.iterdir()):  # an empty one may be about to be locked
                shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX, ignore_cleanup_errors=True) as name, _locked(Path(name)):
        yield Path(name)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises:
    OSError: it is no folder of ours, or somebody else holds it.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _signals_that_unwind() -> Iterator[None]:
    """SIGINT and SIGTERM say at once that they were heard, and raise: children are ended wherever we are."""

    def heard(number: int, frame: FrameType | None) -> None:
        if sys.__stderr__ is not None:  # not closed from the beginning
            with contextlib.suppress(OSError):
                os.write(sys.__stderr__.fileno(), b"Stopping ...\n")  # print() must not be called within print()
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, heard) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
