"""`make gallery`: pictures of a run from its files, and a page that shows those that were made."""
import dataclasses
import re
import shutil
import unicodedata

import nbformat
import pytest

import stentor_utils as su
from stentor import gallery
from stentor.commands import main
from stentor.demo import pictures


@pytest.fixture(scope="module")
def run_dir(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs") / "shown"
    recipe = dataclasses.replace(tiny.recipe, token_budget=4 * 8 * 64)
    su.train(recipe, su.TokenStore(tiny.store_dir, recipe), folder, tokenizer=tiny.tokenizer, say=lambda text: None)
    (folder / "charts").mkdir()
    (folder / "charts" / "mixture.png").write_bytes(b"\x89PNG")
    return folder


def test_the_page_shows_what_was_drawn_and_nothing_else(run_dir, tmp_path, capsys):
    (tmp_path / "probe.png").write_bytes(b"of another run")
    (tmp_path / "demo-chat.png").write_bytes(b"\x89PNG")
    names = gallery.draw_gallery(run_dir, tmp_path)
    assert names == ["training_curves", "segmentation", "mixture"] and not (tmp_path / "probe.png").exists()
    page = gallery.write_page(tmp_path, names).read_text()
    shown = re.findall(r"\]\(([\w-]+\.png)\)", page)
    assert shown == [f"{name}.png" for name in names] + ["demo-chat.png"]
    assert all((tmp_path / name).stat().st_size for name in shown) and not re.search(r"\d", page)
    assert (tmp_path / "training_curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "probe: left out" in capsys.readouterr().out
    with pytest.raises(su.ParameterError, match="has no metrics.jsonl"):
        gallery.draw_gallery(tmp_path, tmp_path)


def test_every_letter_of_the_sentence_is_in_a_box(tiny):
    text = "A naïve café — 你好"
    figure = gallery.draw_segmentation(tiny.tokenizer, text, width=8)
    letters = "".join(letter.get_text() for letter in figure.axes[0].texts)
    assert unicodedata.normalize("NFC", letters) == text       # the tokenizer takes accents apart
    boxes = sum(round(patch.get_width()) for patch in figure.axes[0].patches)
    assert boxes == len(letters), "each box is as wide as its letters"


def test_executed_notebooks_become_html(run_dir, tmp_path):
    pytest.importorskip("nbconvert")
    with pytest.raises(su.ParameterError, match="holds no executed notebook"):
        gallery.write_html(tmp_path, tmp_path)
    (run_dir / "notebooks").mkdir()
    cell = nbformat.v4.new_code_cell("1 + 1", outputs=[nbformat.v4.new_output("stream", text="it says forty-two")])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), run_dir / "notebooks" / "02_x.ipynb")
    path, = gallery.write_html(run_dir, tmp_path / "html")
    assert path.name == "02_x.html" and "it says forty-two" in path.read_text()


def test_the_command_refuses_a_folder_that_is_no_run_in_a_sentence(tmp_path, capsys):
    assert main(["gallery", str(tmp_path), str(tmp_path / "gallery"), str(tmp_path / "html")]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err and not (tmp_path / "gallery").exists()


def test_without_a_browser_one_line_says_why_and_the_rest_goes_on(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "BROWSERS", ("no-such-browser",))
    gallery.photograph_demo(run_dir, tmp_path)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("the demo's screenshots stay as they are: ")
    assert not list(tmp_path.iterdir())


def test_the_demos_pictures_leave_the_votes_of_people_alone(run_dir, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="Gradio is not installed")
    try:
        pictures.find_browser()
    except su.ParameterError as error:
        pytest.skip(str(error))
    for name in ("shown", "other"):                    # a pair for the arena
        shutil.copytree(run_dir / "final", tmp_path / "outputs" / name / "final")
    votes = tmp_path / "outputs" / "arena_votes.jsonl"
    votes.write_text("")
    monkeypatch.setattr(pictures, "USES", {name: pictures.USES[name] for name in ("generate", "explorer", "arena")})
    gallery.photograph_demo(tmp_path / "outputs" / "shown", tmp_path / "gallery")
    assert {path.name for path in (tmp_path / "gallery").iterdir()} == {
        "demo-generate.png", "demo-explorer.png", "demo-arena.png", "demo-phone-generate.png", "demo-phone-explorer.png"}
    assert votes.read_text() == ""
