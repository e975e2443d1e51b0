"""What was trained as files, in the format of PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``.

LoRA (with a head, too) and soft prompts are read and written as PEFT does; whatever it has no name for (deep prompts, a
head alone, modules between blocks, several of these at once) has the same files with ``"peft_type": "RACEME"``. What
PEFT's fields cannot say is in ``"raceme": {"version": 1, "methods": [...]}`` beside them, which PEFT passes over.

Nothing that is read is run: numbers are looked at before they are taken, each for its name, shape, type and finiteness.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from safetensors.torch import save as to_safetensors
from torch import Tensor

from client.errors import InvalidInput
from client.modules.tensors import read_tensors
from client.tuning.methods import (
    MAX_ALPHA,
    TARGETS,
    Between,
    ClassificationHead,
    DeepPromptTuning,
    LoRA,
    Method,
    PromptTuning,
    RegressionHead,
    read_methods,
)
from client.tuning.tuned import LAYERS, Tuned, n_elements
from compute.bloom import BloomConfig
from net.errors import ModuleError
from net.replacing import FOR_ALL, replace_file

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
MAX_CONFIG_BYTES: Final = 1 << 20
VERSION: Final = 1
LEAST_ITEM_BYTES: Final = 2  # of a number
_PREFIX: Final = "base_model.model."
_OWN: Final = "RACEME"
# Variants of LoRA that compute something else; each with the value that means "no".
_UNSUPPORTED: Final[Mapping[str, tuple[object, ...]]] = {
    "use_dora": (False, None),
    "use_bdlora": (False, None),
    "use_qalora": (False, None),
    "bias": ("none",),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "target_parameters": (None,),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "exclude_modules": (None,),
}


def write(tuned: Tuned, folder: Path, base_model: str) -> None:
    """Put both files into a folder, which is made if need be; each replaces the one before as a whole.

    Args:
        tuned: What to write.
        folder: Where.
        base_model: The name of the model that it is for.

    Raises:
        OSError: it cannot be written; the files that were there are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        _stored_name(tuned, name): parameter.detach().cpu().contiguous()
        for name, parameter in tuned.state_dict().items()
    }
    replace_file(folder / WEIGHTS_FILE, to_safetensors(tensors, metadata={"format": "pt"}), mode=FOR_ALL)
    text = json.dumps(config_of(tuned, base_model), indent=2, sort_keys=True)
    replace_file(folder / CONFIG_FILE, text.encode(), mode=FOR_ALL)


def config_of(tuned: Tuned, base_model: str) -> dict[str, Any]:
    """What ``adapter_config.json`` holds."""
    lora, prompt = tuned.find(LoRA), tuned.find(PromptTuning)
    others = [method for method in tuned.methods if not isinstance(method, LoRA | PromptTuning)]
    heads = [method for method in others if isinstance(method, ClassificationHead | RegressionHead)]
    fields: dict[str, Any] = {
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "task_type": "SEQ_CLS" if heads else "CAUSAL_LM",
    }
    own = {"raceme": {"version": VERSION, "methods": [_spell(method) for method in tuned.methods]}}
    if lora is not None and prompt is None and others == heads:
        return {
            **fields,
            **(own if heads else {}),
            "peft_type": "LORA",
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": 0.0,
            "target_modules": list(lora.targets),
            "bias": "none",
            "fan_in_fan_out": False,
            "modules_to_save": ["classifier", "score"] if heads else None,
        }
    if prompt is not None and lora is None and not others:
        return fields | {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": prompt.tokens,
            "token_dim": tuned.config.hidden_size,
            "num_layers": tuned.config.n_layer,
            "num_attention_heads": tuned.config.n_head,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
        }
    return fields | own | {"peft_type": _OWN}


def read_config(folder: Path) -> tuple[tuple[Method, ...], str | None]:
    """The methods that a folder holds parameters of, but for modules of one's own; and the name of their model.

    Raises:
        InvalidInput: it holds none that can be used; what is wrong.
    """
    path = folder / CONFIG_FILE
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"{folder} holds no trained module: {CONFIG_FILE} cannot be read ({error})") from error
    try:
        if len(data) > MAX_CONFIG_BYTES:
            raise ValueError(f"more than {MAX_CONFIG_BYTES} bytes")
        fields = json.loads(data)
        if not isinstance(fields, dict):
            raise ValueError("no JSON object")
        methods = _methods(fields)
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InvalidInput(f"{path} is damaged, or not PEFT's: {error}") from error
    base = fields.get("base_model_name_or_path")
    return methods, base if isinstance(base, str) else None


def read_tuned(config: BloomConfig, words: Tensor, folder: Path) -> Tuned:
    """What a folder holds, for a model.

    Args:
        config: The model's.
        words: Its word embeddings.
        folder: Where.

    Shapes:
        words: [vocabulary, d]

    Raises:
        InvalidInput: it holds nothing that can be used, or what does not fit the model.
    """
    methods, path = read_config(folder)[0], folder / WEIGHTS_FILE
    wanted = n_elements(config, methods)
    try:
        there = path.stat().st_size // LEAST_ITEM_BYTES
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror or error}") from error
    if wanted > there:  # before memory is taken for as many as somebody else has said
        raise InvalidInput(f"{path} holds {there} numbers at most, but {CONFIG_FILE} speaks of {wanted}")
    tuned = Tuned(config, methods, words)
    read_weights(tuned, folder)
    return tuned


