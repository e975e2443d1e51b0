"""What transformers takes for a key-value cache, when keys and values lie on the nodes."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from client.drafting.runner import DraftRunner
from client.errors import ClientError, InvalidInput, SwarmClosed
from client.models.saved import ModelMark, SavedSession
from client.portal import Portal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from os import PathLike

    from client.drafting.base import Drafter
    from client.forms import HopTraffic
    from client.models.local import LocalBlocks
    from client.session import Session


class SessionCache:
    """A session's blocking face. Pass it to ``generate(session=...)``; it keeps its tokens between calls.

    Attributes:
        is_compileable: read by transformers; never true.
        drafter: what ``generate`` drafts with: a model's drafter, ``True`` for the context alone, or nothing.
    """

    is_compileable = False

    def __init__(
        self,
        make: Callable[[], Awaitable[Session]],
        portal: Portal,
        mark: ModelMark,
        local_blocks: LocalBlocks | None = None,
        prompt: torch.Tensor | None = None,
    ) -> None:
        """Make a session.

        Args:
            make: how, and how its forks are made.
            portal: to where it lives.
            mark: of its model.
            local_blocks: that are computed here, before and after the session's.
            prompt: hidden states before the first block of a soft prompt, which comes before the tokens; [p, d].
        """
        self._make = make
        self._session = portal.call(make)
        self._portal = portal
        self._mark = mark
        self._local_blocks = local_blocks
        self._local = None if local_blocks is None else local_blocks.session()
        self._prompt = prompt
        self._closed = False
        self.drafter: Drafter | bool | None = None
        self._order: torch.Tensor | None = None  # [b], of rows, before the next step
        self._runner: DraftRunner | None = None
        self._ids: torch.Tensor | None = None  # [b, t] of what was computed; at least ``position`` long
        self._told: torch.Tensor | None = None  # [b, t] of what ``generate`` gave beyond that

    @property
    def ids(self) -> torch.Tensor:
        """All tokens of its rows as they are now; after ``generate`` with the last one, which nodes have not got yet.

        Shapes:
            returns: [b, t], int64; [0, 0] before the first step
        """
        if self._ids is None:
            return torch.empty(0, 0, dtype=torch.int64)
        had = self._ids[:, : self.position]
        return had.clone() if self._told is None else torch.cat([had, self._told], dim=1)

    def note(self, sequences: torch.Tensor) -> None:
        """Take what ``generate`` gave, where these are the session's rows.

        Shapes:
            sequences: [b, t]
        """
        had = None if self._ids is None else self._ids[:, : self.position]
        if had is not None and sequences.shape[0] == had.shape[0] and sequences.shape[1] >= had.shape[1]:
            self._told = (
                sequences[:, had.shape[1] :].clone() if torch.equal(sequences[:, : had.shape[1]], had) else None
            )

    def fork(self) -> SessionCache:
        """Another session with the same tokens, which goes its own way: nothing is taken from this one.

        Its nodes get the tokens again with its first step; those that have this session share with it what they can.
        Where some blocks are computed here, these compute them again, too: ``position`` is 0 before that.

        Raises:
            ClientError: the session or the swarm is closed.
        """
        self._check_open()
        other = SessionCache(self._make, self._portal, self._mark, self._local_blocks, self._prompt)
        if self._local is not None:
            other._begin_with(self.ids, self.pads)
            return other
        other._ids, other._order, other._told = self._ids, self._order, self._told
        position = self._session.position if self._runner is None else self.position

        async def copy() -> None:
            other._session.take_history(self._session, position)

        self._portal.call(copy)
        return other

    def save(self, path: str | PathLike[str]) -> None:
        """Save its history, for ``model.load_session`` in this process or another: token ids and padding.

        What nodes hold is not saved, nor the state of random numbers: whoever samples keeps that. The file is replaced
        at once, and readable to its owner alone.

        Args:
            path: of the file.

        Raises:
            InvalidInput: the session has no tokens, or too many for a file.
            OSError: the file cannot be written.
        """
        if self._ids is None:
            raise InvalidInput("the session has no tokens that could be saved")
        saved = SavedSession(mark=self._mark, ids=self.ids.tolist(), position=self.position, pads=self.pads)
        saved.write(Path(path))

    def restore(self, saved: SavedSession, embed: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Begin with what was saved, with this model.

        Args:
            saved: the history.
            embed: hidden states [b, t, d] before the first block, of tokens [b, t].

        Raises:
            InvalidInput: the session has begun.
        """
        ids = torch.tensor(saved.ids)  # [b, t]
        if not saved.position:
            return
        if self._local is not None:
            self._begin_with(ids, saved.pads)
            return
        hidden = self._with_prompt(embed(ids[:, : saved.position]), saved.pads)

        async def take() -> None:
            self._session.restore(hidden, saved.pads)

        self._portal.call(take)
        self._ids, self._told = ids, ids[:, saved.position :]

    def _begin_with(self, ids: torch.Tensor, pads: tuple[int, ...] | None) -> None:
        """Have tokens of which nothing has been computed, here or by nodes: the first step is to have them all.

        Shapes:
            ids: [b, t]
        """
        self._session.pads = pads
        self._ids, self._told = ids[:, :0], ids

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens whose keys and values the nodes hold (the name is transformers')."""
        return self.position

    @property
    def position(self) -> int:
        """Tokens so far. Set it back to forget the last ones."""
        return max(0, self._session.position - self._ahead) if self._runner is None else self._runner.position

    @position.setter
    def position(self, position: int) -> None:
        self._portal.call(self._roll_back, position)
        self._told = None

    @property
    def _ahead(self) -> int:
        """Tokens that the session has before these: the soft prompt's."""
        return 0 if self._prompt is None else self._prompt.shape[0]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget that many tokens at the end, as a number below 0; none for 0 (name and sign are transformers').

        Raises:
            InvalidInput: a number above 0, or more tokens than there are.
        """
        if tokens_to_remove > 0:
            raise InvalidInput(f"crop({tokens_to_remove}): give how many tokens to take away as a number below 0")
        if tokens_to_remove:
            self.position += tokens_to_remove

    def activate_past_recording(self) -> None:
        """Nothing to do: a session can always go back (transformers' name)."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row ``i`` goes on from what row ``beam_idx[i]`` has (transformers' name).

        Shapes:
            beam_idx: [b]
        """
        order = beam_idx.cpu()
        self._told = None
        self._order = order if self._order is None else self._order[order]
        if self._ids is not None:
            self._ids = self._ids[order]

    @property
    def pads(self) -> tuple[int, ...] | None:
        """With how many tokens of padding each row begins."""
        return self._session.pads

    def pad(self, attention_mask: torch.Tensor, rows: int, tokens: int) -> None:
        """Take or check what a mask says of padding.

        Args:
            attention_mask: 0 for padding, of all tokens so far and those that are about to be computed.
            rows: of the session; each row of the mask stands for as many as there are more of them.
            tokens: so far and new.

        Shapes:
            attention_mask: [b, tokens]

        Raises:
            InvalidInput: padding that is not at the beginning of rows, or another one than before.
        """
        mask = attention_mask != 0
        starts = mask.int().argmax(dim=1)  # [b]
        expected = torch.arange(mask.shape[1]) >= starts[:, None].cpu()  # [b, tokens]
        if mask.shape[1] != tokens or rows % mask.shape[0] or not torch.equal(mask.cpu(), expected):
            raise InvalidInput(
                f"an attention mask of shape {list(mask.shape)} for {rows} rows of {tokens} tokens: give one of the "
                f"same shape, with zeros only at the beginning of shorter rows (the tokenizer's padding_side='left')"
            )
        pads = tuple(starts.repeat_interleave(rows // mask.shape[0]).tolist())
        wanted = pads if any(pads) else None
        if not self._session.position and self._session.batch is None:
            self._session.pads = wanted
        elif wanted != self._session.pads:
            raise InvalidInput("the session has other padding: open another with model.session()")

    async def _roll_back(self, position: int) -> None:
        if self._runner is None:
            self._session.rollback(position + self._ahead if position else 0)
        elif not 0 <= position <= self._runner.position:
            raise InvalidInput(f"cannot go back to {position}: the session has {self._runner.position} tokens")
        else:
            self._runner.cut(position)

    @property
    def route(self) -> list[tuple[str, int, int]]:
        """(PeerId, first block, end block) of each hop in use."""
        return [(str(hop.node.peer_id), hop.start, hop.end) for hop in self._session.chain]

    @property
    def traffic(self) -> list[HopTraffic]:
        """What the hidden states have taken on each hop in use, as its nodes say: form, bytes, error if measured."""
        self._check_open()
        return self._portal.call(self._session.traffic)

    def prepare(self, batch: int, tokens: int = 0) -> int:
        """Open the session for ``batch`` rows; returns how many tokens fit.

        Args:
            batch: rows.
            tokens: how many the caller is going to need.

        Raises:
            InvalidInput: ``tokens`` do not fit.
            Others: as ``Session.prepare``.
        """
        self._check_open()
        self._session.expected = tokens + self._ahead
        self._portal.call(self._session.prepare, batch)
        room = self._session.max_length - self._ahead
        if tokens > room:
            raise InvalidInput(
                f"prompt and new tokens make {tokens + 1} tokens; the nodes on the chain allow {room + 1} ({room} in "
                f"the session, and the last one, which is never sent): shorten the prompt or ask for fewer new tokens"
            )
        return room

    def keep_prefix(self, ids: torch.Tensor) -> None:
        """Go back to where ``ids`` and the session's tokens part, and at least before the last of ``ids``, whose
        logits are wanted. Each row stands for as many as the session has more of them.

        Shapes:
            ids: [b, t]
        """
        if self._ids is None or self._ids.shape[0] % ids.shape[0]:
            return  # nothing yet, or another number of rows, which the session refuses itself
        shared = min(self.position, ids.shape[1] - 1)
        ids = ids.repeat_interleave(self._ids.shape[0] // ids.shape[0], dim=0)  # as beams are
        same = (self._ids[:, :shared] == ids[:, :shared]).all(dim=0)  # [shared]
        self.position = shared if bool(same.all()) else int(same.int().argmin())

    def step(
        self, hidden: torch.Tensor, ids: torch.Tensor, keep: int | None = None, *, every_block: bool = False
    ) -> torch.Tensor:
        """All blocks on the next tokens.

        Args:
            hidden: before the first block.
            ids: the tokens.
            keep: of how many, at the end, results are wanted; all by default.
            every_block: return what each of ``n`` blocks gives, for all tokens; nothing is drafted any more.

        Shapes:
            hidden: [b, t, d]
            ids: [b, t], of which these are the embeddings
            returns: [b, t or keep, d]; [n, b, t, d] with ``every_block``

        Raises: as ``Session.step``.
        """
        self._check_open()
        self._told = None
        before = self.position
        if every_block:
            self.stop_drafting()
        local, order, first = self._local, None, hidden
        if self._runner is None:
            order = None if self._order is None else self._order.tolist()
            if local is not None:
                self._portal.call(self._session.prepare, hidden.shape[0])  # refuses other rows than it has
                first = local.first.run(hidden, before, order=order, pads=self.pads, every_block=every_block)
                hidden = first[-1] if every_block else first  # [b, t, d]
            # Where blocks follow here, they need all that was computed.
            wanted = keep if local is None else None
            if not before:
                hidden = self._with_prompt(hidden, self.pads)  # [b, p + t, d]
            output = self._portal.call(partial(self._session.step, hidden, order, keep=wanted, every_block=every_block))
            if not before and keep is None:
                output = self._without_prompt(output)
            self._order = None
        else:
            output = self._portal.call(self._runner.step, ids[0].tolist(), before)
        if local is not None:
            hidden = output[-1] if every_block else output  # [b, t, d]
            last = local.last.run(hidden, before, order=order, pads=self.pads, every_block=every_block)
            output = torch.cat([first, output, last]) if every_block else last if keep is None else last[:, -keep:]
        kept = ids if self._ids is None or not before else torch.cat([self._ids[:, :before], ids], dim=1)
        self._ids = kept  # [b, position]
        return output

    def _with_prompt(self, hidden: torch.Tensor, pads: tuple[int, ...] | None) -> torch.Tensor:
        """A session's first tokens behind the soft prompt, which comes after the padding.

        Shapes:
            hidden: [b, t, d]
            returns: [b, p + t, d]

        Raises:
            InvalidInput: there is no token of the text among them, in some row.
        """
        if self._prompt is None:
            return hidden
        starts = pads or (0,) * hidden.shape[0]
        if max(starts) >= hidden.shape[1]:
            raise InvalidInput("the first step must have tokens of each row's text: give the whole prompt at once")
        return torch.stack([torch.cat([row[:s], self._prompt, row[s:]]) for row, s in zip(hidden, starts, strict=True)])

    def _without_prompt(self, output: torch.Tensor) -> torch.Tensor:
        """What the tokens gave. Shapes: [..., b, p + t, d] to [..., b, t, d]."""
        if self._prompt is None:
            return output
        starts, p = self.pads or (0,) * output.shape[-3], self._ahead
        rows = zip(output.unbind(-3), starts, strict=True)
        return torch.stack([torch.cat([row[..., :s, :], row[..., s + p :, :]], dim=-2) for row, s in rows], dim=-3)

    def draft(self, embed: Callable[[Sequence[int]], torch.Tensor], limit: int, model: Drafter | None = None) -> None:
        """Be ahead of who asks for tokens, until :meth:`stop_drafting`. The session is open, and has one row.

        Args:
            embed: hidden states before the first block, of some tokens.
            limit: tokens that the session may come to hold.
            model: a drafter beside the one that looks up in the context.
        """
        had = [] if self._ids is None else self._ids[0, : self.position].tolist()

        def embed_here(tokens: Sequence[int]) -> torch.Tensor:
            hidden = embed(tokens)  # [1, t, d]
            if self._local is None:
                return hidden
            return self._local.first.run(hidden, self._session.position, pads=self.pads)  # [1, t, d]

        async def begin() -> DraftRunner:
            return DraftRunner(self._session, embed_here, ids=had, limit=limit, model=model)

        self._runner = self._portal.call(begin)

    def stop_drafting(self) -> None:
        """Forget what nobody has asked for."""
        if self._runner is not None:
            runner = self._runner

            async def end() -> None:
                runner.cut(runner.position)

            with suppress(SwarmClosed):
                self._portal.call(end)
            self._runner = None

    def _check_open(self) -> None:
        if self._closed:
            raise ClientError("the session is closed: open another with model.session()")

    def close(self) -> None:
        """Free the session on its nodes, if the swarm's end has not done so. It cannot be used afterwards."""
        self._closed = True
        with suppress(SwarmClosed):
            self._portal.call(self._session.aclose)

    def __enter__(self) -> SessionCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
