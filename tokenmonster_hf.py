"""TokenMonster vocabularies without the TokenMonster server, and a transformers tokenizer on top of them.

One file that travels inside every published model: it needs the standard library, numpy, transformers (only for
`TokenMonsterTokenizer`) and, when present, numba. From top to bottom:

    text --normalise (NFD ...)--> --capcode (upper case as markers)--> bytes --walk--> ids

1. runes          what the engine wants to know about a Unicode character
2. normalisation  the eight bits of the `.vocab` header, NFD as Go's x/text writes it
3. capcode        "Hello" -> "DC hello": upper case and word starts as marker characters
4. the walk       ungreedy longest match with a two-token look-ahead: the heart of TokenMonster
5. Vocabulary     the `.vocab` file: read, write, build, change; encode and decode
6. TokenMonsterTokenizer  the transformers class

`word` and ` word` are different tokens, so a greedy longest match often cuts a word badly. At every step the walk
compares up to six ways of cutting the next two tokens (the longest match and its two stored alternatives, each also
with "delete the next space" in front of the second token) and takes the best by a fixed score.
"""

import codecs
import concurrent.futures
import contextlib
import copy
import functools
import itertools
import json
import multiprocessing
import os
import re
import struct
import typing
import unicodedata

import numpy as np

try:
    import numba
except ImportError:  # absent, or at odds with this numpy: the plain Python core gives the same ids
    numba = None
try:
    from transformers import AddedToken, PreTrainedTokenizer
except ImportError:  # Vocabulary does not need it
    PreTrainedTokenizer = object

NONE24 = 0xFFFFFF  # "absent" in the file's 24-bit fields
MAX_TOKEN = 40  # bytes; the reference engine refuses longer keys
LONG_TEXT = 1 << 23  # bytes; longer texts are encoded in pieces of this size
END_LETTER, BEGIN_LETTER, BEGIN_SPACE, END_MARKER, BEGIN_MARKER, ONE_WORD, SPECIAL, PURE = (1 << i for i in range(8))
NFD, LOWERCASE, ACCENTS, QUOTEMARKS, COLLAPSE, TRIM, LEADINGSPACE, UNIXLINES = (1 << i for i in range(8))

# ---------------------------------------------------------------------------------------------------------------------
# 1. Runes. Classes are those of Go's unicode package: Upper = Lu, Lower = Ll, Letter = L*, Number = N*, Modifier = M*.

UPPER, LOWER, LETTER, NUMBER, MODIFIER, SPACE, APOSTROPHE, KNOWN = (1 << i for i in range(8))
# Runes that can come second in a canonical composition although their combining class is 0: they count as non-starters.
COMPOSES_BACKWARD = frozenset(
    [0x09BE, 0x09D7, 0x0B3E, 0x0B56, 0x0B57, 0x0BBE, 0x0BD7, 0x0CC2, 0x0CD5, 0x0CD6, 0x0D3E, 0x0D57, 0x0DCF, 0x0DDF]
    + [0x102E, 0x1B35, 0x11127, 0x1133E, 0x11357, 0x114B0, 0x114BA, 0x114BD, 0x115AF, 0x11930]
    + [*range(0x1161, 0x1176), *range(0x11A8, 0x11C3)]  # Hangul vowels and final consonants
)


class _Runes:
    """Class, lower and upper case of every code point, filled in for those that occur (all would take a second)."""

    def __init__(self):
        self.cls = np.zeros(0x110000, np.uint8)
        self.lower = np.zeros(0x110000, np.int32)
        self.upper = np.zeros(0x110000, np.int32)
        self._learn(np.arange(128))

    def learn(self, data):
        """Fill in the characters of these UTF-8 bytes."""
        if not data.isascii():
            high = np.frombuffer(data, np.uint8)
            high = high[high >= 128].tobytes().decode("utf-8", "ignore")
            self._learn(np.frombuffer(high.encode("utf-32-le"), np.uint32))
        return self

    def _learn(self, cps):
        unknown = cps[self.cls[cps] == 0]
        for found in np.unique(unknown).tolist() if len(unknown) else ():
            for cp in (found, _simple_lower(found), _simple_upper(found)):  # capcode looks at what it writes, too
                category, kind = unicodedata.category(chr(cp)), KNOWN
                kind |= {"Lu": UPPER, "Ll": LOWER}.get(category, 0)
                kind |= {"L": LETTER, "N": NUMBER, "M": MODIFIER}.get(category[0], 0)
                kind |= SPACE * (cp == 0x20) | APOSTROPHE * (cp in (0x27, 0x2019))
                self.lower[cp], self.upper[cp] = _simple_lower(cp), _simple_upper(cp)
                self.cls[cp] = kind  # last: another thread may be looking


@functools.lru_cache(None)
def _runes():
    return _Runes()


def _simple_lower(cp):
    lower = chr(cp).lower()
    return 0x69 if cp == 0x130 else ord(lower) if len(lower) == 1 else cp


def _simple_upper(cp):
    upper, title = chr(cp).upper(), chr(cp).title()
    return ord(upper) if len(upper) == 1 else ord(title) if len(title) == 1 else cp


# ---------------------------------------------------------------------------------------------------------------------
# 2. Normalisation, on UTF-8 bytes. Invalid bytes pass as lone surrogates (surrogateescape) and come out unchanged.


def _nfd(data):
    """NFD of UTF-8 bytes. Only the runs of non-ASCII bytes can change; short ones recur, so they are remembered."""
    if data.isascii():
        return data
    high = np.flatnonzero(np.frombuffer(data, np.int8) < 0)
    first = np.flatnonzero(np.diff(high, prepend=-2) != 1)
    starts, ends = high[first].tolist(), (high[np.append(first[1:], len(high)) - 1] + 1).tolist()
    out, done = [], 0
    for start, end in zip(starts, ends):
        run = data[start:end]
        nfd = _nfd_short(run) if len(run) < 32 else _nfd_run(run)
        if nfd != run:
            out += (data[done:start], nfd)
            done = end
    return b"".join([*out, data[done:]])


def _nfd_run(run):
    """NFD as Go's x/text writes it, that is Stream-Safe: U+034F before a 31st non-starter in a row."""
    text = run.decode("utf-8", "surrogateescape")
    if len(text) > 30 or len(unicodedata.normalize("NFKD", text)) > 30:
        out, stacked = [], 0
        for c in text:
            lead, trail = _stacking(c)
            if stacked + lead > 30:
                out.append("\u034f")
                stacked = lead
            else:
                stacked = stacked + lead if lead else trail
            out.append(c)
        text = "".join(out)
    return unicodedata.normalize("NFD", text).encode("utf-8", "surrogateescape")


_nfd_short = functools.lru_cache(1 << 15)(_nfd_run)


@functools.lru_cache(1 << 15)
def _stacking(c):
    """Leading and trailing non-starters of a character's compatibility decomposition."""
    nfkd = unicodedata.normalize("NFKD", c)
    stacks = [unicodedata.combining(c) != 0 or ord(c) in COMPOSES_BACKWARD for c in nfkd]
    return [*stacks, False].index(False), [*stacks[::-1], False].index(False)


def _normalize(data, bits, charset):
    """bytes -> bytes by the header's normalisation bits, in the official order.

    Two official slips are kept because they decide ids (no released vocabulary combines these bits): a curly quote is
    missed when exactly one byte was removed before it; TRIM with LEADINGSPACE loses the last byte of a text that does
    not begin with white space.
    """
    patterns = [b"\r\n"] * bool(bits & UNIXLINES) + [b"  +"] * bool(bits & COLLAPSE)
    patterns += [b"\xe2\x80[\x98\x99\x9c\x9d]"] * bool(bits & QUOTEMARKS)
    if patterns:
        removed = 0

        def shorter(match):
            nonlocal removed
            found = match[0]
            if found[0] == 0xE2 and removed == 1:
                return found
            removed += len(found) - 1
            return {0x0D: b"\n", 0x20: b" "}.get(found[0]) or (b"'" if found[2] < 0x9C else b'"')

        data = re.sub(b"|".join(patterns), shorter, data)
    if bits & TRIM:
        whole, data = data, data.strip(bytes(range(33)))
        if bits & LEADINGSPACE and whole[:1] > b" ":
            data = data[:-1]
    if bits & LEADINGSPACE and data and data[:1] != b" ":
        data = b" " + data
    if charset == 2 and bits & (ACCENTS | LOWERCASE | NFD):  # by way of UTF-8; half a unit at the end stays as it is
        half = len(data) & ~1
        text = data[:half].decode("utf-16-le", "surrogatepass").encode("utf-8", "surrogatepass")
        text = _normalize(text, bits & (ACCENTS | LOWERCASE | NFD), 1).decode("utf-8", "surrogatepass")
        return text.encode("utf-16-le", "surrogatepass") + data[half:]
    if bits & ACCENTS:  # one U+FFFD for each invalid byte
        data = re.sub("[\udc80-\udcff]", "\ufffd", data.decode("utf-8", "surrogateescape")).encode()
    if bits & (ACCENTS | NFD):
        data = _nfd(data)
    if bits & (ACCENTS | LOWERCASE):
        text = data.decode("utf-8", "surrogateescape")
        if bits & ACCENTS:
            text = "".join(c for c in text if unicodedata.category(c) != "Mn")
        if bits & LOWERCASE:
            text = text.lower()
        data = text.encode("utf-8", "surrogateescape")
    return data


