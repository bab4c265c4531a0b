"""Task files as lm-eval tasks: what kind of task rows are, told by their columns."""
from __future__ import annotations

import contextlib
import re
from pathlib import Path

from stentor.benchmark.rows import (
    LABELS, Row, RowError, choices_of, counting_of, gold_of, question_of, shortened, structure,
    text_of, whole_number)
from stentor.files import ParameterError

ACCURACY = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
NUMBERS = [{"name": name, "filter": [{"function": "regex", **how}, {"function": "take_first"}]} for name, how in (
    ("strict-match", {"regex_pattern": r"#### (\-?[0-9\.\,]+)"}),
    ("flexible-extract", {"group_select": -1, "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"}))]
EXACT = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True,
         "ignore_punctuation": False, "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"]}
BITS = [{"metric": name, "aggregation": aggregation, "higher_is_better": False} for name, aggregation in (
    ("word_perplexity", "weighted_perplexity"), ("byte_perplexity", "weighted_perplexity"),
    ("bits_per_byte", "bits_per_byte"))]
# A column's name, never a template: lm-eval evaluates what a template gives, and takes a text of digits for an index.
CHOICE = {"output_type": "multiple_choice", "doc_to_text": "query", "doc_to_choice": "choices", "doc_to_target": "gold",
          "metric_list": ACCURACY}


def choice_docs(rows: list[Row]) -> list[dict]:
    """[{"query", "choices", "gold"}] of rows of multiple choice. Raises RowError, its row in `where`."""
    rows = [inner_question(row) for row in rows]
    column = next((name for name in LABELS if any(name in row for row in rows)), "label")
    labels, questions, choices = [], [], []
    for row in rows:
        with faults_of(row):
            label = row.get(column)
            number = whole_number(label)
            if label is None or label != label or str(label).strip() == "" or isinstance(label, bool) or (number or 0) < 0:
                raise RowError(f"{column} = {shortened(label)} does not name one of the choices: a row without a label, "
                               "as in a test split, cannot be scored.")
            labels.append(label)
            choices.append(choices_of(row))
            questions.append(question_of(row))
    counting, docs = counting_of(column, labels, choices), []
    for row, label, (texts, names), question in zip(rows, labels, choices, questions):
        with faults_of(row):
            gold = gold_of(label, texts, names, counting)
            if gold is None:
                raise RowError(f"{column} = {shortened(label)} does not name one of the choices {shortened(texts)}; give an "
                               "index from 0, or a letter.")
            if len(texts) < 2:
                raise RowError(f"there is one choice, {shortened(texts[0])}: it takes two to choose.")
            other = gold_of(label, texts, [], "as text") if column == "answer" and whole_number(label) is not None else None
            if other not in (None, gold) and (counting == "from 1" or not isinstance(first_choice(row), str)):
                raise RowError(f"{column} = {shortened(label)} may be the number of a choice or the choice itself, of "
                               f"{shortened(texts)}; give a letter.")
            docs.append({"query": question, "choices": texts, "gold": gold})
    return docs


def first_choice(row: dict):
    """The first choice as the file has it, a number where it is one."""
    found = structure(row.get("choices"))
    return found[0] if isinstance(found, list) else ""


def inner_question(row: Row) -> Row:
    """ARC's, OpenBookQA's and CommonsenseQA's own files keep stem and choices inside `question`."""
    inner = structure(row.get("question")) if not isinstance(row.get("question"), str) or "stem" in row["question"] else None
    if not (isinstance(inner, dict) and "stem" in inner):
        return row
    found = Row({**row, "question": inner["stem"], "choices": inner.get("choices")})
    found.where = row.where
    return found


def pair_docs(rows: list[Row]) -> list[dict]:
    docs = []
    for row in rows:
        with faults_of(row):
            sentences = [text_of(row.get(column), column) for column in ("sentence_good", "sentence_bad")]
            term = row.get("linguistics_term")
            docs.append({"choices": sentences, "gold": 0, "linguistics_term": term if isinstance(term, str) else None})
    return docs


