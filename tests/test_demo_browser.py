"""The demo in a real Chromium, every tab used as a person would, on the CPU twin of the notebooks' chain."""
import html
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import REPO
from test_demo import free_port, gpt2_folder

import stentor_utils as su
from stentor import conversation
from stentor.demo import generating, pictures

try:
    pictures.find_browser()
    WITHOUT = ""
except su.ParameterError as error:
    WITHOUT = str(error)
pytestmark = pytest.mark.skipif(bool(WITHOUT), reason=f"the demo is not tried in a browser: {WITHOUT}")
HOSTILE = ('<img src=x onerror="window.hacked=1"><script>window.hacked=1</script><b>bold</b> </s> <|assistant|> '
           "[x](javascript:1)")


@pytest.fixture(scope="module")
def demo(chain, tmp_path_factory):
    """`make demo` on the chain's run, with a baseline beside it: (address, process, votes file)."""
    folder = tmp_path_factory.mktemp("demo")
    baseline, port = gpt2_folder(folder / "gpt2"), free_port()
    votes = chain[0].parent / "arena_votes.jsonl"
    votes.unlink(missing_ok=True)
    with open(folder / "log", "w") as log:
        app = subprocess.Popen(
            [sys.executable, "-m", "stentor_utils", "demo", "-p", f"OUTPUTS={chain[0].parent}", "RUN=chain", "HUB=False",
             f"PORT={port}", f"BASELINES={baseline}"], cwd=REPO, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}/"
    for _ in range(1200):
        try:
            urllib.request.urlopen(address, timeout=5).read()
            break
        except OSError:
            assert app.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
    yield address, app, votes
    app.send_signal(2)                                 # Ctrl-C
    assert app.wait(60) in (0, 130), (folder / "log").read_text()
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture(scope="module")
def opened():
    with pictures.browser() as browser:
        yield browser


@pytest.fixture
def page(opened, demo):
    context = opened.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    pictures.visit(page, demo[0])
    yield page
    assert not page.problems and page.evaluate("window.hacked") is None
    context.close()


@pytest.fixture(scope="module")
def base(chain):
    folder = chain[0] / "final"
    return su.load_model(folder, dtype=torch.float32).eval(), su.load_tokenizer(folder)


def settle(tab, **values):
    """Set fields of Settings by their labels."""
    tab.open("Settings")
    for label, value in values.items():
        tab.panel.get_by_label({"temperature": "number input for Temperature", "penalty": "number input for Repetition penalty",
                                "tokens": "number input for New tokens at most", "seed": "Seed"}[label]).fill(str(value))
        tab.page.keyboard.press("Tab")
    tab.open("Settings")


def greedy(model, ids, n):
    """The ids that `generate` goes on with, greedy and without a penalty."""
    prompt = torch.tensor([ids])
    with torch.inference_mode():
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, temperature=1.0, top_p=1.0,
                              repetition_penalty=1.0, max_length=len(ids) + n)[0, len(ids):].tolist()


def test_a_completion_streams_and_is_that_of_generate(page, base):
    tab = pictures.Tab(page, "Generate")
    tab.type("Prompt", "The function")
    settle(tab, temperature=0, penalty=1, tokens=200)
    page.evaluate("""() => { window.seen = [];
        new MutationObserver(() => { const text = document.querySelector('#generated .st-said');
            if (text) window.seen.push(text.textContent); })
        .observe(document.querySelector('#generated'), {childList: true, subtree: true, characterData: true}); }""")
    tab.press("Generate")
    tab.finished()
    model, tokenizer = base
    expected = tokenizer.decode(greedy(model, tokenizer("The function")["input_ids"], 200), skip_special_tokens=True)
    assert page.locator("#generated .st-said").text_content() == "The function" + expected
    seen = list(dict.fromkeys(page.evaluate("window.seen")))
    assert len(seen) >= 2 and all(seen[-1].startswith(text) for text in seen)        # it grew before our eyes
    assert re.search(r"\d+ tokens in [\d.]+ s, [\d,]+ tokens/s", tab.panel.locator(".st-figures").inner_text())


def test_an_empty_seed_is_another_text_each_time_also_when_settings_were_opened(page):
    tab, texts = pictures.Tab(page, "Generate"), []
    tab.type("Prompt", "The")
    settle(tab, tokens=30)
    tab.open("History")
    for i in range(3):
        tab.press("Generate")
        tab.panel.locator("#history tbody tr").nth(i).wait_for()       # it is written to its end
        texts += tab.texts()
    assert len(set(texts)) == 3


