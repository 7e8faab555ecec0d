"""Runs passes over a model: visits every site, asks the gate, keeps account.

The gate is composed around the passes: limits, a transaction, a well-formedness check, and
whatever a caller puts into *review* (an analytic model, for one). Verification and the clock look
at whole models and live one floor up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pwopt.errors import PwoptError
from pwopt.graph import Constant, Facts, Model, Node, Rewriter
from pwopt.passes.contract import DEFAULT_VARIANT, Match, Variant
from pwopt.remark import Decline, Fact, Kind, Remark, Tally, Verdict
from pwopt.tuning.candidate import AnyPass, Candidate, signature

__all__ = ["Change", "Checkpoint", "Driver", "Ledger", "keep_all"]

_REWRITES_PER_NODE = 8
"""More rewrites than this per node mean that passes undo each other; the run stops and says so."""


@dataclass(frozen=True, eq=False)
class Change:
    """What a transaction did: the nodes it took out and put in."""

    candidate: Candidate
    variant: Variant
    removed: Sequence[Node]
    added: Sequence[Node]


Choose = Callable[[Candidate], Variant | Verdict]
"""Picks the variant to try at a candidate, or says why none (held, rejected)."""
Review = Callable[[Change], Verdict]
"""Looks at a change before it is committed."""


def keep_all(candidate: Candidate) -> Variant:
    """Take the first variant everywhere."""
    return candidate.variants[0]


def _commit(_: Change) -> Verdict:
    return Verdict.KEPT


@dataclass
class Ledger:
    """The remarks of a run, one per site; sites are roots that a pass visited.

    A root that a pass rewrote counts as another site if the pass rewrites it once more.
    """

    sites: int = 0
    _settled: list[Remark] = field(default_factory=list)
    _open: dict[tuple[str, int], tuple[Node, Remark]] = field(default_factory=dict)
    _closed: dict[tuple[str, int], Node] = field(default_factory=dict)

    def candidate(self, node: Node, remark: Remark) -> None:
        """Record what became of a candidate at *node*."""
        key = (remark.pass_name, id(node))
        if self._open.pop(key, None) is None:
            self.sites += 1
        self._closed[key] = node
        self._settled.append(remark)

    def declined(self, node: Node, remark: Remark) -> None:
        """Record a decline, unless the pass already rewrote this site or had it refused."""
        key = (remark.pass_name, id(node))
        if key in self._closed:
            return
        if key not in self._open:
            self.sites += 1
        self._open[key] = (node, remark)

    def copy(self) -> Ledger:
        """An account that goes on from here on its own."""
        return Ledger(self.sites, list(self._settled), dict(self._open), dict(self._closed))

    def remarks(self) -> list[Remark]:
        """All remarks: candidates in the order of their ordinals, then declines."""
        settled = sorted(self._settled, key=lambda r: r.ordinal or 0)
        remarks = settled + [remark for _, remark in self._open.values()]
        # The accounting identity: no site is lost, none counted twice.
        assert Tally.of(remarks).visited == self.sites
        return remarks


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A state of a :class:`Driver`."""

    mark: int
    ledger: Ledger
    refused: dict[tuple[str, int], Node]
    proposed: int


