"""Every decoding mode that transformers has in itself gives its own tokens in the swarm, ids for ids."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, WatermarkingConfig

from tests.mem.conftest import Reference
from tests.mem.swarms import blocking, generate, swarm_of
from tests.mem.test_parity import PADDED, PADDED_MASK, PROMPT, ROWS, Collects

SPANS = [(0, 2), (2, 5)]


class OnlyEven(LogitsProcessor):  # type: ignore[misc]  # transformers has no types here
    """Lets only even tokens be."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, 1::2] = -torch.inf
        return scores


def near(row: int, ids: torch.Tensor) -> list[int]:
    """Tokens that may follow: some beside the last one."""
    last = int(ids[-1])
    return [(last + step * (row + 1)) % 320 for step in range(1, 30)]


CONSTRAINED: dict[str, dict[str, Any]] = {
    "prefix-allowed-tokens": {"prefix_allowed_tokens_fn": near},
    "bad-words": {"bad_words_ids": [[n] for n in range(0, 300, 3)] + [[7, 8]]},
    "sequence-bias": {"sequence_bias": [[[n], 4.0] for n in range(40, 60)] + [[[41, 42], -9.0]]},
    "suppress-tokens": {"suppress_tokens": list(range(0, 320, 2))},
    "begin-suppress-tokens": {"begin_suppress_tokens": list(range(1, 320, 2))},
    "forced-end": {"forced_eos_token_id": 11, "eos_token_id": 11},
    "forced-begin": {"forced_bos_token_id": 12},
    "min-length": {"min_length": 11, "eos_token_id": list(range(0, 320, 5))},
    "end-decays": {"exponential_decay_length_penalty": (3, 1.4), "eos_token_id": 11},
    "processors": {"logits_processor": LogitsProcessorList([OnlyEven()])},
    "no-repeat-of-prompt": {"encoder_no_repeat_ngram_size": 1},
    "renormalised": {"renormalize_logits": True, "remove_invalid_values": True},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=3.0, seeding_scheme="lefthash")},
    "guided": {"guidance_scale": 1.5},
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "seed": 5, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
}


@pytest.mark.parametrize("name", CONSTRAINED)
async def test_constrained_decoding(odd: Reference, name: str) -> None:
    async with swarm_of(odd.folder, SPANS) as swarm:
        model = await swarm.model(odd.folder)
        wrong = {}
        for way, options in WAYS.items():
            asked = {**CONSTRAINED[name], **options, "max_new_tokens": 8}
            for prompt in (PROMPT, ROWS):
                theirs = generate(odd.model, prompt, **asked)
                ours = await blocking(partial(generate, model, prompt, **asked))
                if ours != theirs:
                    wrong[way, len(prompt)] = (ours, theirs)
        assert not wrong


SAMPLERS: dict[str, dict[str, Any]] = {
    "typical": {"typical_p": 0.6},
    "min-p": {"min_p": 0.01},
    "top-h": {"top_h": 0.7},
    "epsilon": {"epsilon_cutoff": 0.003},
    "eta": {"eta_cutoff": 0.003},
    "all": {"top_k": 0},
}


@pytest.mark.parametrize("name", SAMPLERS)
async def test_samplers(odd: Reference, name: str) -> None:
    asked = {**SAMPLERS[name], "do_sample": True, "seed": 9, "num_return_sequences": 3, "max_new_tokens": 10}
    async with swarm_of(odd.folder, SPANS) as swarm:
        model = await swarm.model(odd.folder)
        for prompt in (PROMPT, ROWS):
            ours = await blocking(partial(generate, model, prompt, **asked))
            assert ours == generate(odd.model, prompt, **asked)


def assisted(odd: Reference) -> dict[str, dict[str, Any]]:
    return {
        "assistant": {"assistant_model": odd.model},
        "prompt-lookup": {"prompt_lookup_num_tokens": 4},
        "prompt-lookup-unigram": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
    }


REPEATS = torch.tensor([[40, 41, 90, 17, 40, 41, 90, 17, 40, 41]])


@pytest.mark.parametrize("name", ["assistant", "prompt-lookup", "prompt-lookup-unigram"])
async def test_assisted_decoding(odd: Reference, name: str) -> None:
    options = assisted(odd)[name]
    async with swarm_of(odd.folder, SPANS) as swarm:
        model = await swarm.model(odd.folder)
        for way in ({"do_sample": False}, {"do_sample": True, "seed": 4}):
            asked: dict[str, Any] = {**options, **way, "max_new_tokens": 20}
            theirs = generate(odd.model, REPEATS, **asked)
            assert await blocking(partial(generate, model, REPEATS, **asked)) == theirs


# What generate and forward give besides ids


def told(model: Any, ids: torch.Tensor, *, seed: int | None = None, **options: Any) -> Any:
    """All that ``generate`` gives."""
    if seed is not None:
        torch.manual_seed(seed)
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 7, **options}
    return model.generate(
        ids, return_dict_in_generate=True, output_scores=True, output_logits=True, output_hidden_states=True, **asked
    )


