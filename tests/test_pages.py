"""`make lint` lets no page pass with a figure that was typed, an image that is not there, a dead link or a placeholder."""
import pages
import pytest

reporting = pytest.importorskip("stentor.reporting")


@pytest.fixture
def suite(tmp_path):
    """A README and docs/ as they should be."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "curve.png").write_bytes(b"x")
    (tmp_path / "docs" / "more.md").write_text("# More, and why\n\nA T4, int8, 02_pretrain_t4, Python 3.11 and `x = 17`.\n")
    block = reporting.sealed("run", "| loss | 4.95 |", ["outputs/demo/summary.json"])
    (tmp_path / "README.md").write_text(
        f"# A\n\n![curve](docs/curve.png)\n\n{block}\n\n[more](docs/more.md#more-and-why) [net](https://x.y/1)\n\n"
        "```\nmake 12\n```\n")
    assert pages.page_problems(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize("old, new, said", [
    ("# A\n", "# A\nIt reaches 4.93.\n", "line 2: 4.93 is typed"),
    ("# A\n", "# A\nA 12M model.\n", "12M is typed"),
    ("# A\n", "# A\n95% of them\n", "95% is typed"),
    ("4.95", "4.85", "the block run was changed by hand"),
    ("outputs/demo/summary.json |", " |", "names no file"),
    ("<!-- end run -->", "", "1 blocks of figures are opened, 0 are whole"),
    ("docs/curve.png", "docs/curves.png", "the image docs/curves.png leads nowhere"),
    ("docs/more.md#", "docs/less.md#", "the link docs/less.md#more-and-why leads nowhere"),
    ("#more-and-why", "#why", "there is no heading why"),
    ("# A\n", "# A\nNot measured yet.\n", "is a placeholder"),
    ("# A\n", "# A\nTODO: say more\n", "is a placeholder")])
def test_what_is_wrong_with_a_page_is_said(suite, old, new, said):
    page = suite / "README.md"
    assert old in page.read_text()
    page.write_text(page.read_text().replace(old, new, 1))
    assert any(said in problem for problem in pages.page_problems(suite)), pages.page_problems(suite)


def test_an_empty_image_and_a_page_of_docs_are_looked_at_too(suite):
    (suite / "docs" / "curve.png").write_bytes(b"")
    (suite / "docs" / "more.md").write_text("# More, and why\n\n1,234 tokens/s\n")
    found = pages.page_problems(suite)
    assert any("is empty" in problem for problem in found) and any(p.startswith("docs/more.md: line 3: 1,234") for p in found)
