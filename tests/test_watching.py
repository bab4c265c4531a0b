"""Long work in a real kernel: one place that is rewritten where a person looks, plain lines under papermill."""
import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import REPO
from nbclient import NotebookClient

from stentor.watching import PICTURE_SECONDS, Watch

WORK = """
import sys, time; sys.path.insert(0, {repo!r})
from stentor.watching import watching
with watching(log="log.txt") as say:
    for step in range(1, 13):
        say(f"step {{step:>6,}}/12 | loss 4.2 <b> | 100 tokens/s | 3m {{step}}s left")
        time.sleep(0.1)
"""


def notebook(code):
    cell = nbformat.v4.new_code_cell(code)
    return nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": {
        "name": "python3", "display_name": "Python 3", "language": "python"}})


def in_a_kernel(code, folder, monkeypatch):
    """The outputs of one cell, executed as a front end does it: nothing of papermill is there."""
    for name in ("STENTOR_PROGRESS", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    book = notebook(code)
    NotebookClient(book, timeout=600, startup_timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return book.cells[0].outputs


def test_where_a_person_looks_there_is_one_place_that_is_rewritten(tmp_path, monkeypatch):
    outputs = in_a_kernel(WORK.format(repo=str(REPO)), tmp_path, monkeypatch)
    assert [output.output_type for output in outputs] == ["display_data"], "no line is printed, nothing scrolls"
    page = outputs[0].data["text/html"]
    assert '<progress value="12" max="12"' in page and "12 of 12" in page
    assert page.count("step ") == 8 and "4.2 &lt;b&gt;" in page and "<b>" not in page
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 12, "every line is kept"


@pytest.mark.parametrize("kaggle", [None, "Batch"])
def test_under_papermill_and_in_a_batch_session_the_lines_are_printed(tmp_path, monkeypatch, kaggle):
    if kaggle:
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", kaggle)
        monkeypatch.delenv("STENTOR_PROGRESS", raising=False)
        book = notebook(WORK.format(repo=str(REPO)))
        NotebookClient(book, timeout=600, startup_timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    else:
        nbformat.write(notebook(WORK.format(repo=str(REPO))), tmp_path / "in.ipynb")
        env = {key: value for key, value in os.environ.items() if key != "STENTOR_PROGRESS"}
        done = subprocess.run([sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb"], cwd=tmp_path, env=env,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        book = nbformat.read(tmp_path / "out.ipynb", 4)
    outputs = book.cells[0].outputs
    assert {output.output_type for output in outputs} == {"stream"}
    assert len(re.findall("step +[0-9]+/12", "".join(output.text for output in outputs))) == 12


def test_in_a_terminal_the_lines_are_printed(tmp_path):
    done = subprocess.run([sys.executable, "-c", WORK.format(repo=str(REPO))], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.count("step ") == 12 and not (tmp_path / "log.txt").exists()


def test_training_in_a_kernel_grows_a_curve_above_the_last_lines(tiny, tmp_path, monkeypatch):
    (tmp_path / "recipe.json").write_text(json.dumps(tiny.recipe.to_dict()))
    code = f"""
import json, sys; sys.path.insert(0, {str(REPO)!r})
import stentor_utils as su
recipe = su.Recipe.from_dict(json.load(open("recipe.json")))
summary = su.launch(recipe, {str(tiny.store_dir)!r}, {str(tiny.tokenizer_dir)!r}, "run")
"""
    outputs = in_a_kernel(code, tmp_path, monkeypatch)
    assert [output.output_type for output in outputs] == ["display_data"]
    page = outputs[0].data["text/html"]
    assert '<progress value="24" max="24"' in page and 'src="data:image/png;base64,' in page and "eval loss" in page
    log = (tmp_path / "run" / "log.txt").read_text()
    assert len(re.findall(r"step +\d+/24 \|", log)) == 6 and log.count("eval loss") == 4


class Place:
    """Stands for what IPython's display returns; counts."""
    pages = []

    def update(self, page):
        self.pages.append(page.data)


def test_time_left_of_rounds_and_batches(monkeypatch):
    import IPython.display
    monkeypatch.setattr(IPython.display, "display", lambda *_, **__: Place())
    watch = Watch(rounds=8)
    watch("9,000 candidates that occur 3 times or more (1 s)")
    assert (watch.done, watch.total) == (0, 8)
    for text in ("size 4,000: 4,000 tokens, 4.1 characters per token (9 s)",) * 9:
        watch(text)
    assert (watch.done, watch.total) == (8, 8) and watch.left.startswith("at most")
    watch("    40 of 1,600 batches, 2m 30s left")
    assert (watch.done, watch.total, watch.left) == (40, 1600, "2m 30s")
    drawn = []
    watch.picture = lambda: drawn.append(1) or 1 / 0   # a curve that cannot be drawn stops nothing
    watch.show()
    watch.show()
    assert len(drawn) == 1 and PICTURE_SECONDS >= 5, "a picture is not drawn at every line"
