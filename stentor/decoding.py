"""Speculative decoding: a small model, the draft, writes a few tokens ahead; the target checks them
in one pass and keeps what it would have said itself.

    draft:  5 tokens, one by one     target: one pass over them     kept: those that agree, and one

The text is the target's own: under greedy decoding token for token, sampled from the same
distribution (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1). transformers'
generate(assistant_model=...) does it for greedy decoding, with one tokenizer or two, see
`assisted`; the loop here also counts what was accepted, takes two tokenizers of one size, which
transformers refuses, and samples across vocabularies exactly, for which transformers cuts down the
draft's lm_head in place.
"""
from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field

import torch

from stentor.files import ParameterError
from stentor.statistics import proportion
from stentor.tokenizer import tokenizer_fit, tokenizer_sha256


def same_tokenizer(one, other) -> bool:
    """Whether two tokenizers give the same ids: by the hash of their vocabularies."""
    return one is other or tokenizer_sha256(one) == tokenizer_sha256(other)


def decoding_problems(target, draft, tokenizer, draft_tokenizer, matched: bool = False) -> list:
    """A sentence for each reason why this draft cannot write ahead of this target, else [].

    matched: the caller means to pass ids from one to the other as they are.
    """
    problems = (tokenizer_fit(tokenizer, target.config.vocab_size)
                + tokenizer_fit(draft_tokenizer, draft.config.vocab_size))
    if matched and not same_tokenizer(tokenizer, draft_tokenizer):
        sizes = sorted({target.config.vocab_size, draft.config.vocab_size})
        both = (f"are of one size, vocab_size = {sizes[0]:,}, but" if len(sizes) == 1 else
                f"have vocab_size = {sizes[0]:,} and {sizes[1]:,}, and")
        problems.append(f"draft and target {both} different tokenizers, so an id means another "
                        "word to each: decode across vocabularies, with both tokenizers "
                        "(su.decoding.speculative, matched=None).")
    return problems


def assisted(target, draft, tokenizer, draft_tokenizer, *, matched: bool | None = None,
             do_sample: bool = False) -> dict:
    """What to give target.generate(...) for transformers' own assisted generation.

    matched: None for as the tokenizers say; True where ids are meant to be shared. Raises
    ParameterError for different tokenizers then, for different ones of one size in any case
    (transformers goes by vocab_size, and takes them for the same or, given both, refuses), and for
    sampling across vocabularies: take `speculative`. Across vocabularies transformers 5.23 raises
    "cannot reshape tensor of 0 elements" on texts where its search for what both tokenisations
    share leaves the draft nothing new to read; `speculative` does not.
    """
    same = _is_matched(target, draft, tokenizer, draft_tokenizer, matched)
    if not same and target.config.vocab_size == draft.config.vocab_size:
        raise ParameterError(["draft and target have two tokenizers of one size, vocab_size = "
                              f"{draft.config.vocab_size:,}, and transformers refuses to assist "
                              "across them: take su.decoding.speculative(...)."])
    if not same and do_sample:
        raise ParameterError(["do_sample = True across vocabularies: transformers cuts the draft's "
                              "lm_head down in place and drops its repetition penalty; take "
                              "su.decoding.speculative(..., do_sample=True)."])
    both = {} if same else {"tokenizer": tokenizer, "assistant_tokenizer": draft_tokenizer}
    return {"assistant_model": draft, "do_sample": do_sample, **both}


def _is_matched(target, draft, tokenizer, draft_tokenizer, matched) -> bool:
    """Raises ParameterError with decoding_problems."""
    if problems := decoding_problems(target, draft, tokenizer, draft_tokenizer, bool(matched)):
        raise ParameterError(problems)
    one_size = target.config.vocab_size == draft.config.vocab_size
    return matched is not False and one_size and same_tokenizer(tokenizer, draft_tokenizer)