# ---------------------------------------------------------------------------------------------------------------------
# 3. Capcode. Level 2: `C` = next letter is upper case, `W` = next word is, `D` = the next space is not there; letters
# are lower-cased, so the markers cannot be confused with text. Level 1: 0x7F 0x20 marks a word that no space precedes.
# These functions, and those of the walk, run compiled by numba where it is installed, else as they stand here.

_inline = numba.njit(nogil=True) if numba else lambda function: function


def _kernel(types):
    """Decorator: function(backend, ...) runs compiled by numba, at first use and for these types, or as plain Python."""

    def decorate(function):
        @functools.lru_cache(None)
        def compiled():
            names = {"u1": numba.uint8, "u4": numba.uint32, "i4": numba.int32, "i8": numba.int64}
            signature = [
                numba.int64 if t == "int" else numba.types.Array(names[t[:2]], 1 + ("2d" in t), "C", readonly="r" in t)
                for t in types.split()
            ]
            try:
                return numba.njit(tuple(signature), cache=True, nogil=True)(function)
            except Exception:  # noqa: BLE001  no folder to cache in, or a cache that is foreign or damaged
                return numba.njit(tuple(signature), nogil=True)(function)

        def run(backend, *args):
            if backend == "numba":
                return compiled()(*args)
            return function(*(memoryview(a) if isinstance(a, np.ndarray) else a for a in args))

        return run

    return decorate


@_inline
def _rune(src, i):
    """(code point, bytes) of the UTF-8 rune at src[i], which is not ASCII; an invalid byte b is U+DC00 + b, 1 byte."""
    b, room = src[i] + 0, len(src) - i
    if 0xC2 <= b < 0xE0 and room > 1 and src[i + 1] >> 6 == 2:
        return (b & 31) << 6 | src[i + 1] & 63, 2
    if 0xE0 <= b < 0xF0 and room > 2 and src[i + 1] >> 6 == 2 and src[i + 2] >> 6 == 2:
        c = (b & 15) << 12 | (src[i + 1] & 63) << 6 | src[i + 2] & 63
        if c >= 0x800 and not 0xD800 <= c < 0xE000:
            return c, 3
    if 0xF0 <= b < 0xF5 and room > 3 and src[i + 1] >> 6 == 2 and src[i + 2] >> 6 == 2 and src[i + 3] >> 6 == 2:
        c = (b & 7) << 18 | (src[i + 1] & 63) << 12 | (src[i + 2] & 63) << 6 | src[i + 3] & 63
        if 0x10000 <= c < 0x110000:
            return c, 4
    return 0xDC00 + b, 1


@_inline
def _put(out, k, c):
    """Write code point c in UTF-8 at out[k]; returns the next k."""
    if c < 0x80 or 0xDC80 <= c < 0xDD00:
        out[k] = c & 0xFF
        return k + 1
    width = 2 if c < 0x800 else 3 if c < 0x10000 else 4
    for j in range(width - 1, 0, -1):
        out[k + j] = 0x80 | c & 63
        c >>= 6
    out[k] = (0xF00 >> width) & 0xFF | c
    return k + width


@_kernel("u1r u1 i4 u1")
def _capcode1(src, cls, lower, out):
    """Level-1 encode: UTF-8 bytes src -> out; returns the length used, at most 3 x as long."""
    i, k, before, before2 = 0, 0, 0, 0  # classes of the last two runes
    while i < len(src):
        c, n = src[i] + 0, 1
        if c >= 0x80:
            c, n = _rune(src, i)
        here, mark = cls[c], False
        if here & LETTER:
            mark = (before & (SPACE | LETTER | MODIFIER)) == 0 and not (before & APOSTROPHE and before2 & LETTER)
        elif here & NUMBER:
            mark = (before & (SPACE | NUMBER)) == 0
        if mark:
            out[k] = 0x7F
            out[k + 1] = 0x20
            k += 2
        if c < 0x80:
            out[k] = 0x14 if c == 0x7F else c
            k += 1
        else:
            k = _put(out, k, c)
        i += n
        before2, before = before, here
    return k


@_kernel("u1r u1 i4 u1")
def _capcode2(src, cls, lower, out):
    """Level-2 encode: UTF-8 bytes src -> out; returns the length used, at most 4 x as long + 4."""
    i, k, before, before2, run = 0, 0, 0, 0, 0  # run of capitals: 0 none, 87 marked as a word, 67 letter by letter
    while i < len(src):
        c, n = src[i] + 0, 1
        if c >= 0x80:
            c, n = _rune(src, i)
        here, mark = cls[c], False
        if here & UPPER:
            if run == 0:
                j, ahead = i + n, here  # a run that a small letter ends is no word in capitals
                while j < len(src) and ahead & (UPPER | NUMBER | APOSTROPHE | MODIFIER):
                    rune, width = src[j] + 0, 1
                    if rune >= 0x80:
                        rune, width = _rune(src, j)
                    ahead = cls[rune]
                    j += width
                run = 67 if ahead & LOWER else 87
                if before & SPACE:
                    k -= 1  # the space goes behind the marker
                else:
                    out[k] = 68
                    k += 1
                out[k] = run
                out[k + 1] = 32
                k += 2
            elif run == 67 and cls[lower[c]] & LOWER:
                out[k] = 68
                out[k + 1] = 67
                out[k + 2] = 32
                k += 3
            else:
                mark = (before & (LETTER | APOSTROPHE | MODIFIER)) == 0
            c = lower[c]
        elif here & LOWER and run:
            mark = (before & (LETTER | APOSTROPHE | MODIFIER)) == 0
            run = 0
        elif here & LOWER:
            mark = (before & (SPACE | LOWER | MODIFIER)) == 0 and not (before & APOSTROPHE and before2 & LETTER)
        elif here & NUMBER:
            mark = (before & NUMBER) == 0 and not (run == 0 and before & SPACE)
        elif (here & (APOSTROPHE | MODIFIER)) == 0:
            run = 0
        if mark:
            out[k] = 68
            out[k + 1] = 32
            k += 2
        if c < 0x80:
            out[k] = c
            k += 1
        else:
            k = _put(out, k, c)
        i += n
        before2, before = before, here
    return k


@_kernel("u1r u1 i4 i8 u1 i8")
def _uncapcode2(src, cls, upper, state, out, kept):
    """Level-2 decode: UTF-8 bytes src -> out (2 x as long + 4); returns the length used. kept: bytes each rune gave.

    state, carried from call to call when streaming: one_char, in_word, delete, keep_word (right behind a W).
    """
    i, k = 0, 0
    while i < len(src):
        c, n, start = src[i] + 0, 1, k
        if c >= 0x80:
            c, n = _rune(src, i)
        if c == 67:
            state[0] = 1
            state[1] = 0
        elif c == 87:
            state[0] = 0
            state[1] = 1
            state[3] = 1
        elif c == 68:
            state[2] = 1
        else:
            if state[2]:
                state[2] = 0
            elif c == 32:
                out[k] = 32
                k += 1
                if state[3] == 0:
                    state[1] = 0
            else:
                if state[0] or (state[1] and cls[c] & (UPPER | LOWER)):
                    c = upper[c] if cls[c] else c
                    state[0] = 0
                elif (cls[c] & (NUMBER | APOSTROPHE | MODIFIER)) == 0:
                    state[1] = 0
                if c < 0x80:
                    out[k] = c
                    k += 1
                else:
                    k = _put(out, k, c)
            state[3] = 0
        kept[i + n - 1] = k - start
        i += n
    return k


@_kernel("u1r u1 i4 i8 u1 i8")
def _uncapcode1(src, cls, upper, state, out, kept):
    """Level-1 decode, like _uncapcode2: 0x7F takes itself and the next byte out."""
    k = 0
    for i in range(len(src)):
        deleted = state[2]
        state[2] = src[i] == 0x7F and not deleted
        if not deleted and src[i] != 0x7F:
            out[k] = src[i]
            kept[i] = 1
            k += 1
    return k


def _capcode_encode(data, capcode, backend):
    """Normalised bytes -> bytes in capcode form."""
    if capcode == 0 or not data:
        return data
    runes, out = _runes().learn(data), np.empty(4 * len(data) + 4, np.uint8)
    encode = _capcode1 if capcode == 1 else _capcode2
    return out[: encode(backend, np.frombuffer(data, np.uint8), runes.cls, runes.lower, out)].tobytes()


def _capcode_decode(data, capcode, backend, state):
    """Bytes in capcode form -> (bytes, how many of them each byte of `data` gave). state (4,) is updated."""
    kept = np.zeros(len(data), np.int64)
    if capcode == 0 or not data:
        return data, kept + 1
    runes, out = _runes().learn(data), np.empty(2 * len(data) + 4, np.uint8)
    decode = _uncapcode1 if capcode == 1 else _uncapcode2
    used = decode(backend, np.frombuffer(data, np.uint8), runes.cls, runes.upper, state, out, kept)
    return out[:used].tobytes(), kept


# ---------------------------------------------------------------------------------------------------------------------
# 4. The walk


