"""The ledger under random and concurrent borrowing: never over the limit, never a byte lost."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.offload.budget import Budget, Loan, Tier
from headrace.offload.errors import BudgetError, HeadraceError

LIMIT_BYTES = 100
NAMES = st.sampled_from(["layers.0", "layers.1", "gradients"])


class LedgerMachine(RuleBasedStateMachine):
    """A budget beside a plain model of it."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget(Tier.HOST, limit_bytes=LIMIT_BYTES)
        self.open: list[Loan] = []
        self.repaid: list[Loan] = []
        self.peak = 0

    @property
    def in_use(self) -> int:
        return sum(loan.nbytes for loan in self.open)

    @rule(name=NAMES, nbytes=st.integers(0, 130))
    def try_borrow(self, name: str, nbytes: int) -> None:
        room = self.in_use + nbytes <= LIMIT_BYTES
        loan = self.budget.try_borrow(name, nbytes)
        assert (loan is not None) == room
        if loan is not None:
            assert (loan.borrower, loan.nbytes) == (name, nbytes)
            self.open.append(loan)
            self.peak = max(self.peak, self.in_use)

    @rule(name=NAMES, nbytes=st.integers(0, 130))
    def borrow(self, name: str, nbytes: int) -> None:
        if self.in_use + nbytes <= LIMIT_BYTES:
            self.open.append(self.budget.borrow(name, nbytes))
            self.peak = max(self.peak, self.in_use)
        else:
            with pytest.raises(BudgetError) as caught:
                self.budget.borrow(name, nbytes)
            assert f"at least {self.in_use + nbytes:,} bytes" in str(caught.value)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def repay(self, data: st.DataObject) -> None:
        loan = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        loan.repay()
        self.repaid.append(loan)

    @precondition(lambda self: self.repaid)
    @rule(data=st.data())
    def repay_twice(self, data: st.DataObject) -> None:
        loan = data.draw(st.sampled_from(self.repaid))
        with pytest.raises(ValueError, match=f"'{loan.borrower}' was repaid"):
            loan.repay()

    @invariant()
    def ledger_holds(self) -> None:
        statistics = self.budget.statistics()
        by_borrower: Counter[str] = Counter()
        for loan in self.open:
            by_borrower[loan.borrower] += loan.nbytes
        assert statistics.in_use_bytes == self.in_use <= LIMIT_BYTES
        assert self.budget.free_bytes == LIMIT_BYTES - self.in_use
        assert statistics.peak_bytes == self.peak
        assert +Counter(statistics.by_borrower) == +by_borrower


TestLedger = LedgerMachine.TestCase


def test_threads_never_pass_the_limit() -> None:
    budget = Budget(Tier.DEVICE, limit_bytes=10)
    start = threading.Barrier(4)
    lent: list[int] = []

    def work(seed: int) -> None:
        start.wait()
        for turn in range(2000):
            loan = budget.try_borrow(f"t{seed}", (turn + seed) % 7)
            if loan is not None:
                lent.append(loan.nbytes)
                loan.repay()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statistics = budget.statistics()
    assert lent
    assert statistics.in_use_bytes == 0
    assert statistics.by_borrower == {}
    assert max(lent) <= statistics.peak_bytes <= 10


def test_refusals() -> None:
    with pytest.raises(BudgetError, match="device budget is -1 bytes"):
        Budget(Tier.DEVICE, limit_bytes=-1)
    budget = Budget(Tier.HOST, limit_bytes=1000)
    with pytest.raises(ValueError, match="-5 bytes"):
        budget.try_borrow("x", -5)
    budget.borrow("layers.0", 700)
    budget.borrow("layers.1", 200)
    with pytest.raises(BudgetError) as caught:
        budget.borrow("layers.2", 2000)
    message = str(caught.value)
    assert "'layers.2' needs 2,000 bytes on HOST" in message
    assert "100 of the 1,000-byte budget" in message
    assert "'layers.0' 700, 'layers.1' 200" in message
    assert "host_budget to at least 2,900 bytes" in message
    assert isinstance(caught.value, HeadraceError)
    assert isinstance(caught.value, ValueError)


@given(st.integers(1, 10**12))
def test_the_stated_least_works(nbytes: int) -> None:
    """The figure in the error is enough, and one byte less is not."""
    used = 300
    assert Budget(Tier.HOST, limit_bytes=used + nbytes).borrow("a", used + nbytes)
    tight = Budget(Tier.HOST, limit_bytes=used + nbytes)
    tight.borrow("a", used)
    tight.borrow("b", nbytes)
    short = Budget(Tier.HOST, limit_bytes=used + nbytes)
    short.borrow("a", used + 1)
    assert short.try_borrow("b", nbytes) is None