@dataclass
class Speculation:
    """What `speculative` made: ids are the new ones alone; passes are the target's."""
    ids: list[int] = field(default_factory=list)
    proposed: int = 0
    accepted: int = 0
    passes: int = 0
    seconds: float = 0.0

    @property
    def acceptance(self) -> float:
        """Share of the proposed tokens that the target kept; nan where none was proposed."""
        return self.accepted / self.proposed if self.proposed else float("nan")


class Reader:
    """A model and its cache of keys and values, cut back to what two texts have in common."""

    def __init__(self, model):
        self.model, self.ids, self.cache, self.room = model, [], None, _room(model)

    def logits(self, ids: list[int], last: int) -> torch.Tensor:
        """(last, vocabulary) in FP32 on the CPU: what follows each of the last ids."""
        from transformers import DynamicCache
        same = _common(self.ids, ids[:len(ids) - last])
        if self.cache is None or same == 0:
            self.cache, self.ids, same = DynamicCache(), [], 0
        if len(self.ids) > same:                      # a negative number means the same in 5.0 too
            self.cache.crop(same - len(self.ids))
        new = torch.tensor([ids[same:]], device=self.model.device)
        mask = torch.ones(1, len(ids), dtype=torch.long, device=self.model.device)
        out = self.model(input_ids=new, attention_mask=mask, past_key_values=self.cache,
                         use_cache=True, logits_to_keep=last)
        self.ids = list(ids)
        return out.logits[0, -last:].float().cpu()


def _room(model) -> int:
    return model.config.max_position_embeddings


def _common(one: list[int], other: list[int]) -> int:
    """How many ids two lists begin with alike."""
    for i, (a, b) in enumerate(zip(one, other)):
        if a != b:
            return i
    return min(len(one), len(other))


class Chooser:
    """One token from a row of logits: the greatest, or drawn after the warpers of transformers."""

    def __init__(self, do_sample, temperature, top_p, repetition_penalty, generator):
        from transformers import (
            LogitsProcessorList, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper,
            TopPLogitsWarper)
        self.do_sample, self.generator, self.warp = do_sample, generator, LogitsProcessorList()
        if repetition_penalty != 1.0:
            self.warp.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
        if do_sample and temperature != 1.0:
            self.warp.append(TemperatureLogitsWarper(temperature))
        if do_sample and top_p < 1.0:
            self.warp.append(TopPLogitsWarper(top_p))

    def probabilities(self, row: torch.Tensor, ids: list[int]) -> torch.Tensor:
        """(vocabulary,) of what follows ids; greedy: all of it on one token."""
        row = self.warp(torch.tensor([ids]), row[None])[0]
        if self.do_sample:
            return row.double().softmax(-1)
        return torch.nn.functional.one_hot(row.argmax(), len(row)).double()

    def draw(self, weights: torch.Tensor) -> int:
        if not self.do_sample:
            return int(weights.argmax())
        return int(torch.multinomial(weights, 1, generator=self.generator))

    def accepts(self, ratio: float) -> bool:
        if not self.do_sample:
            return ratio > 0
        return float(torch.rand((), generator=self.generator, dtype=torch.double)) < ratio


def _draft_matched(reader: Reader, ids: list[int], count: int, choose: Chooser):
    """(tokens, the distribution each was drawn from) that the draft goes on with."""
    tokens, drawn_from = [], []
    for _ in range(min(count, reader.room - len(ids))):
        text = ids + tokens
        drawn_from.append(choose.probabilities(reader.logits(text, 1)[0], text))
        tokens.append(choose.draw(drawn_from[-1]))
    return tokens, drawn_from