@_inline
def _find(text, p, end, cells, base):
    """Record of the longest key that is text[p:...], or -1.

    The keys are a trie in one array: the child of a node on byte b is cells[base + b], if its label says so.
    cell = (longest record on the way here + 1) << 40 | base of its own children << 9 | label (511 = free)
    """
    last = 0
    while p < end:
        b = text[p]
        cell = cells[base + b]
        if (cell & 511) != b:
            break
        last = cell
        base = (cell >> 9) & 0x7FFFFFFF
        p += 1
    return (last >> 40) - 1


@_inline
def _spaced(text, p, end, s, cells, space, rec, begin):
    """The key " " + text[p:...] that may stand for s behind a delete token, or -1."""
    if s < 0 or (rec[s, 1] & 0xFF02) != BEGIN_LETTER or begin[text[p + rec[s, 0]]] != 1:
        return -1
    spaced = _find(text, p, end, cells, space)
    return spaced if spaced >= 0 and rec[spaced, 0] > rec[s, 0] + 1 else -1


@_inline
def _pair(text, rec, begin, f, fd, s, i, p, beat, space_len):
    """Score of cutting text[i:] into f and, at p, s. A word begun counts 100, a word cut in two costs 103.

    fd: 1 if the leading space of f is not in the text. space_len: bytes of s that are not in the text, 0 without a
    delete token. beat: where the longest match ends; an alternative f must get farther, with s, than that.
    """
    if s < 0:
        return -(1 << 30)
    flag_f, flag_s, stop = rec[f, 1], rec[s, 1], p + rec[s, 0] - space_len
    after = begin[text[stop]]  # class of the byte behind: 12 space, 10 other, 1 letter, 0 neither
    score = stop - i + rec[f, 5 + fd] + rec[s, 7]
    if after >= 10:
        score += 101 if after == 12 else 100
    elif after == 1 and flag_s & END_LETTER:
        score -= 3
    if flag_f & END_LETTER and (space_len or flag_s & BEGIN_LETTER):
        score -= 103
    if flag_f & END_MARKER and flag_s & BEGIN_MARKER:
        score -= 100
    if space_len:
        score -= 1 + (flag_s & BEGIN_SPACE) // BEGIN_SPACE
    if stop <= beat:
        score -= 100 if stop < beat else 10000
    return score


@_kernel("u1r i8 i8 i8 int int i4_2d i4 int int u4 i8")
def _walk(text, bounds, stops, cells, space, space_len, rec, begin, delete, unk, out, counts):
    """Tokenise text[bounds[d] : bounds[d + 1] - 1] for each d; the byte behind each text must be 0.

    It stops at the first place from stops[d] on where nothing but the place decides how it goes on (that is, except
    behind a deleted space), and puts that place into stops[d].
    rec (records, 8): length, flag | words << 8, id, alt1, alt2, score as first with fd 0 and 1, score as second.
    counts (documents + 1): tokens of each document, then the bytes without a token. Returns the number of ids in
    `out`, -1 when it is too short.
    """
    k, missing, room = 0, 0, len(out) - 2
    for d in range(len(bounds) - 1):
        i, end, k_before = bounds[d], bounds[d + 1] - 1, k
        x, ln, fd = -1, 0, 0  # the token at i (-1: look), the bytes of text it covers, 1 if its space is not in it
        stop = stops[d]
        while i < end and (i < stop or (fd and x >= 0)):
            if k > room:
                return -1
            if x < 0:
                x = _find(text, i, end, cells, 0)
                if x < 0:
                    missing += 1
                    i += 1
                    if unk >= 0:
                        out[k] = unk
                        k += 1
                    continue
                ln, fd = rec[x, 0], 0
            p1 = i + ln
            if p1 >= end or (rec[x, 1] & ONE_WORD and begin[text[p1]] == 12):  # nothing to weigh
                out[k] = rec[x, 2]
                k += 1
                i, x = p1, -1
                continue

            # up to six ways to cut the next two tokens; on a tie the earlier one stands
            first, second, at, deleted = x, _find(text, p1, end, cells, 0), p1, 0
            best = _pair(text, rec, begin, x, fd, second, i, p1, -1, 0)
            s1, f2, f3, p2, p3, s2, s3 = second, rec[x, 3], -1, 0, 0, -1, -1
            if f2 >= 0:
                p2 = i + rec[f2, 0] - fd
                s2 = _find(text, p2, end, cells, 0)
                score = _pair(text, rec, begin, f2, fd, s2, i, p2, p1, 0)
                if score > best:
                    best, first, second, at = score, f2, s2, p2
                f3 = rec[x, 4]
                if f3 >= 0:
                    p3 = i + rec[f3, 0] - fd
                    s3 = _find(text, p3, end, cells, 0)
                    score = _pair(text, rec, begin, f3, fd, s3, i, p3, p1, 0)
                    if score > best:
                        best, first, second, at = score, f3, s3, p3
            if delete >= 0:
                s = _spaced(text, p1, end, s1, cells, space, rec, begin)
                score = _pair(text, rec, begin, x, fd, s, i, p1, -1, space_len)
                if score > best:
                    best, first, second, at, deleted = score, x, s, p1, 1
                s = _spaced(text, p2, end, s2, cells, space, rec, begin)
                score = _pair(text, rec, begin, f2, fd, s, i, p2, p1, space_len)
                if score > best:
                    best, first, second, at, deleted = score, f2, s, p2, 1
                s = _spaced(text, p3, end, s3, cells, space, rec, begin)
                score = _pair(text, rec, begin, f3, fd, s, i, p3, p1, space_len)
                if score > best:
                    best, first, second, at, deleted = score, f3, s, p3, 1

            out[k] = rec[first, 2]
            k += 1
            if deleted:
                out[k] = delete
                k += 1
            i, x, fd = at, second, deleted
            ln = rec[x, 0] - space_len * deleted if x >= 0 else 0
        counts[d], stops[d] = k - k_before, i
    counts[len(bounds) - 1] = missing
    return k


@_kernel("u1r i8 i8 i8 i8_2d")
def _build_trie(flat, offsets, order, cells, queue):
    """Fill `cells` (see _find) with the keys flat[offsets[j]:offsets[j + 1]], sorted bytewise; order[j] = record.

    A node's children stand at the first base where each finds a free cell and which no other node has. Base 256 is
    that of nodes without children (cells 256 to 511 stay free). queue (bytes of all keys + 1, 5) is work space.
    Returns the number of cells used, -1 when `cells` is too short.
    """
    cells[:] = 511
    used = np.zeros(len(cells), np.bool_)
    labels, starts = np.zeros(257, np.int64), np.zeros(257, np.int64)
    queue[0] = 0  # columns: first key, end, depth, own cell, best + 1
    queue[0, 1], queue[0, 3] = len(order), -1
    head, tail, one, many, top = 0, 1, 512, 512, 512
    while head < tail:
        lo, hi, depth, slot, best = queue[head]
        head += 1
        while lo < hi and offsets[lo + 1] - offsets[lo] == depth:
            best = order[lo] + 1  # of equal keys the last one counts
            lo += 1
        n = 0
        for j in range(lo, hi):
            label = np.int64(flat[offsets[j] + depth])
            if n == 0 or label != labels[n - 1]:
                labels[n], starts[n] = label, j
                n += 1
        starts[n] = hi
        base = 0 if slot < 0 else 256
        if n > 0 and slot >= 0:
            pos, tries, fits = (one if n == 1 else many), 0, False
            while not fits:
                while pos < len(cells) and cells[pos] != 511:
                    pos += 1
                if pos + 512 > len(cells):
                    return -1
                base = pos - labels[0]
                fits = not used[base]
                for j in range(1, n):
                    fits = fits and cells[base + labels[j]] == 511
                pos += 1
                tries += 1
            used[base] = True
            if n == 1:
                one = pos
            elif tries > 100:  # crowded here: look farther on from now on
                many = pos
        for j in range(n):
            cells[base + labels[j]] = labels[j]
            queue[tail, 0], queue[tail, 1], queue[tail, 2] = starts[j], starts[j + 1], depth + 1
            queue[tail, 3], queue[tail, 4] = base + labels[j], best
            tail += 1
        top = max(top, base + 256)
        if slot >= 0:
            cells[slot] = (best << 40) | (base << 9) | cells[slot]
    return top


