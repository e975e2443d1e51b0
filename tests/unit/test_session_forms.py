"""Where a form is used in which something is lost, and what stays as it was when nodes are replaced."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from client.errors import InvalidInput
from client.forms import HopTraffic, SessionForms
from client.routing import Hop
from client.session_core import Gap
from compute.wire_forms import Form
from net.protocol.session import Sent
from tests.unit.announcements import node


def hop(start: int, end: int, dtype: str = "float32") -> Hop:
    offer = node(1, start, end)
    return Hop(node=replace(offer, numerics=replace(offer.numerics, dtype=dtype)), start=start, end=end)


@pytest.mark.parametrize(
    ("dtype", "form"), [("float32", Form.FLOAT32), ("bfloat16", Form.BFLOAT16), ("float8_e5m2", Form.FLOAT32)]
)
def test_by_default_it_is_the_nodes_own(dtype: str, form: Form) -> None:
    forms = SessionForms()
    assert forms.asked is None
    forms.settle([hop(0, 2), hop(2, 4)])
    for each in (hop(0, 2, dtype), hop(0, 1, dtype), hop(3, 4, dtype)):
        assert (forms.into(each), forms.out_of(each)) == (form, form)


def test_what_is_asked_for_is_used_at_the_first_chains_cuts_alone() -> None:
    forms = SessionForms("int8")
    assert (forms.into(hop(1, 3)), forms.out_of(hop(1, 3))) == (Form.INT8, Form.INT8)  # nothing is decided yet
    forms.settle([hop(0, 2), hop(2, 4)])
    forms.settle([hop(0, 1), hop(1, 4)])  # too late
    assert (forms.into(hop(0, 2)), forms.out_of(hop(0, 2))) == (Form.INT8, Form.INT8)
    assert (forms.into(hop(0, 1)), forms.out_of(hop(0, 1))) == (Form.INT8, Form.FLOAT32)
    assert (forms.into(hop(1, 2, "bfloat16")), forms.out_of(hop(1, 2, "bfloat16"))) == (Form.BFLOAT16, Form.INT8)


def test_a_session_moves_only_to_hops_that_are_cut_alike() -> None:
    forms, plain = SessionForms("int8"), SessionForms()
    assert forms.allow([hop(0, 4)])  # nothing has been sent yet
    for each in (forms, plain):
        each.settle([hop(0, 2), hop(2, 4)])
    assert forms.allow([hop(0, 2), hop(2, 4)])
    assert forms.allow([hop(0, 1), hop(1, 2), hop(2, 4)])  # what is handed on at 1 loses nothing
    assert not forms.allow([hop(0, 4)])
    assert not forms.allow([hop(0, 1), hop(1, 4)])
    assert plain.allow([hop(0, 4)])


@pytest.mark.parametrize("wire", ["int8", "auto"])
def test_nodes_are_chosen_within_the_cuts(wire: str) -> None:
    calls: list[tuple[int, int, Any, Any, Any]] = []

    def choose(gap: Gap) -> list[Hop]:
        calls.append((gap.start, gap.end, gap.numerics, gap.before, gap.after))
        return [hop(gap.start, gap.end)]

    forms = SessionForms(wire)
    chosen = forms.within_cuts(choose)
    first, last, some = node(8, 0, 2), node(9, 4, 8), hop(0, 4).node.numerics

    def spans(start: int, end: int) -> list[tuple[int, int]]:
        hops = chosen(Gap(nodes=[], start=start, end=end, avoid={}, before=first, after=last))
        return [(each.start, each.end) for each in hops]

    assert spans(0, 8) == [(0, 8)]
    forms.settle([hop(0, 2), hop(2, 4), hop(4, 8)])
    calls.clear()
    found = spans(1, 8)
    if wire == "auto":
        assert found == [(1, 8)]
        assert calls == [(1, 8, None, first, last)]
    else:
        assert found == [(1, 2), (2, 4), (4, 8)]
        assert calls == [
            (1, 2, None, first, None),
            (2, 4, some, hop(1, 2).node, None),
            (4, 8, some, hop(2, 4).node, last),
        ]
    assert spans(2, 4) == [(2, 4)]


@pytest.mark.parametrize("wire", ["", "fp16", "INT8", None, 8, ["int8"]])
def test_there_are_three_choices(wire: Any) -> None:
    with pytest.raises(InvalidInput, match="give one of auto, bf16, int8"):
        SessionForms(wire)


def test_a_hop_in_words() -> None:
    sent = Sent(form="int8", tokens=10, n_bytes=1320, error=0.0066)
    text = str(HopTraffic(hop=hop(0, 4), to=sent, back=None))
    assert text.startswith("blocks 0:4 at ")
    assert text.endswith(": in: int8, 132 bytes a token, error 0.66 %, out: unknown")
