"""BLOOM with its blocks in the swarm: embeddings, final norm and head are here, hidden states travel.

A token's way: ``generate`` -> ``forward`` -> embeddings -> session (chain of nodes) -> final norm, head -> sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import BloomConfig, GenerationConfig, GenerationMixin
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from client.choices import NO_CHOICES, Choices
from client.drafting.base import Drafter
from client.drafting.runner import make_model_drafter
from client.errors import InvalidInput, UnknownModel
from client.models.cache import SessionCache
from client.models.contrastive import asks_for_contrastive, contrastive_search
from client.models.local import LocalBlocks
from client.models.saved import ModelMark, SavedSession
from client.modules.description import Description
from client.portal import Portal
from client.pricing import Wishes
from client.tuning import peft_files
from client.tuning.remote import RemoteBlocks
from client.tuning.tuned import Tuned
from client.tuning.whole import Rows, check_labels, forward_whole
from compute.bloom import Embeddings, Head

if TYPE_CHECKING:
    from os import PathLike

    from client.swarm import AsyncSwarm, ServedModel
    from client.tuning.trainer import Trainer
    from net.identity import PeerId
    from net.protocol.announcement import NodeAnnouncement

# What logits processors keep open beside the session that is generated with (as classifier-free guidance does).
_side_sessions: ContextVar[list[SessionCache] | None] = ContextVar("side_sessions", default=None)


class DistributedBloomForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model for transformers' ``generate``. Made by ``swarm.model(name)``.

    Attributes:
        served: the model's nodes as they were when it was made.
        tuned: what is trained; ``None`` without.
        parent: hash of the published module that this began with, if it did.
    """

    config_class = BloomConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(
        self,
        config: BloomConfig,
        *,
        embeddings: Embeddings,
        head: Head,
        tokenizer: Any,
        generation_config: GenerationConfig,
        served: ServedModel,
        swarm: AsyncSwarm,
        portal: Portal,
        accepts: Callable[[NodeAnnouncement], bool],
        weights: str | None,
        choices: Choices = NO_CHOICES,
        local: LocalBlocks | None = None,
        tuned: Tuned | None = None,
        parent: str | None = None,
    ) -> None:
        super().__init__(config)
        self._mark = ModelMark(model=served.name, digest=served.digest, weights=weights, blocks=served.n_blocks)
        self.embeddings = embeddings
        self.head = head
        self.generation_config = generation_config
        self.served = served
        self._tokenizer = tokenizer
        self._swarm = swarm
        self._portal = portal
        self._accepts = accepts
        self._choices = choices
        self._local = () if local is None else (local,)  # no part of the module: nothing here is to be trained or moved
        self.requires_grad_(False)
        self.tuned = tuned  # after that: its parameters are what is trained
        self.parent = parent
        self._blocks = RemoteBlocks(served.n_blocks, config.hidden_size, tuned, self._make_trainer, portal)
        self.eval()

    @property
    def blocks(self) -> RemoteBlocks:
        """All blocks, on the nodes: ``model.blocks[2:5]`` is a torch module through which gradients go."""
        return self._blocks

    def _make_trainer(self) -> Trainer:
        make = partial(self._swarm.trainer, self.served, accepts=self._accepts, choices=self._choices)
        return self._portal.call(make)

    @property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer.

        Raises:
            UnknownModel: the checkpoint has none.
        """
        if self._tokenizer is None:
            raise UnknownModel(f"the files of {self.served.name} hold no tokenizer; pass token ids to generate()")
        return self._tokenizer

    @property
    def wishes(self) -> Wishes:
        """Which nodes its sessions may use, for which blocks."""
        own = self._choices.local_blocks
        return replace(self._choices.to_wishes(), start=own, end=self.served.n_blocks - own)

    def session(
        self,
        *,
        max_length: int | None = None,
        wire: str = "auto",
        measures_error: bool = False,
        allow: Iterable[str | PeerId] | None = None,
        block: Iterable[str | PeerId] | None = None,
        pins: Mapping[tuple[int, int], str | PeerId] | None = None,
        mixed_numerics: bool | None = None,
    ) -> SessionCache:
        """A session that keeps its tokens across calls: ``generate(ids, session=session)``.

        ``ids`` are always all tokens from the beginning. Those at their start that the session has are not computed
        again; if they differ from some token on, the session goes back to there.

        Args:
            max_length: reserve for this many tokens; as many as the nodes allow by default.
            wire: in which form hidden states travel: "auto" for the nodes' activation type, in which nothing is lost;
                "bf16" or "int8" (in blocks of 64) for fewer bytes, and not quite the same values. Whichever it is,
                tokens do not depend on nodes that fail.
            measures_error: find out what is lost on the way, for ``session.traffic``; that takes time.
            allow, block, pins, mixed_numerics: as in ``swarm.model``, instead of what was said there.

        Raises:
            TypeError, InvalidInput: options that cannot be, and what to do.
        """
        choices = self._choices.changed(self.served.n_blocks, allow=allow, block=block, pins=pins, mixed=mixed_numerics)
        make = partial(
            self._swarm.session,
            self.served,
            max_length=max_length,
            wire=wire,
            measures_error=measures_error,
            accepts=self._accepts,
            choices=choices,
            tuning=None if self.tuned is None else self.tuned.of_span(0, self.served.n_blocks),
        )
        local, prompt = self._local[0] if self._local else None, None
        mark = self._mark
        if self.tuned is not None:
            self._check_generates(self.tuned)
            mark = replace(mark, tuning=self.tuned.digest())
            if self.tuned.prompt_tokens:
                with torch.inference_mode():
                    prompt = self.embeddings.word_embeddings_layernorm(self.tuned.prompt_embeddings)  # [p, d]
        return SessionCache(make, self._portal, mark, local, prompt)

    def _check_generates(self, tuned: Tuned) -> None:
        """Raises:
        InvalidInput: there is no way from token to token with what is trained.
        """
        if tuned.score is not None:
            raise InvalidInput("a model with a head of its own gives no tokens: call model(input_ids) for its scores")
        if tuned.cuts:
            raise InvalidInput("with modules between blocks nothing can be generated: call model(input_ids)")

    def load_session(self, path: str | PathLike[str], **options: Any) -> SessionCache:
        """A session that goes on where one was saved with ``session.save(path)``; its ``ids`` are the tokens.

        Nodes get the tokens with the first step: those are computed again, whatever chain there is now.

        Args:
            path: of the file.
            options: as for ``session``.

        Raises:
            InvalidInput: the file holds no session, or one of another model.
            OSError: it cannot be read.
        """
        saved = SavedSession.read(Path(path))
        replace(self._mark, tuning=None if self.tuned is None else self.tuned.digest()).check(saved.mark)
        if any(token >= self.config.vocab_size for row in saved.ids for token in row):
            raise InvalidInput(f"{path} holds token ids that the model does not have: it is damaged")
        session = self.session(**options)
        with torch.inference_mode():
            session.restore(saved, self.embeddings)
        return session

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        session: SessionCache | None = None,
        draft: str | PreTrainedModel | None = None,
        wire: str | None = None,
        **options: Any,
    ) -> Any:
        """transformers' ``generate``: greedy, sampling, beams, constraints, assisted decoding, penalties, stopping
        criteria, streamers, padded batches, scores, hidden states; contrastive search, which transformers has moved to
        its hub. Other modes that it has moved there (group and constrained beams, DoLa) need ``trust_remote_code=True``
        and the hub, as they do with it.

        Attentions are not given (``output_attentions``): they stay on the nodes. Contrastive search keeps ``top_k``
        rows in the session for each one, and computes a prompt from its beginning. With ``output_hidden_states``
        nothing is drafted.

        Args:
            inputs: token ids.
            session: from ``self.session()``; without one, a new one is opened and closed.
            draft: "auto" to send tokens that will probably be asked for before they are: as the context goes on where
                it began like this before, wherever that pays. A small model with the same tokenizer to have it guess,
                too. The tokens are the same in any case, greedy or sampled; with several rows nothing is drafted.
            wire: as of ``self.session()``; without a session alone, which has its own.
            options: transformers'.

        Shapes:
            inputs: [b, t], t >= 1
            returns: [b, t + new]

        Raises:
            InvalidInput: an empty prompt, one too long for the nodes, rows of different lengths.
            MissingBlocks, SessionFailed: the swarm cannot compute it (any more).
        """
        if draft not in (None, "auto") and not isinstance(draft, PreTrainedModel):
            raise InvalidInput('draft is None, "auto", or a causal language model of transformers\'')
        if session is not None and not isinstance(session, SessionCache):
            raise InvalidInput(f"session is what model.session() gives, not {type(session).__name__}")
        if session is not None and wire is not None:
            raise InvalidInput("wire is fixed when a session opens: give it to model.session()")
        ids = inputs if inputs is not None else options.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
            raise InvalidInput("generate takes token ids as an integer tensor of shape [batch, tokens]")
        if ids.shape[1] == 0:
            raise InvalidInput("the prompt is empty: give at least one token")
        # The cache is the session's, on the nodes; without it transformers would cut the prompt to what the session
        # lacks and send everything again for each token.
        options["use_cache"] = True
        if session is None:
            with self.session(wire="auto" if wire is None else wire) as fresh:
                return self.generate(inputs, *args, session=fresh, draft=draft, **options)
        if "custom_generate" not in options and asks_for_contrastive(self, args, options):
            # transformers hands no streamer to what it does not know.
            options["custom_generate"] = partial(contrastive_search, streamer=options.get("streamer"))
        session.keep_prefix(ids)
        session.drafter = None if draft is None else self._drafter(draft)
        side_sessions: list[SessionCache] = []
        token = _side_sessions.set(side_sessions)
        try:
            output = super().generate(inputs, *args, past_key_values=session, **options)
            sequences = output.get("sequences") if isinstance(output, ModelOutput) else output
            if isinstance(sequences, torch.Tensor):  # decoding of one's own may return anything
                session.note(sequences)
            return output
        finally:
            _side_sessions.reset(token)
            for each in side_sessions:
                each.close()
            session.stop_drafting()

    def _drafter(self, draft: str | PreTrainedModel) -> Drafter | bool:
        return True if isinstance(draft, str) else make_model_drafter(draft, self.config.vocab_size)

    def _embed(self, tokens: Sequence[int]) -> torch.Tensor:
        """Hidden states before the first block: [1, t, d]."""
        with torch.inference_mode():
            hidden: torch.Tensor = self.embeddings(torch.tensor([list(tokens)]))
        return hidden

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: SessionCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the next tokens, and their loss.

        A model with something to train has gradients for it, and computes whole texts, without a session: padding may
        then also be behind the text. Of a model with a head of its own the logits are that head's, one row of them for
        each text; labels are classes, or the numbers themselves.

        Args:
            input_ids: the tokens.
            attention_mask: zeros for padding at the beginning of rows, else ones; all ones by default.
            past_key_values: the session that has the tokens before these; by default one for this call alone.
            inputs_embeds: not taken: the session keeps its tokens as ids.
            labels: the token at each position, which the position before should foretell; -100 where none counts.
            use_cache: false to compute from the beginning of the session; true to have a new one kept open, which is
                in the output, and the caller's to close.
            output_attentions: not given: attention is computed on the nodes.
            output_hidden_states: true for the hidden states before each block, and after the last norm. They travel:
                a step then takes a round trip to each node, and as many times the data as there are blocks.
            logits_to_keep: how many positions at the end, or which; 0 for all.
            return_dict: false for a tuple.
            num_items_in_batch: divide the loss by this instead of the number of labels that count.

        Shapes:
            input_ids: [b, t]
            attention_mask: [b, tokens so far + t]
            labels: [b, t]
            logits: [b, t, vocabulary], or only the positions to keep
            loss: []
            hidden_states: [b, t, d] each, one more than there are blocks

        Raises: as ``generate``.
        """
        ids = self._checked_ids(input_ids, inputs_embeds)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise InvalidInput("output_attentions cannot be given: it stays on the nodes; leave the option out")
        every = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        if self.tuned is not None and past_key_values is None and not use_cache and not every:
            rows = Rows.read(attention_mask, *ids.shape)
            whole = forward_whole(self, self.tuned, ids, rows, labels, logits_to_keep, num_items_in_batch)
            return whole if as_dict else whole.to_tuple()
        if labels is not None:
            check_labels(labels, ids, self.config.vocab_size, logits_to_keep)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        wanted = logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep else None
        with ExitStack() as closing:
            if past_key_values is None:
                past_key_values = self.session()
                if use_cache and (side_sessions := _side_sessions.get()) is not None:
                    side_sessions.append(past_key_values)
                elif not use_cache:
                    closing.enter_context(past_key_values)
            elif use_cache is False:
                past_key_values.position = 0
            if attention_mask is not None:
                past_key_values.pad(attention_mask, ids.shape[0], past_key_values.position + ids.shape[1])
            last, states = self.run_blocks(ids, past_key_values, wanted, every_block=bool(every))
        with torch.inference_mode():
            logits = self.head.lm_head(last[:, kept])  # [b, t or kept, vocabulary]
        logits = logits.clone()  # outside: one that can be used like any other
        loss = None
        if labels is not None:
            loss = self.loss_function(  # transformers' own
                logits, labels.long(), vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values, hidden_states=states)
        return output if as_dict else output.to_tuple()

    def save_pretrained(self, save_directory: str | PathLike[str], *_: Any, **__: Any) -> None:
        """Write what was trained: PEFT's ``adapter_config.json`` and ``adapter_model.safetensors``, and
        ``raceme.json``, which says of which model it is.

        Args:
            save_directory: a folder, made if need be; files of these names in it are replaced.
            _, __: transformers' others; they do not matter here.

        Raises:
            InvalidInput: nothing was trained.
            OSError: it cannot be written.
        """
        if self.tuned is None:
            raise InvalidInput("there is nothing to save: the model was made without tuning=")
        folder, served = Path(save_directory), self.served
        peft_files.write(self.tuned, folder, served.name)
        told = Description(
            model=served.name, model_digest=served.digest, method=self.tuned.label, metrics={}, parent=self.parent
        )
        told.write(folder)

    def _checked_ids(self, ids: torch.Tensor | None, embeddings: torch.Tensor | None) -> torch.Tensor:
        """Raises:
        InvalidInput: not what a step can be made of.
        """
        if embeddings is not None:
            raise InvalidInput("inputs_embeds are not taken: pass input_ids")
        if ids is None or ids.dim() != 2 or ids.shape[1] == 0:
            raise InvalidInput("forward takes token ids of shape [batch, tokens], at least one token")
        if not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise InvalidInput(f"token ids must lie in 0 to {self.config.vocab_size - 1}")
        return ids

    def run_blocks(
        self, ids: torch.Tensor, session: SessionCache, keep: int | None = None, *, every_block: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """Hidden states after the last norm; and if they are wanted those before each block, these included.

        Args:
            ids: the next tokens.
            session: has those before.
            keep: of how many tokens, at the end, they are wanted; of all by default, and with ``every_block``.
            every_block: ask for those of every block.

        Shapes:
            ids: [b, t]
            returns: [b, t or keep, d], and [b, t, d] of each

        Raises: as ``generate``.
        """
        with torch.inference_mode():
            hidden = self.embeddings(ids)  # [b, t, d]
            if not every_block:
                return self.head.ln_f(session.step(hidden, ids, keep)), None
            given = session.step(hidden, ids, every_block=True)  # [n, b, t, d]
            last = self.head.ln_f(given[-1])  # [b, t, d]
        # Copied outside of inference mode, to be used like any others.
        return last, tuple(state.clone() for state in (hidden, *given[:-1], last))

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """transformers asks for a cache here, when it knows how many rows and tokens there will be."""
        session: SessionCache = model_kwargs["past_key_values"]
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        if generation_mode == GenerationMode.CONTRASTIVE_SEARCH:
            rows *= generation_config.top_k
        mask = model_kwargs.get("attention_mask")
        if mask is None and session.pads is not None:
            raise InvalidInput("the session has padding: give the attention mask, too")
        if mask is not None and not session.position:
            session.pad(mask, rows, mask.shape[1])
        room = session.prepare(rows, max_cache_length)
        may_draft = rows == 1 and not generation_config.output_hidden_states and not self._has_prompt
        if may_draft and session.drafter is not None:
            model = None if isinstance(session.drafter, bool) else session.drafter
            session.draft(self._embed, min(room, max_cache_length), model)
        session._is_user_defined = True  # type: ignore[attr-defined]  # what transformers marks its caches with

    @property
    def _has_prompt(self) -> bool:
        return self.tuned is not None and bool(self.tuned.prompt_tokens)

    def get_input_embeddings(self) -> Any:
        return self.embeddings.word_embeddings

    def get_output_embeddings(self) -> Any:
        return self.head.lm_head