def _walk_python(vocab, text, stop):
    """The walk once more, in plain Python on a dict: for machines without numba, and to check _walk against.

    text: normalised bytes. Returns (ids, bytes without a token, where it stopped: see _walk).
    """
    keys, lengths, rec, begin, end = vocab._key_index, vocab._key_lengths, vocab._rows, bytes(vocab._begin), len(text)
    text += b"\0"  # the look-ahead byte behind the text
    delete, unk, space = vocab.delete_id, vocab.unk_id, vocab._space

    def find(p, prefix=b""):  # longest key at p; only the lengths that occur behind these two bytes are tried
        head = prefix + text[p : min(p + 2, end)]
        for n in lengths.get(head[:2], ()) or lengths.get(head[:1], ()):
            n -= len(prefix)
            if p + n <= end and (s := keys.get(prefix + text[p : p + n])) is not None:
                return s
        return None

    def score(branch):
        f, p, s, n, spaced = branch
        (_, flag_f, words_f, *_), (_, flag_s, words_s, *_) = rec[f], rec[s]
        words_f, after, covered = words_f - fd, begin[text[p + n]], p - i + n
        total = covered + bool(flag_f & PURE) + bool(flag_s & PURE) + max(0, words_f - 1) + max(0, words_s - 1)
        total += 100 * (words_f + words_s + (after >= 10)) + (after == 12)
        total -= 103 * bool(flag_f & END_LETTER and (spaced or flag_s & BEGIN_LETTER))
        total -= 100 * bool(flag_f & END_MARKER and flag_s & BEGIN_MARKER)
        total -= 3 * bool(flag_s & END_LETTER and after == 1)
        total += -1 if spaced else bool(flag_s & BEGIN_SPACE)
        if f != x:
            total -= 10000 if covered == ln else 100 if covered < ln else 0
        return total

    ids, missing, i, x, ln, fd = [], 0, 0, None, 0, 0
    while i < end and (i < stop or (fd and x is not None)):
        if x is None:
            x, fd = find(i), 0
            if x is None:
                missing += 1
                i += 1
                ids += [] if unk is None else [unk]
                continue
            ln = rec[x][0]
        _, flag, _, token, alt1, alt2 = rec[x]
        if i + ln >= end or (flag & ONE_WORD and begin[text[i + ln]] == 12):
            ids.append(token)
            i, x = i + ln, None
            continue
        firsts = [(x, i + ln)] + [(f, i + rec[f][0] - fd) for f in (alt1, alt2) if f >= 0 and alt1 >= 0]
        branches = [(f, p, s, rec[s][0], 0) for f, p in firsts if (s := find(p)) is not None]
        for f, p, s, n, _ in branches[:] if delete is not None else ():
            if rec[s][1] & BEGIN_LETTER and rec[s][2] == 0 and begin[text[p + n]] == 1:
                spaced = find(p, space)
                if spaced is not None and rec[spaced][0] > n + 1:
                    branches.append((f, p, spaced, rec[spaced][0] - len(space), 1))
        first, at, second, cover, deleted = max(branches, key=score, default=(x, i + ln, None, 0, 0))
        ids += [rec[first][3], delete] if deleted else [rec[first][3]]
        i, x, ln, fd = at, second, cover, deleted
    return ids, missing, i


# ---------------------------------------------------------------------------------------------------------------------
# 5. The vocabulary

HEADER = struct.Struct("<8B3s3s3s3s3sB")
TAIL = np.dtype([("flag", "u1"), ("words", "u1"), ("alt", "u1", (2, 3)), ("id", "u1", 3), ("score", "<f4")])
# Which single bytes `include` forces into a vocabulary, and its bit in the header's informative byte.
ASCII_BYTES = {9, 10, 13, *range(32, 127)}
EXTENDED = "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜÝßàáâãäåæçèéêëìíîïñòóôõöøùúûüýÿ€£¥¢©®™°±×÷§«»¿¡‘’“”–—…•"
GO_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
INCLUDE_BITS = {"all256": 1, "128": 2, "utf8": 4, "ascii": 8, "extended": 16}


def _u24(values):
    return np.ascontiguousarray(values, "<u4").view("u1").reshape(-1, 4)[:, :3]


def _from_u24(columns):
    values = columns.astype(np.int32)
    return values[..., 0] | values[..., 1] << 8 | values[..., 2] << 16


class Setting(typing.NamedTuple):
    """The first five bytes of a `.vocab` file."""

    capcode: int  # 0 none, 1 markers for words, 2 also for upper case
    charset: int  # 0 bytes, 1 UTF-8, 2 UTF-16LE
    normalization: int  # bits
    mode: int  # how it was trained: 0 unfiltered, 1 clean, 2 balanced, 3 consistent, 4 strict, 5 not trained
    reserve: int  # which single bytes were forced in; informative