def _draft_across(reader: Reader, ids: list[int], count: int, tokenizer, draft_tokenizer):
    """(tokens, None) of the target's vocabulary for what the draft writes on greedily.

    The text goes over, not the ids. Whatever comes back is only a proposal: one that the target
    would cut differently is refused by it, which costs speed and never changes the text.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    own = draft_tokenizer(text, add_special_tokens=False)["input_ids"]
    own = own if own else [draft_tokenizer.eos_token_id]
    start = len(own)
    for _ in range(min(count, reader.room - start)):
        token = int(reader.logits(own, 1)[0].argmax())
        if token == draft_tokenizer.eos_token_id:
            break
        own = own + [token]
    before = draft_tokenizer.decode(own[:start], skip_special_tokens=True)
    written = draft_tokenizer.decode(own, skip_special_tokens=True)[len(before):]
    if not written:
        return [], None
    whole = tokenizer(text + written, add_special_tokens=False)["input_ids"]
    special = len(ids) - len(tokenizer(text, add_special_tokens=False)["input_ids"])
    kept = ids[max(special, 0):]
    if whole[:len(kept)] == kept:
        return whole[len(kept):][:count], None
    return tokenizer(written, add_special_tokens=False)["input_ids"][:count], None


def _verify(rows, ids, tokens, drawn_from, choose: Chooser) -> tuple[list[int], int]:
    """(new ids, how many of the tokens were accepted): algorithm 1 of the paper.

    A token that was not drawn (across vocabularies) counts as one of probability 1: it is accepted
    with the target's probability of it, which is exact for any proposal.
    """
    kept = []
    for i, token in enumerate(tokens):
        wanted = choose.probabilities(rows[i], ids + kept)
        if drawn_from is None:
            drawn = torch.zeros_like(wanted)
            drawn[token] = 1.0
        else:
            drawn = drawn_from[i]
        if not choose.accepts(float(wanted[token] / drawn[token])):
            rest = (wanted - drawn).clamp_(min=0)     # what the draft proposes too seldom
            return [*kept, choose.draw(rest if rest.sum() > 0 else wanted)], len(kept)
        kept.append(token)
    wanted = choose.probabilities(rows[len(tokens)], ids + kept)
    return [*kept, choose.draw(wanted)], len(tokens)


@torch.inference_mode()
def speculative(target, draft, ids: list[int], max_new_tokens: int, *, tokenizer, draft_tokenizer,
                matched: bool | None = None, draft_tokens: int = 5, do_sample: bool = False,
                temperature: float = 1.0, top_p: float = 1.0, repetition_penalty: float = 1.0,
                seed: int = 42, streamer=None) -> Speculation:
    """The target's continuation of ids, written with the draft's help; see Speculation.

    Greedy by default: the same ids as target.generate(do_sample=False) gives. draft_tokens: how
    many are proposed at a time. streamer: transformers' TextStreamer and its like. matched: as for
    `assisted`. A draft stops helping where its own context ends. Raises ParameterError for a pair
    that does not fit, an empty prompt, or one too long for the target.
    """
    same = _is_matched(target, draft, tokenizer, draft_tokenizer, matched)
    if not ids or len(ids) + max_new_tokens > _room(target):
        raise ParameterError([f"a prompt of {len(ids):,} ids and max_new_tokens = "
                              f"{max_new_tokens:,} do not fit: take at least one id, and at most "
                              f"{_room(target):,} in all (the target's context)."])
    choose = Chooser(do_sample, temperature, top_p, repetition_penalty,
                     torch.Generator().manual_seed(seed))
    read, ahead, made = Reader(target.eval()), Reader(draft.eval()), Speculation()
    ends, begun = end_ids(target, tokenizer), time.perf_counter()
    if streamer is not None:
        streamer.put(torch.tensor([ids]))
    while len(made.ids) < max_new_tokens and not ends.intersection(made.ids[-1:]):
        text, count = [*ids, *made.ids], min(draft_tokens, max_new_tokens - len(made.ids) - 1)
        tokens, drawn_from = (
            _draft_matched(ahead, text, count, choose) if same else
            _draft_across(ahead, text, count, tokenizer, draft_tokenizer))
        rows = read.logits(text + tokens, len(tokens) + 1)
        new, accepted = _verify(rows, text, tokens, drawn_from, choose)
        new = new[:1 + next((i for i, token in enumerate(new) if token in ends), len(new))]
        made.ids += new
        made.proposed += len(tokens)
        made.accepted += min(accepted, len(new))      # what stood behind the text's end is not kept
        made.passes += 1
        if streamer is not None:
            streamer.put(torch.tensor(new))
    if streamer is not None:
        streamer.end()
    made.seconds = time.perf_counter() - begun
    return made


def end_ids(model, tokenizer) -> set[int]:
    """The ids that end a text: generation_config's, one or several, else the tokenizer's."""
    said = model.generation_config.eos_token_id
    said = tokenizer.eos_token_id if said is None else said
    return set(said if isinstance(said, (list, tuple)) else [said])


@torch.inference_mode()
def compare_decoding(target, draft, prompts: list[list[int]], max_new_tokens: int, *, tokenizer,
                     draft_tokenizer, draft_tokens: int = 5) -> list[dict]:
    """Rows of one table: plain greedy decoding, transformers' assisted generation, our loop.

    Each with seconds, tokens_per_second, speed_up over plain (below 1: slower), and how many of n
    continuations equal the plain ones, or raised an error; ours with the acceptance rate and its
    95% Wilson interval, and tokens per pass of the target.
    """
    pair, loops = {"tokenizer": tokenizer, "draft_tokenizer": draft_tokenizer}, []
    _is_matched(target, draft, tokenizer, draft_tokenizer, None)       # that it can be done at all
    try:
        with_draft, refused = assisted(target, draft, **pair), ""
    except ParameterError as error:
        with_draft, refused = {}, str(error)

    def generated(ids, **more):
        given = torch.tensor([ids], device=target.device)
        return target.generate(
            given, attention_mask=torch.ones_like(given), max_length=len(ids) + max_new_tokens,
            repetition_penalty=1.0, pad_token_id=tokenizer.eos_token_id,
            **{"do_sample": False, **more})[0, len(ids):].tolist()

    def by_transformers(ids):
        try:
            return refused or generated(ids, **with_draft)
        except (RuntimeError, ValueError, IndexError) as error:        # 5.23 across vocabularies:
            return f"{type(error).__name__}: {error}"                  # see `assisted`

    def ours(ids):
        loops.append(speculative(target, draft, ids, max_new_tokens, draft_tokens=draft_tokens,
                                 **pair))
        return loops[-1].ids
    with _few_words():
        rows = _timed({"plain greedy": generated, "transformers, assisted": by_transformers,
                       "stentor, speculative": ours}, prompts)
    loops = loops[1:]
    kept, proposed = sum(x.accepted for x in loops), sum(x.proposed for x in loops)
    rows[-1] |= {"acceptance": proportion(kept, proposed), "proposed": proposed,
                 "tokens_per_pass": sum(len(x.ids) for x in loops) / sum(x.passes for x in loops)}
    return rows


@contextlib.contextmanager
def _few_words():
    """transformers at errors alone: else three lines a call about max_length."""
    from transformers.utils import logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _timed(methods: dict, prompts: list[list[int]]) -> list[dict]:
    """A row of `compare_decoding` for each {name: ids -> new ids, or an error's text}, plain first.

    A text that raised took no time worth the name: speed_up is of tokens per second.
    """
    plain, rows = None, []
    for method, decode in methods.items():
        decode(prompts[0])                            # not counted
        begun = time.perf_counter()
        texts = [decode(ids) for ids in prompts]
        seconds = time.perf_counter() - begun
        plain = plain or texts
        made = sum(len(text) for text in texts if isinstance(text, list))
        rows.append({"method": method, "equal": sum(a == b for a, b in zip(texts, plain)),
                     "n": len(texts), "raised": sum(isinstance(text, str) for text in texts),
                     "seconds": seconds, "tokens_per_second": made / seconds})
        rows[-1]["speed_up"] = rows[-1]["tokens_per_second"] / rows[0]["tokens_per_second"]
    return rows
