"""06_charts: every chart is drawn, labelled, not empty; what is missing is said; published figures are the cards'."""
import csv
import dataclasses
import itertools
import json
import math
import random
import re
import sys
from pathlib import Path

import matplotlib
import matplotlib.backends.backend_agg
import numpy as np
import pytest
from notebook_functions import load_functions

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parents[1]
SEEDS = ROOT.parent / "shared" / "seeds"
sys.path.insert(0, str(ROOT))
from stentor import charts as suite  # noqa: E402
from stentor.statistics import wilson  # noqa: E402

PUBLISHED = json.loads((ROOT / "data" / "published.json").read_text(encoding="utf-8"))
CELLS = [cell for cell in json.loads((ROOT / "notebooks/06_charts.ipynb").read_text(encoding="utf-8"))["cells"]
         if cell["cell_type"] == "code"]


def execute(namespace, wanted):
    for cell in CELLS:
        if wanted(cell):
            exec(compile("".join(cell["source"]), f"06_charts:{cell['id']}", "exec"), namespace)  # noqa: S102
    return namespace


@pytest.fixture(scope="module")
def charts():
    """The functions of the notebook: what its cells tagged `functions` define."""
    import stentor_utils

    with matplotlib.rc_context():
        yield execute({"stentor_utils": stentor_utils, "su": stentor_utils, "Path": Path},
                      lambda cell: "functions" in cell["metadata"].get("tags", []))


