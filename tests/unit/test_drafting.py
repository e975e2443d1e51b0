"""Run-ahead speculation: drafters, what is made of them, and that nobody is given another context's results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.drafting.base import Draft, Drafter, common_prefix
from client.drafting.measures import Acceptance, StepCosts
from client.drafting.model import ModelDrafter
from client.drafting.ngram import NgramDrafter
from client.drafting.policy import Choice, DraftPolicy
from client.drafting.runahead import HandOut, RunAhead, Send, SetBack, WantDraft
from client.errors import InvalidInput
from compute.models import find_checkpoint
from tests.checkpoints import VOCABULARY, make_model
from tests.unit.drafting_simulation import Chain, Nodes, Outcome, Results, Simulation, SlowDrafter, Text, digests

# Drafters


def test_what_contexts_share() -> None:
    long = list(range(1000))
    assert common_prefix(long, long) == 1000
    assert common_prefix(long, long[:600]) == 600
    assert common_prefix(long, [*long[:599], -1, *long[600:]]) == 599
    assert common_prefix([], long) == 0


def test_what_followed_the_longest_match_is_copied() -> None:
    drafter = NgramDrafter()
    assert drafter.propose([1, 2, 3, 9, 8, 7, 2, 3], 3).tokens == (9, 8, 7)
    assert drafter.propose([1, 2, 3, 9, 5, 2, 3, 8, 1, 2, 3], 2).tokens == (9, 5), "1 2 3 is longer than the later 2 3"
    assert drafter.propose([2, 3, 9, 5, 2, 3, 8, 1, 2, 3], 2).tokens == (8, 1), "of equally long ones, the last"


def test_nothing_is_made_of_nothing() -> None:
    drafter = NgramDrafter()
    assert drafter.propose([], 4) == Draft()
    assert drafter.propose([1], 4) == Draft()
    assert drafter.propose([1, 2, 3], 4) == Draft()
    assert drafter.propose([1, 2, 1], 0) == Draft()


def test_copying_goes_on_in_the_copy() -> None:
    draft = NgramDrafter().propose([4, 5, 6, 4, 5], 8)
    assert draft.tokens == (6, 4, 5, 6, 4, 5, 6, 4)
    assert list(draft.grades) == sorted(draft.grades)
    assert NgramDrafter().propose([7, 7, 7], 3).tokens == (7, 7, 7)


def longest_match(ids: Sequence[int]) -> int:
    end = len(ids)
    return max(
        (
            length
            for length in range(1, end)
            for start in range(end - length)
            if ids[start : start + length] == ids[-length:]
        ),
        default=0,
    )


@given(st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(0, 3), max_size=8)), min_size=1, max_size=8))
def test_an_index_that_grew_and_was_cut_is_as_good_as_a_new_one(changes: list[tuple[int, list[int]]]) -> None:
    drafter, ids = NgramDrafter(), list[int]()
    for kept, added in changes:
        ids = ids[:kept] + added
        draft = drafter.propose(ids, 5)
        assert draft == NgramDrafter().propose(ids, 5)
        length = min(longest_match(ids), 4)  # beyond, only some earlier occurrences are looked at
        assert bool(draft.tokens) == bool(length)
        if draft.tokens:
            assert any(
                ids[end - length : end] == ids[-length:] and ids[end] == draft.tokens[0]
                for end in range(length, len(ids))
            )
            assert draft.grades[0] >= length - 1


class CountedModel:
    """Counts the tokens that a model computes."""

    def __init__(self, model: Any) -> None:
        self.config, self.device, self._model, self.tokens = model.config, model.device, model, 0

    def forward(self, *, logits_to_keep: int = 0) -> None:
        """Here for its signature."""

    def __call__(self, *, input_ids: torch.Tensor, **options: Any) -> Any:
        self.tokens += input_ids.shape[1]
        return self._model(input_ids=input_ids, **options)


def test_a_model_drafts_what_it_would_generate_and_computes_little_twice() -> None:
    model = make_model(layers=2)
    counted = CountedModel(model)
    drafter = ModelDrafter(counted, vocabulary=VOCABULARY)
    ids = list(range(10, 30))

    def generated(ids: list[int], count: int) -> list[int]:
        options = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count, "eos_token_id": None}
        output: list[int] = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
        return output

    draft = drafter.propose(ids, 6)
    assert list(draft.tokens) == generated(ids, 6)
    assert all(0 <= grade < drafter.grades for grade in draft.grades)
    assert counted.tokens == 20 + 5
    counted.tokens = 0
    accepted = [*ids, *draft.tokens[:3], 7]
    assert list(drafter.propose(accepted, 4).tokens) == generated(accepted, 4)
    assert counted.tokens == 1 + 3, "the rejected token's replacement, and the draft"
    other = [5, *ids]
    assert list(drafter.propose(other, 2).tokens) == generated(other, 2)
    assert drafter.propose([], 4) == Draft()
    assert drafter.propose(ids, 0) == Draft()


def test_a_model_that_fails_begins_anew() -> None:
    counted = CountedModel(make_model(layers=1))
    drafter = ModelDrafter(counted, vocabulary=VOCABULARY)
    drafter.propose([1, 2, 3, 4], 2)
    working, counted._model = counted._model, None
    with pytest.raises(TypeError):
        drafter.propose([1, 2, 3, 4, 5], 2)
    counted._model, counted.tokens = working, 0
    assert drafter.propose([1, 2, 3, 4, 5], 1) == ModelDrafter(working, vocabulary=VOCABULARY).propose(
        [1, 2, 3, 4, 5], 1
    )
    assert counted.tokens == 5


def test_a_model_does_not_draft_beyond_its_positions() -> None:
    model = make_model(layers=1)
    model.config.max_position_embeddings = 6
    drafter = ModelDrafter(model, vocabulary=VOCABULARY)
    assert len(drafter.propose([1, 2, 3, 4], 9).tokens) == 2
    assert drafter.propose([1, 2, 3, 4, 5, 6], 9) == Draft()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("gpt", "a drafting model is a causal language model of transformers', not str"),
        (
            SimpleNamespace(config=SimpleNamespace(vocab_size=99), forward=print),
            "a vocabulary of 99 tokens, the model 320",
        ),
        (
            SimpleNamespace(config=SimpleNamespace(vocab_size=VOCABULARY, is_encoder_decoder=True), forward=print),
            "has an encoder",
        ),
    ],
)
def test_models_that_cannot_draft_are_refused(model: object, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        ModelDrafter(model, vocabulary=VOCABULARY)


def test_a_draft_has_a_grade_per_token() -> None:
    with pytest.raises(ValueError, match="1 tokens with 0 grades"):
        Draft(tokens=(1,))


# What is measured


def test_grades_that_were_never_seen_are_worth_what_lower_ones_are() -> None:
    acceptance = Acceptance(4, memory=0.98)
    assert acceptance.chances([0, 3]) == [0, 0]
    for _ in range(200):
        acceptance.observe(1, True)
    low, seen, above, highest = acceptance.chances([0, 1, 2, 3])
    assert low == 0
    assert 0.9 < seen == above == highest < 1
    for _ in range(100):
        acceptance.observe(1, False)
    assert acceptance.chances([3])[0] < 0.2, "what was long ago is forgotten"


def test_costs_of_sizes_are_measured_and_those_between_presumed() -> None:
    costs = StepCosts()
    assert not costs.is_known
    costs.observe_alone(1, 0.1)
    assert costs.is_known
    assert costs.next_size == 2
    assert 0.1 < costs.alone(2) < costs.alone(8)
    costs.observe_alone(3, 0.13)
    assert costs.next_size == 8
    assert costs.alone(4) == pytest.approx(0.13)
    assert costs.alone(8) == pytest.approx(0.17)
    for _ in range(50):
        costs.observe_alone(3, 0.26)
    assert costs.alone(1) == pytest.approx(0.2, rel=0.02), "a chain that has become slower has so for every size"


def test_what_a_piece_keeps_others_waiting_is_learnt_from_those_behind_it() -> None:
    costs = StepCosts()
    costs.observe_alone(1, 0.1)
    assert costs.behind(1) == pytest.approx(0.05)
    costs.observe_behind(1, 0.1, 0.09)  # only sent so much later
    assert costs.behind(1) == pytest.approx(0.05)
    for _ in range(40):
        costs.observe_behind(1, 0.1, 0.01)
    assert costs.behind(1) == pytest.approx(0.01, rel=0.1)
    for _ in range(40):
        costs.observe_behind(1, 0.2, 0.08)
    assert costs.behind(1) == pytest.approx(0.08, rel=0.1)


# The policy


def trusting_policy() -> DraftPolicy:
    """Knows a chain and a drafter that is always right."""
    policy = DraftPolicy({"n-gram": 1})
    for tokens in (1, 2, 4, 8, 16, 32):
        policy.observe_alone(tokens, 0.1)
    for _ in range(300):
        policy.observe_guess("n-gram", 0, True)
        policy.observe_wait(0.1, plain=True)
    return policy


def test_nothing_is_sent_before_a_drafter_has_shown_itself_and_a_step_was_measured() -> None:
    policy = DraftPolicy({"n-gram": 1})
    for _ in range(50):
        policy.observe_guess("n-gram", 0, True)
    assert policy.appended([0.9] * 8) == Choice()
    policy.observe_alone(1, 0.1)
    assert policy.appended([0.9] * 8).count == 1, "one size after the other"
    fresh = DraftPolicy({"n-gram": 1})
    fresh.observe_alone(1, 0.1)
    assert fresh.appended(fresh.chances("n-gram", [0] * 8)) == Choice()


def test_drafts_are_as_long_as_their_tokens_are_worth_their_seconds() -> None:
    policy = trusting_policy()
    assert policy.appended([1.0] * 64).count == 31
    assert policy.appended([0.9] * 64).count == 18, "then the chance is below the least"
    assert policy.appended([0.1] * 64).count == 0
    steep = DraftPolicy({"n-gram": 1})
    for size in (1, 2, 4, 8, 16, 32):
        steep.observe_alone(size, 0.1 * size)
    assert steep.appended([0.9] * 64).count == 0, "nothing is gained where each token takes a step's time"


def test_pieces_run_ahead_only_where_they_would_arrive_earlier() -> None:
    policy = trusting_policy()
    assert policy.ahead([0.9] * 8, chance=1.0, verdict_s=0.1, last_s=0.1).count == 8
    assert policy.ahead([0.9] * 8, chance=1.0, verdict_s=0.1, last_s=1.0).count == 0, "the nodes are busy until then"
    assert policy.ahead([0.9] * 8, chance=0.1, verdict_s=0.1, last_s=0.1).count == 0


def test_losses_stop_speculation_whatever_the_chances() -> None:
    policy = DraftPolicy({"n-gram": 1})
    for size in (1, 2, 4, 8):
        policy.observe_alone(size, 0.1 + 0.01 * size)
    assert policy.appended([0.9] * 7).count
    policy.observe_wait(0.5, plain=False)
    assert policy.appended([0.9] * 7) == Choice()
    for _ in range(500):
        policy.observe_wait(0.11, plain=True)
    assert policy.appended([0.9] * 7).count


def test_another_chain_is_measured_anew() -> None:
    policy = trusting_policy()
    policy.forget_costs()
    assert policy.appended([1.0] * 8) == Choice()
    assert policy.wanted("n-gram", chance=1.0, rival=0.0) == 0
    policy.observe_alone(1, 0.2)
    assert policy.appended([1.0] * 8).count == 1


# Whole runs

PROMPT = 60


def prompt_of(seed: int, vocabulary: int) -> list[int]:
    random = Random(seed)
    return [random.randrange(vocabulary) for _ in range(PROMPT)]


def copying(seed: int) -> Text:
    """Passages of 40 tokens that stood before, with some new tokens between them."""
    random = Random(seed)
    source: list[int] = []

    def text(ids: Sequence[int]) -> int:
        if not source:
            if random.random() < 0.8:
                return random.randrange(2000)
            start = random.randrange(len(ids) - 40)
            source.extend(reversed(ids[start : start + 40]))
        return source.pop()

    return text


def loop(period: int) -> Text:
    return lambda ids: ids[-period]


def noise(seed: int, vocabulary: int) -> Text:
    random = Random(seed)
    return lambda _: random.randrange(vocabulary)


def spite(seed: int, chance: Callable[[int], float]) -> Text:
    """What look-up drafts, with some chance, and else never that."""
    random, drafter = Random(seed), NgramDrafter()

    def text(ids: Sequence[int]) -> int:
        drafted = drafter.propose(ids, 1).tokens
        if drafted and random.random() < chance(len(ids)):
            return drafted[0]
        return next(token for token in iter(lambda: random.randrange(8), None) if (token,) != drafted)

    return text


CHAINS = {
    "over the internet": Chain(),
    "four hops": Chain(hops=4, step_s=0.015, token_s=0.001),
    "with jitter": Chain(jitter=0.5),
    "slow nodes": Chain(step_s=0.02, token_s=0.004),
    "slow client": Chain(own_s=0.01),
    "at home": Chain(round_s=0.001, step_s=0.005),
    "slow nodes at home": Chain(round_s=0.001, step_s=0.02, token_s=0.004),
}
QUIET = ["over the internet", "four hops", "with jitter", "slow nodes"]  # where 50 ms are most of a token


def simulate(chain: Chain, text: Text, *, new: int = 200, seed: int = 0, vocabulary: int = 8) -> Outcome:
    prompt = prompt_of(seed, vocabulary)
    outcome = Simulation(chain=chain, text=text, prompt=prompt, new=new, quick=NgramDrafter(), seed=seed).run()
    if chain.jitter:
        ids = outcome.ids
        plain = Simulation(chain=chain, text=lambda so_far: ids[len(so_far)], prompt=prompt, new=new, seed=seed).run()
        outcome.plain_s = plain.seconds
    return outcome


def test_without_drafters_it_is_plain_decoding() -> None:
    chain = Chain()
    outcome = Simulation(chain=chain, text=noise(0, 100), prompt=prompt_of(0, 100), new=50).run()
    assert outcome.seconds == pytest.approx(chain.plain_seconds(50))
    assert outcome.sent_pieces == 51
    assert outcome.sent_tokens == PROMPT + 50


@pytest.mark.parametrize("name", QUIET)
@pytest.mark.parametrize("seed", range(2))
def test_repetitive_text_comes_three_times_as_fast(name: str, seed: int) -> None:
    copied = simulate(CHAINS[name], copying(seed), new=400, seed=seed, vocabulary=2000)
    assert copied.speed_up >= 3
    assert copied.sent_tokens < 3 * 400, "nodes are spared what is improbable"
    assert simulate(CHAINS[name], loop(13), seed=seed).speed_up >= 6


def test_what_a_model_says_greedily_comes_three_times_as_fast() -> None:
    from transformers import BloomForCausalLM

    folder = find_checkpoint("bloom-tiny").file("config.json").parent
    model = BloomForCausalLM.from_pretrained(folder, dtype=torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is too small for more
    try:
        said = model.generate(torch.tensor([[300]]), do_sample=False, max_new_tokens=120)[0].tolist()
    finally:
        torch.set_num_threads(threads)
    chain = CHAINS["over the internet"]
    outcome = Simulation(
        chain=chain, text=lambda ids: said[len(ids)], prompt=said[:1], new=len(said) - 2, quick=NgramDrafter()
    ).run()
    assert outcome.speed_up >= 3


def test_repetitive_text_is_faster_wherever_it_comes_from() -> None:
    for name, chain in CHAINS.items():
        assert simulate(chain, copying(1), new=400, vocabulary=2000).speed_up > 1.5, name


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("percent", [0, 10, 20, 30])
def test_adversarial_text_costs_next_to_nothing(name: str, percent: int) -> None:
    for seed in range(3):
        outcome = simulate(CHAINS[name], spite(seed, lambda _: percent / 100), seed=seed)
        assert outcome.speed_up >= 0.97
        if not percent:
            assert outcome.sent_tokens <= PROMPT + 200 * 1.05


@pytest.mark.parametrize("name", CHAINS)
def test_neither_does_text_that_wins_trust_and_betrays_it(name: str) -> None:
    for phase in (5, 10, 20, 60):
        outcome = simulate(CHAINS[name], spite(phase, lambda at: at // phase % 2))  # noqa: B023 -- called in here
        assert outcome.speed_up >= 0.97, phase


def test_a_few_tokens_are_no_slower_either() -> None:
    for name, chain in CHAINS.items():
        for seed in range(5):
            assert simulate(chain, spite(seed, lambda _: 0.1), new=30, seed=seed).speed_up >= 0.97, name


@pytest.mark.parametrize("percent", [0, 10, 50, 80])
def test_chains_may_become_slower_or_faster(percent: int) -> None:
    chains = [Chain(), Chain(step_s=0.2, token_s=0.02), Chain(round_s=0.005, step_s=0.005, token_s=0.003)]
    for before in chains:
        for after in chains:
            outcome = Simulation(
                chain=before,
                chains_after={100: after},
                text=spite(1, lambda _: percent / 100),
                prompt=prompt_of(1, 8),
                new=300,
                quick=NgramDrafter(),
            ).run()
            assert outcome.speed_up >= 0.97
            if percent == 80:
                assert outcome.speed_up > 1.4


class Oracle:
    """A model that knows the text, is right so often, and knows how sure it is."""

    name = "model"
    grades = 10

    def __init__(self, text: list[int], right: float) -> None:
        random = Random(0)
        self._text = text
        self._chances = [min(max(random.gauss(right, 0.2), 0.0), 1.0) if right else 0.0 for _ in text]
        self._is_right = [random.random() < chance for chance in self._chances]

    def propose(self, ids: Sequence[int], count: int) -> Draft:
        is_on_track = list(ids) == self._text[: len(ids)]
        span = range(len(ids), min(len(ids) + count, len(self._text)))
        return Draft(
            tokens=tuple(self._text[at] + (not (is_on_track and self._is_right[at])) for at in span),
            grades=tuple(min(int(self._chances[at] * 10), 9) for at in span),
        )


def written(text: Text, tokens: int) -> list[int]:
    ids = prompt_of(0, 2000)
    while len(ids) < PROMPT + tokens:
        ids.append(text(ids))
    return ids


def choose(ids: list[int], drafters: Sequence[str], *, right: float, seconds: float, chain: str) -> Outcome:
    return Simulation(
        chain=CHAINS[chain],
        text=lambda so_far: ids[len(so_far)],
        prompt=ids[:PROMPT],
        new=len(ids) - PROMPT,
        quick=NgramDrafter() if "n-gram" in drafters else None,
        slow=SlowDrafter(drafter=Oracle(ids, right), seconds=seconds) if "model" in drafters else None,
    ).run()


@pytest.mark.parametrize("chain", ["over the internet", "slow nodes", "at home"])
@pytest.mark.parametrize("seconds", [0.001, 0.02, 0.2])
@pytest.mark.parametrize("right", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("text", ["copied", "new"])
def test_both_drafters_together_are_as_good_as_the_better_one(
    chain: str, seconds: float, right: float, text: str
) -> None:
    ids = written(copying(1) if text == "copied" else noise(1, 2000), 250)
    found = {
        name: choose(ids, name.split("+"), right=right, seconds=seconds, chain=chain)
        for name in ("n-gram", "model", "n-gram+model")
    }
    assert all(outcome.ids == ids for outcome in found.values())
    best = max(found["n-gram"].speed_up, found["model"].speed_up)
    assert found["n-gram+model"].speed_up >= 0.95 * best
    assert min(outcome.speed_up for outcome in found.values()) >= 0.97


def test_a_good_model_speeds_up_new_text_and_a_bad_one_is_left_alone() -> None:
    ids = written(noise(1, 2000), 300)
    good = choose(ids, ["model"], right=0.9, seconds=0.003, chain="over the internet")
    assert good.speed_up > 2.5
    bad = choose(ids, ["model"], right=0.0, seconds=0.003, chain="over the internet")
    late = choose(ids, ["model"], right=0.9, seconds=0.2, chain="over the internet")
    assert bad.slow_drafts < 60
    assert late.slow_drafts < 60
    assert bad.sent_pieces == late.sent_pieces == 301


# The state of it


class Reckless(DraftPolicy):
    """Sends whatever the dice say."""

    def __init__(self, random: Random, drafters: dict[str, int]) -> None:
        super().__init__(drafters)
        self._random = random

    def appended(self, chances: Sequence[float]) -> Choice:
        return self._some(len(chances), 31)

    def ahead(self, chances: Sequence[float], *, chance: float, verdict_s: float | None, last_s: float) -> Choice:
        return self._some(len(chances), 32)

    def wanted(self, drafter: str, *, chance: float, rival: float) -> int:
        return self._random.choice([0, 1, 2, 5])

    def arrival_s(self, tokens: int, *, last_s: float) -> float | None:
        return self._random.choice([0.0, 0.1, 1.0])

    def _some(self, there: int, most: int) -> Choice:
        count = min(self._random.randrange(8), there, most)
        return Choice(count=count, worth=self._random.random() if count else 0.0)


def next_token(ids: Sequence[int]) -> int:
    """A text that repeats itself, with breaks."""
    return (sum(ids[-3:]) * 7 + len(ids) // 9) % 4


class Caller:
    """Drives the core as a runner would, with nodes that answer whenever it is told to."""

    def __init__(self, core: RunAhead[Results], slow: Drafter) -> None:
        self.core, self.slow = core, slow
        self.nodes = Nodes()
        self.ids: list[int] = []
        self.asked_at: int | None = None
        self.under_way: list[tuple[Send, Results]] = []
        self.requests: list[WantDraft] = []
        self.sent_ids: list[int] = []
        self.now = 0.0

    def do(self, actions: Sequence[Send | SetBack | HandOut[Results] | WantDraft]) -> None:
        for action in actions:
            if isinstance(action, Send):
                assert action.position == len(self.sent_ids), "set back before"
                assert len(action.tokens) <= 32
                self.sent_ids += action.tokens
                assert len(self.sent_ids) <= self.core.limit
                self.under_way.append((action, self.nodes.compute(action)))
            elif isinstance(action, SetBack):
                assert action.position < len(self.sent_ids)
                del self.sent_ids[action.position :]
            elif isinstance(action, WantDraft):
                assert not self.requests, "one at a time"
                self.requests.append(action)
            else:
                assert self.asked_at is not None
                given = action.payload[action.start : action.stop]
                assert given == tuple(digests(self.ids)[self.asked_at :]), "another context's results"
                self.asked_at = None
        assert self.core.position == len(self.ids)
        assert self.sent_ids[: len(self.ids)] == self.ids

    def ask(self, position: int, tokens: list[int]) -> None:
        self.ids = self.ids[:position] + tokens
        self.asked_at = position
        self.do(self.core.ask(position, tokens, self.now))

    def answer(self) -> None:
        piece, results = self.under_way.pop(0)
        self.do(self.core.result(piece.number, results, self.now))

    def draft(self) -> None:
        request = self.requests.pop()
        self.do(self.core.drafted(self.slow.propose(request.ids, request.count), 0.01, self.now))

    def fail(self) -> None:
        """The new chain has what was answered, as a replay would give it."""
        self.under_way.clear()
        answered = self.core._ready
        self.nodes.ids = self.sent_ids[:answered]
        self.do(self.core.failed(self.now))

    def abandon(self) -> None:
        assert self.asked_at is not None
        self.ids = self.ids[: self.asked_at]
        self.asked_at = None
        self.do(self.core.abandon())


class Parrot:
    """Knows how the text goes on, most of the time."""

    name = "parrot"
    grades = 2

    def propose(self, ids: Sequence[int], count: int) -> Draft:
        so_far = list(ids)
        for _ in range(count):
            so_far.append((next_token(so_far) + (len(so_far) % 7 == 0)) % 4)
        return Draft(tokens=tuple(so_far[len(ids) :]), grades=(1,) * count)


@given(
    st.randoms(use_true_random=False),
    st.lists(
        st.one_of(
            st.sampled_from(["next", "next", "next", "answer", "answer", "draft", "fail", "abandon", "other"]),
            st.tuples(st.integers(0, 40), st.integers(1, 6)),
        ),
        max_size=80,
    ),
)
@settings(max_examples=150, deadline=None)
def test_every_result_is_that_of_its_context_whatever_happens(
    random: Random, events: list[str | tuple[int, int]]
) -> None:
    slow = Parrot()
    policy = Reckless(random, {"n-gram": NgramDrafter.grades, "parrot": slow.grades})
    core: RunAhead[Results] = RunAhead(policy, quick=NgramDrafter(), slow="parrot", limit=60)
    caller = Caller(core, slow)
    caller.ask(0, [1, 2, 3, 1, 2])
    for event in events:
        caller.now += random.random()
        if event == "answer":
            if caller.under_way:
                caller.answer()
        elif event == "draft":
            if caller.requests:
                caller.draft()
        elif event == "fail":
            caller.fail()
        elif event == "abandon":
            if caller.asked_at is not None:
                caller.abandon()
        else:
            while caller.asked_at is not None:  # as who waits does
                caller.answer()
            position, tokens = len(caller.ids), [next_token(caller.ids)]
            if event == "other":
                tokens = [(tokens[0] + 1) % 4]
            elif isinstance(event, tuple):
                position = min(event[0], len(caller.ids))
                tokens = [random.randrange(4) for _ in range(event[1])]
            if position + len(tokens) <= core.limit:
                caller.ask(position, tokens)
    while caller.asked_at is not None:
        caller.answer()


def a_core(*, grades: int = NgramDrafter.grades, limit: int = 200) -> RunAhead[str]:
    policy = DraftPolicy({"n-gram": grades})
    for tokens in (1, 2, 4, 8):
        policy.observe_alone(tokens, 0.1)
    for _ in range(100):
        policy.observe_behind(1, 0.1, 0.01)
        policy.observe_own(0.05)
        for grade in range(grades):
            policy.observe_guess("n-gram", grade, True)
    return RunAhead(policy, quick=NgramDrafter(), limit=limit)


def test_a_token_that_was_foreseen_is_there_at_once_and_another_sets_the_session_back() -> None:
    core = a_core()
    (prompt,) = core.ask(0, [1, 2, 3, 4, 1, 2], 0.0)
    assert prompt == Send(number=0, position=0, tokens=(1, 2, 3, 4, 1, 2))
    given, *_ = core.result(0, "prompt", 0.1)
    assert given == HandOut(payload="prompt", start=0, stop=6)
    position, ahead = 6, [piece for piece in core._under_way if not piece.is_void]
    assert ahead, "what the prompt foretells is on its way"
    assert core.ask(position, [3], 0.2)[:1] != [SetBack(position=6)]
    given, *_ = core.result(1, "ahead", 0.25)
    assert given == HandOut(payload="ahead", start=0, stop=1)
    given, *_ = core.ask(7, [4], 0.3)
    assert given == HandOut(payload="ahead", start=1, stop=2)
    back, piece, *_ = core.ask(8, [9], 0.4)
    assert back == SetBack(position=8)
    assert isinstance(piece, Send)
    assert (piece.position, piece.tokens) == (8, (9,)), "nothing is known of what follows 9"
    assert core.position == 9


def test_drafts_keep_within_the_sessions_limit() -> None:
    core = a_core(limit=9)
    actions = [*core.ask(0, [1, 2, 1, 2, 1, 2], 0.0), *core.result(0, "prompt", 0.1)]
    sent = [action for action in actions if isinstance(action, Send)]
    assert sum(len(piece.tokens) for piece in sent) == 9


def test_what_cannot_be_is_a_mistake_of_the_caller() -> None:
    core = a_core()
    with pytest.raises(ValueError, match="a step of 1 tokens at 3"):
        core.ask(3, [1], 0.0)
    with pytest.raises(ValueError, match="a step of 0 tokens"):
        core.ask(0, [], 0.0)
    with pytest.raises(ValueError, match="a result for piece 0"):
        core.result(0, "nothing", 0.0)
    with pytest.raises(ValueError, match="nobody asked for"):
        core.drafted(Draft(), 0.1, 0.0)
    core.ask(0, [1], 0.0)
    with pytest.raises(ValueError, match="a step of 1 tokens at 1"):
        core.ask(1, [1], 0.0)
    assert core.abandon() == [SetBack(position=0)]
    assert core.abandon() == []
    assert core.position == 0


def test_after_a_failure_what_is_waited_for_is_sent_alone() -> None:
    core = a_core()
    core.ask(0, [1, 2, 3, 1, 2], 0.0)
    core.result(0, "prompt", 0.1)
    core.ask(5, [3], 0.2)
    assert core.failed(0.3) == [SetBack(position=5), Send(number=core._next_number - 1, position=5, tokens=(3,))]
    (given,) = core.result(core._next_number - 1, "again", 0.9)
    assert given == HandOut(payload="again", start=0, stop=1)
    assert core.ask(6, [1], 1.0) == [Send(number=core._next_number - 1, position=6, tokens=(1,))], "nothing is measured"
