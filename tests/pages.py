"""`make lint`'s rules for README.md and docs/: no figure that was typed, no image or link that leads nowhere, no placeholder.

A figure is a number that somebody measured. It stands in a block that `make results` wrote (stentor/reporting.py), which names
its files and is sealed with a hash. What is a name (T4, int8, 02_pretrain_t4), a version or somebody else's published limit is
no figure of ours; those that begin with a digit are listed below, whole phrases each.
"""
import re
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
# Written whole by a program, and held by a test: tests/way_of_a_token.py.
GENERATED = {"docs/way-of-a-token.md"}
NUMBER = re.compile(r"[\w.,×%/+-]*\d[\w.,×%/+-]*")
ALLOWED = (
    r"\b0[1-9](?:_\w+)?\b",                                # the notebooks' names
    r"Python 3\.\d+", r"Apache 2\.0",
    r"(?m)^\| *\d+ *\|", r"(?m)^ *\d+\. ", r"steps? \d(?: and \d)?",      # places in a list
    r"12 hours \(GPU, CPU\) or 9 \(TPU\)", r"20 GB",       # Kaggle's own limits, as it publishes them
)
PLACEHOLDER = re.compile(r"not measured yet|\b(?:TODO|TBD|FIXME|XXX)\b|lorem ipsum|\bplaceholder\b", re.I)
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)[^)]*\)")
FENCE, CODE = re.compile(r"```.*?```", re.S), re.compile(r"`[^`\n]*`")


def blank(found) -> str:
    """As many spaces, the lines kept: what is left out of a search."""
    return re.sub(r"[^\n]", " ", found.group())


def typed_figures(text: str, block) -> list[str]:
    """Numbers of a page outside its generated blocks, as sentences with their lines."""
    for pattern in (block, FENCE, CODE, re.compile(r"\]\([^)]*\)"), *map(re.compile, ALLOWED)):
        text = pattern.sub(blank, text)
    found = []
    for number in NUMBER.finditer(text):
        if re.match(r"[^\W\d_]", number.group()):          # begins with a letter: a name
            continue
        line = text.count("\n", 0, number.start()) + 1
        found.append(f"line {line}: {number.group().strip('.,')} is typed: a figure stands in a block that "
                     "`make results` writes.")
    return found


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"(?m)^#+ +(.+)$", FENCE.sub(blank, text))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def link_problems(text: str, folder: Path) -> list[str]:
    """Images and links of a page in `folder` that lead nowhere; what is on the net is not asked."""
    found = []
    for image, target in LINK.findall(CODE.sub(blank, FENCE.sub(blank, text))):
        place, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = folder / place if place else None
        if path is not None and not path.exists():
            found.append(f"the {'image' if image else 'link'} {target} leads nowhere.")
        elif image and path is not None and path.stat().st_size == 0:
            found.append(f"the image {target} is empty.")
        elif anchor and (path is None or path.suffix == ".md"):
            there = text if path is None else path.read_text(encoding="utf-8")
            if anchor not in headings(there):
                found.append(f"the link {target}: there is no heading {anchor}.")
    return found


def page_problems(folder: Path = REPO) -> list[str]:
    """Everything wrong with README.md, CONTRIBUTING.md and docs/ of the suite in `folder`, a line each."""
    from stentor.reporting import BLOCK, block_problems
    pages = [folder / "README.md", folder / "CONTRIBUTING.md", *sorted((folder / "docs").rglob("*.md"))]
    found = []
    for page in (page for page in pages if page.is_file()):
        text, name = page.read_text(encoding="utf-8"), page.relative_to(folder).as_posix()
        problems = link_problems(text, page.parent)
        if name not in GENERATED:
            problems += typed_figures(text, BLOCK) + block_problems(text)
        opened = len(re.findall(r"<!-- figures ", text))
        if opened != len(BLOCK.findall(text)):
            problems.append(f"{opened} blocks of figures are opened, {len(BLOCK.findall(text))} are whole.")
        problems += [f"line {text.count(chr(10), 0, word.start()) + 1}: {word.group()!r} is a placeholder."
                     for word in PLACEHOLDER.finditer(CODE.sub(blank, FENCE.sub(blank, text)))]
        found += [f"{name}: {problem}" for problem in problems]
    return found