def read_weights(tuned: Tuned, folder: Path) -> None:
    """Take a folder's numbers, all or none.

    Args:
        tuned: Made for the methods that :func:`read_config` gave, and the model.
        folder: Where.

    Raises:
        InvalidInput: a parameter is missing, has another shape or type, or is not finite; or there are others.
    """
    stored = {_stored_name(tuned, name): name for name in tuned.state_dict()}
    shapes = {name: tuple(tuned.state_dict()[own].shape) for name, own in stored.items()}
    try:
        found = read_tensors(folder, shapes)
    except ModuleError as error:
        raise InvalidInput(f"{folder / WEIGHTS_FILE} does not fit: {error}") from error
    tuned.load_state_dict({stored[name]: values.float() for name, values in found.items()})


def _stored_name(tuned: Tuned, name: str) -> str:
    """What a parameter is called in the file: PEFT has a prefix before those of modules."""
    return _PREFIX + name if config_of(tuned, "")["peft_type"] == "LORA" else name


def _spell(method: Method) -> dict[str, Any]:
    match method:
        case PromptTuning():
            return {"kind": "prompt", "tokens": method.tokens}
        case DeepPromptTuning():
            return {"kind": "deep-prompt", "tokens": method.tokens}
        case LoRA():
            return {"kind": "lora", "rank": method.rank, "alpha": method.alpha, "targets": list(method.targets)}
        case ClassificationHead():
            return {"kind": "classification", "labels": list(method.labels)}
        case RegressionHead():
            return {"kind": "regression", "outputs": method.outputs}
        case Between():
            return {"kind": "between", "blocks": list(method.modules)}


def _methods(fields: Mapping[str, Any]) -> tuple[Method, ...]:
    """Raises:
    InvalidInput, ValueError, TypeError, KeyError: none, or nothing that can be used.
    """
    own = fields.get("raceme")
    if isinstance(own, dict):
        if own.get("version") != VERSION:
            raise InvalidInput(
                f"of version {own.get('version')!r:.20}; this Raceme reads version {VERSION}: upgrade it"
            )
        read = [_read(each) for each in own["methods"]]
        return read_methods([method for method in read if method is not None]) if any(read) else ()
    kind = fields.get("peft_type")
    if kind == "PROMPT_TUNING":
        if fields.get("num_transformer_submodules") not in (1, None):
            raise InvalidInput("a soft prompt for an encoder and a decoder does not fit this model")
        return (PromptTuning(fields["num_virtual_tokens"]),)
    if kind == "LORA":
        return _peft_lora(fields)
    raise InvalidInput(f"peft_type {kind!r:.40} is not supported: LORA and PROMPT_TUNING are")


def _peft_lora(fields: Mapping[str, Any]) -> tuple[Method, ...]:
    for name, usual in _UNSUPPORTED.items():
        if name in fields and fields[name] not in usual:
            raise InvalidInput(f"{name} is {fields[name]!r:.60}, which is not supported: train it without")
    targets, rank, alpha = fields["target_modules"], fields["r"], fields["lora_alpha"]
    if not isinstance(targets, list) or not set(targets) <= {*TARGETS, *LAYERS.values()}:
        raise InvalidInput(f"target_modules are {targets!r:.100}: a list of some of {', '.join(TARGETS)} is supported")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= MAX_ALPHA:
        raise InvalidInput(f"lora_alpha is {alpha!r:.40}: a number above 0 is supported")
    lora = LoRA(rank, alpha=alpha, targets=[target.rpartition(".")[2] for target in targets])
    if fields.get("use_rslora"):
        lora = LoRA(rank, alpha=alpha * rank**0.5, targets=lora.targets)
    if fields.get("modules_to_save"):
        raise InvalidInput("modules_to_save without names of labels: load it with tuning=[LoRA(...), a head]")
    return (lora,)


def _read(fields: Mapping[str, Any]) -> Method | None:
    """What :func:`_spell` has written; ``None`` for modules, which come from who wrote them."""
    match fields["kind"]:
        case "prompt":
            return PromptTuning(fields["tokens"])
        case "deep-prompt":
            return DeepPromptTuning(fields["tokens"])
        case "lora":
            return LoRA(fields["rank"], alpha=fields["alpha"], targets=_texts(fields["targets"]))
        case "classification":
            return ClassificationHead(_texts(fields["labels"]))
        case "regression":
            return RegressionHead(fields["outputs"])
        case "between":
            return None
    raise InvalidInput(f"a method {fields['kind']!r:.40}, which this Raceme does not know: upgrade it")


def _texts(given: object) -> Sequence[str]:
    if not isinstance(given, list) or not all(isinstance(each, str) for each in given):
        raise TypeError("no list of names")
    return given
