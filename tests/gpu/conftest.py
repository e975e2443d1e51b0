"""Where these tests run."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, if torch can use one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def dtype(device: torch.device) -> torch.dtype:
    """Of hidden states, norms and cache there, beside quantised weights."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def pytest_report_header() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none, tests/gpu runs on the CPU"
    return f"GPU: {name}"
