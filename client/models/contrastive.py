"""Contrastive search: of the likeliest tokens, the one that makes the context least like itself.

transformers has this mode no longer in itself, but on its hub, in a form that asks the cache for tensors. Here each row
of a prompt is ``top_k`` rows in the session from the beginning, as it is with beams: all candidates of a token are
computed in one step, and the chosen one's row takes the others' places in the next.

Source: Su et al., A Contrastive Framework for Neural Text Generation (NeurIPS 2022), eq. 5; the ids are those of
``generate(penalty_alpha=..., top_k=...)`` of transformers 4.55.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    from client.models.bloom import DistributedBloomForCausalLM
    from client.models.cache import SessionCache


def asks_for_contrastive(model: DistributedBloomForCausalLM, args: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether these are arguments of ``generate``, after the inputs, that ask for contrastive search."""
    given = args[0] if args else options.get("generation_config")
    alpha = options.get("penalty_alpha", getattr(given or model.generation_config, "penalty_alpha", None))
    if not alpha:
        return False
    named = {name: value for name, value in options.items() if name != "generation_config"}
    config, _ = model._prepare_generation_config(given, **named)
    mode = config.get_generation_mode(options.get("assistant_model"))
    return bool(mode == GenerationMode.CONTRASTIVE_SEARCH)


def contrastive_search(
    model: DistributedBloomForCausalLM,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,  # transformers would take what is named here out of them
) -> Tensor | GenerateDecoderOnlyOutput:
    """What transformers calls to decode; its arguments are transformers'.

    Shapes:
        input_ids: [b, t]
        returns: [b, t + new]
    """
    config = generation_config
    session: SessionCache = model_kwargs["past_key_values"]
    attention_mask: Tensor | None = model_kwargs.get("attention_mask")  # [b, t]
    top_k, told = config.top_k, config.return_dict_in_generate
    rows = input_ids.shape[0]
    scores: tuple[Tensor, ...] = ()
    raw: tuple[Tensor, ...] = ()
    states: tuple[tuple[Tensor, ...], ...] = ()
    wants_states = bool(told and config.output_hidden_states)
    pad = getattr(config, "_pad_token_tensor", None)
    has_end = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask  # [b, t]
    unfinished = torch.ones(rows, dtype=torch.long)

    session.position = 0  # of all tokens, hidden states are needed
    last, given = model.run_blocks(input_ids.repeat_interleave(top_k, dim=0), session, every_block=wants_states)
    context = normalize(last[::top_k], dim=-1)  # [b, t, d]
    logits = model.head.lm_head(last[::top_k, -1])  # [b, v]
    step_states = None if given is None else tuple(state[::top_k] for state in given)
    while bool(unfinished.any()):
        processed = logits_processor(input_ids, logits)  # [b, v]
        likeliest, candidates = processed.softmax(dim=-1).topk(top_k, dim=-1)  # [b, k]
        if told:
            scores += (processed,) if config.output_scores else ()
            raw += (logits,) if config.output_logits else ()
            states += () if step_states is None else (step_states,)

        last, given = model.run_blocks(candidates.reshape(-1, 1), session, every_block=wants_states)
        new = normalize(last, dim=-1).reshape(rows, top_k, -1)  # [b, k, d]
        alike = torch.einsum("btd,bkd->bkt", context, new)
        alike = alike.masked_fill(mask[:, None] == 0, -torch.inf).amax(dim=-1)  # [b, k]
        chosen = ((1 - config.penalty_alpha) * likeliest - config.penalty_alpha * alike).argmax(dim=-1)  # [b]

        row = torch.arange(rows)
        places = row * top_k + chosen  # [b], of the chosen ones among the session's rows
        session.reorder_cache(places.repeat_interleave(top_k))
        context = torch.cat([context, new[row, chosen][:, None]], dim=1)
        mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
        logits = model.head.lm_head(last[places, -1])
        step_states = None if given is None else tuple(state[places] for state in given)

        tokens = candidates[row, chosen]  # [b]
        if has_end and pad is not None:
            tokens = tokens * unfinished + pad * (1 - unfinished)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        if streamer is not None:
            streamer.put(tokens.cpu())
        unfinished &= ~stopping_criteria(input_ids, scores)
    if streamer is not None:
        streamer.end()
    if not told:
        return input_ids
    return GenerateDecoderOnlyOutput(
        sequences=input_ids,
        scores=scores or None,
        logits=raw or None,
        hidden_states=states or None,
        past_key_values=session,
    )
