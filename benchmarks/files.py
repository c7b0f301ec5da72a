"""The README's annotated file tree, from the first sentence of each module's docstring.

python benchmarks/files.py            print it
python benchmarks/files.py --write    put it into README.md between its markers
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- files: begin -->", "<!-- files: end -->"
FOLDERS = ("feedback", "feedback/backends", "feedback/page", "feedback/pocket", "train")


def purpose(path: Path) -> str:
    """Return the first paragraph of a module's docstring on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def tree() -> str:
    """Return the tree as Markdown: a foldable list per folder."""
    parts = []
    for folder in FOLDERS:
        files = sorted((ROOT / folder).glob("*.py"))
        head = next((purpose(file) for file in files if file.name == "__init__.py"), "")
        lines = [
            f"- `{file.name}`: {purpose(file)}" for file in files if file.name != "__init__.py"
        ]
        body = "\n".join(lines)
        parts.append(
            f"<details><summary><code>{folder}/</code> {head}</summary>\n\n{body}\n\n</details>"
        )
    return "\n".join(parts)


def main() -> None:
    """Print the tree, or write it into the README."""
    if "--write" not in sys.argv[1:]:
        print(tree())
        return
    path = ROOT / "README.md"
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{tree()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