class Vocabulary:
    """A TokenMonster vocabulary: the `.vocab` file, encoding and decoding.

    Make one with `from_file`, `from_bytes` or `from_tokens`. backend: "numba" (compiled), "python" (same ids, slower)
    or "auto" (numba where it is installed). Attributes: those of `Setting`; unk_id and delete_id, or None; n_ids, the
    highest id + 1. `len()` is the number of ids in use. Instances pickle, copy and serve several threads.
    """

    def __init__(self, setting, counts, keys, tail, begin, deleted, backend="auto"):
        if backend not in ("auto", "numba", "python"):
            raise ValueError(f"backend is {backend!r}; it must be 'auto', 'numba' or 'python'.")
        if backend == "numba" and numba is None:
            raise ValueError("backend='numba' needs the package numba: install it, or take backend='auto'.")
        self.backend = ("numba" if numba else "python") if backend == "auto" else backend
        self._setting = setting
        self.capcode, self.charset, self.normalization, self.mode, _ = setting
        self.unk_id, self.delete_id, self._size, self.n_ids = counts
        self._keys, self._tail, self._begin, self._deleted = keys, tail, begin, deleted
        self._make_tables()

    # -- the file --

    @classmethod
    def from_file(cls, path, backend="auto"):
        """Read a `.vocab` file. Raises ValueError when it is not one, or damaged."""
        with open(path, "rb") as file:
            data = file.read()
        try:
            return cls.from_bytes(data, backend)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from None

    @classmethod
    def from_bytes(cls, data, backend="auto"):
        """Read the bytes of a `.vocab` file. Every count is checked against the bytes present before it is believed."""

        def check(holds, what):
            if not holds:
                raise ValueError(f"This is not a TokenMonster vocabulary, or a damaged one: {what}.")

        def none(value):
            return None if value == NONE24 else value

        data = bytes(data)
        check(len(data) >= HEADER.size + 256 + 3, f"{len(data)} bytes are less than its header and tables take")
        *setting, zero1, zero2, zero3, unk, size, n_ids, count, delete, longest = HEADER.unpack_from(data)
        unk, size, n_ids, count, delete = (int.from_bytes(v, "little") for v in (unk, size, n_ids, count, delete))
        setting = Setting(*setting)
        check(setting.capcode <= 2 and setting.charset <= 2 and setting.mode <= 5, f"its settings are {setting[:4]}")
        check(not (zero1 or zero2 or zero3), "its reserved bytes are not zero")
        check(0 < longest <= MAX_TOKEN, f"longest token of {longest} bytes")
        keys, tails, p = [], [], HEADER.size
        for _ in range(count):
            check(p < len(data), "it ends within its records")
            n = data[p]
            check(0 < n <= longest, f"a token of {n} bytes, of at most {longest}")
            keys.append(data[p + 1 : p + 1 + n])
            tails.append(data[p + 1 + n : p + 1 + n + TAIL.itemsize])
            p += 1 + n + TAIL.itemsize
        check(p + 256 + 3 <= len(data), "it ends within its records")
        tail = np.frombuffer(b"".join(tails), TAIL)
        begin = np.frombuffer(data, np.uint8, 256, p)
        deleted, n_deleted, p = [], int.from_bytes(data[p + 256 : p + 259], "little"), p + 259
        for _ in range(n_deleted):
            check(p < len(data) and p + 1 + data[p] + 7 <= len(data), "it ends within its list of deleted tokens")
            n = data[p]
            token, gone = data[p + 1 : p + 1 + n], int.from_bytes(data[p + 1 + n : p + 4 + n], "little")
            deleted.append((token, none(gone), struct.unpack_from("<f", data, p + 4 + n)[0]))
            p += 8 + n
        check(p == len(data), f"{len(data) - p} bytes follow its end")

        ids, alts = _from_u24(tail["id"]), _from_u24(tail["alt"])
        check(count and max(map(len, keys)) == longest, "the longest token is not as long as the header says")
        check(all((len(a), a) <= (len(b), b) for a, b in itertools.pairwise(keys)), "its tokens are not sorted")
        check(np.isin(begin, (0, 1, 10, 12)).all(), "its table of first bytes holds unknown classes")
        check(np.isfinite(tail["score"]).all() and all(np.isfinite(d[2]) for d in deleted), "a score is not a number")
        highest = max(ids.max(initial=0), -1 if unk == NONE24 else unk)
        check(highest < n_ids, f"{n_ids} ids, but the highest is {highest}")
        check(size <= count + 1 and n_ids <= 16 * (count + n_deleted) + 65536, f"{size} tokens for {n_ids} ids")
        check(delete == NONE24 or delete in ids, f"delete token {delete} is not in it")
        for i, row in enumerate(alts.tolist()):
            for alt in row:
                whole = alt == NONE24 or (alt < i and keys[i].startswith(keys[alt]))
                check(whole, f"an alternative of token {keys[i]!r} is not a part of it")
        return cls(setting, (none(unk), none(delete), size, n_ids), keys, tail, begin, deleted, backend)

    def to_bytes(self):
        """The `.vocab` file; for a loaded vocabulary the very bytes it was read from."""
        counts = (self.unk_id, self._size, self.n_ids, len(self._keys), self.delete_id)
        counts = (int(NONE24 if c is None else c).to_bytes(3, "little") for c in counts)
        out = [HEADER.pack(*self._setting, 0, 0, 0, *counts, max(map(len, self._keys)))]
        tails = self._tail.tobytes()
        for i, key in enumerate(self._keys):
            out += [bytes([len(key)]), key, tails[i * TAIL.itemsize : (i + 1) * TAIL.itemsize]]
        out += [self._begin.tobytes(), len(self._deleted).to_bytes(3, "little")]
        for key, id_, score in self._deleted:
            id_ = (NONE24 if id_ is None else id_).to_bytes(3, "little")
            out.append(bytes([len(key)]) + key + id_ + struct.pack("<f", score))
        return b"".join(out)

    def save(self, path):
        """Write the `.vocab` file: to a temporary file beside it first, then renamed."""
        temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(self.to_bytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def __reduce__(self):
        return type(self).from_bytes, (self.to_bytes(), self.backend)

    # -- building --

    @classmethod
    def from_tokens(cls, tokens, *, capcode=0, charset=1, normalization=NFD, mode=5, scores=None, special_tokens=(),
                    unk=False, include="", encoded=True, backend="auto"):
        """Build a vocabulary from a list of tokens (bytes, or str for UTF-8).

        scores: one float per token, its share of the training text (0: unknown). include: which single bytes to force
        in, some of "all256", "128", "utf8", "ascii", "extended"; others have a token only if `tokens` holds them.
        encoded: the tokens are already normalised and in capcode form; if not, they are brought there. Ids go by
        (length, bytes). Tokens over 40 bytes are dropped. With capcode a token `word` also stands for marker + space +
        `word`: as a token of its own that gets no id (and leaves one unused).
        """
        tokens = [_as_bytes(t, charset) for t in tokens]
        scores = [0.0] * len(tokens) if scores is None else [float(s) for s in scores]
        if len(scores) != len(tokens):
            raise ValueError(f"{len(scores)} scores for {len(tokens)} tokens; give one for each, or none.")
        if bad := [s for s in scores if not 0 <= s < 3e38]:
            raise ValueError(f"The score {bad[0]} is not a share of the training text: give 0 or more.")
        names = include.replace(",", " ").split() if isinstance(include, str) else list(include)
        if unknown := [n for n in names if n not in INCLUDE_BITS]:
            raise ValueError(f"include={unknown[0]!r} is none of {', '.join(INCLUDE_BITS)}.")
        if capcode not in (0, 1, 2) or charset not in (0, 1, 2) or mode not in range(6):
            raise ValueError(f"capcode {capcode}, charset {charset} or mode {mode} does not exist: 0-2, 0-2, 0-5.")
        setting = Setting(capcode, charset, normalization, mode, sum(INCLUDE_BITS[n] for n in names))
        entries = {}
        for token, score in zip(tokens, scores):
            token = token if encoded else _prepare(token, setting, "python")
            if 0 < len(token) <= MAX_TOKEN:
                entries[token] = [None, score or entries.get(token, (0, 0.0))[1], False]
        for byte in _forced_bytes(names, capcode, normalization, charset):
            entries.setdefault(bytes([byte]), [None, 0.0, False])
        if not entries:
            raise ValueError("A vocabulary needs at least one token of 1 to 40 bytes.")
        cls._add_specials(entries, special_tokens, setting, deleted := [])
        return cls._build(entries, deleted, unk, setting, None, backend)

    @staticmethod
    def _add_specials(entries, special_tokens, setting, deleted):
        """Add special tokens to `entries`; ordinary tokens that contain one move to `deleted`."""
        for token in special_tokens:
            token = _checked(_prepare(_as_bytes(token, setting.charset), setting, "python"))
            own = entries.pop(token, [None])
            for key in [k for k in entries if token in k and not entries[k][2]]:
                deleted.append((key, *entries.pop(key)[:2]))
            entries[token] = [own[0], 0.0, True]

    @classmethod
    def _build(cls, entries, deleted, unk, setting, begin, backend):
        """Vocabulary of `entries` {key: [id or None, score, special]}: ids, variants, flags and alternatives.

        begin: the table of first bytes before a change; a byte that no rule matches keeps its class (as officially).
        """
        capcode, charset = setting.capcode, setting.charset
        marker = b"" if capcode == 0 else b"\x7f" if capcode == 1 else b"D"
        base = sorted(entries, key=lambda k: (len(k), k))
        shapes = {key: _shape(key, capcode, charset) for key in base}
        # every word also gets a record behind the marker and a space, so that a word no space precedes costs no more
        variants = {
            marker + b" " + key: key
            for key in base
            if capcode and shapes[key][2][0] in "ln" and len(key) <= MAX_TOKEN - 2 and not entries[key][2]
        }
        unk_id = len(base) if unk is True else unk if unk is not False else None
        taken = {e[0] for e in entries.values()} | {unk_id}
        free = (i for i in range(NONE24) if i not in taken)
        for key in base:
            if entries[key][0] is None and key not in variants:
                entries[key][0] = next(free)
        # a token that is also some word's variant gets no id of its own: officially the variant stands there twice
        doubled = [variants[key] for key in base if key in variants]
        records = [(marker + b" " + word, entries[word][0], -1.0, False) for word in [*variants.values(), *doubled]]
        records += [(key, *entries[key]) for key in base if key not in variants]
        records.sort(key=lambda r: (len(r[0]), r[0]))
        keys = [r[0] for r in records]
        index = {key: i for i, key in enumerate(keys)}

        tail = np.zeros(len(keys), TAIL)
        counts = np.zeros((256, 4), np.int64)
        rows = []
        for i, (key, id_, score, special) in enumerate(records):
            if special:
                rows.append((SPECIAL, 0, NONE24, NONE24))
                continue
            shape = shapes.get(key) or _shape(key, capcode, charset)
            rows.append(_derive(key, shape, index, capcode))
            counts[key[0], {" ": 0, "l": 1, "n": 2}.get(shape[2][0], 3)] += 1
        rows = np.array(rows, np.uint32)
        tail["flag"], tail["words"] = rows[:, 0], rows[:, 1]
        tail["alt"][:, 0], tail["alt"][:, 1] = _u24(rows[:, 2]), _u24(rows[:, 3])
        tail["id"], tail["score"] = _u24([r[1] for r in records]), [r[2] for r in records]

        begin = np.zeros(256, np.uint8) if begin is None else begin.copy()
        for byte, (space, letter, number, other) in enumerate(counts.tolist()):
            most = max(space, letter, number, other)
            if most > 2 and (space, letter, number, other).count(most) == 1 and number < most:
                begin[byte] = 1 if letter == most else 12 if space == most else 10
        ids = {r[1] for r in records} | ({unk_id} - {None})
        delete = entries[marker][0] if marker and marker in entries else None
        size = len(base) + (unk_id is not None)
        return cls(setting, (unk_id, delete, size, max(size, max(ids) + 1)), keys, tail, begin, deleted, backend)

    # -- surgery: each method changes the vocabulary in place and returns it --

    def _entries(self):
        rows = zip(self._keys, _from_u24(self._tail["id"]).tolist(), self._tail["score"].tolist(), self._tail["flag"])
        return {key: [id_, score, flag == SPECIAL] for key, id_, score, flag in rows if score != -1}

    def _rebuild(self, entries, deleted):
        unk = False if self.unk_id is None else self.unk_id
        deleted = sorted({d[0]: d for d in deleted}.values(), key=lambda d: (len(d[0]), d[0]))
        self.__dict__ = self._build(entries, deleted, unk, self._setting, self._begin, self.backend).__dict__
        return self

    def add_tokens(self, tokens, scores=None, encoded=False):
        """Add tokens (bytes or str), plain text unless `encoded`. Ids in use stay; the new tokens take free ones."""
        entries, deleted = self._entries(), list(self._deleted)
        for token, score in zip(tokens, scores or [0.0] * len(tokens), strict=True):
            token = _as_bytes(token, self.charset) if encoded else self.normalize(token)
            entries.setdefault(_checked(token), [None, float(score), False])
        return self._rebuild(entries, deleted)

    def delete_tokens(self, tokens):
        """Delete tokens (bytes or str, as `tokens` shows them); ids of the others stay."""
        entries, deleted = self._entries(), list(self._deleted)
        for token in tokens:
            token = _as_bytes(token, self.charset)
            if token not in entries:
                raise ValueError(f"There is no token {token!r} to delete.")
            deleted.append((token, *entries.pop(token)[:2]))
        return self._rebuild(entries, deleted)

    def add_special_tokens(self, tokens):
        """Add special tokens. Ordinary tokens that contain one are deleted. The walk finds a special token only where
        it happens to land on it: to be sure, split the text before encoding, as `TokenMonsterTokenizer` does."""
        entries, deleted = self._entries(), list(self._deleted)
        self._add_specials(entries, tokens, self._setting, deleted)
        return self._rebuild(entries, deleted)

    def resize(self, size):
        """Shrink to `size` ids by deleting the tokens of lowest score (never single bytes, special tokens or tokens
        without a score), or grow by bringing back the best deleted ones."""
        entries, deleted = self._entries(), list(self._deleted)
        excess = len(entries) + (self.unk_id is not None) - size
        able = [(e[1], len(k), k) for k, e in entries.items() if len(k) > 1 and e[1] > 0 and not e[2]]
        back = sorted((d for d in deleted if d[0] not in entries), key=lambda d: (-d[2], len(d[0]), d[0]))
        if excess > len(able) or -excess > len(back):
            reach = f"{len(self) - len(able)} to {len(self) + len(back)}"
            raise ValueError(f"This vocabulary cannot be resized to {size}: its scores allow {reach}.")
        for _, _, key in sorted(able)[: max(0, excess)]:
            deleted.append((key, *entries.pop(key)[:2]))
        taken = {e[0] for e in entries.values()} | {self.unk_id}
        for key, id_, score in back[: max(0, -excess)]:  # they stay in the list of deleted tokens, as officially
            entries[key] = [None if id_ in taken else id_, score, False]
            taken.add(id_)
        return self._rebuild(entries, deleted)

    def reset_ids(self):
        """Renumber all tokens by (length, bytes), without gaps; UNK last."""
        entries = {key: [None, score, special] for key, (_, score, special) in self._entries().items()}
        self.unk_id = None if self.unk_id is None else len(entries)
        return self._rebuild(entries, [(key, None, score) for key, _, score in self._deleted])

    def enable_unk(self):
        """Give bytes without a token an id of their own, the next free one."""
        if sum(len(k) == 1 for k in self._keys) >= (233 if self.capcode == 2 else 256):
            raise ValueError("Every byte has a token here, so an UNK token could never occur.")
        if self.unk_id is None:
            taken = set(_from_u24(self._tail["id"]).tolist())
            self.unk_id = next(i for i in range(len(self), NONE24) if i not in taken)
            self._rebuild(self._entries(), self._deleted)
        return self

    # -- encoding --

    def _make_tables(self):
        flag, words = self._tail["flag"].astype(np.int32), self._tail["words"].astype(np.int32)
        lengths = np.array([len(k) for k in self._keys], np.int32)
        ids, alt = _from_u24(self._tail["id"]), _from_u24(self._tail["alt"])
        alt[alt == NONE24] = -1
        self._space = b" \0" if self.charset == 2 else b" "
        self._id_type = np.uint16 if self.n_ids <= 1 << 16 else np.uint32
        self._bytes = [b""] * self.n_ids  # what an id decodes to: officially the last record that has it
        self._plain = [b""] * self.n_ids  # the token itself, where that is a variant
        self._score = np.zeros(self.n_ids, np.float32)
        for key, id_, score in zip(self._keys, ids.tolist(), self._tail["score"].tolist()):
            self._bytes[id_] = key
            if score != -1:
                self._plain[id_], self._score[id_] = key, score
        if self.backend == "python":
            self._rows = list(zip(*(c.tolist() for c in (lengths, flag, words, ids, alt[:, 0], alt[:, 1]))))
            self._key_index = {key: i for i, key in enumerate(self._keys)}
            found = {}
            for key in self._keys:
                found.setdefault(key[:2], set()).add(len(key))
            self._key_lengths = {head: sorted(n | found.get(head[:1], set()), reverse=True) for head, n in found.items()}
            return
        pure = (flag & PURE) // PURE
        self._rec = np.empty((len(ids), 8), np.int32)  # see _walk
        self._rec[:, 0], self._rec[:, 1], self._rec[:, 2], self._rec[:, 3:5] = lengths, flag | words << 8, ids, alt
        for fd in (0, 1):
            self._rec[:, 5 + fd] = pure + np.maximum(0, words - fd - 1) + 100 * (words - fd)
        self._rec[:, 7] = self._rec[:, 5] + (flag & BEGIN_SPACE) // BEGIN_SPACE
        self._classes = self._begin.astype(np.int32)
        order = np.array(sorted(range(len(ids)), key=self._keys.__getitem__), np.int64)
        flat = np.frombuffer(b"".join(self._keys[i] for i in order), np.uint8)
        offsets = np.concatenate(([0], np.cumsum(lengths[order], dtype=np.int64)))
        queue, room, used = np.empty((len(flat) + 1, 5), np.int64), len(flat) + (1 << 16), -1
        while used < 0:
            cells, room = np.empty(room, np.int64), 2 * room
            used = _build_trie("numba", flat, offsets, order, cells, queue)
        self._cells, self._space_base = cells[:used].copy(), 0
        for byte in self._space:
            cell = int(self._cells[self._space_base + byte])
            self._space_base = cell >> 9 & 0x7FFFFFFF if cell & 511 == byte else 256

    def normalize(self, text):
        """The bytes that are tokenised: text (str or bytes) normalised and in capcode form."""
        return _prepare(_as_bytes(text, self.charset), self._setting, self.backend)

    def encode(self, text):
        """Ids of one text (str or bytes): 1-d array, uint16 (uint32 where ids pass 65,535). Empty text: no ids."""
        data = _as_bytes(text, self.charset)
        if len(data) > LONG_TEXT and self.charset == 1 and not self._setting.normalization & ~(NFD | LOWERCASE | ACCENTS):
            return np.concatenate(list(self._encode_long(data)))
        return self._encode([_prepare(data, self._setting, self.backend)])[0]

    def _encode_long(self, data):
        """The ids of a long UTF-8 text in pieces: memory stays a few times LONG_TEXT, the ids are those of one call.

        The text is cut before a space that follows another character: normalisation and capcode carry nothing across.
        The walk stops short of the end of what is normalised so far, where it looked at nothing behind it.
        """
        reach, start, waiting = 4 * MAX_TOKEN, 0, b""
        while start < len(data):
            cut = data.find(b" ", start + LONG_TEXT)
            while cut >= 0 and data[cut - 1] == 32:
                cut = data.find(b" ", cut + 1)
            cut = cut if cut >= 0 else len(data)
            waiting += _prepare(data[start:cut], self._setting, self.backend)
            start, last = cut, cut == len(data)
            stops = np.array([len(waiting) if last else max(0, len(waiting) - 2 * reach)])
            ids, _, _ = self._encode([waiting], stops)
            if last or stops[0] <= len(waiting) - reach:  # else: a chain of deleted spaces up to the end; read on
                yield ids
                waiting = waiting[stops[0] :]

    def missing(self, text):
        """How many bytes of the (normalised) text have no token; they vanish, or become UNK where there is one."""
        return self._encode([self.normalize(text)])[2]

    def _encode(self, datas, stops=None):
        """Normalised texts -> (ids, tokens of each, bytes without a token). stops: one text, see _walk."""
        bounds = np.zeros(len(datas) + 1, np.int64)
        np.cumsum([len(d) + 1 for d in datas], out=bounds[1:])
        stops = bounds[1:] - 1 if stops is None else stops
        if self.backend == "python":
            walks = [_walk_python(self, data, int(stop - at)) for data, stop, at in zip(datas, stops, bounds)]
            stops[:] = [walk[2] for walk in walks]
            ids = np.array([i for walk in walks for i in walk[0]], self._id_type)
            return ids, np.array([len(w[0]) for w in walks], np.int64), sum(w[1] for w in walks)
        text = np.frombuffer(b"\0".join([*datas, b""]), np.uint8)
        counts, n = np.zeros(len(datas) + 1, np.int64), len(text)
        delete, unk = (-1 if i is None else i for i in (self.delete_id, self.unk_id))
        tables = (self._cells, self._space_base, len(self._space), self._rec, self._classes, delete, unk)
        for room in (n // 2 + 64, n + 64, 3 * n + 64):  # three ids per byte is the worst case
            out, stopped = np.empty(room, np.uint32), stops.copy()
            used = _walk("numba", text, bounds, stopped, *tables, out, counts)
            if used >= 0:
                stops[:] = stopped
                return out[:used].astype(self._id_type), counts[:-1], int(counts[-1])
        raise ValueError("This vocabulary makes the walk go round in circles; its file is damaged.")

    def encode_batch(self, texts, num_proc=1):
        """Ids of many texts: (ids of all, uint16 or uint32; offsets, int64: text d has ids[offsets[d] : offsets[d + 1]]).

        num_proc > 1 spreads the texts over that many processes.
        """
        texts = list(texts)
        if num_proc > 1 and len(texts) > 1:
            ids, counts = self._encode_in_processes(texts, num_proc)
        else:
            ids, counts, _ = self._encode([self.normalize(t) for t in texts])
        return ids, np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))

    def _encode_in_processes(self, texts, num_proc):
        """encode_batch, in num_proc worker processes: pieces of about equal size go out, arrays come back."""
        sizes = np.cumsum([len(t) for t in texts])
        cuts = np.searchsorted(sizes, np.linspace(0, sizes[-1], 4 * num_proc + 1)[1:-1]).tolist()
        pieces = [texts[a:b] for a, b in zip([0, *cuts], [*cuts, len(texts)]) if b > a]
        context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn")
        with concurrent.futures.ProcessPoolExecutor(num_proc, context, _worker_start, (self,)) as pool:
            results = list(pool.map(_worker_encode, pieces))
        return np.concatenate([r[0] for r in results]), np.concatenate([r[1] for r in results])

    # -- decoding --

    def decode_bytes(self, ids):
        """The bytes that ids stand for. Ids past the vocabulary are skipped; UNK is nothing."""
        return _capcode_decode(b"".join(self._pieces(ids)), self.capcode, self.backend, np.zeros(4, np.int64))[0]

    def decode(self, ids):
        """The text that ids stand for; bytes that are no valid text become U+FFFD."""
        return self.decode_bytes(ids).decode(self._encoding, "replace")

    def _pieces(self, ids):
        ids = np.asarray(ids)
        if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
            raise ValueError(f"Ids must be a list or 1-d array of integers, not {ids.dtype} of shape {ids.shape}.")
        return [self._bytes[i] if 0 <= i < self.n_ids else b"" for i in ids.tolist()]

    @property
    def _encoding(self):
        return "utf-16-le" if self.charset == 2 else "utf-8"

    def decoder(self):
        """A streaming decoder: `push(ids)` returns the text that is complete so far, `flush()` the rest."""
        return Decoder(self)

    def token_byte_lengths(self, ids):
        """Bytes of decoded text each id stands for in this sequence: int64, as long as `ids`.

        The sum is len(decode_bytes(ids)), so it is the byte count of the normalised text where no byte was missing.
        Capcode markers and deleted spaces count 0; a character over several tokens counts where it ends.
        """
        pieces = self._pieces(ids)
        lengths = np.array([len(p) for p in pieces], np.int64)
        _, kept = _capcode_decode(b"".join(pieces), self.capcode, self.backend, np.zeros(4, np.int64))
        total = np.concatenate(([0], np.cumsum(kept)))
        return np.diff(total[np.concatenate(([0], np.cumsum(lengths)))])

    # -- looking --

    def __len__(self):
        return self._size

    @property
    def tokens(self):
        """Bytes of each id (capcode form); b"" for UNK and ids not in use."""
        return list(self._plain)

    @property
    def scores(self):
        """Score of each id: its share of the training text; 0 where unknown."""
        return self._score.copy()


