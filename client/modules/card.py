"""The page that describes a module to people, in the form that the Hugging Face hub shows."""

from __future__ import annotations

import json

from client.modules.description import Description

CARD_FILE = "README.md"


def spell_card(name: str, description: Description, licence: str) -> str:
    """A model card. All that goes in has been checked: nothing in it can be taken for YAML or HTML."""
    front = [
        "---",
        f"base_model: {json.dumps(description.model)}",
        f"license: {json.dumps(licence.lower())}",
        "library_name: peft",
        'tags: ["raceme"]',
        "---",
    ]
    lines = [
        f"# {name}",
        "",
        f"A module ({description.method}) for `{description.model}`, whose digest is `{description.model_digest}`.",
    ]
    if description.parent is not None:
        lines += ["", f"Trained further from the module `{description.parent}`."]
    if description.metrics:
        lines += ["", "| metric | value |", "|---|---|"]
        lines += [f"| {metric} | {value:g} |" for metric, value in sorted(description.metrics.items())]
    lines += [
        "",
        "Use it with Raceme:",
        "",
        "```python",
        "import client",
        "",
        'with client.connect("ADDRESS") as swarm:',
        f'    model = swarm.model({json.dumps(description.model)}, module="{name}@HASH")',
        "```",
    ]
    return "\n".join([*front, "", *lines, ""])