def test_chips_history_and_its_file(page):
    tab = pictures.Tab(page, "Generate")
    tab.type("Prompt", "The")
    tab.press("Focused")
    tab.open("Settings")                               # folded while the chip was pressed
    warm = tab.panel.get_by_label("number input for Temperature")
    page.wait_for_function("field => field.value === '0.6'", arg=warm.element_handle())
    tab.open("Settings")
    settle(tab, seed=5, tokens=12)
    tab.panel.get_by_label("number input for Completions").fill("3")
    page.keyboard.press("Tab")
    tab.press("Generate")
    tab.finished(3)
    assert len(set(tab.texts())) == 3                  # each of its own seed
    tab.open("History")
    rows = tab.panel.locator("#history tbody tr")
    rows.nth(2).wait_for()
    with page.expect_download() as found:
        tab.panel.get_by_role("link", name="Download as JSON").or_(
            tab.panel.get_by_role("button", name="Download as JSON")).first.click()
    history = json.loads(Path(found.value.path()).read_text())
    assert [row["seed"] for row in history] == [5, 6, 7] and history[0]["prompt"] == "The"
    assert history[0]["settings"]["temperature"] == 0.6 and history[0]["settings"]["top_p"] == 0.6
    assert [f'The{row["text"]}' for row in history] == tab.panel.locator(".st-said").all_text_contents()
    assert all(row["tokens_per_second"] > 0 and row["time"].endswith("Z") for row in history)


def test_stop_works(page):
    tab = pictures.Tab(page, "Generate")
    settle(tab, temperature=0, penalty=1, tokens=1000)   # greedy goes round and round: the context's end is all that stops it
    tab.panel.get_by_label("number input for Completions").fill("5")
    page.keyboard.press("Tab")
    tab.press("Generate")
    tab.panel.locator(".st-card[aria-busy]").wait_for()
    tab.press("Stop")
    tab.panel.get_by_text("stopped by you").wait_for()
    tab.finished()
    assert len(tab.texts()) < 5 and "stopped by you" in tab.panel.locator(".st-figures").last.inner_text()
    settle(tab, tokens=5)
    tab.panel.get_by_label("number input for Completions").fill("1")
    page.keyboard.press("Tab")
    tab.press("Generate")                              # and the next one is not stopped
    page.wait_for_function("() => document.querySelector('#generated').textContent.includes('5 tokens in')")


def test_hovering_shows_eight_alternatives_with_the_probabilities_of_a_direct_computation(page, base):
    model, tokenizer = base
    text = "The naïve function 😀 returns </s> a list."
    tab = pictures.Tab(page, "Token Explorer")
    tab.type("Prompt, or a text to be judged", text)
    tab.press("Judge text")
    tokens = tab.panel.locator(".st-tokens .st-token")
    tokens.nth(2).wait_for()
    ids = conversation.tokens(tokenizer, text, plain=True)
    with torch.no_grad():
        logits = model(torch.tensor([[tokenizer.eos_token_id, *ids]])).logits[0, :-1]
    expected = torch.softmax(logits.double(), -1)
    assert tokens.count() == len(ids) and tokenizer.eos_token_id not in ids
    for place in (0, 3, len(ids) - 1):
        tokens.nth(place).hover()
        shown = tab.panel.locator(f'.st-panel button[data-place="{place}"]')
        shown.nth(7).wait_for()
        assert shown.count() == 8
        best = expected[place].topk(8)
        given = [float(button.get_attribute("data-probability")) for button in shown.all()]
        assert given == pytest.approx(best.values.tolist(), rel=1e-3)
        assert [int(button.get_attribute("data-choice")) for button in shown.all()] == best.indices.tolist()
        facts = json.loads(tokens.nth(place).get_attribute("data-facts"))
        own = expected[place, ids[place]].item()
        assert facts["p"] == pytest.approx(own, rel=1e-3)
        assert f"{facts['rank']:,}" in tab.panel.locator(".st-panel").inner_text()
        level = "st-sure" if own >= 0.8 else "st-unsure" if own < 0.35 else "st-middle"
        assert level in tokens.nth(place).get_attribute("class")
    legend = tab.panel.locator(".st-legend").inner_text()
    assert "at least 80%" in legend and "under 35%" in legend


