"""The tasks: lm-eval's blocks of the cards, and local files made into lm-eval tasks."""
from __future__ import annotations

import contextlib
import functools
import re
import string
from pathlib import Path

from stentor.benchmark.rows import (
    LABELS, PACKED, QUESTIONS, Row, RowError, TASK_FILES, choices_of, counting_of, gold_of,
    question_of, read_rows, shortened, structure, text_of, whole_number)
from stentor.files import ParameterError

# The blocks of the Stentor3 card's script, and BLiMP: name -> (title, lm-eval tasks, number of few-shot examples).
BLOCKS = {
    "openbookqa_truthfulqa": ("OpenBookQA · TruthfulQA", ("openbookqa", "truthfulqa_mc2"), 0),
    "winogrande_commonsenseqa": ("Winogrande · CommonsenseQA", ("winogrande", "commonsense_qa"), 0),
    "hellaswag": ("HellaSwag", ("hellaswag",), 0),
    "arc": ("ARC-Easy · ARC-Challenge", ("arc_easy", "arc_challenge"), 0),
    "mmlu": ("MMLU", ("mmlu",), 0),
    "gsm8k_0shot": ("GSM8K (0-shot)", ("gsm8k",), 0),
    "gsm8k_5shot": ("GSM8K (5-shot)", ("gsm8k",), 5),
    "blimp": ("BLiMP", ("blimp",), 0),
}
# Those of its peers that are on the hub under a name the card's table makes plain.
PEERS = {"DistilGPT2": "hf:distilbert/distilgpt2", "Pythia-14M": "hf:EleutherAI/pythia-14m",
         "Pythia-31M": "hf:EleutherAI/pythia-31m", "Pythia-70M": "hf:EleutherAI/pythia-70m",
         "TinyStories-33M": "hf:roneneldan/TinyStories-33M"}
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


def golds_of(task, doc: dict) -> list[int | None]:
    """The indices of an item's right choices; None stands for a target that names none of them."""
    found = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    golds = [choices.index(gold) if gold in choices else gold for gold in (found if isinstance(found, list) else [found])]
    return [gold if isinstance(gold, int) and 0 <= gold < len(choices) else None for gold in golds]


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
                             "known, by their columns, stand in 05_benchmark and in stentor.benchmark.tasks.task_config."])


def task_files(place) -> list[Path]:
    """The task files of a folder, or the one file; none of those that begin with a dot."""
    place = Path(place)
    paths = [place] if place.is_file() else sorted(place.glob("*")) if place.is_dir() else []
    return [path for path in paths
            if path.suffix.lower() in TASK_FILES and path.is_file() and not path.name.startswith(".")]


def read_local(place) -> tuple[list[tuple[Path, dict, list]], list[str]]:
    """([(file, lm-eval's configuration, docs)], [what is wrong, a sentence a file]) of a folder of task files, or one file."""
    place, found, problems = Path(place), [], []
    for path in task_files(place):
        try:
            found.append((path, *task_config(read_rows(path), path)))
        except ParameterError as error:
            problems += error.problems
    packed = [path for path in place.glob("*") if path.suffix.lower() in PACKED and not path.name.startswith(".")]
    problems += [f"{path} cannot be read as it is; unpack or convert it to {', '.join(TASK_FILES)}." for path in sorted(packed)]
    if not (found or problems):
        problems = [f"{str(place)!r} is not a folder with {', '.join(TASK_FILES)} or .yaml task files, nor one such file."]
    return found, problems


def local_problems(place) -> list[str]:
    """What is wrong with a folder of task files, or one file, in sentences; a folder of YAML is lm-eval's own to judge."""
    return [] if list(Path(place).glob("*.yaml")) else read_local(place)[1]


# Tasks: lm-eval's by name, and files of your own.