def write_run(folder, steps=600, tokens_per_step=8192, seconds_per_step=0.25, final=3.9, seed=0, fp16=True):
    """A run folder as `train` writes it, with a loss that falls, noise, an anneal, and one gradient spike."""
    import stentor_utils

    folder.mkdir(parents=True)
    rng, best, elapsed, recipe = random.Random(seed), math.inf, 0.0, stentor_utils.RECIPES["stentor2-12m"]
    (folder / "run.json").write_text(json.dumps({"recipe": dataclasses.asdict(recipe)}, default=str))
    (folder / "summary.json").write_text(json.dumps({"parameters": 12_294_400, "tokens": steps * tokens_per_step}))
    table = [["step", "epoch", "train_loss", "eval_loss", "eval_ppl", "note"], [0, 0, "", "9.01", "8184.5", ""]]
    metrics = [{"kind": "eval", "step": 0, "tokens": 0, "epoch": 0, "loss": 9.01, "perplexity": math.exp(9.01),
                "bits_per_byte": 9.01 / math.log(2) / 3, "elapsed_seconds": 0.1, "best": True}]
    for step in range(2, steps + 1, 2):
        done, elapsed = step / steps, elapsed + 2 * seconds_per_step
        loss = final + 3.5 * math.exp(-step / 15) + 1.2 / (1 + 12 * done) + rng.gauss(0, 0.07)
        common = {"step": step, "tokens": step * tokens_per_step, "epoch": round(done, 4)}
        row = {"kind": "train", **common, "loss": loss, "learning_rate": 8e-4 * (1 - done),
               "grad_norm": 6.0 if step == 300 else 0.4 * math.exp(rng.gauss(0, 0.1)), "wait_seconds": 0.01,
               "tokens_per_second": tokens_per_step / seconds_per_step, "elapsed_seconds": elapsed,
               "loss_scale": 1.0, "skipped_steps": 0,
               "mixture": {"prose": 0.8, "code": 0.2} if done < 0.85 else {"prose": 0.5, "code": 0.2, "math": 0.3}}
        if fp16:
            row |= {"loss_scale": 65536.0 if step < 200 else 131072.0, "skipped_steps": step // 250}
        metrics.append(row)
        table.append([step, common["epoch"], f"{loss:.4f}", "", "", ""])
        if step % 50 == 0:
            loss += 0.05 - (loss - final - 1.2 / (1 + 12 * done))
            metrics.append({"kind": "eval", **common, "loss": loss, "perplexity": math.exp(loss),
                            "bits_per_byte": loss / math.log(2) / 3, "elapsed_seconds": elapsed, "best": loss < best})
            table.append([step, common["epoch"], "", f"{loss:.4f}", f"{math.exp(loss):.2f}", "best" * (loss < best)])
            best = min(best, loss)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    with open(folder / "training_curves.csv", "w", newline="") as file:
        csv.writer(file).writerows(table)
    return folder


PHENOMENA = {"island_effects": (150, 300), "binding": (52, 100), "npi_licensing": (70, 200), "tense": (90, 100)}


def write_scores(folder, seed=0):
    """What 04 and 05 add to a run: phases, probe, benchmark table and per-item files."""
    rng = random.Random(seed)
    (folder / "instruct").mkdir()
    sources = [["seed_safety"], ["beavertails", "dolly", "falsereject", "seed_safety"], ["concise_qa"]]
    names, phases = ["safety warm-up", "main", "stop calibration"], []
    for recipe in ("card", "better"):
        for i, (name, present) in enumerate(zip(names, sources), 1):
            loss = {source: 5.5 + 0.3 * j - 0.2 * i for j, source in enumerate(present)}
            rows = []
            for step in range(2 * i + 1):
                rows.append({"kind": "train", "step": step, "loss": 5.5 - 0.1 * step + rng.gauss(0, 0.1)})
                if step in (0, 2 * i):
                    mean = sum(loss.values()) / len(loss) - 0.1 * step
                    rows.append({"kind": "eval", "step": step, "loss": mean,
                                 "per_source": {source: value - 0.1 * step for source, value in loss.items()}})
            phases.append({"number": i, "phase": name, "loss_after": rows[-1]["loss"], "examples": 9, "steps": 2 * i})
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "instruct" / f"sft_metrics-{recipe}-phase{i}.jsonl").write_text(lines)
    (folder / "instruct/sft_summary.json").write_text(json.dumps({"phases": phases, "deliver": "better", "seeds": [0]}))
    shares = ("harmful refused", "harmful complied with", "benign helped", "stops by itself")
    (folder / "instruct/probe.json").write_text(json.dumps({"models": {who: {"scores": {suite: {key: {
        "hits": 3, "n": 18, "share": (share := (i + j) / 8), "low": max(0, share - 0.15), "high": min(1, share + 0.15)}
        for j, key in enumerate(shares)} for suite in ("35 prompts, greedy", "35 prompts, sampled", "larger suite, greedy")}}
        for i, who in enumerate(("base", "card-0", "better-0", "better-1"))}}))
    table = ["task,model,metric,score,low,high,chance,rank,n"]
    for task, chance in (("arc_easy", 0.25), ("winogrande", 0.5), ("gsm8k", ""), ("written minimal pairs", 0.5)):
        for model in (folder.name, "stentor2-12m", "pythia-70m"):
            score = (chance or 0.02) + rng.uniform(-0.01, 0.2)
            table.append(f"{task},{model},acc,{score},{max(0, score - 0.03)},{score + 0.03},{chance},1–2,500.0")
    for model in (folder.name, "untrained"):
        (folder / "benchmark" / model).mkdir(parents=True)
        tasks = {f"{name}/{half}": {"phenomenon": name,
                                    "items": {"acc,none": [1.0] * (right // 2) + [0.0] * ((n - right) // 2)}}
                 for name, (right, n) in PHENOMENA.items() for half in (1, 2)}
        (folder / "benchmark" / model / "pairs.json").write_text(json.dumps({"tasks": tasks, "title": "pairs"}))
    (folder / "benchmark/results.csv").write_text("\n".join(table) + "\n")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    write_run(folder / "demo")
    write_run(folder / "long-run", steps=1800, tokens_per_step=131_072, seconds_per_step=2.0, final=3.2, seed=1)
    write_run(folder / "low-rate", final=3.95, seed=2, fp16=False)  # ends beside demo: labels would collide
    write_scores(folder / "demo")
    write_scores(folder / "long-run", seed=1)
    return folder


def charts_of(charts, runs):
    """{chart: its figure, or the reason why there is none}, for all charts of these runs."""
    calls = {
        "loss": (charts["draw_curves"], runs, "loss"), "perplexity": (charts["draw_curves"], runs, "perplexity"),
        "bits_per_byte": (charts["draw_curves"], runs, "bits_per_byte"), "compute": (charts["draw_compute"], runs),
        "health": (charts["draw_health"], runs), "throughput": (charts["draw_throughput"], runs),
        "mixture": (charts["draw_mixture"], runs), "parameters": (charts["draw_budget"], runs),
        "sft": (charts["draw_sft"], runs), "probe": (charts["draw_probe"], runs), "blimp": (charts["draw_blimp"], runs),
        "benchmark": (charts["draw_benchmark"], runs, ROOT / "data/published_benchmarks.json"),
    }  # fmt: skip
    figures = {}
    for name, (draw, *arguments) in calls.items():
        try:
            figures[name] = draw(*arguments)
        except charts["Missing"] as reason:
            figures[name] = str(reason)
    return figures


@pytest.fixture(scope="module", params=[["demo"], ["demo", "long-run", "low-rate"]], ids=["one run", "three runs"])
def figures(request, charts, outputs):
    drawn = charts_of(charts, charts["load_runs"]([outputs / name for name in request.param]))
    if len(request.param) == 1:
        assert "fewer than two" in drawn.pop("compute")
        drawn["published"] = charts["draw_published"](ROOT / "data" / "published.json")
        drawn["history"] = charts["draw_history"](ROOT / "data" / "published.json")
    canvases = {}
    for name, figure in drawn.items():
        assert not isinstance(figure, str), f"{name}: {figure}"
        canvases[name] = matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
        canvases[name].draw()
    return canvases


def test_every_chart_is_drawn_labelled_and_not_empty(figures):
    for name, canvas in figures.items():
        pixels = np.asarray(canvas.buffer_rgba())[..., :3]
        assert (pixels[-1] == 255).all(), "a white background also on dark pages"
        for ax in canvas.figure.axes:
            assert any(other.get_xlabel() for other in ax.get_shared_x_axes().get_siblings(ax)), name
            rows = ax.get_shared_y_axes().get_siblings(ax)  # bars have named rows in place of a label
            named = any(re.match("[a-z]", label.get_text()) for other in rows for label in other.get_yticklabels())
            assert named or any(other.get_ylabel() for other in rows), name
            x0, y0, x1, y1 = (round(edge) for edge in ax.get_window_extent().extents)
            inside = pixels[len(pixels) - y1 + 3:len(pixels) - y0 - 3, x0 + 3:x1 - 3].reshape(-1, 3).astype(int)
            # coloured or dark ink, not just the light grey grid (#E4E4E4)
            assert ((inside.max(1) - inside.min(1) > 60) | (inside.max(1) < 90)).sum() > 150, f"{name} is empty"


def test_no_text_overlaps_other_text(figures):
    for name, canvas in figures.items():
        for ax in canvas.figure.axes:
            for group in (ax.get_xticklabels(), ax.get_yticklabels(), ax.texts):
                boxes = [(text.get_text(), text.get_window_extent()) for text in group
                         if text.get_text() and text.get_visible()]
                view = ax.get_window_extent().padded(1)
                if group is not ax.texts:  # ticks outside the view are kept by matplotlib but not drawn
                    boxes = [(text, box) for text, box in boxes if view.x0 <= (box.x0 + box.x1) / 2 <= view.x1
                             or view.y0 <= (box.y0 + box.y1) / 2 <= view.y1]
                for (text, box), (other, other_box) in itertools.combinations(boxes, 2):
                    assert not box.overlaps(other_box), f"{name}: {text!r} overlaps {other!r}"


def test_show_saves_png_and_svg_or_says_why_not(charts, outputs, tmp_path, capsys):
    run, = charts["load_runs"]([outputs / "demo"])
    charts["show"]("health", charts["draw_health"], [run], folder=tmp_path)
    assert (tmp_path / "health.png").read_bytes().startswith(b"\x89PNG")
    first = (tmp_path / "health.svg").read_bytes()
    assert b"<path" in first and b"<image" not in first, "vector, not an embedded bitmap"
    charts["show"]("health", charts["draw_health"], [run], folder=tmp_path)
    assert (tmp_path / "health.svg").read_bytes() == first, "an unchanged chart is an unchanged file"
    capsys.readouterr()
    charts["show"]("mixture", charts["draw_mixture"], [run | {"train": []}], folder=tmp_path)
    assert capsys.readouterr().out == f"mixture is {charts['OUTCOME']['mixture']}.\n"
    assert not (tmp_path / "mixture.png").exists()


NEEDS_METRICS = {"bits_per_byte", "compute", "health", "throughput", "mixture"}
NEEDS_SCORES = {"sft", "probe", "benchmark", "blimp"}


@pytest.mark.parametrize("kept, absent", [
    ({"training_curves.csv"}, NEEDS_METRICS),
    ({"metrics.jsonl"}, {"compute"}),
    ({"run.json", "summary.json"}, NEEDS_METRICS | {"loss", "perplexity"}),
    (set(), NEEDS_METRICS | {"loss", "perplexity"}),
])  # fmt: skip
def test_missing_files_leave_out_just_their_charts(charts, outputs, tmp_path, kept, absent):
    for name in kept:
        (tmp_path / name).write_bytes((outputs / "demo" / name).read_bytes())
    drawn = charts_of(charts, charts["load_runs"]([tmp_path]))
    assert {name for name, figure in drawn.items() if isinstance(figure, str)} == absent | NEEDS_SCORES
    for name in absent | NEEDS_SCORES:
        assert "\n" not in drawn[name] and len(drawn[name]) > 20, "a reason, in one line"
    with pytest.raises(charts["Missing"], match="published.json is not beside"):
        charts["draw_published"](tmp_path / "published.json")


def test_broken_files_are_survived(charts, outputs, tmp_path):
    lines = (outputs / "demo/metrics.jsonl").read_text().splitlines()
    again = json.dumps({"kind": "train", "step": 2, "loss": 1.25})  # step 2 once more, after a resume
    odd = json.dumps({"kind": "train", "step": 4, "loss": float("nan"), "grad_norm": None, "mixture": {}})
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, again, odd, "[]", '{"kind": "train", "st']))
    (tmp_path / "run.json").write_text('{"recipe": {"name": "own", "shape": {"hidden": 3}}}')
    (tmp_path / "summary.json").write_text("not json")
    (tmp_path / "prices.csv").write_text("item,price\nbread,3\n")
    run, = charts["load_runs"]([tmp_path])
    assert len(run["train"]) + len(run["eval"]) == len(lines)
    assert run["train"][0]["loss"] == 1.25 and run["train"][0]["learning_rate"] > 0, "the later line adds to the first"
    assert 4 not in suite.series(run["train"], "step", "loss")[0], "a loss that is not a number is no point"
    assert sum(isinstance(figure, str) for figure in charts_of(charts, [run]).values()) == 5  # compute needs two


