"""Figures of a page: written from a run's files, sealed, and found again when somebody types over them."""
import json

import pytest

import stentor_utils as su
from conftest import REPO
from stentor.reporting import BLOCK, MAKE_RUN, block_problems, sealed, write_results


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "outputs" / "demo"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"eval_loss": 4.5}))
    (folder / "samples.json").write_text(json.dumps({"samples": [
        {"prompt": f"Prompt {i}", "text": f" text\n{i} <b>"} for i in range(5)]}))
    return folder


def page_of(tmp_path, *blocks):
    page = tmp_path / "README.md"
    page.write_text("# A page\n\n" + "\n\n".join(blocks) + "\n\nThe end.\n")
    return page


def test_a_block_is_written_from_its_files_and_a_changed_figure_is_found(run_dir, tmp_path):
    page = page_of(tmp_path, sealed("samples", "old", ["outputs/demo/samples.json"]),
                   sealed("bench-speed", "kept 12", ["outputs/benchmarks/speed.md"]))
    assert write_results(run_dir, page) == ["samples"]
    text = page.read_text()
    assert text.startswith("# A page\n\n") and text.endswith("\n\nThe end.\n") and "old" not in text
    assert "> **Prompt 2** text 2 &lt;b>" in text and "Prompt 3" not in text and "kept 12" in text
    assert "outputs/demo/samples.json; " in text and "cores; written at commit " in text
    assert block_problems(text) == []
    changed = block_problems(text.replace("text 2", "text 9").replace("kept 12", "kept 13"))
    assert [problem.split()[2] for problem in changed] == ["samples", "bench-speed"]
    assert write_results(run_dir, page) == [] and page.read_text() == text          # the same figures keep their commit
    page.write_text(text.replace("text 2", "text 9"))
    assert write_results(run_dir, page) == ["samples"] and "text 2 " in page.read_text()


def test_a_benchmark_that_was_run_again_takes_its_place(run_dir, tmp_path):
    page = page_of(tmp_path, sealed("bench-speed", "kept 12", ["outputs/benchmarks/speed.md"]))
    (run_dir.parent / "benchmarks").mkdir()
    (run_dir.parent / "benchmarks" / "speed.md").write_text("| speed |\n|---|\n| 14 |\n")
    assert write_results(run_dir, page) == ["bench-speed"]
    block, = BLOCK.finditer(page.read_text())
    assert "| 14 |" in block["text"] and "kept 12" not in block["text"]


def test_the_six_figures_are_read_where_their_files_are(run_dir, tmp_path):
    (run_dir / "baseline.json").write_text(json.dumps({"byte_bigram_bits_per_byte": 3.5}))
    (run_dir / "run.json").write_text(json.dumps({"recipe": su.RECIPES["stentor2-12m"].to_dict()}))
    summary = {"parameters": 1_000, "tokens": 2_000, "seconds": 61, "eval_loss": 4.5, "perplexity": 90.0,
               "bits_per_byte": 1.25, "tokens_per_second": 33.0}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    outputs = run_dir.parent
    (outputs / "speedrun.json").write_text(json.dumps({
        "width": 128, "ratios": [{"width": 128, "share": 0.25}, {"width": 128, "share": 0.35}, {"width": 64, "share": 0.9}],
        "times": [{"who": "trainer", "width": 128, "share": 0.125}, {"who": "card", "width": 128, "share": 0.7}]}))
    (outputs / "reliability.json").write_text(json.dumps({"differing_files": [], "kills": 12, "runs": 3}))
    page = page_of(tmp_path, sealed("six", "old", ["outputs/demo/summary.json"]))
    assert write_results(run_dir, page) == ["six"]
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 6 and "1,000 parameters after 2,000 tokens in 1m 01s" in rows[0][0]
    figures = [row[1].removesuffix(" |") for row in rows]
    assert figures == ["1.2500 (one draw); a byte bigram model 3.5000 (2.2500 more)", "0.300 (0.250 to 0.350, n = 2)",
                       "0.125 (one draw)", "0 after 12 kills in 3 runs", "not measured", "not measured"]


def test_the_minutes_are_papermills_and_those_of_make_run_are_added(run_dir, tmp_path):
    page = page_of(tmp_path, sealed("minutes", "old", ["outputs/demo/notebooks/*.ipynb"]))
    (run_dir / "notebooks").mkdir()
    clock = {"01_tokenizer": 100, "02_pretrain_t4": 200, "04_instruct_sft": 60, "05_benchmark": 10, "07_growth": 300}

    def written(clock):
        for name, seconds in clock.items():
            (run_dir / "notebooks" / f"{name}.ipynb").write_text(json.dumps({"metadata": {"papermill": {"duration": seconds}}}))
        assert write_results(run_dir, page) == ["minutes"]
        return page.read_text()
    assert "together" not in written(clock)            # 06 has not run yet
    text = written({"06_charts": 5.5})
    assert "|  | 01 | 02 | 04 | 05 | 06 | 07 |" in text
    assert "| on this CPU | 1m 40s | 3m 20s | 1m 00s | 10s | 5s | 5m 00s |" in text
    assert "`make run` (01, 02, 04, 05, 06) together: 6m 15s." in text


def test_the_notebooks_of_make_run_are_the_makefiles():
    assert f"NOTEBOOKS ?= {' '.join(MAKE_RUN)}\n" in (REPO / "Makefile").read_text()


def test_a_stranger_finds_the_commands(monkeypatch):
    """What tests/benchmarks/bench_stranger.py types stands in the README's first block of commands."""
    monkeypatch.syspath_prepend(str(REPO / "tests" / "benchmarks"))
    import bench_stranger
    assert {"make run", "make demo"} <= set(bench_stranger.commands((REPO / "README.md").read_text()))


def test_what_cannot_be_written_is_said(run_dir, tmp_path):
    with pytest.raises(su.ParameterError, match="name README.md"):
        write_results(run_dir, tmp_path / "nowhere.md")
    with pytest.raises(su.ParameterError, match="'speed' is none of"):
        write_results(run_dir, page_of(tmp_path, sealed("speed", "12", ["outputs/speed.json"])))
    with pytest.raises(su.ParameterError, match="summary.json cannot be read"):
        write_results(tmp_path / "no-run", page_of(tmp_path))
    assert "names no file" in block_problems(sealed("samples", "old", []))[0]
