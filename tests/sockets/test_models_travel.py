"""Models on machines that have nothing of them: a client and a node with an empty home and one address."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from tests.checkpoints import make_checkpoint
from tests.sockets.commands import LOOPBACK, run, started

PROMPT = "In the beginning"
NEW = 8


def expected(folder: Path) -> list[int]:
    """What transformers makes of the prompt."""
    from transformers import AutoTokenizer, BloomForCausalLM

    model = BloomForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    rows = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    tokens: list[int] = rows[0].tolist()
    return tokens


def test_a_client_and_a_node_with_one_address(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "travelling-bloom")
    with ExitStack() as processes:

        def start(name: str, *arguments: str) -> str:
            command = processes.enter_context(started(tmp_path / name, *arguments, "--listen", LOOPBACK))
            return command.line()

        relay = start("relay", "relay")
        serve = ("--bootstrap", relay, "--threads", "1", "--quantize", "fp32")
        start("first", "serve", str(folder), "--blocks", "0:3", *serve)

        # A node: its blocks' shards, and a place to give them to others from.
        second = processes.enter_context(
            started(
                tmp_path / "second",
                *("serve", "travelling-bloom", "--blocks", "2:5", "--listen", LOOPBACK, "--json", *serve),
            )
        )
        offer = second.json()
        assert (offer["model"], offer["start"], offer["end"]) == ("travelling-bloom", 2, 5)
        [manifest] = (tmp_path / "second" / "models").iterdir()
        for path in manifest.glob("*.safetensors"):
            assert path.read_bytes() == (folder / path.name).read_bytes()

        # A client.
        generate = ("generate", "--bootstrap", relay, "--max-new-tokens", str(NEW), "--json", PROMPT, "--model")
        outcome = run(tmp_path / "client", *generate, "travelling-bloom")
        assert outcome.status == 0, outcome.errors
        assert outcome.json["ids"] == expected(folder)
        pin = manifest.name[:32]
        assert outcome.errors.strip() == (
            "raceme: note: the files of travelling-bloom are those that its nodes offer; to take these and no others "
            f"the next time, say travelling-bloom@{pin}"
        )

        # Pinned by what status says.
        status = run(tmp_path / "client", "status", "--bootstrap", relay)
        assert f"\nFiles: travelling-bloom@{pin} from 2 nodes\n" in status.output
        outcome = run(tmp_path / "other", *generate, f"travelling-bloom@{pin}")
        assert (outcome.status, outcome.errors, outcome.json["ids"]) == (0, "", expected(folder))
        outcome = run(tmp_path / "other", *generate, "travelling-bloom@12345678")
        assert outcome.status == 1
        assert f"begin with 12345678; there is travelling-bloom@{pin}" in outcome.errors
        outcome = run(tmp_path / "third", "serve", "travelling-bloom@12345678", *serve, "--listen", LOOPBACK)
        assert outcome.status == 1
        assert outcome.errors.startswith(
            "raceme: error: no node of the swarm gives files of travelling-bloom that begin"
        )
