"""Running English in docstrings, comments and descriptions, without the mark-up around it.

What a small model reads, it writes: trained on `:param x:`, underlined headings, tables and
doctests, it printed those; trained on sentences alone, sentences.
"""
from __future__ import annotations

import re

# A paragraph with such a line is a list of parameters, a directive, a doctest, a table or code.
_NO_PROSE = re.compile(r"""(?mx)^\s*(?:
    :\w[^:\n]*:(?!`) | @\w+                                      # :param x:   @param
    | [\w*]+[^.:\n]{0,40}\s:\s\S | [\w*]+\s?\([^)\n]*\):         # x : int     x (int):
    | (?:Args|Arguments|Keyword\ Args|Parameters|Attributes|Returns?|Yields|Raises|Examples?
        |Inputs?|Outputs?|Shape)\s*:
    | \.\.\s | >>> | \.\.\.\s | \$\s | [|+] | \#+\s | ``` | ~~~ | \w+\s*=\s)""")
_UNDERLINE = re.compile(r"""(?mx)^[^\n]*\n\s*([-=~^*#_"'+.`])\1{2,}\s*$   # a heading and its line
                            | ^\s*([-=~^*#_"'+.`])\2{2,}\s*$""")
_ITEM = re.compile(r"(?m)^\s*(?:[-*•+]|\d+[.)]|\([a-z0-9]\))\s+")
_ROLE = re.compile(r":[\w:+-]+:`[~!]?([^`<]*?)(?:\s*<[^>`]*>)?`")           # :class:`~a.B <c>`
_MARKS = re.compile(r"""(?x) `([^`]+)`(?:__?)? | \*\*([^*]+)\*\*           # `a`  **a**
                        | (?<!\w)\*([^*\s][^*]*)\*(?!\w) | \[([^\]]*)\]\([^)]*\)   # *a*  [a](b)""")
_BEGINS, _ENDS = re.compile(r"[A-Z\"'“(]"), re.compile(r"[.!?][\"')”]*$")
_PLAIN_WORD = re.compile(r"[A-Za-z]?[a-z'’-]*|[A-Z]{2,5}s?|\d{1,4}")
_COMMON_WORDS = frozenset(
    "a all an and any are as at be but by can for from had has have if in into is it its may no not "
    "of on one only or so than that the then there this to use used was we when which will with "
    "you".split())

SHORTEST = 60             # characters of a paragraph: a sentence of ten words
LEAST_COMMON = 0.25       # share of words that hold sentences together: a list of names has none
MOST_ODD = 0.08           # share of words that are identifiers, paths, numbers or abbreviations
LEAST_LETTERS = 0.93      # share of letters and spaces


def running_text(text: str) -> list[str]:
    """The paragraphs, and items of lists, of a text that are running English, each as one line."""
    paragraphs = (_UNDERLINE.sub("", part) for part in re.split(r"\n\s*\n", text))
    parts = (part for paragraph in paragraphs for part in _ITEM.split(paragraph))
    lines = (without_marks(part) for part in parts if not _NO_PROSE.search(part))
    return [line for line in lines if is_english(line)]


def without_marks(text: str) -> str:
    """A paragraph as one line: what reStructuredText and Markdown mark, without the marks."""
    text = _ROLE.sub(r"\1", text).replace("``", "`")
    text = _MARKS.sub(lambda found: found[found.lastindex], text)
    return " ".join(text.replace("`", "").split())


def is_english(line: str) -> bool:
    """Whole sentences, hardly an identifier or a formula in them."""
    if len(line) < SHORTEST or not _BEGINS.match(line) or not _ENDS.search(line):
        return False
    words = [word.strip(".,;:!?()\"'") for word in line.split()]
    common = sum(word.lower() in _COMMON_WORDS for word in words)
    odd = sum(not _PLAIN_WORD.fullmatch(word) for word in words)
    letters = sum(character.isalpha() or character == " " for character in line)
    return (common >= LEAST_COMMON * len(words) and odd <= MOST_ODD * len(words)
            and letters >= LEAST_LETTERS * len(line))
