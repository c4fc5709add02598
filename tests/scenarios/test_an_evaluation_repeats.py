"""What was measured can be measured again."""

from pathlib import Path

from tests.scenarios.conftest import UNTRACKED, Run


def test_two_evaluations_in_fresh_stores_agree_to_the_last_digit(run: Run, folder: Path) -> None:
    """Of the source and of the packed model beside it, each time by processes of their own."""
    found = []
    for outputs in ("first", "second"):
        done = run("recipe=mine.yaml", "order=[quantize,evaluate]", f"outputs={outputs}", UNTRACKED)
        assert done.code == 0, done.err
        found.append({file.parent.name: file.read_bytes() for file in (folder / outputs / "store").glob("evaluate-*/report.json")})
    assert found[0] == found[1] and len(found[0]) == 2
