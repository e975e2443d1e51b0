"""The form of a node's weights: what was asked for, else that of the model's other nodes, else the fastest."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from compute import memory
from compute import node as node_module
from compute.models import find_checkpoint
from compute.node import Node, linear_name
from compute.node_settings import NodeSettings
from compute.probe import Probe
from net.protocol.announcement import NodeAnnouncement, Numerics
from tests.unit.announcements import node as announced


def numerics(quantization: str, backend: str = "cpu-fbgemm", dtype: str = "float32") -> Numerics:
    return Numerics(dtype=dtype, quantization=quantization, backend=backend)


@pytest.mark.parametrize(
    ("seen", "on_cpu", "on_gpu"),
    [
        (numerics("none", "cpu-onednn"), "fp32", None),
        (numerics("none", "cpu"), "fp32", None),
        (numerics("fp16"), "fp16", None),
        (numerics("llm-int8", "cpu-bitsandbytes-mixing"), "llm-int8", None),
        (numerics("nf4", "cuda-bitsandbytes"), None, None),
        (numerics("nf4", "cuda-bitsandbytes", "bfloat16"), None, "nf4"),
        (numerics("none", "cpu", "bfloat16"), None, None),
        (numerics("of tomorrow"), None, None),
    ],
)
def test_which_of_our_forms_computes_like_another_node(seen: Numerics, on_cpu: str | None, on_gpu: str | None) -> None:
    assert linear_name(seen, torch.device("cpu")) == on_cpu
    assert linear_name(seen, torch.device("cuda", 1)) == on_gpu


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[Path | None]:
    """Where outcomes were to be kept, of each probe."""
    calls: list[Path | None] = []

    def probe(config: object, folder: Path | None) -> Probe:
        calls.append(folder)
        return Probe(chosen="fp16", candidates=())

    monkeypatch.setattr(node_module, "probe", probe)
    return calls


async def chosen(settings: NodeSettings, *rounds: list[NodeAnnouncement]) -> str:
    nothing = cast(Any, None)  # a node that has not been started asks nobody
    node = Node(nothing, nothing, find_checkpoint("bloom-tiny"), settings)
    for others in rounds:
        await node._choose_linear(others)
    return node._linear


async def test_what_was_asked_for_is_taken(probes: list[Path | None]) -> None:
    others = [announced(1, 0, 8, numerics=numerics("fp16"))]
    assert await chosen(NodeSettings(linear="int8"), others) == "int8"
    assert probes == []


async def test_the_form_of_most_blocks_is_taken(probes: list[Path | None]) -> None:
    others = [
        announced(1, 0, 3, numerics=numerics("int8")),
        announced(2, 3, 8, numerics=numerics("none", "cpu-onednn")),
        announced(3, 0, 8, numerics=numerics("of tomorrow")),
    ]
    assert await chosen(NodeSettings(linear=None), others) == "fp32"
    assert probes == []


async def test_the_first_node_finds_out_what_is_fast_once(tmp_path: Path, probes: list[Path | None]) -> None:
    assert await chosen(NodeSettings(linear=None, probed=tmp_path), [], []) == "fp16"
    assert probes == [tmp_path]


async def test_who_is_seen_later_is_followed(probes: list[Path | None]) -> None:
    others = [announced(1, 0, 8, numerics=numerics("none", "cpu"))]
    assert await chosen(NodeSettings(linear=None), [], others) == "fp32"


# Free memory


def test_free_memory_is_what_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    cpu = torch.device("cpu")
    assert memory.free_bytes(cpu) == 2 << 30  # nobody says anything
    meminfo.write_text("MemTotal:       100 kB\nMemAvailable:    40 kB\n")
    assert memory.free_bytes(cpu) == 40 << 10
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1024\n")
    assert memory.free_bytes(cpu) == 40 << 10
    (tmp_path / "memory.max").write_text("11264\n")
    assert memory.free_bytes(cpu) == 10 << 10
    (tmp_path / "memory.current").write_text("999999\n")
    assert memory.free_bytes(cpu) == 0


async def test_the_first_node_on_a_gpu_has_nf4(probes: list[Path | None]) -> None:
    assert await chosen(NodeSettings(linear=None, devices=(torch.device("cuda", 0),)), []) == "nf4"
    assert probes == []


async def test_as_many_blocks_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, nothing = find_checkpoint("bloom-tiny"), cast(Any, None)
    span = checkpoint.load_span(0, 2, linear="fp16")
    each = checkpoint.block_bytes("fp16", torch.device("cpu"))
    weights = sum(layer.weight_bytes for layer in span.linears) / 2
    assert weights < each < 1.2 * weights  # biases and norms are in float32, and there are few of them

    def length(blocks: float, settings: NodeSettings) -> int:
        monkeypatch.setattr(node_module, "free_bytes", lambda _: int(blocks * each / 0.7))
        return Node(nothing, nothing, checkpoint, settings)._choose_length()

    fp16 = NodeSettings(linear="fp16")
    assert [length(blocks, fp16) for blocks in (0.0, 1.5, 5.01, 100.0)] == [1, 1, 5, 8]
    assert length(3.01, NodeSettings(linear="fp32")) == 1
    assert length(2.01, NodeSettings(linear="fp16", max_blocks=3)) == 3
    two = (torch.device("cuda", 0), torch.device("cuda", 1))
    assert length(0, NodeSettings(linear="fp16", devices=two)) == 1
    bf16 = checkpoint.block_bytes("fp16", torch.device("cuda", 0))
    assert length(2.51 * bf16 / each, NodeSettings(linear="fp16", devices=two)) == 4


@pytest.mark.parametrize(
    ("others", "stays"),
    [
        ([], True),
        ([announced(1, 3, 6, numerics=numerics("fp16"))], True),
        ([announced(1, 3, 6, numerics=numerics("none", "cpu-onednn"))], False),
        ([announced(1, 3, 6, numerics=numerics("none", "cpu"), state="joining")], True),
    ],
    ids=["nobody", "alike", "online in another form", "junior, and still joining"],
)
async def test_a_node_that_has_loaded_another_form_than_the_others_begins_anew(
    others: list[NodeAnnouncement], stays: bool
) -> None:
    """Each may have probed before it saw the others; a chain needs one form."""
    lowest = SimpleNamespace(peer_id=SimpleNamespace(to_bytes=lambda: b""))
    node = Node(cast(Any, lowest), cast(Any, None), find_checkpoint("bloom-tiny"), NodeSettings(linear=None))
    node._linear, node._length = "fp16", 3

    async def seen() -> list[NodeAnnouncement]:
        return others

    node._others = seen  # type: ignore[method-assign]
    assert await node._may_stay(0, 3) is stays
    assert (node._linear, node._length) == (("fp16", 3) if stays else ("fp32", 0))