class Driver:
    """Applies passes to one model with one rewriter, numbering candidates as it goes."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.facts = Facts(model)
        self.rewriter = Rewriter(model)
        self.ledger = Ledger()
        self._refused: dict[tuple[str, int], Node] = {}
        self._proposed = 0

    @property
    def proposed(self) -> int:
        """The ordinal of the latest candidate."""
        return self._proposed

    def checkpoint(self) -> Checkpoint:
        """A point to come back to."""
        return Checkpoint(
            self.rewriter.mark(), self.ledger.copy(), dict(self._refused), self._proposed
        )

    def restore(self, point: Checkpoint) -> None:
        """Take model and account back to *point*."""
        self.rewriter.rollback(point.mark)
        self.ledger = point.ledger.copy()
        self._refused = dict(point.refused)
        self._proposed = point.proposed

    def run(
        self, pass_: AnyPass, choose: Choose = keep_all, review: Review = _commit
    ) -> tuple[int, int]:
        """Visit every site of *pass_* until nothing is left to do.

        Returns:
            (applied, visited): rewrites kept, and match attempts made.

        Raises:
            PwoptError: the pass keeps rewriting what it has written.
        """
        model = self.model
        queue = deque(self._sites(pass_))
        waiting = {id(n) for n in queue}
        limit = _REWRITES_PER_NODE * (len(model.nodes) + 16)
        applied = visited = 0
        while queue:
            node = queue.popleft()
            waiting.discard(id(node))
            if id(node) not in model.nodes or (pass_.name, id(node)) in self._refused:
                continue
            visited += 1
            result = pass_.match(node, self.facts)
            if isinstance(result, Decline):
                self._record_decline(pass_, node, result)
                continue
            if not self._attempt(pass_, node, result, choose, review):
                self._refused[pass_.name, id(node)] = node
                continue
            applied += 1
            if applied > limit:
                raise PwoptError(f"pass {pass_.name} does not come to an end; please report this")
            for touched in self.rewriter.take_touched():
                if id(touched) not in waiting and self._is_root(pass_, touched):
                    waiting.add(id(touched))
                    queue.append(touched)
        return applied, visited

    def _attempt(
        self, pass_: AnyPass, node: Node, match: Match, choose: Choose, review: Review
    ) -> bool:
        self._proposed += 1
        candidate = Candidate(
            self._proposed,
            pass_,
            match,
            self.facts.site(node),
            signature(pass_, match, self.facts),
            pass_.variants(match),
        )
        chosen = choose(candidate)
        facts: dict[str, Fact] = {"signature": candidate.signature}
        is_one_of_a_kind = candidate.variants == (DEFAULT_VARIANT,)
        if not is_one_of_a_kind:
            facts["variants"] = [v.name for v in candidate.variants]
        if isinstance(chosen, Verdict):
            self._record(candidate, node, chosen, facts)
            return False
        mark = self.rewriter.mark()
        pass_.rewrite(match, chosen, self.rewriter)
        removed, added = self.rewriter.changes(mark)
        self._assert_well_formed(candidate, added)
        verdict = review(Change(candidate, chosen, removed, added))
        if not is_one_of_a_kind:
            facts["variant"] = chosen.name
        self._record(candidate, node, verdict, facts)
        if verdict is not Verdict.KEPT:
            self.rewriter.rollback(mark)
            return False
        return True

    def _assert_well_formed(self, candidate: Candidate, added: Sequence[Node]) -> None:
        """A pass that writes an ill-formed graph is a bug in the pass; name it."""
        for node in added:
            if id(node) not in self.model.nodes:
                continue
            for tensor in node.inputs:
                if tensor.is_empty() or self.facts.is_input(tensor) or tensor.inputs:
                    continue
                if not isinstance(tensor, Constant):
                    raise PwoptError(
                        f"pass {candidate.pass_.name} at '{candidate.site}' left tensor"
                        f" '{tensor.name}' without a producer; please report this"
                    )
            for tensor in node.outputs:
                if len(tensor.inputs) > 1:
                    raise PwoptError(
                        f"pass {candidate.pass_.name} at '{candidate.site}' produced tensor"
                        f" '{tensor.name}' twice; please report this"
                    )

    def _sites(self, pass_: AnyPass) -> list[Node]:
        model = self.model
        if "*" in pass_.roots:
            nodes = list(model.nodes.values())
        else:
            nodes = [n for op in pass_.roots for n in model.by_op.get(op, {}).values()]
        return sorted(nodes, key=model.position)

    def _is_root(self, pass_: AnyPass, node: Node) -> bool:
        return "*" in pass_.roots or self.facts.op(node) in pass_.roots

    def _record_decline(self, pass_: AnyPass, node: Node, decline: Decline) -> None:
        remark = Remark(
            None,
            pass_.name,
            self.facts.site(node),
            Kind.DECLINED,
            str(decline.why.value),
            dict(decline.facts),
        )
        self.ledger.declined(node, remark)

    def _record(
        self, candidate: Candidate, node: Node, verdict: Verdict, facts: dict[str, Fact]
    ) -> None:
        remark = Remark(
            candidate.ordinal,
            candidate.pass_.name,
            candidate.site,
            verdict.kind,
            verdict.value,
            {**candidate.match.facts, **facts},
        )
        self.ledger.candidate(node, remark)