def test_foreign_runs(charts, tmp_path):
    """A card's CSV under another name, and the trainer_state.json of the newest checkpoint."""
    (tmp_path / "a").mkdir()
    rows = ["step,epoch,train_loss,eval_loss,eval_ppl,note", "900,0.2,3.9,,,", "1500,0.4,,3.5410,34.50,first best",
            "3300,0.9,,3.2814,26.61,Best", "3662,1.0,,3.2565,25.96,final"]  # fmt: skip
    (tmp_path / "a/curves.csv").write_text("\ufeff" + "\r\n".join(rows), encoding="utf-8")
    run, = charts["load_runs"]([tmp_path / "a"])
    assert suite.series(run["eval"], "step", "perplexity")[1].tolist() == [34.50, 26.61, 25.96]
    assert suite.best_row(run)["step"] == 3300, "the last row noted as best, as in the card"

    transformers = pytest.importorskip("transformers")
    for step in (20, 100):
        state = transformers.TrainerState(global_step=step)
        for at in range(10, step + 1, 10):
            state.log_history.append({"loss": 5 - at / 50, "grad_norm": 0.5, "learning_rate": 1e-3, "step": at})
            state.log_history.append({"eval_loss": 5.2 - at / 50, "epoch": at / 100, "step": at})
        (tmp_path / f"b/checkpoint-{step}").mkdir(parents=True)
        state.save_to_json(str(tmp_path / f"b/checkpoint-{step}/trainer_state.json"))
    run, = charts["load_runs"]([tmp_path / "b"])
    assert [row["step"] for row in run["train"]] == list(range(10, 101, 10)) == [row["step"] for row in run["eval"]]
    assert suite.best_row(run)["loss"] == pytest.approx(3.2)
    assert run["eval"][-1]["perplexity"] == pytest.approx(math.exp(3.2))
    assert not isinstance(charts_of(charts, [run])["health"], str)


