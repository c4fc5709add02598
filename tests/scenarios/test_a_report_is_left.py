"""Every run leaves a report that a person can read, among MLflow's artifacts too, and names it."""

from pathlib import Path

from tests.scenarios.conftest import UNTRACKED, Run


def test_a_run_leaves_a_page_and_the_same_run_again_keeps_it(run: Run, folder: Path) -> None:
    gate = "gates=[{after: prune, metric: perplexity, max: 1.5, on_fail: warn}]"
    outcome = run("recipe=mine.yaml", gate)
    (page,) = folder.glob("outputs/runs/mine/*/report.html")
    assert f"report   {page.relative_to(folder)}" in outcome.out.splitlines()
    assert "investigate" in page.read_text() and page.with_name("report.md").read_text().startswith("**investigate: ")
    logged = {file.name for file in folder.glob("outputs/mlartifacts/llmpress/*/artifacts/report.*")}
    assert logged == {"report.html", "report.md", "report.json"}
    written = page.stat().st_mtime_ns
    again = run("recipe=mine.yaml", gate, blocked=("matplotlib", "jinja2"))  # nothing new to say, so nothing to draw with
    assert again.code == 0 and page.stat().st_mtime_ns == written


def test_an_error_is_on_the_page_of_the_run_that_it_ended(run: Run, folder: Path) -> None:
    outcome = run("recipe=mine.yaml", "gates=[{after: prune, metric: perplexity, max: 1.5}]", UNTRACKED)
    assert outcome.code == 6
    (page,) = folder.glob("outputs/runs/mine/*/report.html")
    assert "failed: gate@prune: gate fails: perplexity is " in page.read_text()
    assert str(page.relative_to(folder)) in outcome.out
