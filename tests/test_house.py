"""The house keeps its shape: no circles, one face, short notebooks that share, and a page that follows a token through it."""
import ast

import house
import pytest
import way_of_a_token
from conftest import REPO


@pytest.fixture(scope="module")
def figures():
    return house.figures(REPO)


def test_no_file_imports_itself_through_others(figures):
    assert figures["import circles"] == 0
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_the_helper_is_a_map_and_gives_out_nothing_private(figures):
    assert figures["lines of stentor_utils.py"] <= 100 and figures["of them Python"] == 2
    tree = ast.parse((REPO / "stentor_utils.py").read_text())
    names = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert not [name for name in names if name.startswith("_")] and len(names) == len(set(names))
    modules = {path.stem for path in (REPO / "stentor").glob("*.py")} - {"__init__", "rules"}
    assert not [name for name in modules if name not in ast.get_docstring(tree)]


def test_no_file_takes_what_is_private_to_another():
    taken = [f"{path.relative_to(REPO)}: {alias.name}" for path in house.python_files(REPO)
             for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
             and (node.module or "").startswith("stentor") for alias in node.names if alias.name.startswith("_")]
    assert not taken


def test_02_and_03_share_no_more_than_ten_lines(figures):
    assert int(figures["code lines of 02 that stand in 03"].split()[0]) <= 10


def test_lines_and_functions_stay_short(figures):
    assert float(figures["lines over 100 columns"].rstrip("%")) < 8
    long = [f"{path.relative_to(REPO)}: {node.name}" for path in house.python_files(REPO) for node in ast.walk(
        ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 60]
    assert len(long) <= 2, long                       # the tokenizer's compiled walk, and what builds the minimal pairs


def test_the_page_of_a_tokens_way_is_what_a_run_calls():
    assert way_of_a_token.PAGE.read_text() == way_of_a_token.page()
    assert len(way_of_a_token.WAY) < 32               # as long as the way was before the house
