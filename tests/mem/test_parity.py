"""The swarm gives transformers' own tokens, ids for ids, whatever the chain."""

from __future__ import annotations

import queue
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trio
from transformers import (
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from client.errors import InvalidInput
from tests.checkpoints import make_checkpoint
from tests.mem.conftest import Reference, reference
from tests.mem.swarms import Span, blocking, generate, swarm_of, until

CHAINS: dict[str, list[Span]] = {
    "one-node": [(0, 5)],
    "two-nodes": [(0, 2), (2, 5)],
    "three-nodes": [(0, 1), (1, 4), (4, 5)],
    "overlapping": [(0, 3), (2, 5)],
}
PROMPT = torch.tensor([[40, 41, 90, 17, 200, 33, 12]])
ROWS = torch.tensor([[40, 41, 90, 17], [9, 8, 7, 6], [300, 301, 11, 55]])


class StopAfter(StoppingCriteria):  # type: ignore[misc]  # transformers has no types here
    """Stops at a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "temperature": {"do_sample": True, "temperature": 0.7, "seed": 3},
    "top-k": {"do_sample": True, "top_k": 7, "seed": 4},
    "top-p": {"do_sample": True, "top_p": 0.8, "temperature": 1.3, "top_k": 0, "seed": 5},
    "repetition-penalty": {"do_sample": False, "repetition_penalty": 1.4},
    "no-repeat-ngram": {"do_sample": False, "no_repeat_ngram_size": 2},
    "min-new-tokens": {"do_sample": True, "min_new_tokens": 10, "seed": 6},
    "stopping-criteria": {"do_sample": False, "stopping_criteria": StoppingCriteriaList([StopAfter(11)])},
    "time-criteria": {"do_sample": False, "stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(600)])},
    "no-cache": {"do_sample": False, "use_cache": False},
    "several-sequences": {"do_sample": True, "num_return_sequences": 3, "seed": 7},
    "beams": {"do_sample": False, "num_beams": 4},
    "beams-several": {"do_sample": False, "num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.4},
    "beams-sampled": {"do_sample": True, "num_beams": 3, "seed": 8},
    "beams-early": {"do_sample": False, "num_beams": 3, "early_stopping": True, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("chain", CHAINS)
async def test_every_way_of_generating(odd: Reference, chain: str) -> None:
    async with swarm_of(odd.folder, CHAINS[chain]) as swarm:
        model = await swarm.model(odd.folder)
        wrong = {}
        for name, options in OPTIONS.items():
            for prompt in (PROMPT, ROWS):
                theirs = generate(odd.model, prompt, max_new_tokens=12, **options)
                ours = await blocking(partial(generate, model, prompt, max_new_tokens=12, **options))
                if ours != theirs:
                    wrong[name, len(prompt)] = (ours, theirs)
        assert not wrong
        await until(lambda: all(node.sessions == 0 for node in swarm.nodes))


PADDED = torch.tensor([[0, 0, 0, 41, 90, 17], [5, 6, 7, 8, 9, 10], [0, 22, 23, 24, 25, 26]])
PADDED_MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("name", ["greedy", "top-p", "beams", "repetition-penalty", "several-sequences"])
async def test_rows_of_different_lengths(odd: Reference, name: str) -> None:
    options = {**OPTIONS[name], "attention_mask": PADDED_MASK, "max_new_tokens": 12}
    async with swarm_of(odd.folder, [(0, 2), (2, 5)]) as swarm:
        model = await swarm.model(odd.folder)
        assert await blocking(partial(generate, model, PADDED, **options)) == generate(odd.model, PADDED, **options)
        theirs = odd.model(PADDED, attention_mask=PADDED_MASK).logits
        ours = await blocking(lambda: model(PADDED, attention_mask=PADDED_MASK).logits)
        assert torch.allclose(ours[PADDED_MASK.bool()], theirs[PADDED_MASK.bool()], atol=1e-4)


async def test_beams_and_padding_outlive_a_node(odd: Reference) -> None:
    options: dict[str, Any] = {**OPTIONS["beams"], "attention_mask": PADDED_MASK, "max_new_tokens": 14}
    async with swarm_of(odd.folder, [(0, 2), (2, 5), (2, 5)]) as swarm:
        model = await swarm.model(odd.folder)
        steps = 0

        class DiesAfterSix(StoppingCriteria):  # type: ignore[misc]
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
                nonlocal steps
                steps += 1
                if steps == 6:
                    victim = next(node for node in swarm.nodes if node.sessions and node.offer.start == 2)
                    trio.from_thread.run(victim.die)
                return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        criteria = StoppingCriteriaList([DiesAfterSix()])
        ours = await blocking(partial(generate, model, PADDED, stopping_criteria=criteria, **options))
        assert ours == generate(odd.model, PADDED, **options)
        assert steps >= 6


LAYOUTS: dict[str, dict[str, Any]] = {
    "heads-3": {"heads": 3, "hidden": 24, "layers": 3},
    "heads-12": {"heads": 12, "hidden": 48},
    "post-layernorm": {"post_layernorm": True},
    "no-prefix": {"prefix": False},
    "bin-shards": {"format": "bin"},
    "bin-no-prefix": {"format": "bin", "prefix": False},
    "bin-single": {"format": "bin", "shards_of_blocks": None},
    "safetensors-single": {"shards_of_blocks": None},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_every_layout_of_checkpoints(tmp_path: Path, layout: str) -> None:
    theirs = reference(make_checkpoint(tmp_path / "some-bloom", seed=len(layout), **LAYOUTS[layout]))
    last = theirs.n_blocks
    async with swarm_of(theirs.folder, [(0, 2), (2, last)]) as swarm:
        for options in (OPTIONS["greedy"], OPTIONS["temperature"]):
            assert await swarm.generate(theirs.folder, PROMPT % 24, max_new_tokens=16, **options) == generate(
                theirs.model, PROMPT % 24, max_new_tokens=16, **options
            )


@pytest.mark.parametrize("spans", [[(0, 8)], [(0, 3), (3, 6), (6, 8)]], ids=["one-node", "three-nodes"])
async def test_the_model_that_ships(tiny: Reference, spans: list[Span]) -> None:
    async with swarm_of(tiny.folder, spans) as swarm:
        model = await swarm.client.model("bloom-tiny")
        ids = model.tokenizer("In the beginning", return_tensors="pt").input_ids
        for options in (OPTIONS["greedy"], OPTIONS["top-p"]):
            theirs = generate(tiny.model, ids, max_new_tokens=24, **options)
            assert await blocking(partial(generate, model, ids, max_new_tokens=24, **options)) == theirs


async def test_logits_are_those_of_transformers(odd: Reference) -> None:
    async with swarm_of(odd.folder, CHAINS["three-nodes"]) as swarm:
        model = await swarm.model(odd.folder)
        with torch.inference_mode():
            theirs = odd.model(ROWS).logits
        ours = (await blocking(lambda: model(ROWS))).logits
        assert ours.shape == theirs.shape == (3, 4, 320)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        last = (await blocking(lambda: model(ROWS, logits_to_keep=1))).logits
        torch.testing.assert_close(last, theirs[:, -1:], atol=1e-4, rtol=1e-4)
        chosen = (await blocking(lambda: model(ROWS, logits_to_keep=torch.tensor([0, 2])))).logits
        torch.testing.assert_close(chosen, theirs[:, [0, 2]], atol=1e-4, rtol=1e-4)


async def test_the_loss_is_that_of_transformers(odd: Reference) -> None:
    some = ROWS.clone()
    some[0, :2] = -100
    cases: dict[str, dict[str, Any]] = {
        "all": {"labels": ROWS},
        "some": {"labels": some},
        "narrow integers": {"labels": ROWS.int()},
        "none that counts": {"labels": torch.full_like(ROWS, -100)},
        "divided by": {"labels": some, "num_items_in_batch": 5},
        "as a tuple": {"labels": some, "return_dict": False},
    }
    async with swarm_of(odd.folder, CHAINS["two-nodes"]) as swarm:
        model: Any = await swarm.model(odd.folder)
        for name, options in cases.items():
            with torch.inference_mode():
                theirs = odd.model(ROWS, **(options | {"labels": options["labels"].long()}))
            ours = await blocking(partial(model, ROWS, **options))
            if options.get("return_dict") is False:
                assert isinstance(ours, tuple)
            assert torch.allclose(ours[0], theirs[0], atol=1e-4, rtol=1e-4, equal_nan=True), name
        assert (await blocking(lambda: model(ROWS))).loss is None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "labels of another shape": ({"labels": ROWS[:, :3]}, r"integer tensor of input_ids' shape, \[3, 4\]"),
    "labels that are no ids": ({"labels": ROWS.float()}, "integer tensor"),
    "labels that are no tensor": ({"labels": ROWS.tolist()}, "integer tensor"),
    "labels outside": ({"labels": ROWS + 300}, "labels must lie in 0 to 319, or be -100"),
    "labels below": ({"labels": ROWS - 10}, "labels must lie in 0 to 319, or be -100"),
    "labels of some positions": ({"labels": ROWS, "logits_to_keep": 2}, "leave logits_to_keep out"),
    "attentions": ({"output_attentions": True}, "output_attentions cannot be given: it stays on the nodes"),
    "embeddings": ({"inputs_embeds": torch.zeros(3, 4, 48)}, "inputs_embeds are not taken: pass input_ids"),
}


async def test_what_cannot_be_given_is_refused_and_never_left_out(odd: Reference) -> None:
    async with swarm_of(odd.folder, CHAINS["one-node"]) as swarm:
        model: Any = await swarm.model(odd.folder)
        for options, says in REFUSED.values():
            with pytest.raises(InvalidInput, match=says):
                await blocking(partial(model, ROWS, **options))
        with pytest.raises(InvalidInput, match="cannot be given"):
            await blocking(partial(generate, model, ROWS, max_new_tokens=2, output_attentions=True))
        with pytest.raises(InvalidInput, match=r"session is what model\.session\(\) gives, not int"):
            await blocking(lambda: generate(model, ROWS, session=3))
        with pytest.raises(InvalidInput, match="max_length is 0: give a number of tokens above 0"):
            await blocking(lambda: model.session(max_length=0))
        with pytest.raises(TypeError, match="max_length is a number of tokens, not str"):
            await blocking(lambda: model.session(max_length="12"))


async def test_generation_ends_at_the_end_of_text_token(odd: Reference) -> None:
    whole = generate(odd.model, PROMPT, max_new_tokens=12, do_sample=False)[0]
    stop_at = whole[PROMPT.shape[1] + 4]
    async with swarm_of(odd.folder, [(0, 5)]) as swarm:
        options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": stop_at}
        theirs = generate(odd.model, PROMPT, **options)
        assert theirs[0][-1] == stop_at
        assert len(theirs[0]) < len(whole)
        assert await swarm.generate(odd.folder, PROMPT, **options) == theirs


class Collects(TextStreamer):  # type: ignore[misc]  # transformers has no types here
    """Notes what a streamer is given."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


async def test_streamers_get_the_same_tokens(odd: Reference) -> None:
    async with swarm_of(odd.folder, CHAINS["two-nodes"]) as swarm:
        model = await swarm.model(odd.folder)
        streamer = Collects()
        ours = await blocking(lambda: generate(model, PROMPT, max_new_tokens=9, do_sample=False, streamer=streamer))
        assert ours == generate(odd.model, PROMPT, max_new_tokens=9, do_sample=False)
        assert streamer.ids == ours[0]
        assert streamer.ended

        texts = TextIteratorStreamer(model.tokenizer, timeout=10)
        await blocking(lambda: generate(model, PROMPT, max_new_tokens=9, do_sample=False, streamer=texts))
        try:
            streamed = "".join(texts)
        except queue.Empty:
            pytest.fail("the streamer was not ended")
        assert streamed == model.tokenizer.decode(ours[0])


async def test_a_batch_gives_what_each_row_gives_alone(odd: Reference) -> None:
    async with swarm_of(odd.folder, CHAINS["two-nodes"]) as swarm:
        model = await swarm.model(odd.folder)
        together = await blocking(lambda: generate(model, ROWS, max_new_tokens=10, do_sample=False))
        for row, expected in zip(ROWS, together, strict=True):
            alone = await blocking(partial(generate, model, row[None], max_new_tokens=10, do_sample=False))
            assert alone == [expected]