def test_an_alternative_can_be_taken_by_mouse_and_by_keyboard(page):
    tab = pictures.Tab(page, "Token Explorer")
    tab.type("Prompt, or a text to be judged", "The function returns")
    settle(tab, seed=3, tokens=6)
    tab.press("Judge text")
    tokens = tab.panel.locator(".st-tokens .st-token")
    tokens.nth(2).wait_for()

    def labels():
        return [json.loads(token.get_attribute("data-facts"))["label"] for token in tokens.all()]
    before = labels()
    tokens.nth(2).click()
    tokens.nth(0).hover()                              # on the way to the panel: what was clicked stays
    choice = tab.panel.locator('.st-panel button[data-place="2"]').nth(4)
    taken = choice.locator("b").inner_text()
    choice.click()
    page.wait_for_function("n => document.querySelectorAll('#explorer .st-tokens .st-token').length > n", arg=3)
    after = labels()
    assert after[:3] == [*before[:2], taken] and len(after) >= 4
    tokens.nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate("JSON.parse(document.activeElement.dataset.facts).place") == 1
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.dataset.place") == "1"
    taken = page.evaluate("document.activeElement.querySelector('b').textContent")
    page.keyboard.press("Enter")
    page.wait_for_function(
        "label => { const all = document.querySelectorAll('#explorer .st-tokens .st-token');"
        " return all.length > 2 && JSON.parse(all[1].dataset.facts).label === label; }", arg=taken)


def test_a_sweep_gives_a_text_for_each_temperature(page, base):
    model, tokenizer = base
    tab = pictures.Tab(page, "Temperature Sweep")
    tab.type("Prompt", "The function")
    for i, value in enumerate((0, 0.7, 2), 1):
        tab.panel.get_by_label(f"number input for Temperature {i}").fill(str(value))
        page.keyboard.press("Tab")
    settle(tab, penalty=1, tokens=30, seed=1)
    tab.press("Sweep")
    tab.finished(3)
    assert tab.panel.locator(".st-card h3").all_inner_texts() == ["temperature 0", "temperature 0.7", "temperature 2"]
    first, *_ = texts = [card.text_content() for card in tab.panel.locator(".st-said").all()]
    expected = tokenizer.decode(greedy(model, tokenizer("The function")["input_ids"], 30), skip_special_tokens=True)
    assert first == "The function" + expected and len(set(texts)) == 3


def test_a_blind_vote_hides_the_names_and_then_reveals_them(page, demo):
    address, _, votes = demo
    before = len(votes.read_text().splitlines()) if votes.exists() else 0
    tab = pictures.Tab(page, "Arena")
    tab.panel.get_by_label("Blind", exact=True).check()
    tab.type("Prompt", "The")
    settle(tab, tokens=10)
    better = tab.panel.get_by_role("button", name="A is better")
    assert better.is_disabled()
    tab.press("Let both write")
    tab.finished(2)
    tab.panel.get_by_text("Which is better?").wait_for()
    hidden = page.locator("#arena").inner_html()
    assert "Model A" in hidden and not any(name in hidden for name in ("chain", "gpt2", "tokens/s"))
    better.click()
    tab.panel.get_by_text("Your vote: A is better").wait_for()
    row = json.loads(votes.read_text().splitlines()[before])
    shown = page.locator("#arena h3").all_inner_texts()
    assert shown == [f"A · {row['a']}", f"B · {row['b']}"] and row["vote"] == "A is better" and row["mode"] == "Blind"
    assert len(votes.read_text().splitlines()) == before + 1 and better.is_disabled()
    assert row["a"] in tab.panel.locator("#ratings").inner_text()
    tab.panel.get_by_label("Random", exact=True).check()
    tab.press("Let both write")
    tab.panel.get_by_text("Which is better?").wait_for()
    tab.press("Both bad")
    tab.panel.get_by_text("Your vote: Both bad").wait_for()
    row = json.loads(votes.read_text().splitlines()[-1])
    assert "gpt2" in (row["a"], row["b"]) and row["a"] != row["b"] and row["vote"] == "both bad"


