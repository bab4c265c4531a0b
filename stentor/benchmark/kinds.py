"""Task files as lm-eval tasks: what kind of task rows are, told by their columns."""
from __future__ import annotations

import contextlib
import re
from pathlib import Path

from stentor.benchmark.rows import (
    LABELS, Row, RowError, choices_of, counting_of, gold_of, question_of, shortened, structure,
    text_of, whole_number)
from stentor.files import ParameterError

# lm-eval's configurations of the kinds.
ACCURACY = [{"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")]
# A column's name, never a template: lm-eval evaluates what a template gives, and takes a text of
# digits for an index.
CHOICE = {"output_type": "multiple_choice", "doc_to_text": "query", "doc_to_choice": "choices",
          "doc_to_target": "gold", "metric_list": ACCURACY}
PAIRS = {**CHOICE, "doc_to_text": "", "target_delimiter": "", "metric_list": ACCURACY[:1]}
BLANKS = {**CHOICE, "doc_to_text": "gold", "doc_to_target": "continuation",
          "metric_list": ACCURACY[:1]}
SUMS = {
    "output_type": "generate_until", "doc_to_text": "query", "doc_to_target": "answer",
    "filter_list": [
        {"name": name, "filter": [{"function": "regex", **how}, {"function": "take_first"}]}
        for name, how in (
            ("strict-match", {"regex_pattern": r"#### (\-?[0-9\.\,]+)"}),
            ("flexible-extract", {"group_select": -1,
                                  "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"}))],
    "metric_list": [{
        "metric": "exact_match", "aggregation": "mean", "higher_is_better": True,
        "ignore_case": True, "ignore_punctuation": False,
        "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"]}],
    "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False}}
TEXT = {
    "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
    "metric_list": [{"metric": name, "aggregation": aggregation, "higher_is_better": False}
                    for name, aggregation in (("word_perplexity", "weighted_perplexity"),
                                              ("byte_perplexity", "weighted_perplexity"),
                                              ("bits_per_byte", "bits_per_byte"))]}


def choice_docs(rows: list[Row]) -> list[dict]:
    """[{"query", "choices", "gold"}] of rows of multiple choice. Raises RowError, naming the row."""
    rows = [inner_question(row) for row in rows]
    column = next((name for name in LABELS if any(name in row for row in rows)), "label")
    labels, questions, choices = [], [], []
    for row in rows:
        with faults_of(row):
            if is_no_label(row.get(column)):
                raise RowError(f"{column} = {shortened(row.get(column))} does not name one of the "
                               "choices: a row without a label, as in a test split, cannot be "
                               "scored.")
            labels.append(row[column])
            choices.append(choices_of(row))
            questions.append(question_of(row))
    counting, docs = counting_of(column, labels, choices), []
    for row, label, (texts, names), question in zip(rows, labels, choices, questions):
        with faults_of(row):
            gold = gold_of(label, texts, names, counting)
            if gold is None:
                raise RowError(f"{column} = {shortened(label)} does not name one of the choices "
                               f"{shortened(texts)}; give an index from 0, or a letter.")
            if len(texts) < 2:
                raise RowError(
                    f"there is one choice, {shortened(texts[0])}: it takes two to choose.")
            number = column == "answer" and whole_number(label) is not None
            other = gold_of(label, texts, [], "as text") if number else None
            numbers_choose = counting == "from 1" or not isinstance(first_choice(row), str)
            if other not in (None, gold) and numbers_choose:
                raise RowError(f"{column} = {shortened(label)} may be the number of a choice or "
                               f"the choice itself, of {shortened(texts)}; give a letter.")
            docs.append({"query": question, "choices": texts, "gold": gold})
    return docs


def is_no_label(label) -> bool:
    """Whether a label names nothing: none, NaN, empty, a truth value, or -1, as in test splits."""
    if label is None or label != label or isinstance(label, bool):
        return True
    return str(label).strip() == "" or (whole_number(label) or 0) < 0


def first_choice(row: dict):
    """The first choice as the file has it, a number where it is one."""
    found = structure(row.get("choices"))
    return found[0] if isinstance(found, list) else ""


def inner_question(row: Row) -> Row:
    """ARC's, OpenBookQA's and CommonsenseQA's own files keep stem and choices inside `question`."""
    question = row.get("question")
    readable = not isinstance(question, str) or "stem" in question
    inner = structure(question) if readable else None
    if not (isinstance(inner, dict) and "stem" in inner):
        return row
    found = Row({**row, "question": inner["stem"], "choices": inner.get("choices")})
    found.where = row.where
    return found


def pair_docs(rows: list[Row]) -> list[dict]:
    docs = []
    for row in rows:
        with faults_of(row):
            sentences = [text_of(row.get(column), column)
                         for column in ("sentence_good", "sentence_bad")]
            term = row.get("linguistics_term")
            docs.append({"choices": sentences, "gold": 0,
                         "linguistics_term": term if isinstance(term, str) else None})
    return docs


