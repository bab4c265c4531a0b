"""A curriculum: stages trained one after the other, each a recipe, each beginning from the one before.

`published.CURRICULA` holds the published one, Stentor-Big's. Here are its figures held against each
other, its small twin for a CPU, and the stages run by the one launcher.
"""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from stentor.checkpoints import check_run
from stentor.files import write_atomically
from stentor.kaggle import adopt, how_to_go_on, stop_here
from stentor.launch import launch
from stentor.metrics import read_metrics
from stentor.preparing import prepare_tokens
from stentor.recipes import Recipe, Source
from stentor.session import hours_left
from stentor.shapes import Shape, count_parameters
from stentor.tokens import plan_sources, source_names

# Good documents of each source that a twin's stage holds out, by its first source, for about 10,000
# tokens of that: a file of code is long, a paragraph is not.
HELD_OUT = {"prose": 12, "code": 3, "math": 3}


def accounting(stages) -> list[dict]:
    """One row a stage: the card's tokens against its steps x batch x length, which do not agree.

    "tokens" and "steps" are printed; "steps_x_batch" is what they make of each other, and
    "per_gpu" the same where the batch printed were that of one GPU; "steps_for_tokens" is what the
    printed tokens would take.
    """
    rows = []
    for stage in stages:
        said = stage.published
        a_step = said["batch"] * stage.block_size
        rows.append({"stage": stage.name, "tokens": said["tokens"], "steps": said["steps"],
                     "steps_x_batch": said["steps"] * a_step,
                     "per_gpu": said["steps"] * a_step * said["gpus"],
                     "steps_for_tokens": round(said["tokens"] / a_step)})
    return rows


def parameters_apart(recipe: Recipe) -> int:
    """The parameters that a card prints beyond what its shape has; Stentor-Big's 1,536."""
    return recipe.published["parameters"] - count_parameters(recipe.shape)


def local_stages(stages, shape: Shape, *, tokens: int, rate: float = 2e-3, textbooks=None
                 ) -> tuple[Recipe, ...]:
    """The small twin of a curriculum of three stages for a CPU: prose, then code, then mathematics.

    The embedded corpora stand in for the card's texts, so that what a stage forgets can be seen:
    they differ as its web text, stories and textbooks do. tokens: of all stages, shared out as the
    card's; rates and batches keep the card's proportions too. textbooks: a folder of .txt files
    that joins the mathematics, as SciPhi's books joined the web text of stage 3.
    """
    texts = [(Source("prose", "local:prose"),),
             (Source("code", "local:code", preserve_linebreaks=True),),
             (Source("math", "local:math"),)]
    if textbooks:
        texts[2] += (Source("textbooks", str(textbooks)),)
    whole = sum(stage.token_budget for stage in stages)
    twins = []
    for stage, sources in zip(stages, texts, strict=True):
        twin = stage.scaled_to("cpu")
        batch = 8 * stage.total_batch_size // stages[0].total_batch_size
        twin = dataclasses.replace(
            twin, shape=shape, sources=sources,
            token_budget=max(1, round(tokens * stage.token_budget / whole)),
            block_size=min(twin.block_size, shape.max_position_embeddings),
            learning_rate=rate * stage.learning_rate / stages[0].learning_rate,
            per_device_train_batch_size=batch, max_eval_samples=HELD_OUT[sources[0].name],
            gradient_checkpointing=False)
        half = -(-twin.total_steps // 2)
        twins.append(dataclasses.replace(twin, eval_steps=half, best_eval_steps=half,
                                         logging_steps=max(1, twin.total_steps // 20)))
    return tuple(twins)


def prepare_stages(stages, tokenizer, folder, **reading) -> list[Path]:
    """The token store of each stage, in <folder>/stage<n>/tokens; no stage reads what another holds out.

    reading: as for `prepare_tokens`.
    """
    stores = []
    for number, recipe in enumerate(stages, 1):
        beside = [(source, other.max_eval_samples) for other in stages if other is not recipe
                  for source in other.sources]
        shares = plan_sources(recipe)
        wanted = {name: int((shares == i).sum() + 1) * recipe.block_size
                  for i, name in enumerate(source_names(recipe))}
        stores.append(prepare_tokens(
            recipe.sources, tokenizer, stage_folder(folder, number) / "tokens",
            tokens_per_source=wanted, validation_documents=recipe.max_eval_samples, beside=beside,
            **reading))
    return stores


def stage_folder(folder, number: int) -> Path:
    return Path(folder) / f"stage{number}"


def run_stages(stages, start, tokenizer_dir, folder, *, deadline: float | None = None,
               num_processes: int | None = None, say=None) -> list[dict]:
    """Train the stages, each from the model of the one before, the first from the folder `start`.

    Each is a run of its own, in <folder>/stage<n>/, whose store `prepare_stages` made; a killed one
    goes on, an attached one is taken over. Every evaluation measures the text of every stage. deadline: of
    `session_end`. Returns the summaries; where a stage was stopped, the notebook ends in a sentence.
    Raises CheckpointError, before any is trained, where a folder holds another run.
    """
    folders = [stage_folder(folder, number) for number in range(1, len(stages) + 1)]
    for recipe, run_dir in zip(stages, folders):
        check_run(recipe, run_dir)
    texts = {text_name(number): run_dir / "tokens" for number, run_dir in enumerate(folders, 1)}
    summaries = []
    for number, (recipe, run_dir) in enumerate(zip(stages, folders), 1):
        adopt(run_dir, recipe=recipe, say=say or print)
        summaries.append(launch(
            recipe, run_dir / "tokens", tokenizer_dir, run_dir, start=start, texts=texts,
            num_processes=num_processes, deadline_hours=hours_left(deadline), say=say))
        if summaries[-1]["stopped"]:
            stop_here(f"Stage {number} of {len(stages)}: {how_to_go_on(summaries[-1])}")
            return summaries                          # a saved version on Kaggle only skips cells
        start = run_dir / "final"
    return summaries


def text_name(number: int) -> str:
    return f"text of stage {number}"


def forgetting(folder, stages: int, figure: str = "bits_per_byte") -> list[dict]:
    """How each stage's held-out text fares: one row before stage 1, and one after each.

    Each row is {"after": 0 ... stages, "text of stage 1": figure, ...}, from the stages' logs. What
    a text's figure rises by, from the row of its own stage to the last, is what was forgotten of it.
    """
    logs = [[row for row in read_metrics(stage_folder(folder, number) / "metrics.jsonl")
             if row["kind"] == "eval"] for number in range(1, stages + 1)]
    rows = [logs[0][0], *(log[-1] for log in logs)]
    return [{"after": after} | {name: found[figure] for name, found in row["texts"].items()}
            for after, row in enumerate(rows)]


def write_curriculum(folder, stages, summaries) -> None:
    """<folder>/curriculum.json: the stages' recipes, what each came to, and what was forgotten."""
    described = {"stages": [recipe.to_dict() for recipe in stages], "summaries": summaries,
                 "bits_per_byte": forgetting(folder, len(stages)),
                 "loss": forgetting(folder, len(stages), "loss")}
    write_atomically(Path(folder) / "curriculum.json", json.dumps(described, indent=1))
