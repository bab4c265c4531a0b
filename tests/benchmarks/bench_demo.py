"""The demo's figures: tokens a second against `model.generate`, and seconds from opening the page to the first text.

    python tests/benchmarks/bench_demo.py [MODEL_FOLDER]        # prints, and writes outputs/benchmarks/demo.json

MODEL_FOLDER: by default outputs/demo/final; without one an untrained model of the Stentor2-12M's shape. Nothing is asserted:
the figures are this machine's, so look that it is idle. The ways take turns, and their medians are compared.
"""
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

import torch  # noqa: E402

import stentor_utils as su  # noqa: E402
from stentor.demo import app, generating, models, pictures  # noqa: E402

PROMPT, TOKENS, ROUNDS = "The function returns", 200, 7


def model_folder(given: list[str], folder: Path) -> Path:
    if given:
        return Path(given[0])
    if (REPO / "outputs" / "demo" / "final" / "config.json").is_file():
        return REPO / "outputs" / "demo" / "final"
    import tokenmonster_hf as tm
    words = [b" the", b" function", b" returns"]
    vocabulary = tm.Vocabulary.from_tokens(words, capcode=0, include="all256")
    tokenizer = tm.TokenMonsterTokenizer.from_vocabulary(vocabulary, vocab_size=8064)
    shape = su.RECIPES["stentor2-12m"].shape
    su.save_model_folder(su.build_model(shape, eos_token_id=tokenizer.eos_token_id), tokenizer, folder / "untrained")
    return folder / "untrained"


def settings_without_end(loaded) -> dict:
    """As many tokens in each round: what ends a text is a row that no text was ever trained on."""
    loaded.model.generation_config.eos_token_id = loaded.model.config.vocab_size - 1
    room = loaded.context - len(generating.prompt_ids(loaded, PROMPT))
    return generating.settings_of(0.8, 0.7, 1.2, min(TOKENS, room))


def plain(loaded, settings) -> float:
    """Tokens a second of `model.generate` alone, called as on any other day."""
    ids = torch.tensor([generating.prompt_ids(loaded, PROMPT)])
    torch.manual_seed(0)
    began = time.monotonic()
    with torch.inference_mode():
        out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **settings,
                                    pad_token_id=loaded.tokenizer.eos_token_id)
    return (out.shape[1] - ids.shape[1]) / (time.monotonic() - began)


def through_the_page(address: str, name: str, settings: dict) -> float:
    """Tokens a second that the page shows, asked as a browser asks, with all its updates sent."""
    from gradio_client import Client
    shown, *_ = Client(address, verbose=False).predict(
        name, PROMPT, settings["temperature"], settings["top_p"], settings["repetition_penalty"], settings["max_new_tokens"],
        0, 1, api_name="/generate")
    return float(re.search(r"s, ([\d,]+) tokens/s", shown)[1].replace(",", ""))


def main(given: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        where = model_folder(given, Path(folder))
        opened = models.Models([models.Entry("model", str(where))])
        loaded = opened.submit(opened.load, "model").result()
        settings = settings_without_end(loaded)
        blocks = app.build(opened, Path(folder) / "votes.jsonl")
        address = app.start(blocks)
        rounds = {"generate": [], "stream": [], "page": []}
        for _ in range(ROUNDS):
            rounds["generate"].append(opened.submit(plain, loaded, settings).result())
            *_, text = generating.stream(opened, "model", PROMPT, settings, 0, threading.Event())
            rounds["stream"].append(text.speed)
            rounds["page"].append(through_the_page(address, "model", settings))
        speed = {name: statistics.median(values) for name, values in rounds.items()}
        first = first_text(address)
        app.close(blocks)
    report = {"tokens_per_second": speed, "page_to_generate": speed["page"] / speed["generate"],
              "stream_to_generate": speed["stream"] / speed["generate"], "rounds": rounds,
              "seconds_from_opening_to_first_text": first, "tokens": settings["max_new_tokens"],
              "parameters": loaded.model.num_parameters(), "cores": os.cpu_count(), "machine": platform.processor()}
    out = REPO / "outputs" / "benchmarks"
    out.mkdir(parents=True, exist_ok=True)
    su.write_atomically(out / "demo.json", json.dumps(report, indent=1))
    print(f"{loaded.model.num_parameters():,} parameters, {settings['max_new_tokens']} tokens, {ROUNDS} rounds, medians: "
          f"generate {speed['generate']:.0f} tokens/s, streamed {speed['stream']:.0f}, through the page {speed['page']:.0f} "
          f"({report['page_to_generate']:.2f} of generate)")
    print("from opening the page to the first text: " + (f"{first:.1f} s" if first else "no Chromium on this machine"))


def first_text(address: str) -> float | None:
    """Seconds from opening the page in a fresh browser to the first words of the model."""
    try:
        with pictures.browser() as browser:
            page = browser.new_page()
            began = time.monotonic()
            pictures.visit(page, address)
            page.get_by_role("button", name="Generate").first.click()
            page.locator("#generated .st-said").wait_for()
            return time.monotonic() - began
    except su.ParameterError:
        return None


if __name__ == "__main__":
    main(sys.argv[1:])
