"""The shape of the house in a few figures: of the working tree, or of any commit beside it.

    python tests/house.py [COMMIT ...]          # a table, one column a tree; the last column is the working tree
"""
import ast
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
NOT_OURS = {"tests", "outputs", "dist", "build"}


def python_files(root: Path) -> list[Path]:
    """The suite's Python files, without tests and what is hidden or generated."""
    return [path for path in sorted(root.rglob("*.py"))
            if not any(part.startswith(".") or part in NOT_OURS for part in path.relative_to(root).parts)]


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, root: Path, modules: set[str]) -> set[str]:
    """The suite's own modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return (found & modules) - {module_name(path, root)}


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """The groups of two or more modules that reach each other."""
    def reached(start):
        seen, todo = set(), [start]
        while todo:
            for other in arrows[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        return seen
    reach = {name: reached(name) for name in arrows}
    groups = {tuple(sorted(other for other in reach[name] if name in reach[other])) for name in arrows if name in reach[name]}
    return [list(group) for group in sorted(groups)]


def code_lines(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text())["cells"]
    lines = [line.strip() for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).split("\n")]
    return [line for line in lines if len(line) > 3 and not line.startswith("#")]


def figures(root: Path) -> dict:
    files = python_files(root)
    modules = {module_name(path, root) for path in files}
    arrows = {module_name(path, root): imports(path, root, modules) for path in files}
    lines = {path: path.read_text().split("\n") for path in files}
    functions = [(node.end_lineno - node.lineno + 1, f"{path.relative_to(root)}: {node.name}") for path in files
                 for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    own = [path for path in files if path.name != "tokenmonster_hf.py"]
    every = [line for path in files for line in lines[path]]
    second, third = (code_lines(next((root / "notebooks").glob(f"{number}_*.ipynb"))) for number in ("02", "03"))
    size, largest = max((len(lines[path]), str(path.relative_to(root))) for path in own)
    length, function = max(functions)
    return {
        "files at the top": len([path for path in root.iterdir() if path.is_file() and not path.name.startswith(".")]),
        "of them Python": len(list(root.glob("*.py"))),
        "lines of Python": len(every),
        "largest file but the tokenizer": f"{size} ({largest})",
        "largest function": f"{length} ({function})",
        "functions over 45 lines": sum(length > 45 for length, _ in functions),
        "import circles": len(circles(arrows)),
        "lines of stentor_utils.py": len(lines[root / "stentor_utils.py"]),
        "code lines of 02 that stand in 03": f"{sum(line in set(third) for line in second)} of {len(second)}",
        "lines over 100 columns": f"{sum(len(line) > 100 for line in every) / len(every):.1%}",
    }


def tree_of(commit: str, folder: str) -> Path:
    archive = subprocess.run(["git", "archive", commit], cwd=REPO, check=True, capture_output=True).stdout
    tarfile.open(fileobj=io.BytesIO(archive)).extractall(folder, filter="data")
    return Path(folder)


def main() -> None:
    columns = {}
    for commit in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            columns[commit] = figures(tree_of(commit, folder))
    columns["now"] = figures(REPO)
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name in columns["now"]:
        print(f"| {name} | " + " | ".join(str(column[name]) for column in columns.values()) + " |")


if __name__ == "__main__":
    main()
