"""Run-ahead speculation on a session: carries out what ``runahead.py`` decides."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import trio

from client.drafting.base import Drafter
from client.drafting.ngram import NgramDrafter
from client.drafting.policy import DraftPolicy
from client.drafting.runahead import HandOut, RunAhead, Send, SetBack, WantDraft

if TYPE_CHECKING:
    import torch

    from client.session import Session

logger = logging.getLogger(__name__)


class DraftRunner:
    """A session of one row that is asked for one token after another, and is ahead of who asks.

    Belongs to the session's event loop; not for concurrent use.
    """

    def __init__(
        self,
        session: Session,
        embed: Callable[[Sequence[int]], torch.Tensor],
        *,
        ids: Sequence[int],
        limit: int,
        model: Drafter | None = None,
    ) -> None:
        """Take a session that is open.

        Args:
            session: nobody else makes steps with it.
            embed: hidden states [1, t, d] before the first block, of t tokens; called in the event loop.
            ids: tokens that the session has.
            limit: tokens that it may come to hold.
            model: a drafter that takes long; beside looking up in the context.
        """
        quick = NgramDrafter()
        drafters = {quick.name: quick.grades} | ({} if model is None else {model.name: model.grades})
        self._session = session
        self._embed = embed
        self._model = model
        self._ahead: RunAhead[torch.Tensor] = RunAhead(
            DraftPolicy(drafters), quick=quick, slow=None if model is None else model.name, limit=limit
        )
        self._ahead.begin_with(ids)
        self._pieces: deque[tuple[int, int, int]] = deque()  # under way: number, position, end
        self._collecting: trio.CancelScope | None = None
        self._answer: torch.Tensor | None = None
        self._failure: BaseException | None = None
        self._answered = trio.Event()

    @property
    def position(self) -> int:
        """Tokens that were asked for."""
        return self._ahead.position

    async def step(self, ids: Sequence[int], position: int) -> torch.Tensor:
        """What the blocks give for these tokens.

        Shapes:
            returns: [1, t, d]

        Raises: as ``Session.step``.
        Cancellation: the step has not been.
        """
        await self._session.prepare(1)
        self._answer, self._failure, self._answered = None, None, trio.Event()
        try:
            await self._do(self._ahead.ask(position, ids, trio.current_time()))
            while self._answer is None and self._failure is None:
                await self._answered.wait()
                self._answered = trio.Event()
            if self._failure is not None:
                raise self._failure
        except BaseException:
            self.cut(position)
            raise
        return self._answer

    def cut(self, position: int) -> None:
        """Forget all tokens from ``position`` on."""
        for action in self._ahead.cut(min(position, self._ahead.position)):
            self._set_back(action.position)
        if self._session.position > position:
            self._set_back(position)

    def _set_back(self, position: int) -> None:
        if self._collecting is not None:
            self._collecting.cancel()
            self._collecting = None
        self._session.rollback(position)
        self._ahead.drop_void()
        self._pieces = deque(piece for piece in self._pieces if piece[2] <= position)
        self._collect()

    async def _do(self, actions: Sequence[Send | SetBack | HandOut[torch.Tensor] | WantDraft]) -> None:
        for action in actions:
            match action:
                case SetBack(position=position):
                    self._set_back(position)
                case Send(number=number, position=position, tokens=tokens):
                    end = await self._session.begin(self._embed(tokens))
                    self._pieces.append((number, position, end))
                    self._collect()
                case HandOut(payload=payload, start=start, stop=stop):
                    self._answer = payload[:, start:stop]
                    self._answered.set()
                case WantDraft(ids=ids, count=count):
                    self._session.start_soon(self._draft, ids, count)

    def _collect(self) -> None:
        if self._collecting is None and self._pieces:
            self._collecting = trio.CancelScope()
            self._session.start_soon(self._collect_in, self._collecting)

    async def _collect_in(self, scope: trio.CancelScope) -> None:
        """Take results as they come, in order."""
        with scope:
            while self._pieces:
                number, position, end = self._pieces[0]
                try:
                    result = await self._session.result(position, end)
                except Exception as error:  # noqa: BLE001  # raised by who waits
                    self._failure = error
                    self._answered.set()
                    break
                self._pieces.popleft()
                await self._do(self._ahead.result(number, result, trio.current_time()))
        if self._collecting is scope:
            self._collecting = None

    async def _draft(self, ids: list[int], count: int) -> None:
        model = self._model
        if model is None:
            return
        began = trio.current_time()
        draft = await trio.to_thread.run_sync(model.propose, ids, count, abandon_on_cancel=True)
        now = trio.current_time()
        await self._do(self._ahead.drafted(draft, now - began, now))


def make_model_drafter(model: Any, vocabulary: int) -> Drafter:
    """A drafter out of a small model of transformers'.

    Raises:
        InvalidInput: not a model that can draft.
    """
    from client.drafting.model import ModelDrafter

    return ModelDrafter(model, vocabulary=vocabulary)
