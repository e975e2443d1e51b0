"""What a node serves and how much."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from compute.engine_settings import EngineSettings
from compute.linear.kept import KeptWeights


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """What a node serves and how much.

    Attributes:
        span: blocks [start, end); None for what the swarm lacks most, now and later.
        max_blocks: the most to take when ``span`` is None; None for as many as fit into memory.
        linear: backend of the linear layers, one of ``compute.linear.BACKENDS``; None for the one that the model's
            other nodes on such devices have, since a chain keeps to one, or for the first of them the fastest CPU has,
            and nf4 on a GPU.
        kept: where quantised weights are looked for and kept; None for nowhere.
        devices: where blocks are, the first ones on the first.
        probed: where it is kept which backend is the fastest here, and how fast the node is; None for nowhere.
        resume_s: how long a session whose stream broke waits for its client to come back another way.
        look_s: between looks whether the swarm lacks other blocks more.
        stay_s: how long to stay after a move, or the attempt, unless nobody serves some block.
        drain_s: how long sessions may go on with blocks that the node has moved away from.
        leave_s: how long sessions have to go elsewhere when the node ends.
        measure_line: whether to find out what our line carries.
    """

    span: tuple[int, int] | None = None
    max_blocks: int | None = None
    linear: str | None = "fp32"
    kept: KeptWeights | None = None
    devices: tuple[torch.device, ...] = (torch.device("cpu"),)
    probed: Path | None = None
    resume_s: float = 15.0
    look_s: float = 60.0
    stay_s: float = 600.0
    drain_s: float = 120.0
    leave_s: float = 3.0
    measure_line: bool = True
    engine: EngineSettings = field(default_factory=EngineSettings)