class Decoder:
    """Streaming decoder of one sequence. What the pushes and the flush return adds up to decode() of all ids.

    Held back: the bytes of an unfinished character, and the capcode state.
    """

    def __init__(self, vocabulary):
        self._vocabulary = vocabulary
        self.flush()

    def push(self, ids):
        """Text that is complete with these ids: an int, a list or a 1-d array."""
        v = self._vocabulary
        data = b"".join(v._pieces([ids] if isinstance(ids, (int, np.integer)) else ids))
        if v.capcode == 2:  # it works on characters: an unfinished one waits here
            data = self._runes.decode(data).encode("utf-8", "surrogateescape")
        return self._text.decode(_capcode_decode(data, v.capcode, v.backend, self._state)[0])

    @property
    def waiting(self):
        """Whether a capcode marker waits for the character it speaks of."""
        return bool(self._state[[0, 2, 3]].any())

    def flush(self):
        """The rest, and a fresh start."""
        v, rest = self._vocabulary, ""
        if hasattr(self, "_text"):
            data = self._runes.decode(b"", True).encode("utf-8", "surrogateescape")
            rest = self._text.decode(_capcode_decode(data, v.capcode, v.backend, self._state)[0], True)
        self._runes = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = codecs.getincrementaldecoder(v._encoding)("replace")
        self._state = np.zeros(4, np.int64)
        return rest


