"""Screenshots of the demo's tabs in use, by a real Chromium: what `make gallery` shows of it.

Needs Chromium on this machine (Debian: apt-get install chromium) and playwright's package.
"""
from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path

from stentor.files import ParameterError

PROMPT = "The function returns"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WAIT = 120_000                             # ms that a slow machine may take for an answer


def find_browser() -> str:
    """The path of a Chromium. ParameterError, one sentence, where this machine lacks one."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        raise ParameterError(["playwright is not installed: pip install playwright (its own browser "
                              "is not needed)."]) from None
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        raise ParameterError(["there is no Chromium on this machine: apt-get install chromium"])
    return found


@contextlib.contextmanager
def browser():
    """A headless Chromium of playwright's, closed at the end."""
    from playwright.sync_api import sync_playwright
    path = find_browser()
    with sync_playwright() as driver:
        # A container's root has no sandbox, and its /dev/shm is small.
        opened = driver.chromium.launch(executable_path=path, args=[
            "--no-sandbox", "--disable-dev-shm-usage"])
        yield opened
        opened.close()


class Tab:
    """One tab of an open page, used as a person does: by labels and roles."""

    def __init__(self, page, name: str):
        self.page = page
        page.get_by_role("tab", name=name).click()
        self.panel = page.locator("[role=tabpanel]:visible")
        self.panel.wait_for()
        at_rest(page)

    def press(self, name: str) -> None:
        self.panel.get_by_role("button", name=name, exact=True).click()

    def type(self, label: str, text: str) -> None:
        self.panel.get_by_label(label).first.fill(text)

    def open(self, name: str) -> None:
        """Unfolds Settings or History, or folds them."""
        self.panel.get_by_role("button", name=name).first.click()
        at_rest(self.page)

    def texts(self) -> list[str]:
        """What the cards say, in order."""
        return self.panel.locator(".st-said").all_inner_texts()

    def finished(self, cards: int = 1) -> None:
        """Waits until so many cards are written to their ends."""
        done = self.panel.locator(".st-card:not([aria-busy])")
        done.nth(cards - 1).wait_for(timeout=WAIT)
        self.page.wait_for_function(
            "() => !document.querySelector('.st-card[aria-busy]')", timeout=WAIT)


def visit(page, address: str, dark: bool = False) -> None:
    """Open the demo and wait until it can be used."""
    page.set_default_timeout(WAIT)
    page.goto(f"{address}?__theme={'dark' if dark else 'light'}", wait_until="domcontentloaded")
    page.get_by_role("button", name="Generate").first.wait_for()
    at_rest(page)


def at_rest(page) -> None:
    """Waits until the page has fetched nothing for half a second.

    Gradio fetches what draws a field when it is first shown, and a value that is typed meanwhile is
    shown, but not sent: of 9 openings with 2 s to each answer 2 lost the first one.
    """
    page.wait_for_function("() => performance.getEntriesByType('resource').every("
                           "found => performance.now() - found.responseEnd > 500)")


def use_generate(page) -> None:
    tab = Tab(page, "Generate")
    tab.type("Prompt", PROMPT)
    tab.press("Focused")
    page.wait_for_timeout(1000)                        # until the sliders have moved
    tab.open("Settings")
    tab.type("Seed", "7")
    tab.open("Settings")
    tab.press("Generate")
    tab.finished()
    tab.open("History")


def use_explorer(page) -> None:
    tab = Tab(page, "Token Explorer")
    tab.type("Prompt, or a text to be judged", PROMPT)
    tab.open("Settings")
    tab.type("Seed", "7")
    tab.open("Settings")
    tab.press("Generate")
    token = tab.panel.locator(".st-tokens .st-token")
    token.nth(4).wait_for()
    token.nth(4).click()


def use_sweep(page) -> None:
    tab = Tab(page, "Temperature Sweep")
    tab.type("Prompt", PROMPT)
    tab.press("Sweep")
    tab.finished(3)


def use_arena(page) -> None:
    tab = Tab(page, "Arena")
    tab.panel.get_by_label("Blind", exact=True).check()
    tab.type("Prompt", PROMPT)
    tab.press("Let both write")
    tab.finished(2)
    tab.panel.get_by_role("button", name="Tie").click()
    tab.panel.get_by_text("Your vote: Tie").wait_for()


def use_chat(page) -> None:
    tab = Tab(page, "Chat")
    for question in ("What is the capital of France?", "And of Italy?"):
        before = page.locator("#chat .bot").count()
        tab.type("Your message", question)
        tab.press("Send")
        page.locator("#chat .bot").nth(before).wait_for()
        tab.panel.get_by_text("tokens/s").last.wait_for()


USES = {"generate": use_generate, "explorer": use_explorer, "sweep": use_sweep, "arena": use_arena,
        "chat": use_chat}


def take(address: str, folder) -> list[Path]:
    """demo-<tab>.png of each tab in use, and two in the dark on a phone; their paths."""
    folder, taken = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    with browser() as opened:
        page = opened.new_page(viewport={"width": 1200, "height": 860})
        visit(page, address)
        for name, use in USES.items():
            use(page)
            taken.append(folder / f"demo-{name}.png")
            page.screenshot(path=taken[-1])
        phone = opened.new_page(viewport={"width": 390, "height": 844}, has_touch=True,
                                is_mobile=True, device_scale_factor=2)
        visit(phone, address, dark=True)
        for name in ("generate", "explorer"):
            USES[name](phone)
            taken.append(folder / f"demo-phone-{name}.png")
            phone.screenshot(path=taken[-1])
    return taken


def take_of_run(run_dir, folder) -> list[Path]:
    """The screenshots of a run's demo, served for as long as they take; their paths.

    The vote that one of them shows is not among those of people. Raises ParameterError, one
    sentence, without a browser, Gradio or a model, and where a page does not come so far.
    """
    from stentor.demo.command import needs_gradio
    run_dir = Path(run_dir)
    find_browser()
    needs_gradio()
    from playwright.sync_api import Error

    from stentor.demo.app import close, open_demo, start
    with tempfile.TemporaryDirectory() as votes:
        blocks = open_demo(run_dir.parent, run_dir.name, votes=Path(votes) / "votes.jsonl")
        try:
            return take(start(blocks), folder)
        except Error as error:
            raise ParameterError([f"Chromium gave up: {error.message.splitlines()[0]}"]) from None
        finally:
            close(blocks)
