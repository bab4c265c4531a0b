"""What a score is: requests in tokens, and the rows of tokens that give many of them at once."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def common_prefix(*rows) -> int:
    """Number of leading tokens that all rows share."""
    first, last = min(rows), max(rows)                # in lexical order: what these share, all do
    for i, (a, b) in enumerate(zip(first, last)):
        if a != b:
            return i
    return min(len(first), len(last))


@dataclass(slots=True)
class Request:
    """One (context, continuation) in tokens: its score is logP(whole) - logP(context).

    whole, context: token ids of the two strings, each encoded once and whole, behind the prefix
    token where the context is empty. start: the number of leading tokens they share, whose terms
    cancel; at least 1, as the first token of a row is never predicted.
    """
    key: bytes
    whole: list
    context: list
    start: int

    @property
    def merged(self) -> bool:
        """Whether a token crosses the join, or lookahead changed one before it.

        lm-eval's own split is then wrong.
        """
        return self.start < len(self.context)

    @property
    def empty(self) -> bool:
        return len(self.whole) <= self.start


@dataclass(slots=True)
class Tree:
    """Rows of tokens that begin with the same `trunk`, computed in one row of the batch."""
    trunk: list
    branches: list    # of lists of tokens, each at least one long
    owners: list      # of (request, "whole" | "context", offset of the branch in its tokens)

    @property
    def length(self) -> int:
        """Tokens of the row; nothing is predicted from the last one of a branch."""
        return len(self.trunk) + sum(len(branch) - 1 for branch in self.branches)


def windows(tokens: list, start: int, max_length: int) -> list[tuple[int, int, int]]:
    """[(begin, first, end)]: predict tokens[first:end] from tokens[begin:end - 1].

    At most max_length of them at a time. A row that fits is one window. Else the left of the
    context is cut off, as lm-eval does; a continuation longer than the model is predicted in as
    many windows as it takes, the last with all the context there is room for.
    """
    many = len(tokens) - start > max_length
    cuts = list(range(start, len(tokens), max_length)) if many else [start]
    ends = cuts[1:] + [len(tokens)]
    return [(max(0, end - 1 - max_length), first, end) for first, end in zip(cuts, ends)]


def make_trees(requests: list[Request], max_length: int, share: bool = True) -> list[Tree]:
    """The trees that give every log-probability that `requests`, the choices of one item, need.

    Choices share their context: a four-choice item is one row, not four, where that saves a
    quarter of the tokens.
    """
    trees, fitting = [], []
    for request in requests:
        for kind, tokens in (("whole", request.whole), ("context", request.context)):
            if len(tokens) <= request.start:
                continue
            if max(len(tokens), len(request.whole)) - 1 <= max_length:
                fitting.append((request, kind, tokens))
            else:
                trees += cut_to_fit(request, kind, tokens, max_length)
    if not fitting:
        return trees
    trunk = min(common_prefix(*(tokens for _, _, tokens in fitting)),
                *(request.start for request, _, _ in fitting))
    together = Tree(fitting[0][2][:trunk], [tokens[trunk:] for _, _, tokens in fitting],
                    [(request, kind, trunk) for request, kind, _ in fitting])
    apart = [Tree(tokens[:request.start], [tokens[request.start:]],
                  [(request, kind, request.start)]) for request, kind, tokens in fitting]
    saves = trunk > 0 and together.length <= 0.75 * sum(tree.length for tree in apart)
    return trees + ([together] if share and saves else apart)


def cut_to_fit(request: Request, kind: str, tokens: list, max_length: int) -> list[Tree]:
    """The trees of one row that is longer than the model, or whose whole is."""
    # The context's tail is predicted from the same left edge as the whole.
    one_window = len(request.whole) - request.start <= max_length
    edge = max(0, len(request.whole) - 1 - max_length) if one_window else 0
    trees = []
    for begin, first, end in windows(tokens, request.start, max_length):
        begin = max(begin, min(edge, first - 1))
        trees.append(Tree(tokens[begin:first], [tokens[first:end]], [(request, kind, first)]))
    return trees


@dataclass(slots=True)
class Rows:
    """Trees as a batch. ids, position, segment: int64 of (trees, tokens of the longest).

    segment: 0 the trunk, then 1, 2, ... a branch each. sources, targets: for each token that is
    predicted, in the order of the branches, the place in the flattened batch that predicts it, and
    its id.
    """
    ids: np.ndarray
    position: np.ndarray
    segment: np.ndarray
    sources: list[int]
    targets: list[int]


def lay_out(trees: list[Tree]) -> Rows:
    length = max(tree.length for tree in trees)
    rows = Rows(*(np.zeros((len(trees), length), np.int64) for _ in range(3)), [], [])
    for row, tree in enumerate(trees):
        at = n = len(tree.trunk)
        rows.ids[row, :n], rows.position[row, :n] = tree.trunk, range(n)
        for number, branch in enumerate(tree.branches, 1):
            inside = slice(at, at + len(branch) - 1)
            rows.ids[row, inside], rows.segment[row, inside] = branch[:-1], number
            rows.position[row, inside] = range(n, n + len(branch) - 1)
            rows.sources += [row * length + n - 1,
                             *range(row * length + at, row * length + inside.stop)]
            rows.targets += branch
            at = inside.stop
    return rows
