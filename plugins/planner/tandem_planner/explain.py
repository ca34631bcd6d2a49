# SPDX-License-Identifier: Apache-2.0
"""A decision in words: the sentence, then its terms, pool by pool, in the order in which they were found. For the log and `tandem plan`."""

from collections.abc import Iterator

from tandem_planner.terms import Decision, Term
from tandem_protocol.roles import Role


def lines(decision: Decision) -> Iterator[str]:
    """For people."""
    yield decision.reason
    for role in (None, *Role):
        terms = [term for term in decision.terms if term.role is role]
        if terms:
            yield f"{role.value if role else 'traffic and budget'}:"
            yield from _table(terms)


def one_line(decision: Decision) -> str:
    """For a log: `name=value` for each term, those of a pool as `pool.name`."""
    pairs = (f"{term.role.value + '.' if term.role else ''}{term.name}={number(term.value)}" for term in decision.terms)
    return f"{decision.reason} [{' '.join(pairs)}]"


def number(value: float) -> str:
    """Four digits are enough to follow a calculation."""
    return f"{value:.0f}" if abs(value) >= 1e4 and abs(value) != float("inf") else f"{value:.4g}"


def _table(terms: list[Term]) -> Iterator[str]:
    names, values = max(len(term.name) for term in terms), max(len(number(term.value)) for term in terms)
    for term in terms:
        yield f"  {term.name:<{names}}  {number(term.value):>{values}}  {term.how}"