def _worker_start(vocabulary):
    global _worker
    _worker = vocabulary


def _worker_encode(texts):
    return _worker._encode([_worker.normalize(t) for t in texts])[:2]


def _as_bytes(text, charset):
    if isinstance(text, str):
        return text.encode("utf-16-le" if charset == 2 else "utf-8", "surrogatepass")
    return bytes(memoryview(text))


def _prepare(data, setting, backend):
    """bytes -> normalised bytes in capcode form: what is tokenised."""
    return _capcode_encode(_normalize(data, setting.normalization, setting.charset), setting.capcode, backend)


def _checked(token):
    if not 0 < len(token) <= MAX_TOKEN:
        raise ValueError(f"The token {token!r} takes {len(token)} bytes; the format allows 1 to {MAX_TOKEN}.")
    return token


def _forced_bytes(names, capcode, normalization, charset):
    forced = set()
    for name in names:
        forced |= {
            "all256": set(range(256)),
            "128": set(range(128)),
            "ascii": ASCII_BYTES,
            "utf8": ASCII_BYTES | set(range(0x80, 0xC0)) | set(range(0xC2, 0xF5)),
            "extended": ASCII_BYTES | set(_normalize(EXTENDED.encode(), normalization, 1)),
        }[name]
    if capcode == 1 and forced:
        forced.add(127)
    return forced - set(b"ABEFGHIJKLMNOPQRSTUVXYZ") if capcode == 2 else forced


def _shape(key, capcode, charset):
    """Two strings with a letter per byte of the key: the class of the rune that begins there, and of the one that ends.

    l letter or mark, n number, space, w other white space, m capcode marker, _ underscore, . anything else, also for
    bytes that no rune begins (ends) at.
    """

    def kind(c):
        category = unicodedata.category(c)[0]
        if c in ("", "\x7f", "CDW")[capcode]:
            return "m"
        return c if c in " _" else "w" if c in GO_SPACE else {"N": "n", "L": "l", "M": "l"}.get(category, ".")

    if charset == 2:  # any two bytes are a unit, also across units
        begin = "".join(kind(chr(key[i] | key[i + 1] << 8)) for i in range(len(key) - 1)) + "."
        return begin, "." + begin[:-1], begin[: len(key) & ~1 : 2] + "." * (len(key) & 1)
    begin, end, runes = "", "", ""
    for c in key.decode("utf-8", "surrogateescape"):
        rest = "" if c < "\x80" or "\udc80" <= c <= "\udcff" else "." * (len(c.encode()) - 1)
        runes += kind(c)
        begin += runes[-1] + rest
        end += rest + runes[-1]
    return begin, end, runes


def _derive(key, shape, index, capcode):
    """(flag, words, alt1, alt2) of one record: what the walk knows about a token."""
    begin, end, runes = shape
    n = len(key)
    words = len(re.findall(" (?=[ln])", runes))
    flag = END_LETTER * (end[-1] == "l") | BEGIN_LETTER * (begin[0] == "l")
    flag |= BEGIN_SPACE * (runes[0] == " " or (runes[0] == "m" and key[0] in b"CW"))
    flag |= END_MARKER * (end[-1] == "m") | BEGIN_MARKER * (begin[0] == "m")
    flag |= ONE_WORD * bool(words == 1 and re.fullmatch(" l+", runes))
    flag |= PURE * bool(n == 1 or re.fullmatch("(?!l(?!l))[l ]+|(?!n(?!n))[n ]+|[^ln]+", runes))

    slots = [[0, 0, NONE24], [0, 0, NONE24]]  # priority, length, record
    for cut in range(n - 1, 1 if words >= 2 and re.match(" [ln]", runes) else 0, -1):
        prefix = index.get(key[:cut])
        if prefix is None:
            continue
        a, b = end[cut - 1], begin[cut]
        if key[cut] == 32 and begin[cut + 1 : cut + 2] in ("l", "n"):
            priority = 10
        elif (
            (capcode == 0 and ((a not in "l_" and b in "l_") or (a != "n" and b == "n")))
            or (a in "l_" and b not in "l_n")
            or (a == "n") != (b == "n")
        ):
            priority = 9
        elif (a in " w") != (b in " w"):
            priority = 7 if a in " w" else 8
        else:
            priority = 9 if b == "m" else 1
        slot = slots[0] if slots[0][:2] <= slots[1][:2] else slots[1]
        if priority > slot[0]:
            slot[:] = priority, cut, prefix
    slots.sort(reverse=True)
    return flag, words, slots[0][2], slots[1][2]


# ---------------------------------------------------------------------------------------------------------------------
# 6. The transformers tokenizer

# The card's template ("<|role|>", new line, content, new line). An assistant's message also ends in EOS, and what the
# assistant wrote stands between generation marks, so that return_assistant_tokens_mask gives a mask for fine-tuning.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"  # jinja drops a bare one behind a block
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def _printable_bytes():
    """A printable character for each byte: itself where it is one, else one from U+0100 on (GPT-2's alphabet)."""
    plain = [*range(33, 127), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(0x100 + i) for i, b in enumerate(rest)}}


