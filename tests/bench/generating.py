"""A client as a process of its own, which generates what it is told to: ``client`` as any program uses it.

Orders come as lines of JSON on standard input, and each is answered with one line; once torch and transformers have
been imported, ``{"up": true}`` comes by itself. Instants are of CLOCK_MONOTONIC, which all processes share.

- ``{"do": "connect", "bootstrap": [ADDRESS], "model": NAME}``: ``{"connect_s": S, "model_s": S}``. Again: the old
  connection is closed first.
- ``{"do": "generate", "ids": [ID], "new": N, "options": {...}, "stream": false}``: a new session;
  ``{"began": AT, "times": [AT], "ids": [ID], "ended": AT}`` with an instant for each new id. With ``stream``, a line
  ``{"at": AT, "id": ID}`` comes for each token as it comes, too, and ``{"began": AT}`` before.

Where either raised there is ``"error": {"type": NAME, "text": TEXT, "typed": BOOL}``, typed if the type is ours.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.streamers import BaseStreamer

import client
import client.models.loading
import client.session  # what connecting and generating would else import
from client.errors import ClientError
from net.errors import NetError

if TYPE_CHECKING:
    from client.blocking import Swarm
    from client.models.bloom import DistributedBloomForCausalLM


MAX_TEXT = 300


class Noted(BaseStreamer):  # type: ignore[misc]  # transformers has no types here
    """Every new token with its instant."""

    def __init__(self, *, is_told: bool) -> None:
        self.ids: list[int] = []
        self.times: list[float] = []
        self._is_told = is_told
        self._has_prompt = False

    def put(self, value: Any) -> None:
        """Take the prompt, then new tokens."""
        if not self._has_prompt:
            self._has_prompt = True
            return
        now = time.monotonic()
        for token in value.flatten().tolist():
            self.ids.append(token)
            self.times.append(now)
            if self._is_told:
                say(at=now, id=token)

    def end(self) -> None:
        """Nothing is held back."""


class Client:
    """What orders work on."""

    def __init__(self) -> None:
        self._swarm: Swarm | None = None
        self._model: DistributedBloomForCausalLM | None = None

    def connect(self, bootstrap: list[str], model: str) -> None:
        if self._swarm is not None:
            self._swarm.close()
            self._swarm = self._model = None
        began = time.monotonic()
        try:
            self._swarm = client.connect(bootstrap, remember=False)
            connected = time.monotonic()
            self._model = self._swarm.model(model)
        except Exception as error:
            say(error=_told(error))
        else:
            say(connect_s=connected - began, model_s=time.monotonic() - connected)

    def generate(self, ids: list[int], new: int, options: dict[str, Any], *, stream: bool = False) -> None:
        if self._model is None:
            raise RuntimeError("connect first")
        prompt = torch.tensor([ids])
        noted = Noted(is_told=stream)
        began = time.monotonic()
        if stream:
            say(began=began)
        how = {"do_sample": False, "attention_mask": torch.ones_like(prompt), "streamer": noted, **options}
        answer: dict[str, Any] = {"began": began}
        try:
            output = self._model.generate(prompt, max_new_tokens=new, **how)
            answer["ids"] = output[0, len(ids) :].tolist()
        except Exception as error:
            answer |= {"error": _told(error), "ids": noted.ids}
        say(**answer, times=noted.times, ended=time.monotonic())


def _told(error: Exception) -> dict[str, Any]:
    is_typed = isinstance(error, ClientError | NetError)
    return {"type": type(error).__name__, "text": str(error)[:MAX_TEXT], "typed": is_typed}


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    say(up=True)
    ours = Client()
    for line in sys.stdin:
        order = json.loads(line)
        getattr(ours, order.pop("do"))(**order)


if __name__ == "__main__":
    main()
