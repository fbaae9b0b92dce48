"""Messages that the pages on errors quote are messages of the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
FOLDERS = ("data", "kernels", "model", "objective", "optim", "parallel", "runtime", "tools")
GAP = "…"


def texts(tree: ast.AST) -> list[str]:
    """Every string of a file but its docstrings; what an f-string fills in is a gap."""
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            found.append(node.value)
    return found


def of_the_sources() -> list[str]:
    files = [ROOT / "train.py", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    return [text for path in files for text in texts(ast.parse(path.read_text(encoding="utf-8")))]


def quoted(page: str) -> list[str]:
    """The messages of a page: code in the first column of a table."""
    return re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)


def says(text: str, message: str) -> bool:
    """Is `message`, with its gaps, in `text`? A gap stands for anything, one of the text is met by a gap only."""
    parts = [re.escape(part.strip(" ")) for part in message.split(GAP) if part.strip(" ;:.()")]
    return re.search(".*".join(parts), text, re.DOTALL) is not None


def test_every_message_is_one_of_the_code():
    sources, messages = of_the_sources(), quoted(PAGE.read_text(encoding="utf-8"))
    assert len(messages) > 35
    assert [m for m in messages if not any(says(text, m) for text in sources)] == []
    assert [m for m in messages if len(re.sub(r"\W", "", m)) < 9] == [], "too short to find the right one"
    assert len(set(messages)) == len(messages)


def test_a_message_that_changed_is_noticed():
    tree = ast.parse('"""A doc that says: no such thing."""\nraise E(f"no such {what}, but " f"{n} others; use {it}")')
    assert texts(tree)[0] == "no such …, but … others; use …"
    assert says(texts(tree)[0], "no such …, but … others") and says(texts(tree)[0], "others; use …")
    assert not any(says(text, message) for text in texts(tree) for message in ("no such thing", "others, use …", "others … no such"))