def local_blocks(places) -> dict[str, dict]:
    """{block name: block for `run`} of folders and task files, named by as much of each path's end as tells them apart."""
    paths, blocks = list(dict.fromkeys(Path(place).resolve() for place in places)), {}
    for path in paths:
        length = next(n for n in range(1, len(path.parts) + 1)
                      if sum(path.parts[-n:] == other.parts[-n:] for other in paths) == 1)
        name = "/".join(path.parts[-length:])
        key = "local_" + name.replace("/", "_")
        key += "_" * (key in blocks)
        blocks[key] = {"title": f"local: {name}", "local": str(path), "name": name}
    return blocks


def local_tasks(place, name: str | None = None) -> list:
    """lm-eval tasks from a folder: its own YAML files if it has any, else every task file, called <name>/<file>.

    name: by default the folder's. place may be one task file: called `name`, or by default <its folder>/<file>.
    Raises ParameterError with every file's first fault.
    """
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    place = Path(place)
    if list(place.glob("*.yaml")):
        from lm_eval.tasks import TaskManager
        manager = TaskManager(include_path=str(place), include_defaults=False)
        return list(manager.load(manager.all_subtasks)["tasks"].values())
    found, problems = read_local(place)
    if problems:
        raise ParameterError(problems)
    stems, tasks = [path.stem for path, _, _ in found], []
    for path, config, docs in found:
        data = Dataset.from_list(docs)
        own = path.stem if stems.count(path.stem) == 1 else path.name       # x.csv beside x.jsonl
        called = name if name and place.is_file() else f"{name or path.absolute().parent.name}/{own}"
        tasks.append(ConfigurableTask(config={
            "task": called, "custom_dataset": lambda data=data, **_: {"test": data},
            "test_split": "test", "num_fewshot": 0, **config}))
    return tasks


def load_tasks(block: dict, seed: int) -> dict:
    """{"tasks": {name: Task}, "groups": ...} of a block: {"local": folder or file, "name"} or
    {"tasks": [names], "num_fewshot": n}."""
    if "local" in block:
        loaded = {"tasks": {task.config.task: task for task in local_tasks(block["local"], block.get("name"))},
                  "groups": {}}
    else:
        loaded = task_manager().load(list(block["tasks"]))
    for task in loaded["tasks"].values():
        if task.config.num_fewshot != 0 and "num_fewshot" in block:
            task.set_config(key="num_fewshot", value=block["num_fewshot"])
        elif task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded


@functools.cache
def task_manager():
    from lm_eval.tasks import TaskManager
    return TaskManager()                              # reads the index of all tasks: some seconds


def item_texts(task) -> list[list[str]]:
    """The forms of each item, without few-shot examples or the task's description. The first is its own question with its
    right answer; the others: each question column with the answer as it is written or scored, the prompt with the answer,
    the question with all choices, and each question alone."""
    docs = {instance.doc_id: instance.doc for instance in task.instances}
    return [item_forms(task, doc) for doc in docs.values()]


def item_forms(task, doc: dict) -> list[str]:
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return [str(task.doc_to_target(doc))]
    answers, exams, prompt, target = [], [], task.doc_to_text(doc), task.doc_to_target(doc)
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(doc)
        right = [choices[gold] for gold in golds_of(task, doc) if gold is not None]
        if task.multiple_input:
            prompt = right[0] if right else ""
        else:
            target = right[0] if right else ""
    with contextlib.suppress(RowError, TypeError, AttributeError):      # its own words, where the prompt has a letter
        row, = choice_docs([Row(doc)])
        answers.append(row["choices"][row["gold"]])
        for form in ("{1}", "{0} {1}"):               # as exams print it, each choice behind its letter or not
            exams.append(" ".join([row["query"], *map(form.format, string.ascii_uppercase, row["choices"])]))
    answers.append(str(target[0] if isinstance(target, list) and target else target))
    questions = [text for text in (doc.get(name) for name in QUESTIONS) if isinstance(text, str) and text.strip()]
    with contextlib.suppress(RowError):
        questions.insert(0, question_of(doc))
    questions = list(dict.fromkeys(questions or [str(prompt)]))
    pairs = [f"{question} {answer}" for question in questions for answer in answers]
    others = [f"{prompt} {answers[-1]}", *exams, *questions, *filter(None, [doc.get("sentence")])]
    return list(dict.fromkeys([*pairs, *others]))
