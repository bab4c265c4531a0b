"""The tasks: lm-eval's blocks of the cards, and local files made into lm-eval tasks."""
from __future__ import annotations

import contextlib
import functools
import string
from pathlib import Path

from stentor.benchmark.kinds import choice_docs, task_config
from stentor.benchmark.rows import (
    PACKED, QUESTIONS, Row, RowError, TASK_FILES, question_of, read_rows)
from stentor.files import ParameterError

# The blocks of the Stentor3 card's script, and BLiMP:
# name -> (title, lm-eval tasks, number of few-shot examples).
BLOCKS = {
    "openbookqa_truthfulqa": ("OpenBookQA · TruthfulQA", ("openbookqa", "truthfulqa_mc2"), 0),
    "winogrande_commonsenseqa": (
        "Winogrande · CommonsenseQA", ("winogrande", "commonsense_qa"), 0),
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
         "TinyStories-33M": "hf:roneneldan/TinyStories-33M",
         "Stentor3-50M": "hf:StentorLabs/Stentor3-50M",
         "Portimbria-150M": "hf:StentorLabs/Portimbria-150M"}


def load_tasks(block: dict, seed: int) -> dict:
    """{"tasks": {name: Task}, "groups": ...} of a block.

    block: {"local": folder or file, "name"} or {"tasks": [names], "num_fewshot": n}.
    """
    if "local" in block:
        tasks = local_tasks(block["local"], block.get("name"))
        loaded = {"tasks": {task.config.task: task for task in tasks}, "groups": {}}
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


def local_blocks(places) -> dict[str, dict]:
    """{block name: block for `run`} of folders and task files.

    Each is named by as much of its path's end as tells them apart.
    """
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
    """lm-eval tasks from a folder: its own YAML files if it has any, else every task file.

    A file's task is called <name>/<file>; name: by default the folder's. place may be one task
    file: called `name`, or by default <its folder>/<file>. Raises ParameterError with every
    file's first fault.
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
        folder = name or path.absolute().parent.name
        called = name if name and place.is_file() else f"{folder}/{own}"
        tasks.append(ConfigurableTask(config={
            "task": called, "custom_dataset": lambda data=data, **_: {"test": data},
            "test_split": "test", "num_fewshot": 0, **config}))
    return tasks


def task_files(place) -> list[Path]:
    """The task files of a folder, or the one file; none of those that begin with a dot."""
    place = Path(place)
    paths = [place] if place.is_file() else sorted(place.glob("*")) if place.is_dir() else []
    return [path for path in paths
            if path.suffix.lower() in TASK_FILES and path.is_file() and path.name[0] != "."]


def read_local(place) -> tuple[list[tuple[Path, dict, list]], list[str]]:
    """([(file, lm-eval's configuration, docs)], [what is wrong, a sentence a file]).

    place: a folder of task files, or one file.
    """
    place, found, problems = Path(place), [], []
    for path in task_files(place):
        try:
            found.append((path, *task_config(read_rows(path), path)))
        except ParameterError as error:
            problems += error.problems
    readable = ", ".join(TASK_FILES)
    packed = sorted(path for path in place.glob("*")
                    if path.suffix.lower() in PACKED and path.name[0] != ".")
    problems += [f"{path} cannot be read as it is; unpack or convert it to {readable}."
                 for path in packed]
    if not (found or problems):
        problems = [f"{str(place)!r} is not a folder with {readable} or .yaml task files, nor one "
                    "such file."]
    return found, problems


def local_problems(place) -> list[str]:
    """What is wrong with a folder of task files, or one file, in sentences.

    A folder of YAML is lm-eval's own to judge.
    """
    return [] if list(Path(place).glob("*.yaml")) else read_local(place)[1]


def item_texts(task) -> list[list[str]]:
    """The forms of each item, without few-shot examples or the task's description.

    The first is its own question with its right answer; the others: each question column with the
    answer as it is written or scored, the prompt with the answer, the question with all choices,
    and each question alone.
    """
    docs = {instance.doc_id: instance.doc for instance in task.instances}
    return [item_forms(task, doc) for doc in docs.values()]


def item_forms(task, doc: dict) -> list[str]:
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return [str(task.doc_to_target(doc))]
    answers, exams = [], []
    prompt, target = task.doc_to_text(doc), task.doc_to_target(doc)
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(doc)
        right = next((choices[gold] for gold in golds_of(task, doc) if gold is not None), "")
        if task.multiple_input:
            prompt = right
        else:
            target = right
    # Its own words, where the prompt has a letter.
    with contextlib.suppress(RowError, TypeError, AttributeError):
        row, = choice_docs([Row(doc)])
        answers.append(row["choices"][row["gold"]])
        for form in ("{1}", "{0} {1}"):               # as exams print it, behind letters or not
            printed = map(form.format, string.ascii_uppercase, row["choices"])
            exams.append(" ".join([row["query"], *printed]))
    answers.append(str(target[0] if isinstance(target, list) and target else target))
    columns = (doc.get(name) for name in QUESTIONS)
    questions = [text for text in columns if isinstance(text, str) and text.strip()]
    with contextlib.suppress(RowError):
        questions.insert(0, question_of(doc))
    questions = list(dict.fromkeys(questions or [str(prompt)]))
    pairs = [f"{question} {answer}" for question in questions for answer in answers]
    others = [f"{prompt} {answers[-1]}", *exams, *questions, *filter(None, [doc.get("sentence")])]
    return list(dict.fromkeys([*pairs, *others]))


def golds_of(task, doc: dict) -> list[int | None]:
    """The indices of an item's right choices; None stands for a target that names none of them."""
    found = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    golds = [choices.index(gold) if gold in choices else gold
             for gold in (found if isinstance(found, list) else [found])]
    return [gold if isinstance(gold, int) and 0 <= gold < len(choices) else None for gold in golds]