def check_told(ours: Any, theirs: Any) -> None:
    """Ids for ids, and all else near enough."""
    assert type(ours) is type(theirs)
    assert torch.equal(ours.sequences, theirs.sequences)
    if "beam_indices" in theirs:
        assert torch.equal(ours.beam_indices, theirs.beam_indices)
        torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, atol=1e-4, rtol=1e-4)
    for name in ("scores", "logits"):
        for one, other in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    for step, other_step in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        check_states(step, other_step)


def check_states(ours: Any, theirs: Any, where: torch.Tensor | None = None) -> None:
    """As many, of the same shapes, and the same within what is left of fp32 after five blocks."""
    assert len(ours) == len(theirs) == 6
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        if where is not None:
            one, other = one[where], other[where]
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


TOLD: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "seed": 3, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "beams-sampled": {"do_sample": True, "seed": 3, "num_beams": 3},
    "padded": {"do_sample": False, "attention_mask": PADDED_MASK},
}


@pytest.mark.parametrize("name", TOLD)
async def test_scores_logits_and_hidden_states(odd: Reference, name: str) -> None:
    options = TOLD[name]
    async with swarm_of(odd.folder, SPANS) as swarm:
        model = await swarm.model(odd.folder)
        prompts = [PADDED] if name == "padded" else [PROMPT, ROWS]
        for prompt in prompts:
            ours = await blocking(partial(told, model, prompt, **options))
            theirs = told(odd.model, prompt, **options)
            if name == "padded":  # what stands at padding is nobody's
                theirs.hidden_states, ours.hidden_states = theirs.hidden_states[1:], ours.hidden_states[1:]
            check_told(ours, theirs)


async def test_hidden_states_of_assisted_decoding(odd: Reference) -> None:
    async with swarm_of(odd.folder, SPANS) as swarm:
        model = await swarm.model(odd.folder)
        for options in assisted(odd).values():
            asked = {**options, "do_sample": False, "max_new_tokens": 12}
            check_told(await blocking(partial(told, model, REPEATS, **asked)), told(odd.model, REPEATS, **asked))


@pytest.mark.parametrize("spans", [[(0, 5)], SPANS, [(0, 1), (1, 4), (4, 5)], [(0, 3), (2, 5)]])
async def test_hidden_states_of_forward(odd: Reference, spans: list[tuple[int, int]]) -> None:
    async with swarm_of(odd.folder, spans) as swarm:
        model: Any = await swarm.model(odd.folder)
        with torch.inference_mode():
            theirs = odd.model(ROWS, output_hidden_states=True)
            padded = odd.model(PADDED, attention_mask=PADDED_MASK, output_hidden_states=True)
        for to_keep in (0, 1, torch.tensor([0, 2])):
            asked = partial(model, ROWS, output_hidden_states=True, logits_to_keep=to_keep)
            ours = await blocking(asked)
            check_states(ours.hidden_states, theirs.hidden_states)
            kept = theirs.logits[:, slice(-to_keep, None) if isinstance(to_keep, int) else to_keep]
            torch.testing.assert_close(ours.logits, kept, atol=1e-4, rtol=1e-4)
        ours = await blocking(partial(model, PADDED, attention_mask=PADDED_MASK, output_hidden_states=True))
        check_states(ours.hidden_states, padded.hidden_states, PADDED_MASK.bool())
        assert (await blocking(partial(model, ROWS))).hidden_states is None
        assert len(await blocking(partial(model, ROWS, output_hidden_states=True, return_dict=False))) == 3


# Contrastive search, which transformers has no longer in itself


def contrastive(model: Any, ids: torch.Tensor, alpha: float, top_k: int, new: int, mask: torch.Tensor) -> torch.Tensor:
    """Contrastive search as its paper has it, everything computed anew for each candidate, one row after another."""
    found = []
    for row, row_mask in zip(ids, mask, strict=True):
        tokens, seen = row[None], row_mask[None]
        for _ in range(new):
            likeliest, candidates = model(tokens, attention_mask=seen).logits[0, -1].softmax(-1).topk(top_k)
            seen = torch.cat([seen, torch.ones(1, 1, dtype=torch.long)], dim=1)
            values = []
            for share, candidate in zip(likeliest, candidates, strict=True):
                longer = torch.cat([tokens, candidate.reshape(1, 1)], dim=1)
                hidden = model(longer, attention_mask=seen, output_hidden_states=True).hidden_states[-1][0]
                alike = torch.cosine_similarity(hidden[:-1], hidden[-1:], dim=-1)[seen[0, :-1].bool()].max()
                values.append((1 - alpha) * share - alpha * alike)
            tokens = torch.cat([tokens, candidates[torch.stack(values).argmax()].reshape(1, 1)], dim=1)
        found.append(tokens[0])
    return torch.stack(found)