def test_stars_mark_the_best_checkpoint(charts, outputs):
    run, = charts["load_runs"]([outputs / "demo"])
    best = min(run["eval"], key=lambda row: row["loss"])
    for y in ("loss", "perplexity", "bits_per_byte"):
        figure = charts["draw_curves"]([run], y)
        minutes = best["elapsed_seconds"] / 60
        for ax, x in zip(figure.axes, (best["step"], best["tokens"], minutes), strict=True):
            star, = [line for line in ax.lines if line.get_marker() == "*"]
            assert [star.get_xdata()[0], star.get_ydata()[0]] == pytest.approx([x, best[y]])


def test_numbers_behind_the_charts(charts, outputs):
    run, = charts["load_runs"]([outputs / "low-rate"])
    assert len(charts["draw_health"]([run]).axes) == 2, "without fp16 there is no loss scale"
    top = charts["draw_curves"]([run], "bits_per_byte").axes[0].get_ylim()[1]
    assert run["eval"][1]["bits_per_byte"] < top < 0.8 * run["eval"][0]["bits_per_byte"], "the start is cut off"
    line = np.linspace(9.0, 3.0, 500)
    assert suite.smooth(line)[:480] == pytest.approx(line[:480]), "no lag on a slope"
    assert suite.smooth(np.array([4.0])) == pytest.approx([4.0])
    run, = charts["load_runs"]([outputs / "demo"])
    _, waits = charts["waiting_share"](run["train"])
    assert waits == pytest.approx(np.full(300, 2.0)), "0.01 s of every 0.5 s"
    x, at, shares = charts["mixture_table"](run)
    assert x == "tokens" and sum(shares.values()) == pytest.approx(np.full(len(at), 100.0))
    assert shares["math"][[0, -1]] == pytest.approx([0, 30])
    for number, text in ((950, "950"), (12_000, "12,000"), (240_001_024, "240M"), (8.5e9, "8.5B"), (2e-4, "0.0002")):
        assert suite.short(number) == text