class TokenMonsterTokenizer(PreTrainedTokenizer):
    """TokenMonster as a transformers tokenizer.

    ids: 0 to n - 1 the vocabulary; n EOS (also the padding token), n + 1 BOS, then <|extra_0|>, <|extra_1|>, ... up to
    `vocab_size`, by default the next multiple of `pad_to_multiple` (Stentor2: 8,000 + 2 + 62 = 8,064). Nothing is added
    to a text unless `special_tokens_pattern` is "bos", "eos" or "bos_eos". Special tokens in a text are recognised
    before it is tokenised; with `split_special_tokens=True` they are plain text, which is right for untrusted input.
    decode gives the normalised text: NFD for the released vocabularies.
    """

    vocab_files_names = {"vocab_file": "tokenmonster.vocab"}
    model_input_names = ["input_ids", "attention_mask"]
    _auto_class = "AutoTokenizer"  # save_pretrained copies this file and writes auto_map

    def __init__(self, vocab_file=None, eos_token="</s>", bos_token="<s>", pad_token=None, pad_to_multiple=128,
                 vocab_size=None, vocabulary=None, **kwargs):
        """vocab_file: path of a `.vocab` file, or `vocabulary`, a Vocabulary, in its place."""
        if (vocab_file is None) == (vocabulary is None):
            raise ValueError("Give TokenMonsterTokenizer either vocab_file, the path of a .vocab file, or vocabulary.")
        self.vocabulary = Vocabulary.from_file(vocab_file) if vocabulary is None else vocabulary
        n = self.vocabulary.n_ids
        self.pad_to_multiple = pad_to_multiple
        self._size = vocab_size or -(-(n + 2) // pad_to_multiple) * pad_to_multiple
        if self._size < n + 2:
            raise ValueError(f"vocab_size={self._size} has no room for {n} tokens, EOS and BOS: take {n + 2} or more, or "
                             f"from_vocabulary, which drops the tokens of lowest score.")
        extras = [f"<|extra_{i}|>" for i in range(self._size - n - 2)]
        special, alphabet = [str(eos_token), str(bos_token), *extras], _printable_bytes()
        taken = dict.fromkeys(special)
        for i, token in enumerate(self.vocabulary.tokens):
            text = "".join(map(alphabet.__getitem__, token)) or f"<|unused_{i}|>"
            text = "<unk>" if i == self.vocabulary.unk_id else text
            while text in taken:  # a token that reads like a special one
                text += "\u2581"
            taken[text] = None
        self._strings = list(taken)[len(special) :]
        self._ids = {token: i for i, token in enumerate(self._strings + special)}
        if self.vocabulary.unk_id is not None:
            kwargs.setdefault("unk_token", self._strings[self.vocabulary.unk_id])
        self._splitter = (0, None)  # number of added tokens, pattern that finds them
        kwargs.setdefault("special_tokens_pattern", "none")
        kwargs.setdefault("chat_template", CHAT_TEMPLATE)
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        kwargs |= {"eos_token": eos_token, "bos_token": bos_token, "pad_token": eos_token if pad_token is None else pad_token}
        super().__init__(pad_to_multiple=pad_to_multiple, vocab_size=self._size, **kwargs)
        self._add_tokens([AddedToken(t, special=True, normalized=False) for t in extras], special_tokens=True)
        # what save_pretrained writes: the pattern, which the base class forgets, and nothing about where we came from
        self.init_kwargs["special_tokens_pattern"] = self.special_tokens_pattern
        for name in ("is_local", "local_files_only"):
            self.init_kwargs.pop(name, None)

    @classmethod
    def from_vocabulary(cls, vocabulary, vocab_size=None, pad_to_multiple=128, **kwargs):
        """Tokenizer of a Vocabulary, or of the path of one, in `vocab_size` ids all told.

        vocab_size None: the vocabulary's size rounded up to a multiple of `pad_to_multiple`. Where EOS and BOS do not
        fit (Stentor3: 4,096 tokens in 4,096 ids), the multi-byte tokens of lowest score make room, and the ids of the
        others are renumbered.
        """
        source = vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary.from_file(vocabulary)
        total = vocab_size or -(-source.n_ids // pad_to_multiple) * pad_to_multiple
        if source.n_ids + 2 > total:
            source = copy.deepcopy(source).resize(total - 2).reset_ids()
        return cls(vocabulary=source, vocab_size=total, pad_to_multiple=pad_to_multiple, **kwargs)

    # -- what transformers asks of a tokenizer --

    @property
    def vocab_size(self):
        return self._size

    def get_vocab(self):
        return {**self._ids, **self._added_tokens_encoder}

    def _tokenize(self, text, **kwargs):
        return [self._strings[i] for i in self.vocabulary.encode(text).tolist()]

    def _convert_token_to_id(self, token):
        return self._ids.get(token, self.vocabulary.unk_id)

    def _convert_id_to_token(self, index):
        return self._strings[index] if 0 <= index < len(self._strings) else None

    def convert_tokens_to_string(self, tokens):
        return self._decode([self.convert_tokens_to_ids(t) for t in tokens])

    def _pieces(self, text, split_special_tokens):
        """The text as ids: (added token or None, ids) for each stretch of it."""
        added = self._added_tokens_encoder
        if split_special_tokens or not added:
            return [(None, self.vocabulary.encode(text).tolist())]
        if self._splitter[0] != len(added):  # the base class's trie takes ten times as long as the walk
            pattern = "|".join(map(re.escape, sorted(added, key=len, reverse=True)))
            self._splitter = (len(added), re.compile(f"({pattern})"))
        parts = filter(None, self._splitter[1].split(text))
        return [(p, [added[p]]) if p in added else (None, self.vocabulary.encode(p).tolist()) for p in parts]

    def _encode_plus(self, text, text_pair=None, **kwargs):
        """The base class goes by way of token strings; this goes straight to ids, which it takes as they are."""
        split = kwargs.get("split_special_tokens", self.split_special_tokens)
        stripping = any(t.lstrip or t.rstrip or t.single_word for t in self._added_tokens_decoder.values())

        def encode(item):
            if isinstance(item, str):
                return [i for _, ids in self._pieces(item, split) for i in ids] or item
            return type(item)(map(encode, item)) if isinstance(item, (list, tuple)) else item

        if not (stripping or kwargs.get("is_split_into_words") or kwargs.get("sanitize_control_tokens")):
            text, text_pair = encode(text), encode(text_pair)
        return super()._encode_plus(text, text_pair, **kwargs)

    def _decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None, **kwargs):
        ids = np.atleast_1d(np.asarray(token_ids, dtype=np.int64))
        parts, start = [], 0
        for i in [*np.flatnonzero(ids >= self.vocabulary.n_ids).tolist(), len(ids)]:
            parts.append(self._decode_run(ids[start:i]))
            token = self._added_tokens_decoder.get(int(ids[i])) if i < len(ids) else None
            if token is not None and not (skip_special_tokens and token.special):
                parts.append(token.content)
            start = i + 1
        text = "".join(parts)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        tidy = getattr(self, "clean_up_tokenization", None)  # transformers 5.0 has none, and its pipelines ask for it
        return tidy(text) if tidy and clean_up_tokenization_spaces else text

    def _decode_run(self, ids):
        decoder = self.vocabulary.decoder()
        text = decoder.push(ids)
        # transformers' streamers forget the ids behind a line's end, and with them a capcode marker that waits for its
        # letter: keep the line's end back until the letter is there.
        waiting = decoder.waiting
        text += decoder.flush()
        return text.rstrip("\n") if waiting else text

    def save_vocabulary(self, save_directory, filename_prefix=None):
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        vocab_file = os.path.join(save_directory, prefix + self.vocab_files_names["vocab_file"])
        map_file = os.path.join(save_directory, prefix + "special_tokens_map.json")
        self.vocabulary.save(vocab_file)
        with open(map_file, "w", encoding="utf-8") as file:
            json.dump({k: str(v) for k, v in self.special_tokens_map.items() if isinstance(v, (str, AddedToken))}, file)
        return vocab_file, map_file

    # -- and more --

    def encode_batch(self, texts, num_proc=1):
        """Ids of a corpus: see Vocabulary.encode_batch. Special tokens in the texts are plain text here."""
        return self.vocabulary.encode_batch(texts, num_proc)

    def token_byte_lengths(self, ids):
        """Bytes of text each id stands for: see Vocabulary.token_byte_lengths. 0 for special tokens."""
        return self.vocabulary.token_byte_lengths(ids)

    def apply_chat_template(self, conversation, *args, return_assistant_tokens_mask=False, **kwargs):
        """As in transformers, which gives return_assistant_tokens_mask to fast tokenizers only; here it works, too."""
        if not return_assistant_tokens_mask:
            return super().apply_chat_template(conversation, *args, **kwargs)
        if not (kwargs.get("tokenize", True) and kwargs.get("return_dict", True)):
            raise ValueError("return_assistant_tokens_mask=True needs tokenize=True and return_dict=True.")
        from transformers.utils.chat_template_utils import render_jinja_template

        kwargs |= dict(zip(("tools", "documents", "chat_template", "add_generation_prompt"), args))
        tensors = kwargs.pop("return_tensors", None)
        out = super().apply_chat_template(conversation, **{**kwargs, "tokenize": True, "return_dict": True})
        for name in ("tokenize", "return_dict", "padding", "truncation", "max_length", "tokenizer_kwargs"):
            kwargs.pop(name, None)
        kwargs["chat_template"] = self.get_chat_template(kwargs.get("chat_template"), kwargs.get("tools"))
        batched = not isinstance(conversation[0], dict)
        chats, spans = render_jinja_template(
            conversations=conversation if batched else [conversation],
            return_assistant_tokens_mask=True,
            **{**self.special_tokens_map, **kwargs},
        )
        masks = [self._token_mask(chat, span) for chat, span in zip(chats, spans)]
        for i, real in enumerate(out["attention_mask"] if batched else [out["attention_mask"]]):
            there = sum(real)  # less than the mask has where the chat was truncated
            mask = iter(masks[i][len(masks[i]) - there :] if self.truncation_side == "left" else masks[i])
            masks[i] = [next(mask) if r else 0 for r in real]
        out["assistant_masks"] = masks if batched else masks[0]
        return out.convert_to_tensors(tensors, prepend_batch_axis=not batched)

    def _token_mask(self, text, spans):
        """1 for each token of `text` that holds something of text[start:end], for any (start, end) of `spans`."""
        lengths = []
        for token, ids in self._pieces(text, False):
            lengths += [len(token.encode())] if token else self.vocabulary.token_byte_lengths(ids).tolist()
        ends = np.cumsum(lengths)
        starts, mask = ends - lengths, np.zeros(len(ends), bool)
        bits, charset = self.vocabulary.normalization, self.vocabulary.charset
        for span in spans:
            first, last = (len(_normalize(_as_bytes(text[:c], charset), bits, charset)) for c in span)
            mask |= (starts < last) & ((ends > first) | (starts == first))  # a marker counts for what it marks
        return mask.astype(int).tolist()
