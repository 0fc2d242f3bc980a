"""What the README shows is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_python_snippet_runs(code: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_commands_exist() -> None:
    """Every ``bamboo-md COMMAND`` of the README is one."""
    from typer.main import get_command

    from md.cli import app

    named = set(re.findall(r"bamboo-md ([a-z]+)", README))
    assert {"run", "analyze", "validate"} <= named
    assert named <= set(get_command(app).commands)  # type: ignore[attr-defined]


def test_linked_files_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) >= 4
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


def test_equations_point_to_code_and_tests_that_exist() -> None:
    rows = re.findall(r"\| `([^`]+)` \| `([^`]+)` \|$", (ROOT / "docs/theory.md").read_text(), flags=re.MULTILINE)
    assert len(rows) > 25
    for code, test in rows:
        file, name = test.split("::")
        assert (ROOT / code).exists(), code
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), test