def test_benchmark_bars_are_the_scores(charts, outputs):
    run, = charts["load_runs"]([outputs / "demo"])
    with open(outputs / "demo/benchmark/results.csv") as file:
        expected = {(row["task"], row["model"]): row for row in csv.DictReader(file)}
    figure = charts["draw_benchmark"]([run], ROOT / "nowhere.json")
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["demo", "stentor2-12m", "pythia-70m"] and len(figure.axes) == 4
    for ax in figure.axes:
        task = ax.get_title(loc="left").split(",")[0]
        for name, bar in zip(names, ax.patches, strict=True):
            row = expected[task, name]
            assert bar.get_width() == pytest.approx(float(row["score"]))
            assert matplotlib.colors.to_hex(bar.get_facecolor()).upper() == charts["colour_of"](name, [run]).upper()
        whiskers = [segment[:, 0] for lines in ax.collections for segment in lines.get_segments()]
        assert np.allclose(whiskers, [[float(expected[task, name][key]) for key in ("low", "high")] for name in names])
        chance = [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "--"]
        assert chance == [float(row["chance"])] if row["chance"] else not chance
    assert charts["colour_of"]("Stentor2-12M", [run]) == suite.MODEL_COLOURS["stentor2-12m"]


def test_foreign_lm_eval_results(charts, tmp_path):
    """A results file as lm-eval 0.4 writes it: acc_norm where the cards use it, 1.96 standard errors, chance by task."""
    (tmp_path / "__models__other").mkdir()
    (tmp_path / "published.json").write_text(json.dumps({"peers": {"columns": [
        {"task": "arc_easy", "chance": "0.250"}, {"task": "truthfulqa_mc2", "chance": "0.4447"},
        {"task": "gsm8k", "chance": None}]}}))
    (tmp_path / "__models__other/results_2026-01-01T00-00-00.json").write_text(json.dumps({
        "model_name": "user/other", "n-samples": {"arc_easy": {"original": 2376, "effective": 2376}}, "results": {
            "arc_easy": {"alias": "arc_easy", "acc,none": 0.4, "acc_stderr,none": 0.01, "acc_norm,none": 0.35,
                         "acc_norm_stderr,none": 0.01},
            "truthfulqa_mc2": {"acc,none": 0.43, "acc_stderr,none": 0.015},
            "blimp_wh_island": {"acc,none": 0.7, "acc_stderr,none": "N/A"},
            "gsm8k": {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 0.02,
                      "exact_match_stderr,flexible-extract": 0.004}, "odd": {"alias": "odd"}}}))
    (tmp_path / "results_other.json").write_text("[]")
    run, = charts["load_runs"]([tmp_path])
    rows = {row["task"]: row for row in charts["load_scores"](run, charts["published_chances"](tmp_path / "published.json"))}
    assert set(rows) == {"arc_easy", "truthfulqa_mc2", "blimp_wh_island", "gsm8k"} and rows["gsm8k"]["score"] == 0.02
    arc = rows["arc_easy"]
    assert (arc["model"], arc["metric"], arc["score"], arc["chance"], arc["n"]) == ("other", "acc_norm", 0.35, 0.25, 2376)
    assert (arc["low"], arc["high"]) == pytest.approx((0.3304, 0.3696), abs=1e-6)
    assert rows["truthfulqa_mc2"]["chance"] is None and rows["blimp_wh_island"]["chance"] == 0.5
    assert len(charts["draw_benchmark"]([run], tmp_path / "published.json").axes) == 4


def test_phenomena_phases_and_probe_are_those_of_the_files(charts, outputs):
    run, = charts["load_runs"]([outputs / "demo"])
    assert charts["load_phenomena"](run)["demo"] == {name: [right, n] for name, (right, n) in PHENOMENA.items()}
    ax, = charts["draw_blimp"]([run]).axes
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["npi licensing (200)", "island effects (300)", "binding (100)", "tense (100)"], "weakest below"
    assert [container[0].get_xdata().tolist() for container in ax.containers][0] == [35, 50, 52, 90]
    low, high = ax.containers[0][2][0].get_segments()[1][:, 0]
    assert (low, high) == pytest.approx((44.38, 55.62), abs=0.01), "Wilson's interval of 150 in 300"
    figure = charts["draw_sft"]([run])
    assert [ax.get_ylabel().split("\n")[0] for ax in figure.axes] == ["recipe better", "recipe card"]
    for ax in figure.axes:
        texts = [text.get_text() for text in ax.texts]
        assert texts[:3] == ["safety\nwarm-up\n2 steps", "main\n4 steps", "stop\ncalibration\n6 steps"]
        line = next(line for line in ax.lines if line.get_color() == suite.SOURCE_COLOURS["dolly"])
        assert line.get_xdata().tolist() == [1, 2] and line.get_ydata() == pytest.approx([5.4, 5.0])
    first, second = charts["draw_probe"]([run]).axes
    shown = {container.get_label(): container[0].get_xdata().tolist() for container in first.containers}
    assert shown == {"base": [0, 12.5, 25, 37.5], "card": [12.5, 25, 37.5, 50], "better": [25, 37.5, 50, 62.5]}
    assert "35 prompts" in first.get_xlabel() and "larger suite" in second.get_xlabel()