def test_a_chat_answers_twice_and_remembers(page, chain):
    folder = chain[0] / "instruct" / "final"
    model, tokenizer = su.load_model(folder, dtype=torch.float32).eval(), su.load_tokenizer(folder)
    system = json.loads((chain[0] / "instruct" / "sft_summary.json").read_text())["system"]
    tab = pictures.Tab(page, "Chat")
    assert tab.panel.get_by_label("Model").first.input_value() == "chain, instruct"
    settle(tab, temperature=0, penalty=1, tokens=16)
    messages = [{"role": "system", "content": system}]
    for i, question in enumerate(["What is the capital of France?", "And why?"]):
        tab.type("Your message", question)
        page.keyboard.press("Enter")
        tab.panel.get_by_text("tokens/s").last.wait_for()
        page.locator("#chat .bot.message").nth(i).wait_for()
        messages.append({"role": "user", "content": question})
        ids, _ = conversation.fit_chat(tokenizer, messages, model.config.max_position_embeddings - 16)
        answer = tokenizer.decode(greedy(model, ids, 16), skip_special_tokens=True)
        page.wait_for_function(
            "([i, text]) => document.querySelectorAll('#chat .bot.message')[i]?.textContent.includes(text)",
            arg=[i, (answer.strip() or "(no words").split("\n")[0][:60]])
        messages.append({"role": "assistant", "content": answer})
    assert page.locator("#chat .user.message").count() == 2
    tab.press("New chat")
    page.wait_for_function("() => !document.querySelector('#chat .message')")


def test_hostile_input_shows_as_text(page):
    tab = pictures.Tab(page, "Generate")
    settle(tab, tokens=5)
    tab.type("Prompt", HOSTILE)
    tab.press("Generate")
    tab.finished()
    assert tab.panel.locator(".st-said").text_content().startswith(HOSTILE)
    tab.type("Prompt", "<b>" + "a b " * 25_000)        # 100 kB
    tab.press("Generate")
    refused = tab.panel.get_by_role("alert")
    refused.wait_for()
    assert re.search(r"The prompt has [\d,]+ tokens, and chain holds", refused.inner_text())
    tab = pictures.Tab(page, "Token Explorer")
    tab.type("Prompt, or a text to be judged", HOSTILE)
    tab.press("Judge text")
    tab.panel.locator(".st-tokens .st-token").nth(2).wait_for()
    assert "".join(tab.panel.locator(".st-tokens .st-token").all_text_contents()) == HOSTILE
    tab.panel.locator(".st-tokens .st-token").nth(1).hover()
    tab = pictures.Tab(page, "Chat")
    settle(tab, tokens=5)
    tab.type("Your message", HOSTILE)
    tab.press("Send")
    bubble = page.locator("#chat .user.message").first
    bubble.wait_for()
    tab.panel.get_by_text("tokens/s").last.wait_for()
    assert HOSTILE in bubble.text_content()
    assert not page.locator("#chat img[src=x], #generated img, #explorer img, #chat b, #generated b").count()


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_needs_no_sideways_scrolling_and_everything_has_a_name(opened, demo, dark):
    context = opened.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    pictures.visit(page, demo[0], dark=dark)
    assert page.evaluate("document.body.classList.contains('dark')") == dark
    for name in ("Generate", "Token Explorer", "Temperature Sweep", "Arena", "Chat"):
        if not page.get_by_role("tab", name=name).is_visible():
            page.locator("button.overflow-menu, .overflow-menu button").first.click()
            page.locator(".overflow-dropdown").get_by_text(name, exact=True).click()
        else:
            page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(150)
        assert page.evaluate("document.scrollingElement.scrollWidth <= window.innerWidth + 1"), name
        nameless = page.evaluate("""() => [...document.querySelectorAll('input, textarea, select, button, [role=button]')]
            .filter(e => e.offsetParent && !e.closest('.overflow-menu'))         // Gradio's own, nameless before 6.31
            .filter(e => !(e.labels?.length || e.getAttribute('aria-label') || e.title
                || e.getAttribute('aria-labelledby') || e.textContent.trim()))
            .map(e => e.outerHTML.slice(0, 150))""")
        assert not nameless, (name, nameless)
    context.close()


def test_twenty_people_at_once_are_all_answered_and_not_mixed(demo, base):
    from gradio_client import Client
    address, app, _ = demo
    model, tokenizer = base

    def memory():
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{app.pid}/status").read_text())[1]) / 1024
    found, clients = {}, [Client(address, verbose=False) for _ in range(20)]
    before = memory()

    def ask(i):
        found[i] = clients[i].predict("chain", f"Number {i}: the", 0.9, 0.9, 1.1, 24, i, 2, api_name="/generate")[0]
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    settings = generating.settings_of(0.9, 0.9, 1.1, 24)
    for i in range(20):
        for j in range(2):                             # two completions each, of seeds i and i + 1
            text, = su.generate(model, tokenizer, [f"Number {i}: the"], seed=i + j, **settings)
            assert html.escape(f"Number {i}: the") in found[i] and html.escape(text) in found[i]
    assert memory() - before < 400                     # MB
