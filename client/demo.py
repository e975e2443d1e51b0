"""``raceme demo``: a relay and three nodes as processes, a client, and the comparison with one machine."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from client.errors import ClientError
from net import console

MODEL = "bloom-tiny"
SPANS = ("0:3", "3:6", "6:8")
HOW: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.2}  # small models repeat themselves
START_S = 45.0
STOP_S = 5.0
_PR_SET_PDEATHSIG = 1


class DemoFailed(ClientError):
    """A process of the demo did not do what it should."""


def run(prompt: str, max_new_tokens: int, *, as_json: bool) -> int:
    """Returns: 0 if the swarm gave the same tokens as one machine.

    Raises:
        DemoFailed: a process did not start.
    """
    say = (lambda *_, **__: None) if as_json else print
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        # Signals must unwind the stack: children are ended wherever we are.
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        stack.callback(signal.signal, signal.SIGTERM, previous)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raceme-demo-")))
        say(f"Starting a relay and {len(SPANS)} compute nodes, each a process of its own ...", flush=True)
        relay = stack.enter_context(_process(folder, "relay", "relay", "--listen", "/ip4/127.0.0.1/tcp/0"))
        address = str(relay.ready()["address"])
        say(f"  relay   {address}", flush=True)
        nodes = [
            stack.enter_context(
                _process(
                    folder,
                    f"node-{index}",
                    *("serve", MODEL, "--blocks", span, "--threads", "1"),
                    *("--bootstrap", address, "--listen", "/ip4/127.0.0.1/tcp/0"),
                )
            )
            for index, span in enumerate(SPANS)
        ]
        alone = _Alone(prompt, max_new_tokens)  # loads transformers while the nodes start
        for node in nodes:
            ready = node.ready()
            say(f"  node    blocks {ready['start']}:{ready['end']}  {ready['peer_id']}", flush=True)
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
    from client.cli import print_placement

    with client.connect(address) as swarm:
        model = swarm.model(MODEL)

        import torch
        from transformers import TextStreamer

        tokenizer = model.tokenizer
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        say(f"\n{MODEL} continues a prompt, its blocks spread over the nodes:\n", flush=True)
        streamer = None if say is not print else TextStreamer(tokenizer, skip_special_tokens=True)
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
    """The same prompt through transformers' own model, on this machine, in a thread."""

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

            from compute.models import find_checkpoint

            logging.disable_progress_bar()
            folder = find_checkpoint(MODEL).file("config.json").parent
            model = BloomForCausalLM.from_pretrained(folder, dtype=torch.float32)
            self._loaded = AutoTokenizer.from_pretrained(folder), model.eval()
        except BaseException as error:  # noqa: BLE001  handed to the thread that waits
            self._error = error

    def result(self) -> tuple[list[int], float]:
        """Token ids, and tokens per second. Computed when asked, so that it does not compete with the swarm."""
        self._thread.join()
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

    def stop(self) -> None:
        self._popen.send_signal(signal.SIGINT)
        try:
            self._popen.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self._popen.wait(STOP_S)}"


@contextlib.contextmanager
def _process(folder: Path, name: str, *arguments: str) -> Iterator[_Process]:
    home, log = folder / name, folder / f"{name}.log"
    home.mkdir()
    with log.open("w") as errors:
        popen = subprocess.Popen(  # noqa: S603  our own command, no shell
            [sys.executable, "-m", "client", *arguments, "--json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "RACEME_HOME": str(home)},
            start_new_session=True,  # Ctrl-C reaches us alone; we end the others in order
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )
    process = _Process(name, log, popen)
    try:
        yield process
    finally:
        process.stop()


def _end_with_parent() -> None:
    """So that not even ``kill -9`` of the demo leaves a process behind (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
