"""What a span does between its attentions, recorded once and played back: CUDA graphs.

A decode step of one row is some twenty kernels a block, each of which takes as long to start as to run. Recorded as a
graph, those before and after attention start as one. Attention itself stays as it is: it depends on each session's
length and memory, and a step of any sessions shares the same graphs.

Graphs are for fixed numbers of rows; a step takes the next larger one, and the rows that are too many hold what was
there before, which nobody reads. Recordings are made when they are first needed. What cannot be recorded runs kernel by
kernel, as it does without this module. A graph belongs to one GPU: a span on several has a set for each of its stages.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from compute.bloom.block import BloomBlock, BloomSpan

ROWS: Final = (1, 2, 4, 8, 16, 32)  # bitsandbytes' fused 4-bit kernel ends at 32 for the widest layers
_WARM_UP: Final = 3  # runs before the recording: the first ones choose kernels and allocate
_recording = threading.Lock()
_log = logging.getLogger(__name__)

Replay = Callable[[], None]
Record = Callable[[Replay], Replay]  # a function of fixed memory -> one that does the same again


def attach_graphs(span: BloomSpan) -> None:
    """Have a span on GPUs play its decode steps back; where that cannot be, it stays as it is, and the log says why."""
    if any(device.type != "cuda" for device in span.devices):
        _log.info("blocks %d:%d run without graphs, which are for GPUs", span.start, span.end)
        return
    stages = [span.part(span.start + stage.start, span.start + stage.stop) for stage in span.stages]
    try:
        span.graphs = [SpanGraphs(stage, cuda_recorder(stage.device)) for stage in stages]
    except ValueError as exc:
        _log.info("blocks %d:%d run without graphs: %s", span.start, span.end, exc)


class SpanGraphs:
    """The recordings of one span on one device; for one thread. See :class:`compute.bloom.segments.Graphs`.

    Attributes:
        recorded: Numbers of rows for which there are recordings.
    """

    def __init__(self, span: BloomSpan, record: Record, rows: Sequence[int] = ROWS) -> None:
        """Record nothing yet.

        Raises:
            ValueError: A linear layer cannot be recorded, or the span is on several devices.
        """
        if len(span.stages) > 1:
            raise ValueError("blocks on several devices need graphs for each")
        unfit = sorted({layer.name for layer in span.linears if not layer.is_recordable})
        if unfit:
            raise ValueError(f"{', '.join(unfit)} layers cannot be recorded")
        # Not the span, which has these: what nobody serves any more is to be gone at once.
        self._blocks = [block for block in span.blocks if isinstance(block, BloomBlock)]
        self._record = record
        self._rows = sorted(rows)
        self._made: dict[int, GraphSegments] = {}
        self._failed = False

    @property
    def recorded(self) -> list[int]:
        """See the class."""
        return sorted(self._made)

    def segments(self, rows: int) -> GraphSegments | None:
        """Those for the least number of rows that is enough; ``None`` if there is none, or recording failed once."""
        size = next((each for each in self._rows if each >= rows), None)
        if size is None or self._failed:
            return None
        made = self._made.get(size)
        if made is None:
            try:
                made = self._made[size] = GraphSegments(self._blocks, size, self._record)
            except RuntimeError as exc:  # how torch says all of it
                _log.warning("no graphs, and steps run kernel by kernel: %s", str(exc).splitlines()[0])
                self._failed = True
                return None
        return made.of(rows)


class GraphSegments:
    """Segments of a fixed number of rows, over memory of their own. See :class:`compute.bloom.segments.Segments`."""

    def __init__(self, blocks: Sequence[BloomBlock], rows: int, record: Record) -> None:
        """Record what is between consecutive blocks on one device.

        Raises:
            RuntimeError: That cannot be, or there is no memory.
        """
        self._blocks = blocks
        like = blocks[0].input_layernorm.weight  # [d]
        self._hidden, self._room, self._residual = (like.new_zeros(rows, len(like)) for _ in range(3))  # [n, d]
        self._fused = like.new_zeros(rows, 3 * len(like))  # [n, 3d]
        self._n = rows
        with torch.inference_mode():
            self._replays = [record(self._first), *(record(self._between(index)) for index in range(len(self._blocks)))]

    def of(self, rows: int) -> GraphSegments:
        """The same, for the first so many rows."""
        self._n = rows
        return self

    @property
    def room(self) -> Tensor:
        """See :class:`compute.bloom.segments.Segments`."""
        return self._room[: self._n]  # [n, d]

    def begin(self, hidden: Tensor) -> Tensor:
        """See :class:`compute.bloom.segments.Segments`."""
        self._hidden[: self._n] = hidden
        self._replays[0]()
        return self._fused[: self._n]  # [n, 3d]

    def go_on(self, index: int) -> Tensor:
        """See :class:`compute.bloom.segments.Segments`."""
        self._replays[index + 1]()
        if index + 1 == len(self._blocks):
            return self._hidden[: self._n].clone()  # [n, d]; the memory is used again
        return self._fused[: self._n]  # [n, 3d]

    def _first(self) -> None:
        self._enter(self._blocks[0])

    def _between(self, index: int) -> Replay:
        def run() -> None:
            self._hidden.copy_(self._blocks[index].leave(self._room, self._residual))
            if index + 1 < len(self._blocks):
                self._enter(self._blocks[index + 1])

        return run

    def _enter(self, block: BloomBlock) -> None:
        residual, fused = block.enter(self._hidden)
        self._fused.copy_(fused)
        self._residual.copy_(residual)


def cuda_recorder(device: torch.device) -> Record:
    """Records CUDA graphs of one GPU. They share a pool of memory, for they never run at the same time, and a stream
    for which the libraries' own memory is there before the recording begins.
    """
    pool = torch.cuda.graph_pool_handle()
    side = torch.cuda.Stream(device)

    def record(function: Replay) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            here = torch.cuda.current_stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    function()
            here.wait_stream(side)
            # Other threads may do with the GPU what they like meanwhile, such as loading. But torch records one at a
            # time, and a node that moves has two engines for a while.
            with _recording, torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                function()
        replay: Replay = graph.replay
        return replay

    return record
