"""Training through the swarm: the gradients and losses of one machine, whatever is trained and whoever computes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trio
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from client.errors import InvalidInput
from client.swarm import AsyncSwarm
from client.tuning import (
    Between,
    ClassificationHead,
    DeepPromptTuning,
    LoRA,
    PromptTuning,
    RegressionHead,
)
from client.tuning.tuned import Tuned
from tests.checkpoints import make_checkpoint, make_model
from tests.mem.swarms import Span, blocking, generate, swarm_of
from tests.one_machine import generate_locally, local_loss, shake

CHAINS: dict[str, list[Span]] = {
    "one-node": [(0, 5)],
    "two-nodes": [(0, 2), (2, 5)],
    "three-nodes": [(0, 1), (1, 4), (4, 5)],
    "parallel-chains": [(0, 5), (0, 2), (2, 5), (0, 5)],
}
METHODS: dict[str, Callable[[], Any]] = {
    "prompt": lambda: PromptTuning(3),
    "deep-prompt": lambda: DeepPromptTuning(3),
    "lora": lambda: LoRA(rank=3, targets=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")),
    "lora-and-prompt": lambda: [LoRA(rank=2, alpha=5), PromptTuning(2)],
    "lora-and-deep-prompt": lambda: [LoRA(rank=2), DeepPromptTuning(2)],
    "between": lambda: Between({2: nn.Linear(48, 48), 5: nn.LayerNorm(48)}),
    "classes": lambda: ClassificationHead(("no", "yes", "perhaps")),
    "lora-and-classes": lambda: [LoRA(rank=2), ClassificationHead(3)],
    "prompt-and-numbers": lambda: [PromptTuning(2), RegressionHead(2)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tuning") / "made-bloom")


def batch(seed: int = 0, rows: int = 6, tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask with padding on either side, labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 320, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, 6:] = 0
    mask[2, :1] = 0
    mask[2, 7:] = 0
    return ids, mask, ids.masked_fill(mask == 0, -100)


def labels_for(tuned: Tuned, labels: Tensor) -> Tensor:
    """Those that its head wants."""
    generator = torch.Generator().manual_seed(3)
    if tuned.find(ClassificationHead) is not None:
        return torch.randint(0, 3, (len(labels),), generator=generator)
    if tuned.find(RegressionHead) is not None:
        return torch.randn(len(labels), 2, generator=generator)
    return labels


def gradients(loss: Tensor, tuned: Tuned) -> dict[str, Tensor]:
    names = [name for name, _ in tuned.named_parameters()]
    return dict(zip(names, torch.autograd.grad(loss, list(tuned.parameters())), strict=True))


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("method", METHODS)
async def test_gradients_are_those_of_one_machine(folder: Path, method: str, chain: str) -> None:
    async with swarm_of(folder, CHAINS[chain]) as swarm:
        model = await swarm.client.model(str(folder), tuning=METHODS[method]())
        tuned = model.tuned
        assert tuned is not None
        shake(tuned)
        ids, mask, labels = batch()
        labels = labels_for(tuned, labels)
        loss = await blocking(lambda: model(input_ids=ids, attention_mask=mask, labels=labels).loss)
        found = await blocking(functools.partial(gradients, loss, tuned))
    expected_loss = local_loss(tuned, ids, mask, labels)
    expected = gradients(expected_loss, tuned)
    assert torch.allclose(loss, expected_loss, rtol=1e-5)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


async def test_transformers_trainer_trains_what_it_trains_with_peft(folder: Path, tmp_path: Path) -> None:
    def train(model: Any, where: str) -> list[float]:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / where),
            max_steps=5,
            per_device_train_batch_size=3,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            seed=11,
            disable_tqdm=True,
            save_strategy="no",
        )
        generator = torch.Generator().manual_seed(4)
        rows = [torch.randint(4, 320, (8,), generator=generator) for _ in range(15)]
        data: Any = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
        trainer.save_model(str(tmp_path / where / "module"))
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    async with swarm_of(folder, CHAINS["two-nodes"]) as swarm:
        torch.manual_seed(5)
        ours = await swarm.client.model(str(folder), tuning=LoRA(rank=3))
        found = await blocking(lambda: train(ours, "ours"))
    model = make_model()
    torch.manual_seed(5)
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=6, target_modules=["query_key_value"], task_type="CAUSAL_LM")
    )
    expected = await blocking(lambda: train(theirs, "theirs"))
    assert found == pytest.approx(expected, rel=1e-4)
    ours_saved = load_file(tmp_path / "ours" / "module" / "adapter_model.safetensors")
    theirs_saved = load_file(tmp_path / "theirs" / "module" / "adapter_model.safetensors")
    assert ours_saved.keys() == theirs_saved.keys()
    for name, values in theirs_saved.items():
        assert torch.allclose(ours_saved[name], values, atol=1e-4), name


async def test_what_was_saved_goes_on_as_it_was(folder: Path, tmp_path: Path) -> None:
    ids, mask, labels = batch()
    async with swarm_of(folder, CHAINS["two-nodes"]) as swarm:
        for name in ("lora", "lora-and-deep-prompt", "lora-and-classes", "prompt"):
            model = await swarm.client.model(str(folder), tuning=METHODS[name]())
            assert model.tuned is not None
            shake(model.tuned)
            own = labels_for(model.tuned, labels)
            model.save_pretrained(tmp_path / name)
            other = await swarm.client.model(str(folder), module=tmp_path / name)
            assert other.tuned is not None
            assert other.tuned.digest() == model.tuned.digest()

            def loss(of: Any, own: Tensor = own) -> Tensor:
                found: Tensor = of(input_ids=ids, attention_mask=mask, labels=own).loss
                return found

            one, two = await blocking(functools.partial(loss, model)), await blocking(functools.partial(loss, other))
            assert torch.equal(one, two)


async def test_blocks_are_modules_between_modules_of_ones_own(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, 48, generator=generator)
    own = nn.Linear(48, 48)
    local = make_model().transformer

    def through_local(given: Tensor) -> Tensor:
        local.requires_grad_(False)
        kept = local.h
        given_again = given
        for blocks, after in ((kept[:2], own), (kept[2:], None)):
            local.h, local.ln_f = blocks, nn.Identity()
            local.word_embeddings_layernorm = nn.Identity()
            given_again = local(inputs_embeds=given_again).last_hidden_state
            given_again = given_again if after is None else after(given_again)
        local.h = kept
        return given_again

    async with swarm_of(folder, CHAINS["three-nodes"]) as swarm:
        model = await swarm.client.model(str(folder))
        leaf = hidden.clone().requires_grad_(True)

        def run() -> tuple[Tensor, tuple[Tensor, ...]]:
            output = nn.Sequential(model.blocks[:2], own, model.blocks[2:])(leaf)
            return output, torch.autograd.grad(output.square().sum(), [leaf, own.weight])

        output, found = await blocking(run)
        with pytest.raises(InvalidInput, match="none"):
            model.blocks[3:3]
        with pytest.raises(InvalidInput, match="hidden states"):
            await blocking(lambda: model.blocks[:](torch.zeros(2, 3, 4)))
    leaf = hidden.clone().requires_grad_(True)
    expected_output = through_local(leaf)
    expected = torch.autograd.grad(expected_output.square().sum(), [leaf, own.weight])
    assert torch.allclose(output, expected_output, rtol=1e-4, atol=1e-4)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


async def test_weights_on_nodes_never_change_and_nothing_is_kept(folder: Path) -> None:
    ids, mask, labels = batch()
    async with swarm_of(folder, CHAINS["one-node"]) as swarm:
        span = swarm.nodes[0].node.engine.span
        before = {name: values.clone() for name, values in span.state_dict().items()}
        model = await swarm.client.model(str(folder), tuning=METHODS["lora"]())
        assert model.tuned is not None
        optimizer = torch.optim.AdamW(model.tuned.parameters(), lr=1e-2)
        for _ in range(2):
            loss = await blocking(lambda: model(input_ids=ids, attention_mask=mask, labels=labels).loss)
            await blocking(loss.backward)
            optimizer.step()
        assert all(torch.equal(values, before[name]) for name, values in span.state_dict().items())
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in span.parameters())
        assert swarm.nodes[0].cached_tokens == 0
        assert not any(parameter.requires_grad for parameter in model.embeddings.parameters())


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"labels": torch.zeros(6, 9)}, "labels"),
        ({"labels": torch.full((6, 9), 400)}, "labels"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1, 1]] * 6)}, "mask"),
        ({"attention_mask": torch.zeros(6, 9)}, "mask"),
        ({"attention_mask": torch.ones(6, 8)}, "mask"),
    ],
)
async def test_input_that_cannot_be_trained_on_says_why(folder: Path, given: dict[str, Any], why: str) -> None:
    ids, mask, labels = batch()
    async with swarm_of(folder, CHAINS["one-node"]) as swarm:
        model = await swarm.client.model(str(folder), tuning=LoRA(rank=2))
        options = {"input_ids": ids, "attention_mask": mask, "labels": labels} | given
        with pytest.raises(InvalidInput, match=why):
            await blocking(lambda: model(**options))


async def test_a_head_gives_no_tokens_and_says_so(folder: Path) -> None:
    async with swarm_of(folder, CHAINS["one-node"]) as swarm:
        model = await swarm.client.model(str(folder), tuning=ClassificationHead(2))
        with pytest.raises(InvalidInput, match="head"):
            await blocking(lambda: model.generate(torch.tensor([[5, 6]]), max_new_tokens=1))
        wrong = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([7])}
        with pytest.raises(InvalidInput, match="labels"):
            await blocking(lambda: model(**wrong))
        plain = await swarm.client.model(str(folder))
        with pytest.raises(InvalidInput, match="nothing to save"):
            plain.save_pretrained("anywhere")


async def test_two_that_train_and_one_that_generates_get_what_each_gets_alone(folder: Path) -> None:
    ids = torch.tensor([[40, 41, 90, 17, 200]])

    def train(model: Any, rows: Tensor, labels: Tensor) -> str:
        optimizer = torch.optim.AdamW(model.tuned.parameters(), lr=1e-2)
        for _ in range(12):
            optimizer.zero_grad()
            model(input_ids=rows, labels=labels).loss.backward()
            optimizer.step()
        digest: str = model.tuned.digest()
        return digest

    async def users(clients: Sequence[AsyncSwarm]) -> list[Callable[[], object]]:
        """What each of them does; their models begin with random numbers, which are made one after another."""
        torch.manual_seed(1)
        one = await clients[0].model(str(folder), tuning=[LoRA(rank=3), DeepPromptTuning(2)])
        two = await clients[1].model(str(folder), tuning=[LoRA(rank=2, targets=("dense",)), ClassificationHead(3)])
        three = await clients[2].model(str(folder))
        first, second = batch(1)[0], batch(2)[0]
        return [
            lambda: train(one, first, first),
            lambda: train(two, second, torch.tensor([0, 1, 2, 0, 1, 2])),
            lambda: generate(three, ids, max_new_tokens=60, do_sample=False),
        ]

    async with swarm_of(folder, CHAINS["two-nodes"]) as swarm:
        alone = [await blocking(user) for user in await users([swarm.client] * 3)]
    async with swarm_of(folder, CHAINS["two-nodes"]) as swarm, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(swarm.another_client()) for _ in range(3)]
        together: dict[int, object] = {}

        async def run(number: int, user: Callable[[], object]) -> None:
            together[number] = await blocking(user)

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for number, user in enumerate(await users(clients)):
                    nursery.start_soon(run, number, user)
    assert [together[number] for number in range(3)] == alone


GENERATED: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False, "max_new_tokens": 12},
    "sampled": {"do_sample": True, "max_new_tokens": 12, "seed": 3},
    "beams": {"do_sample": False, "num_beams": 3, "max_new_tokens": 8},
    "drafted": {"do_sample": False, "max_new_tokens": 12, "draft": "auto"},
}


@pytest.mark.parametrize("mode", GENERATED)
@pytest.mark.parametrize("method", ["prompt", "lora", "lora-and-deep-prompt"])
async def test_tokens_are_those_of_one_machine(folder: Path, method: str, mode: str) -> None:
    ids = torch.tensor([[40, 41, 90, 17, 200, 33, 12]])
    options = GENERATED[mode]
    async with swarm_of(folder, CHAINS["two-nodes"]) as swarm:
        model = await swarm.client.model(str(folder), tuning=METHODS[method]())
        assert model.tuned is not None
        shake(model.tuned)
        found = await blocking(lambda: generate(model, ids, **options))
        tuned = model.tuned
    local = {name: value for name, value in options.items() if name != "draft"}
    assert found == generate_locally(tuned, ids, **local)


async def test_rows_with_padding_go_on_behind_a_soft_prompt(folder: Path) -> None:
    rows = [[40, 41, 90, 17, 200], [9, 8, 7], [300]]
    ids = torch.tensor([[3] * (5 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (5 - len(row)) + [1] * len(row) for row in rows])
    async with swarm_of(folder, CHAINS["two-nodes"]) as swarm:
        model = await swarm.client.model(str(folder), tuning=[LoRA(rank=2), PromptTuning(3)])
        assert model.tuned is not None
        shake(model.tuned)
        options = {"max_new_tokens": 9, "do_sample": False}
        found = await blocking(lambda: generate(model, ids, attention_mask=mask, **options))
        for text, row in zip(rows, found, strict=True):
            alone = torch.tensor([text])
            assert row[5 - len(text) :] == generate_locally(model.tuned, alone, **options)[0]


async def test_a_session_has_what_was_trained_when_it_began(folder: Path, tmp_path: Path) -> None:
    ids = torch.tensor([[40, 41, 90, 17, 200]])
    async with swarm_of(folder, CHAINS["two-nodes"]) as swarm:
        model = await swarm.client.model(str(folder), tuning=[LoRA(rank=2), PromptTuning(3)])
        assert model.tuned is not None
        shake(model.tuned)

        def run() -> list[list[list[int]]]:
            with model.session() as session:
                first = generate(model, ids, max_new_tokens=4, do_sample=False, session=session)
                session.save(tmp_path / "session")
                assert session.position == 8
                with session.fork() as fork, model.load_session(tmp_path / "session") as loaded:
                    again = torch.tensor(first)
                    return [
                        generate(model, again, max_new_tokens=4, do_sample=False, session=each)
                        for each in (session, fork, loaded)
                    ]

        one, two, three = await blocking(run)
        assert one == two == three == generate_locally(model.tuned, ids, max_new_tokens=8, do_sample=False)
        with torch.no_grad():
            model.tuned.prompt_embeddings.mul_(2)
        with pytest.raises(InvalidInput, match="other trained parameters"):
            await blocking(lambda: model.load_session(tmp_path / "session"))