def test_ties_count_as_halves_in_the_interval_of_a_phenomenon(charts, tmp_path):
    (tmp_path / "run/benchmark/run").mkdir(parents=True)
    task = {"phenomenon": "ties", "items": {"acc,none": [0.5] * 3 + [1.0, 0.0]}}
    (tmp_path / "run/benchmark/run/pairs.json").write_text(json.dumps({"tasks": {"ties": task}}))
    ax, = charts["draw_blimp"](charts["load_runs"]([tmp_path / "run"])).axes
    middle, _, (whisker,) = ax.containers[0]
    assert middle.get_xdata() == [50]
    assert whisker.get_segments()[0][:, 0] == pytest.approx([100 * end for end in wilson(2.5, 5)])


def test_the_curves_of_02_and_03(charts, outputs, tmp_path):
    """One run's loss and bits per byte in its colour, the anneal shaded, what it has to beat dashed; shown and saved."""
    figure = suite.draw_training(outputs / "demo", anneal_from=510, yardsticks={"byte bigram model": 3.77})
    run, = charts["load_runs"]([outputs / "demo"])
    loss, bits = figure.axes
    assert loss.get_ylabel() == "loss (nats per token)" and bits.get_ylim()[0] == 0 and bits.get_ylim()[1] > 3.77
    for ax, y in ((loss, "loss"), (bits, "bits_per_byte")):
        held = next(line for line in ax.lines if line.get_marker() == "o")
        assert held.get_ydata().tolist() == suite.series(run["eval"], "step", y)[1].tolist()
        assert held.get_color() == run["colour"] and "anneal" in {text.get_text() for text in ax.texts}
    assert [line.get_ydata()[0] for line in bits.lines if line.get_linestyle() == "--"] == [3.77]
    assert "byte bigram model" in {text.get_text() for text in bits.texts}
    suite.show(figure, tmp_path / "new" / "curves.png")
    assert (tmp_path / "new/curves.png").stat().st_size > 5_000


def test_the_chart_of_05_has_every_score_in_its_models_colour():
    draw = load_functions("05_benchmark")["draw_scores"]
    rows = [{"task": task, "model": model, "metric": metric, "score": score, "low": score - 0.1, "high": score + 0.2,
             "chance": 0.25}
            for task, metric in (("arc_easy", "acc"), ("text", "bits_per_byte"), ("gsm8k", "acc"))
            for model, score in (("demo", 0.3), ("stentor2-12m", 0.4))]
    block = {"tasks": {"ties": {"phenomenon": "ties", "items": {"acc,none": [0.5] * 3 + [1.0, 0.0]}}}}
    tasks, phenomena = draw(rows, {"demo": {"pairs": block}, "stentor2-12m": {}}).axes
    assert [label.get_text() for label in tasks.get_yticklabels()] == ["arc_easy", "gsm8k"], "bits per byte is no score"
    colours = suite.colours_of(["demo", "stentor2-12m"])
    for container, score in zip(tasks.containers, (0.3, 0.4), strict=True):
        middle, _, (whiskers,) = container
        assert middle.get_xdata().tolist() == [score] * 2 and middle.get_color() == colours[container.get_label()]
        assert whiskers.get_segments()[0][:, 0] == pytest.approx([score - 0.1, score + 0.2])
    assert phenomena.containers[0][2][0].get_segments()[0][:, 0] == pytest.approx(wilson(2.5, 5))
    alone, = draw(rows, {"demo": {}, "stentor2-12m": {}}).axes
    assert alone.get_xlabel() == "score (dashed: chance)"


def test_a_short_run_stays_in_view(charts, outputs, tmp_path):
    """Two evaluations, alone and beside a long run: its end is inside the axes, and nothing is squeezed to nothing."""
    (tmp_path / "short").mkdir()
    (tmp_path / "short/metrics.jsonl").write_text("".join(json.dumps(
        {"kind": "eval", "step": step, "tokens": 100 * step, "loss": loss, "bits_per_byte": loss / 3, "elapsed_seconds": step})
        + "\n" for step, loss in ((0, 9.0), (70, 7.0))))
    for folders in ([tmp_path / "short"], [outputs / "demo", tmp_path / "short"]):
        figure = charts["draw_curves"](charts["load_runs"](folders), "bits_per_byte")
        low, high = figure.axes[0].get_ylim()
        assert low < 7 / 3 < high and high - low > 0.2
        matplotlib.backends.backend_agg.FigureCanvasAgg(figure).draw()
        assert figure.axes[0].get_window_extent().width > 100


