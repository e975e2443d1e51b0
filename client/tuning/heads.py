"""Heads of a client's own: classes or numbers for a whole text, in the place of the next token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from client.errors import InvalidInput
from client.tuning.methods import ClassificationHead
from client.tuning.tuned import Tuned


def head_config(config: Any, tuned: Tuned) -> None:
    """Tell transformers' configuration of a model about its head."""
    head = tuned.head
    if isinstance(head, ClassificationHead):
        config.id2label = dict(enumerate(head.labels))
        config.label2id = {label: index for index, label in enumerate(head.labels)}
    elif head is not None:
        config.num_labels = head.outputs
        config.problem_type = "regression"


def check_head_labels(tuned: Tuned, labels: Tensor | None, rows: int) -> None:
    """Raises:
    InvalidInput: labels that a head has no loss for.
    """
    if labels is None:
        return
    if isinstance(tuned.head, ClassificationHead):
        if labels.shape != (rows,) or labels.is_floating_point():
            raise InvalidInput(f"labels are one class for each of the {rows} texts, as an integer tensor [{rows}]")
        if rows and not 0 <= int(labels.min()) <= int(labels.max()) < tuned.n_outputs:
            raise InvalidInput(f"labels must lie in 0 to {tuned.n_outputs - 1}")
    elif labels.numel() != rows * tuned.n_outputs or not torch.isfinite(labels.float()).all():
        raise InvalidInput(f"labels are {tuned.n_outputs} finite numbers for each of the {rows} texts")


def head_loss(tuned: Tuned, scores: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of classes, mean squared error of numbers; the average over texts.

    Shapes:
        scores: [b, outputs]
        labels: [b], or [b, outputs]
        returns: []
    """
    if isinstance(tuned.head, ClassificationHead):
        return F.cross_entropy(scores, labels.long())
    return F.mse_loss(scores, labels.to(scores.dtype).view_as(scores))