@pytest.mark.parametrize("alpha", [0.2, 0.6, 0.9])
async def test_contrastive_search(odd: Reference, alpha: float) -> None:
    async with swarm_of(odd.folder, SPANS) as swarm:
        model = await swarm.model(odd.folder)
        for prompt, mask in ((PROMPT, torch.ones_like(PROMPT)), (ROWS, torch.ones_like(ROWS)), (PADDED, PADDED_MASK)):
            with torch.inference_mode():
                theirs = contrastive(odd.model, prompt, alpha, 4, 8, mask).tolist()
            asked: dict[str, Any] = {"penalty_alpha": alpha, "top_k": 4, "max_new_tokens": 8, "attention_mask": mask}
            assert await blocking(partial(generate, model, prompt, **asked)) == theirs


async def test_contrastive_search_with_all_that_belongs_to_it(odd: Reference) -> None:
    with torch.inference_mode():
        expected = contrastive(odd.model, PROMPT, 0.6, 4, 12, torch.ones_like(PROMPT))
    config = GenerationConfig(penalty_alpha=0.6, top_k=4, max_new_tokens=12)
    async with swarm_of(odd.folder, SPANS) as swarm:
        model: Any = await swarm.model(odd.folder)

        def calls() -> None:
            streamer = Collects()
            assert torch.equal(model.generate(PROMPT, config, streamer=streamer), expected)
            assert streamer.ids == expected[0].tolist()
            end = int(expected[0, 11])
            ended = model.generate(ROWS, generation_config=config, eos_token_id=end, pad_token_id=3)
            for row, whole in zip(ended.tolist(), model.generate(ROWS, config).tolist(), strict=True):
                stop = whole.index(end, 4) + 1 if end in whole[4:] else len(whole)
                assert row[:stop] == whole[:stop]
                assert set(row[stop:]) <= {3}
            with model.session() as session:
                first = model.generate(PROMPT, config, max_new_tokens=5, session=session)
                assert torch.equal(model.generate(first, config, max_new_tokens=7, session=session), expected)
            everything = told(model, PROMPT, penalty_alpha=0.6, top_k=4, do_sample=False)
            assert torch.equal(everything.sequences, expected[:, :14])
            with torch.inference_mode():
                states = odd.model(expected[:, :13], output_hidden_states=True)
            check_states(everything.hidden_states[0], [state[:, :7] for state in states.hidden_states])
            for step, given in enumerate(everything.hidden_states[1:], start=7):
                check_states(given, [state[:, step : step + 1] for state in states.hidden_states])
            for step, logits in enumerate(everything.logits, start=6):
                torch.testing.assert_close(logits, states.logits[:, step], atol=1e-4, rtol=1e-4)
            assert len(everything.scores) == 7

        await blocking(calls)


MOVED: dict[str, dict[str, Any]] = {
    "Group Beam Search": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "Constrained Beam Search": {"num_beams": 3, "force_words_ids": [[7, 8]]},
    "Dola Generation": {"dola_layers": "low"},
}


@pytest.mark.parametrize("name", MOVED)
async def test_modes_that_transformers_has_no_longer_are_refused_alike(odd: Reference, name: str) -> None:
    asked = {**MOVED[name], "do_sample": False, "max_new_tokens": 4}
    async with swarm_of(odd.folder, SPANS) as swarm:
        model = await swarm.model(odd.folder)
        for each in (odd.model, model):
            with pytest.raises(ValueError, match=f"{name} requires `trust_remote_code=True`"):
                await blocking(partial(generate, each, PROMPT, **asked))


async def test_decoding_of_ones_own(odd: Reference, tmp_path: Path) -> None:
    """As the modes that transformers loads from its hub: a folder with a function, or the function itself."""
    script = """
def second_best(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    import torch
    unfinished, first = True, True
    while unfinished:
        new = None if first else 1
        inputs = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=new, is_first_iteration=first, **model_kwargs
        )
        outputs = model(**inputs, return_dict=True)
        best = outputs.logits[:, -1].topk(2).indices[:, 1:]
        input_ids = torch.cat([input_ids, best], dim=1)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        unfinished, first = not stopping_criteria(input_ids, None).all(), False
    return input_ids


def generate(model, *args, custom_generate=None, **kwargs):
    from transformers import GenerationMixin

    return GenerationMixin.generate(model, *args, custom_generate=second_best, **kwargs)
"""
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(script)
    names: dict[str, Any] = {}
    exec(script, names)  # the text above
    async with swarm_of(odd.folder, SPANS) as swarm:
        model = await swarm.model(odd.folder)
        for custom in (names["second_best"], str(tmp_path)):
            asked: dict[str, Any] = {"custom_generate": custom, "max_new_tokens": 6, "do_sample": False}
            asked |= {"trust_remote_code": True} if isinstance(custom, str) else {}
            for prompt in (PROMPT, ROWS):
                theirs = generate(odd.model, prompt, **asked)
                assert await blocking(partial(generate, model, prompt, **asked)) == theirs
