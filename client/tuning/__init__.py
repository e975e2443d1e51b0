"""Fine-tuning: what is trained stays with the client, the model's blocks on the nodes never change.

    from client.tuning import LoRA

    model = swarm.model("bloom-tiny", tuning=LoRA(rank=8))
    optimizer = torch.optim.AdamW(model.tuned.parameters(), lr=1e-3)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.save_pretrained("my-adapter")

Importing this loads no torch.
"""

from __future__ import annotations

from client.tuning.methods import (
    Between,
    ClassificationHead,
    DeepPromptTuning,
    LoRA,
    PromptTuning,
    RegressionHead,
)

__all__ = ["Between", "ClassificationHead", "DeepPromptTuning", "LoRA", "PromptTuning", "RegressionHead"]