def test_parameter_bars_are_the_published_counts(charts, outputs):
    import stentor_utils

    figure = charts["draw_budget"](charts["load_runs"]([outputs / "demo"]))
    absolute, share = figure.axes
    names = [label.get_text() for label in absolute.get_yticklabels()]
    assert set(names) == set(stentor_utils.RECIPES) - {"stentor-12m-instruct"} | {"demo"}
    for ax, totals in ((absolute, [stentor_utils.count_parameters(
            stentor_utils.RECIPES[name if name != "demo" else "stentor2-12m"].shape) / 1e6 for name in names]),
            (share, [100] * len(names))):
        widths = np.array([[bar.get_width() for bar in bars] for bars in ax.containers])
        assert widths.shape == (4, len(names)) and widths.sum(0) == pytest.approx(totals)
    assert share.containers[0][names.index("stentor-12m")].get_width() == pytest.approx(52.2, abs=0.05)  # Preview card
    assert share.containers[0][names.index("stentor3-20m")].get_width() == pytest.approx(12.9, abs=0.05)  # its card
    assert "12,047,040" in {text.get_text() for text in absolute.texts}


def test_parameters_are_drawn_in_the_order_given():
    import stentor_utils
    names = "stentor-12m", "stentor2-12m"
    budgets = {name: stentor_utils.parameter_budget(stentor_utils.RECIPES[name].shape) for name in names}
    ax, = stentor_utils.charts.draw_parameters(budgets).axes
    widths = np.array([[bar.get_width() for bar in bars] for bars in ax.containers])
    assert widths.sum(0) == pytest.approx([100, 100])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["stentor2-12m: 12.3M", "stentor-12m: 12M"]      # from below
    assert widths[0] == pytest.approx([16.8, 52.2], abs=0.05)          # of them the embedding, in the cards


def test_published_curves_are_published_json(charts):
    loss, perplexity = charts["draw_published"](ROOT / "data" / "published.json").axes
    for ax, key in ((loss, "eval_loss"), (perplexity, "eval_ppl")):
        assert "published" in ax.get_ylabel()
        lines = {line.get_label(): line for line in ax.lines if line.get_marker() == "o"}
        assert set(lines) == set(PUBLISHED["curves"]) >= {"stentor2-12m-preview", "stentor3-20m"}
        for name, curve in PUBLISHED["curves"].items():
            steps = [point["step"] for point in curve["points"]]
            assert lines[name].get_xdata().tolist() == [step * curve["tokens_per_step"] for step in steps]
            assert lines[name].get_ydata().tolist() == [point[key] for point in curve["points"]]
    history = charts["draw_history"](ROOT / "data" / "published.json")
    shown = " ".join(text.get_text() for ax in history.axes for text in ax.texts)
    for model in PUBLISHED["best"].values():
        assert model["title"] in shown and f"{model['perplexity']:.2f}" in shown


def test_published_figures_agree_with_each_other():
    for curve in PUBLISHED["curves"].values():
        for point in curve["points"]:
            half_a_digit = 0.5 * 10 ** -len(str(point["eval_ppl"]).partition(".")[2])
            # 0.3%: the Preview prints ~1,228 where exp(7.1108) = 1,225.1
            assert point["eval_ppl"] == pytest.approx(math.exp(point["eval_loss"]), rel=0.003, abs=half_a_digit), point
    for point in PUBLISHED["curves"]["stentor3-20m"]["points"]:  # bfloat16 has 8 significant bits
        grid = 32 if point["eval_loss"] >= 4 else 64
        assert abs(point["eval_loss"] * grid - round(point["eval_loss"] * grid)) < 1e-4 * grid, point


@pytest.mark.skipif(not SEEDS.is_dir(), reason="the model cards are not here (../shared/seeds)")
def test_published_figures_are_printed_in_their_cards():
    for curve in PUBLISHED["curves"].values():
        card = (SEEDS / curve["card"]).read_text(encoding="utf-8", errors="replace").replace("*", "")
        assert curve["section"] in card and f"{curve['tokens_per_step']:,}" in card
        for point in curve["points"]:
            row = rf"{point['step']:,}\)? \| {point['eval_loss']:.4f} \| ~?([\d,.]+) \|"
            perplexities = [float(found.replace(",", "")) for found in re.findall(row, card)]
            assert point["eval_ppl"] in perplexities, point
    for model in PUBLISHED["best"].values():
        card = (SEEDS / model["card"]).read_text(encoding="utf-8", errors="replace")
        row = next(line for line in re.findall(r"\| (?:\*\*)?Best Perplexity(?:\*\*)? \|.*", card))
        assert f"{model['perplexity']:.2f}" in row, model


