"""From a name to a model: its files, what nodes must hold to compute for it, what is trained or has been."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import AutoTokenizer, BloomConfig, GenerationConfig

from client.choices import Choices
from client.errors import InvalidInput, UnknownModel
from client.models.bloom import DistributedBloomForCausalLM
from client.models.local import LocalBlocks
from client.modules.obtaining import ObtainedModule, obtain
from client.tuning import peft_files
from client.tuning.heads import head_config
from client.tuning.methods import DeepPromptTuning, Method, PromptTuning, read_methods
from client.tuning.tuned import Tuned
from compute.bloom import span_digest
from compute.checkpoint import Checkpoint
from compute.errors import ModelNotFound
from compute.models import find_checkpoint, is_folder
from compute.peer_models import find_at_peers, fits_pin
from net.files.models import split_pin
from net.protocol.announcement import MAX_BLOCKS

if TYPE_CHECKING:
    from os import PathLike

    from client.portal import Portal
    from client.swarm import AsyncSwarm, ServedModel
    from net.files.models import FileProgress, PeerModels
    from net.modules.finding import Check
    from net.protocol.announcement import NodeAnnouncement

MAX_CHECKED_BYTES = 512 * 1024 * 1024  # hashed when a model is made: about a second


def load(
    name: str,
    served: Sequence[ServedModel],
    swarm: AsyncSwarm,
    portal: Portal,
    *,
    tuning: object = None,
    module: str | PathLike[str] | None = None,
    progress: FileProgress | None = None,
    **options: Any,
) -> DistributedBloomForCausalLM:
    """The model called ``name`` (or whose checkpoint is the folder ``name``), served by ``served``'s nodes.

    Args:
        name, tuning, progress, options: see ``AsyncSwarm.model``.
        module: what was trained before: a folder, or what somebody has published.
        served: models.
        swarm, portal: through which it is used.

    Raises:
        UnknownModel, TypeError, InvalidInput: see ``AsyncSwarm.model``.
        CheckpointError: its files are damaged.
    """
    if not isinstance(name, str):
        raise TypeError(f"a model's name, or its folder's path, is a str, not {type(name).__name__}")
    peers = Choices.read(MAX_BLOCKS, allow=options.get("allow"), block=options.get("block", ())).to_wishes()
    models = swarm.peer_models(lambda node: peers.permits_peer(node.peer_id), progress)
    checkpoint = _find_files(name, served, models, portal)
    match = _match(name, checkpoint, served)
    choices = Choices.read(match.n_blocks, **options)
    methods = None if tuning is None else read_methods(tuning)
    if (methods or module is not None) and choices.local_blocks:
        raise InvalidInput("local_blocks and tuning do not go together yet: leave one of them out")
    config = BloomConfig.from_json_file(str(checkpoint.file("config.json")))
    generation_config = _load_generation_config(checkpoint, config)
    embeddings = checkpoint.load_embeddings()
    tokenizer = _load_tokenizer(checkpoint)
    words, parent = embeddings.word_embeddings.weight, None  # [v, d]
    tuned = None if methods is None else Tuned(checkpoint.config, methods, words, _starts(methods, tokenizer))
    if module is not None:
        tell = None if progress is None else partial(progress, str(module))
        get = partial(obtain, swarm, module, checkpoint.digest, progress=tell)
        tuned, parent = _take_module(lambda check: portal.call(partial(get, check=check)), tuned, checkpoint, words)
    if tuned is not None:
        head_config(config, tuned)
    digests = checkpoint.block_digests_at_hand(MAX_CHECKED_BYTES)
    return DistributedBloomForCausalLM(
        config,
        embeddings=embeddings,
        head=checkpoint.load_head(embeddings=embeddings),
        tokenizer=tokenizer,
        generation_config=generation_config,
        served=match,
        swarm=swarm,
        portal=portal,
        accepts=_weights_check(digests),
        weights=None if digests is None else span_digest(digests),
        choices=choices,
        local=LocalBlocks.load(checkpoint, choices.local_blocks) if choices.local_blocks else None,
        tuned=tuned,
        parent=parent,
    )


# Files


def _find_files(name: str, served: Sequence[ServedModel], models: PeerModels, portal: Portal) -> Checkpoint:
    """From here, if they are, and else from peers."""
    plain, pin = split_pin(name)
    is_known = any(plain in model.names for model in served)
    if not is_known and not Path(name).is_dir() and ("/" not in name or name.startswith((".", "/"))):
        raise UnknownModel(f"nobody serves {plain}; {_spell(served)}")
    try:
        checkpoint = find_checkpoint(plain)
        if pin is None or fits_pin(checkpoint, pin, models.remembered):
            return checkpoint
    except ModelNotFound:
        if is_folder(name) or not is_known:
            raise
    try:
        return find_at_peers(models, plain, pin, portal.call)
    except ModelNotFound as error:
        raise UnknownModel(
            f"{plain} is served, but its files are not on this machine (the client holds embeddings and head), and "
            f"{error}: name the folder of its checkpoint instead, with a / in its path, as ./{plain}"
        ) from error


def _load_generation_config(checkpoint: Checkpoint, config: BloomConfig) -> GenerationConfig:
    path = checkpoint.find_file("generation_config.json")
    if path is None:
        return GenerationConfig.from_model_config(config)
    return GenerationConfig.from_pretrained(path.parent)


def _load_tokenizer(checkpoint: Checkpoint) -> Any:
    path = checkpoint.find_file("tokenizer.json")
    if path is None:
        return None
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        checkpoint.find_file(name)  # fetched beside it, where files are fetched
    return AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False)


# Nodes


def _match(name: str, checkpoint: Checkpoint, served: Sequence[ServedModel]) -> ServedModel:
    """The served model whose files these are, called as the caller does where some nodes do so, too.

    Raises:
        UnknownModel: there is none.
    """
    wanted = (checkpoint.digest, checkpoint.n_blocks)
    match = next((model for model in served if (model.digest, model.n_blocks) == wanted), None)
    if match is None:
        same_name = [model for model in served if checkpoint.name in model.names]
        if same_name:
            raise UnknownModel(
                f"{checkpoint.name} is served with digest {same_name[0].digest[:12]}, but the files here have "
                f"{checkpoint.digest[:12]}: they are different models"
            )
        raise UnknownModel(f"nobody serves {checkpoint.name}; {_spell(served)}")
    plain = split_pin(name)[0]
    return replace(match, name=plain) if plain in match.names else match


def _spell(served: Sequence[ServedModel]) -> str:
    if not served:
        return "the swarm serves no model at all; start a node with: raceme serve MODEL --bootstrap ADDR"
    return "served are: " + ", ".join(sorted(set().union(*(model.names for model in served))))


def _weights_check(digests: Sequence[str] | None) -> Callable[[NodeAnnouncement], bool]:
    """Whether a node announces the weights that the files here hold, where all files are here to tell.

    The model's digest says which tensors there are, the weights' digest what is in them.
    """
    if digests is None:
        return lambda _: True
    return lambda node: node.weights == span_digest(digests[node.start : node.end])


# What is trained, or has been


def _starts(methods: Sequence[Method], tokenizer: Any) -> list[int]:
    """Token ids of the text that a soft prompt begins as.

    Raises:
        UnknownModel: there is a text, but no tokenizer.
    """
    text = next((method.text for method in methods if isinstance(method, PromptTuning | DeepPromptTuning)), None)
    if not text:
        return []
    if tokenizer is None:
        raise UnknownModel("the model's files hold no tokenizer: leave the soft prompt's text out")
    ids: list[int] = tokenizer(text).input_ids
    return ids


def _take_module(
    get: Callable[[Check], ObtainedModule], tuned: Tuned | None, checkpoint: Checkpoint, words: Tensor
) -> tuple[Tuned, str | None]:
    """What a module holds, and its hash, if it is a published one.

    Args:
        get: gets the module, once it has passed a check.
        tuned: what takes the module's numbers; by default, what the module itself says it is.
        checkpoint: of the model.
        words: its word embeddings.

    Shapes:
        words: [v, d]
    """
    taken: list[Tuned] = []

    def take(folder: Path) -> None:
        if tuned is None:
            taken.append(peft_files.read_tuned(checkpoint.config, words, folder))
        else:
            peft_files.read_weights(tuned, folder)
            taken.append(tuned)

    obtained = get(take)
    return taken[-1], None if obtained.manifest is None else obtained.manifest.hash
