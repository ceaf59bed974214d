"""What README says about the code is so."""

import re
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def test_line_counts():
    """The reading order counts the lines that are there."""
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README.read_text(), flags=re.M)
    assert len(rows) >= 12
    for name, lines in rows:
        assert len(Path(name).read_text().splitlines()) == int(lines), name


def test_links_lead_somewhere():
    """Every relative link of every page leads to a file."""
    for page in [README, Path("nano/README.md"), *Path("docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), (page, link)


def test_the_test_command_is_the_one_that_ci_runs():
    """.ci/run calls README's command verbatim."""
    command = "pip install -r requirements.txt && python -m pytest -q"
    assert f"    {command}\n" in README.read_text()
    assert f"\n{command}\n" in Path(".ci/run").read_text()


def test_fork_diffs_fit_the_code():
    """Each line that a diff of README takes away, or leaves as it is, stands in the file that it names."""
    diffs = re.findall(r"```diff\n\+\+\+ (\S+)\n(.*?)```", README.read_text(), flags=re.S)
    assert len(diffs) == 3
    for name, diff in diffs:
        kept = [line[1:] for line in diff.splitlines() if line[0] in "- "]
        source = Path(name).read_text().splitlines() if kept else []
        assert all(line in source for line in kept), (name, kept)


def test_it_is_short():
    """At most 1,500 words: what is longer stands in docs/."""
    assert len(README.read_text().split()) <= 1500