def test_one_model_has_one_colour(charts, outputs):
    names = ["demo", "long-run", "low-rate"]
    runs = charts["load_runs"]([outputs / name for name in names])
    colours = {run["name"]: run["colour"] for run in runs}
    assert len(set(colours.values())) == 3
    for order in itertools.permutations(names):
        assert suite.colours_of(order) == colours, "the order on the command line changes no colour"
    assert suite.colours_of(["demo"])["demo"] == colours["demo"], "nor does company"

    for y in ("loss", "perplexity", "bits_per_byte"):
        for ax in charts["draw_curves"](runs, y).axes:
            assert {line.get_color() for line in ax.lines} == set(colours.values())
    named = [text for draw in ("draw_health", "draw_throughput", "draw_compute")
             for ax in charts[draw](runs).axes for text in ax.texts if "starts at" not in text.get_text()]  # fmt: skip
    assert len(named) > 10 and all(text.get_color() == colours[text.get_text().split(":")[0]] for text in named)

    expected = suite.MODEL_COLOURS
    curves = charts["draw_published"](ROOT / "data" / "published.json")
    assert all(line.get_color() == expected[line.get_label()]
               for ax in curves.axes for line in ax.lines if line.get_marker() == "o")
    title = {model["title"]: name for name, model in PUBLISHED["best"].items()}
    for ax in charts["draw_history"](ROOT / "data" / "published.json").axes:
        assert all(text.get_color() == expected[title[text.get_text().split("\n")[0]]] for text in ax.texts)
    for label in charts["draw_budget"](runs).axes[0].get_yticklabels():
        assert label.get_color() == (expected | colours)[label.get_text()]


# Machado, Oliveira & Fernandes (2009), severity 1.0: linear RGB as seen without one kind of cone.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}  # fmt: skip


def linear(colour):
    value = np.array(matplotlib.colors.to_rgb(colour))
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    """CIE L*a*b* of linear RGB; a distance of 2.3 is just noticeable."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_colours_stay_apart_for_colour_blind_readers(charts, vision):
    runs, models, parts = suite.RUN_COLOURS, suite.MODEL_COLOURS.values(), suite.PART_COLOURS.values()
    labels, sources = suite.LABEL_COLOURS.values(), suite.SOURCE_COLOURS.values()
    for palette, apart in ((runs, 15), (models, 6), (parts, 30), (labels, 12), (sources, 12)):
        seen = {colour: lab(np.array(VISION[vision]) @ linear(colour)) for colour in palette}
        for one, other in itertools.combinations(seen, 2):
            assert np.linalg.norm(seen[one] - seen[other]) > apart, (vision, one, other)
    for colour in [*runs, *models]:  # they also write names; WCAG asks 3:1 of graphics
        assert 1.05 / (linear(colour) @ [0.2126, 0.7152, 0.0722] + 0.05) >= 3, colour


def run_notebook(**parameters):
    """Every code cell in order, in one namespace, with these parameters."""
    namespace = {"__name__": "notebook"}
    with matplotlib.rc_context():
        for cell in CELLS:
            execute(namespace, lambda other, cell=cell: other is cell)
            if "parameters" in cell["metadata"].get("tags", []):
                namespace.update(parameters)
    return namespace


def test_the_notebook_ends_well_with_half_of_the_files_missing(outputs, tmp_path, capsys):
    (tmp_path / "half").mkdir()
    for name in ("training_curves.csv", "run.json"):
        (tmp_path / "half" / name).write_bytes((outputs / "demo" / name).read_bytes())
    run_notebook(RUN="half", OUTPUTS=str(tmp_path))
    drawn = {"loss", "perplexity", "parameters", "published", "history"}
    saved = {path.name for path in (tmp_path / "half/charts").iterdir()}
    assert saved == {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")}
    said = capsys.readouterr().out
    assert all(f"\n{name} is left out: " in said for name in NEEDS_METRICS | NEEDS_SCORES)
    assert "left out for half: there is no final/ model" in said and "nothing is uploaded" in said


@pytest.mark.parametrize("parameters, sentence", [
    ({"RUN": "dmeo"}, r"RUN = 'dmeo' is not in .*which holds demo, long-run, low-rate"),
    ({"RUN": "demo,,low-rate"}, r"RUN = 'demo,,low-rate' must be names of run folders, each once; '' is none"),
    ({"RUN": 3}, r"RUN = 3 must be the name of a run folder"),
    ({"RUNS": "demo"}, r"RUNS is not a parameter"),
    ({"PROFILE": "gpu"}, r"PROFILE = 'gpu' must be one of"),
])  # fmt: skip
def test_bad_parameters_are_refused_in_one_sentence(outputs, parameters, sentence):
    import stentor_utils

    with pytest.raises(stentor_utils.ParameterError, match=sentence):
        run_notebook(**{"RUN": "demo", "OUTPUTS": str(outputs), **parameters})
