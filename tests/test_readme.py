"""What README says about the code is so."""
import re
from pathlib import Path


def test_line_counts_and_files():
    """The reading-order table counts the lines that are there."""
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", Path("README.md").read_text(), flags=re.M)
    assert len(rows) >= 5
    for name, lines in rows:
        assert len(Path(name).read_text().splitlines()) == int(lines), name


def test_pictures_and_links_exist():
    """Every relative link of both READMEs leads to a file."""
    for readme in (Path("README.md"), Path("nano/README.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", readme.read_text()):
            assert (readme.parent / link).exists(), link


def test_commands_are_the_ones_that_ci_runs():
    """.ci/run calls README's test command verbatim."""
    command = "pip install -r requirements.txt && python -m pytest -q"
    assert f"    {command}\n" in Path("README.md").read_text() and f"\n{command}\n" in Path(".ci/run").read_text()
    assert "    pip install -r requirements.txt && python grpo.py config.yaml && python bench.py config.yaml\n" in Path("README.md").read_text()