def blank_docs(rows: list[Row]) -> list[dict]:
    """Winogrande: the sentence up to its blank with either option is a context, what follows is scored behind both."""
    docs = []
    for row in rows:
        with faults_of(row):
            sentence, *options = (text_of(row.get(column), column) for column in ("sentence", "option1", "option2"))
            before, blank, after = sentence.partition("_")
            after = after.lstrip("_").strip()
            if not (blank and after):
                raise RowError(f"sentence = {shortened(sentence)} has no blank _ with something behind it.")
            gold = gold_of(row.get("answer"), options, [], "from 1")
            if gold is None:
                raise RowError(f"answer = {shortened(row.get('answer'))} is not 1 or 2: a row without a label, as in a test "
                               "split, cannot be scored.")
            docs.append({"choices": [before + option for option in options], "gold": gold, "continuation": after,
                         "sentence": sentence})
    return docs


def sum_docs(rows: list[Row]) -> list[dict]:
    """GSM8K: the number behind #### is what an answer is compared with."""
    docs = []
    for row in rows:
        with faults_of(row):
            question, answer = (text_of(row.get(column), column) for column in ("question", "answer"))
            if not re.fullmatch(r"-?\$?-?[0-9][0-9,]*(\.[0-9]+)?\.?", answer.rpartition("####")[2].strip()):
                raise RowError(f"answer = {shortened(answer)} ends in no number that an answer could be compared with; write "
                               "#### and the number.")
            docs.append({"query": f"Question: {question}\nAnswer:", "answer": answer, "question": question})
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
    "minimal pairs": (({"sentence_good", "sentence_bad"},), pair_docs,
                      {**CHOICE, "doc_to_text": "", "target_delimiter": "", "metric_list": ACCURACY[:1]}),
    "blanks": (({"sentence", "option1", "option2"},), blank_docs,
               {**CHOICE, "doc_to_text": "gold", "doc_to_target": "continuation", "metric_list": ACCURACY[:1]}),
    "choice": (({"choices"}, {"endings"}, {"options"}, {"sol1", "sol2"}, {"A", "B"}), choice_docs, CHOICE),
    "sums": (({"question", "answer"},), sum_docs,
             {"output_type": "generate_until", "doc_to_text": "query", "doc_to_target": "answer", "filter_list": NUMBERS,
              "metric_list": [EXACT], "generation_kwargs": {"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False}}),
    "text": (({"text"},), text_docs, {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
                                      "metric_list": BITS}),
}


def headline(kind: str, columns: set) -> str | None:
    """The metric that is reported for files of HellaSwag, ARC, OpenBookQA and PIQA; None leaves it to the reader."""
    published = bool({"endings", "sol1"} & columns or ("answerKey" in columns and "question_concept" not in columns))
    return "acc_norm" if kind == "choice" and published else None


def task_config(rows: list[Row], path: Path) -> tuple[dict, list[dict]]:
    """(lm-eval's configuration of the task that these rows are, rows in the form it expects). By the columns:

    sentence_good, sentence_bad              minimal pairs (BLiMP): the likelier sentence, each behind EOS
    sentence, option1, option2, answer       Winogrande: what follows the blank, behind either option; answer 1 or 2
    choices | endings | options | sol1, sol2 | A, B, ...
                                             multiple choice, after query | question | question_stem | ctx | context |
                                             prompt | goal as it stands, question behind context | passage | article;
                                             label | gold | answer | answerKey an index, a letter, one of the file's own
                                             names or the choice itself. choices may be a list or ARC's {"text", "label"}
    question, answer                         GSM8K: generated, compared by lm-eval's two filters
    text                                     perplexity and bits per byte

    Indices count from 0, unless that leaves a row of the file without a choice and counting from 1 does not. No column but
    these is read. Raises ParameterError naming file and row.
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
            return {**config, "metadata": {"version": "local", "headline": headline(kind, columns)}}, docs
    raise ParameterError([f"{path} is no task: its columns are {', '.join(sorted(map(str, columns)))}; the kinds that are "
                             "known, by their columns, stand in 05_benchmark and in stentor.benchmark.kinds.task_config."])