def blank_docs(rows: list[Row]) -> list[dict]:
    """Winogrande: the sentence up to its blank, with either option, is a context.

    What follows is scored behind both.
    """
    docs = []
    for row in rows:
        with faults_of(row):
            sentence, *options = (text_of(row.get(column), column)
                                  for column in ("sentence", "option1", "option2"))
            before, blank, after = sentence.partition("_")
            after = after.lstrip("_").strip()
            if not (blank and after):
                raise RowError(f"sentence = {shortened(sentence)} has no blank _ with something "
                               "behind it.")
            gold = gold_of(row.get("answer"), options, [], "from 1")
            if gold is None:
                raise RowError(f"answer = {shortened(row.get('answer'))} is not 1 or 2: a row "
                               "without a label, as in a test split, cannot be scored.")
            docs.append({"choices": [before + option for option in options], "gold": gold,
                         "continuation": after, "sentence": sentence})
    return docs


def sum_docs(rows: list[Row]) -> list[dict]:
    """GSM8K: the number behind #### is what an answer is compared with."""
    docs = []
    for row in rows:
        with faults_of(row):
            question, answer = (text_of(row.get(column), column)
                                for column in ("question", "answer"))
            number = answer.rpartition("####")[2].strip()
            if not re.fullmatch(r"-?\$?-?[0-9][0-9,]*(\.[0-9]+)?\.?", number):
                raise RowError(f"answer = {shortened(answer)} ends in no number that an answer "
                               "could be compared with; write #### and the number.")
            docs.append({"query": f"Question: {question}\nAnswer:", "answer": answer,
                         "question": question})
    return docs


def text_docs(rows: list[Row]) -> list[dict]:
    docs = []
    for row in rows:
        with faults_of(row):
            docs.append({"text": text_of(row.get("text"), "text")})
    return docs


@contextlib.contextmanager
def faults_of(row: Row):
    """Names the row in what is raised about it."""
    try:
        yield
    except RowError as error:
        raise RowError(f"{row.where}: {error}") from None


# name -> (columns that tell it, docs from rows, lm-eval's configuration)
KINDS = {
    "minimal pairs": (({"sentence_good", "sentence_bad"},), pair_docs, PAIRS),
    "blanks": (({"sentence", "option1", "option2"},), blank_docs, BLANKS),
    "choice": (({"choices"}, {"endings"}, {"options"}, {"sol1", "sol2"}, {"A", "B"}),
               choice_docs, CHOICE),
    "sums": (({"question", "answer"},), sum_docs, SUMS),
    "text": (({"text"},), text_docs, TEXT),
}


def headline(kind: str, columns: set) -> str | None:
    """The metric that is reported for files of HellaSwag, ARC, OpenBookQA and PIQA.

    None leaves it to the reader.
    """
    arc = "answerKey" in columns and "question_concept" not in columns
    published = arc or {"endings", "sol1"} & columns
    return "acc_norm" if kind == "choice" and published else None


def task_config(rows: list[Row], path: Path) -> tuple[dict, list[dict]]:
    """(lm-eval's configuration of the task that these rows are, rows as it expects them).

    sentence_good, sentence_bad     minimal pairs (BLiMP): the likelier sentence, each behind EOS
    sentence, option1, option2, answer
                                    Winogrande: what follows the blank, behind either option;
                                    answer 1 or 2
    choices | endings | options | sol1, sol2 | A, B, ...
                                    multiple choice, after query | question | question_stem | ctx
                                    | context | prompt | goal as it stands, question behind
                                    context | passage | article; label | gold | answer | answerKey
                                    an index, a letter, one of the file's own names or the choice
                                    itself. choices may be a list or ARC's {"text", "label"}
    question, answer                GSM8K: generated, compared by lm-eval's two filters
    text                            perplexity and bits per byte

    Indices count from 0, unless that leaves a row of the file without a choice and counting from 1
    does not. No column but these is read. Raises ParameterError naming file and row.
    """
    if not rows:
        raise ParameterError([f"{path} has no rows."])
    columns = set().union(*map(inner_question, rows))
    for kind, (tells, make, config) in KINDS.items():
        if any(names <= columns for names in tells):
            try:
                docs = make(rows)
            except RowError as error:
                raise ParameterError([f"{path}, {error}"]) from None
            about = {"version": "local", "headline": headline(kind, columns)}
            return {**config, "metadata": about}, docs
    named = ", ".join(sorted(map(str, columns)))
    raise ParameterError([
        f"{path} is no task: its columns are {named}; the kinds that are known, by their columns, "
        "stand in 05_benchmark and in stentor.benchmark.kinds.task_config."])
