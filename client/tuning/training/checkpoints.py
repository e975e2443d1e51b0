"""A training as one file: parameters, optimizer, random numbers and position, which only mean something together.

It is a safetensors file, replaced as a whole::

    parameter.NAME       what is trained
    optimizer.NAME.KEY   what AdamW keeps of it
    rng                  torch's generator of random numbers, uint8
    metadata "raceme"    JSON: {"raceme-training": 1, "step": STEPS DONE, "marks": {...}, "notes": {...}}

``marks`` are what must be the same for a training to go on: the model, the data, the options that count.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from client.errors import InvalidInput
from net.replacing import PART_SUFFIX, replace_file

_MARK: Final = "raceme-training"
VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a training is.

    Attributes:
        step: How many steps have been done.
        marks: What must not change; values as JSON has them.
        notes: What else is to be known later on.
        parameters: What is trained, by name.
        optimizer: What the optimizer keeps, by the parameter's name and its own.
        rng: Of torch's default generator.

    Shapes:
        rng: [n], uint8
    """

    step: int
    marks: Mapping[str, Any]
    notes: Mapping[str, Any]
    parameters: Mapping[str, Tensor]
    optimizer: Mapping[tuple[str, str], Tensor]
    rng: Tensor

    @classmethod
    def of(
        cls,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        rng: Tensor,
        *,
        step: int,
        marks: Mapping[str, Any],
        notes: Mapping[str, Any],
    ) -> Checkpoint:
        """What a training has now. The tensors are those of the training: write them before it goes on."""
        return cls(
            step=step,
            marks=marks,
            notes=notes,
            parameters=module.state_dict(),
            optimizer={
                (name, key): value
                for name, parameter in module.named_parameters()
                for key, value in optimizer.state.get(parameter, {}).items()
            },
            rng=rng,
        )

    def restore(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give a module and its optimizer what they had; the random numbers are the caller's to put back.

        Raises:
            InvalidInput: It is of other parameters.
        """
        parameters = dict(module.named_parameters())
        shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in self.parameters.items()}:
            raise InvalidInput("the checkpoint is of other parameters: begin anew with another --out")
        if not {name for name, _ in self.optimizer} <= set(parameters):
            raise InvalidInput("the checkpoint's optimizer is of other parameters: it is damaged")
        module.load_state_dict(self.parameters)
        optimizer.state.clear()
        for (name, key), value in self.optimizer.items():
            optimizer.state[parameters[name]][key] = value.clone()

    def write(self, path: Path) -> None:
        """Put it in place of what is there, at once.

        Raises:
            OSError: It cannot be written; what was there is there still.
        """
        tensors = {f"parameter.{name}": tensor for name, tensor in self.parameters.items()}
        tensors |= {f"optimizer.{name}.{key}": tensor for (name, key), tensor in self.optimizer.items()}
        tensors["rng"] = self.rng
        told = {_MARK: VERSION, "step": self.step, "marks": dict(self.marks), "notes": dict(self.notes)}
        separate = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        replace_file(path, save(separate, metadata={"raceme": json.dumps(told)}))

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Raises:
        InvalidInput: No checkpoint is in it, or one of another version.
        OSError: It cannot be read.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                told = json.loads((file.metadata() or {}).get("raceme", "null"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
            return cls._parse(told, tensors)
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidInput(f"{path} holds no training that can be taken up: {error}") from error

    @classmethod
    def _parse(cls, told: Any, tensors: dict[str, Tensor]) -> Checkpoint:
        """Raises:
        ValueError, KeyError, TypeError: not what :meth:`write` writes.
        """
        if not isinstance(told, dict) or _MARK not in told:
            raise ValueError("none was saved in it")
        if told[_MARK] != VERSION:
            raise ValueError(f"version {told[_MARK]!r:.20}, not {VERSION}: take the raceme that saved it")
        step, marks, notes = told["step"], told["marks"], told["notes"]
        if type(step) is not int or step < 0 or not isinstance(marks, dict) or not isinstance(notes, dict):
            raise ValueError("it does not say where it is")
        parameters, optimizer = {}, {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "parameter":
                parameters[rest] = tensor
            elif kind == "optimizer":
                of, _, key = rest.rpartition(".")
                optimizer[of, key] = tensor
        rng = tensors["rng"]
        if rng.dtype != torch.uint8 or rng.dim() != 1:
            raise ValueError("its random numbers are none")
        return cls(step=step, marks=marks, notes=notes, parameters=parameters, optimizer=optimizer, rng=rng)


def remove_parts(folder: Path) -> None:
    """Remove what a process that was killed had begun to write. Nobody else may be writing there."""
    for part in folder.glob(f".*{PART_SUFFIX}"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
