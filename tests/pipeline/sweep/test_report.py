"""What a sweep says of its jobs: which pipeline is best, what is noise, what to run, what failed."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.sweep.record import JobRecord, Sweep
from pipeline.sweep.report import NEVER_ENDED, SweepReport, build_sweep, exit_code
from tests.pipeline.rehearsal import small_model
from tests.pipeline.sweep.jobs import TOKENS, Jobs, losses

PQ, QP = ("prune", "quantize", "evaluate"), ("quantize", "prune", "evaluate")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def jobs(model: Path, tmp_path: Path) -> Jobs:
    return Jobs(model, tmp_path / "outputs")


def labels(report: SweepReport) -> list[str]:
    return [row.label for row in report.rows]


def test_the_better_order_comes_first_with_its_command_and_how_much_better_it_is(jobs: Jobs) -> None:
    jobs.add(QP, losses(0.5))
    jobs.add(PQ, losses(0.2))
    report = build_sweep(jobs.sweep())
    assert labels(report) == ["prune>rtn4", "rtn4>dequantize>prune>rtn4"]
    best, other = report.rows
    assert (best.rank, other.rank, best.vs_best, other.tie) == (1, 2, None, False)
    assert other.vs_best is not None and other.vs_best.percent == pytest.approx(35, abs=2)
    assert best.vs_source is not None and best.vs_source.percent == pytest.approx(22, abs=2)
    assert best.command == "run recipe=rehearsed 'order=[prune,quantize,evaluate]'"
    assert best.folder == jobs.records[1].run_dir and best.nbytes == other.nbytes and best.bits_per_weight == pytest.approx(6.08, abs=0.01)
    said = report.sentences()
    assert said[0].startswith("prune>rtn4 is best: perplexity ") and said[1] == "no other order ties with the best"
    assert said[2].startswith("prune>rtn4 is 3") and said[2].endswith("better than rtn4>dequantize>prune>rtn4")
    assert report.suggestion is not None and report.suggestion.command == best.command and report.cheapest is None


def test_orders_that_noise_alone_tells_apart_tie_and_the_cheapest_of_them_is_named(jobs: Jobs) -> None:
    jobs.add(QP, losses(0.200, wobble=0.05))
    jobs.add(PQ, losses(0.201, wobble=0.01))
    report = build_sweep(jobs.sweep())
    assert [row.tie for row in report.rows] == [False, True]
    assert report.sentences()[1].startswith("1 order ties with the best: ")
    assert report.suggestion is not None and report.suggestion.label == "prune>rtn4"  # 2 executions of 12.5 s, not 4
    assert report.suggestion.cost_seconds == 25
    assert "no recipe sets gates" in report.suggestion.sentence


def test_jobs_that_differ_only_in_seeds_are_one_row_with_means(jobs: Jobs) -> None:
    order = ("prune", "distill", "quantize", "evaluate")
    for seed, shift in enumerate((0.18, 0.20, 0.22)):
        jobs.add(order, losses(shift), stages={"distill": {"seed": seed}}, overrides=[f"stages.distill.seed={seed}"])
    jobs.add(("distill", "prune", "quantize", "evaluate"), losses(0.5))
    report = build_sweep(jobs.sweep())
    best, other = report.rows
    assert labels(report) == ["prune>distill>rtn4", "distill>prune>rtn4"]
    assert [run.seeds for run in best.runs] == [{"distill.seed": seed} for seed in range(3)] and len(other.runs) == 1
    middle = best.runs[1].perplexity
    assert best.perplexity == pytest.approx(middle, rel=0.01) and best.perplexity not in [run.perplexity for run in best.runs]
    assert best.params == {} and "the mean of 3 seeds" in report.sentences()[0]
    assert (report.executions.nodes, report.executions.distinct) == (24, 16)  # prune and both of the source are shared


def test_pipelines_of_one_name_are_told_apart_by_what_differs(jobs: Jobs) -> None:
    for ratio in (0.5, 0.0):
        jobs.add(PQ, losses(0.2 + ratio), stages={"prune": {"head_ratio": ratio}}, overrides=[f"stages.prune.head_ratio={ratio}"])
    report = build_sweep(jobs.sweep())
    assert labels(report) == ["prune>rtn4 (prune.head_ratio=0.0)", "prune>rtn4 (prune.head_ratio=0.5)"]
    assert [row.params for row in report.rows] == [{"prune.head_ratio": 0.0}, {"prune.head_ratio": 0.5}]
    assert [row.pareto for row in report.rows] == [True, True]  # the larger is better
    assert report.sentences()[1] == "no other pipeline ties with the best"


def test_a_pipeline_that_is_larger_and_worse_is_not_on_the_front(jobs: Jobs) -> None:
    jobs.add(PQ, losses(0.2))
    jobs.add(PQ, losses(0.4), stages={"quantize": {"num_bits": 8}})
    assert [(row.label, row.pareto) for row in build_sweep(jobs.sweep()).rows] == [("prune>rtn4", True), ("prune>rtn8", False)]


def test_what_was_measured_on_other_documents_is_not_ranked_with_the_rest(jobs: Jobs) -> None:
    jobs.add(PQ, losses(0.3))
    jobs.add(QP, losses(0.4))
    jobs.add(("prune", "evaluate"), losses(0.0), tokens=[count + 1 for count in TOKENS])
    jobs.add(("quantize", "evaluate"), losses(0.0), stages={"evaluate": {"max_length": 16}})
    report = build_sweep(jobs.sweep())
    assert [(row.rank, row.name) for row in report.rows] == [
        (1, "prune>rtn4"),
        (2, "rtn4>dequantize>prune>rtn4"),
        (None, "prune"),
        (None, "rtn4"),
    ]
    assert report.rows[2].perplexity is not None and report.rows[2].vs_best is None
    assert len(report.notes) == 1 and "other documents" in report.notes[0] and report.notes[0].endswith(": prune, rtn4")


def test_without_losses_by_document_perplexities_rank_and_nothing_is_said_to_tie(jobs: Jobs) -> None:
    for order, level in ((PQ, 0.3), (QP, 0.300001)):
        record = jobs.add(order, losses(level, wobble=0.0))
        report = json.loads((Path(record.run_dir) / "report.json").read_text())
        (Path(report["stages"][-1]["path"]) / "report.json").unlink()
    built = build_sweep(jobs.sweep())
    assert [row.name for row in built.rows] == ["prune>rtn4", "rtn4>dequantize>prune>rtn4"]
    change = built.rows[1].vs_best
    assert change is not None and change.low is None and not built.rows[1].tie
    assert "differences have no intervals: that takes the losses of two documents at least, by document" in built.sentences()
    assert any(note.startswith("without intervals, since") for note in built.notes)


def test_where_nothing_was_measured_size_ranks(jobs: Jobs) -> None:
    jobs.add(("prune",))
    jobs.add(("prune", "quantize"))
    report = build_sweep(jobs.sweep())
    assert report.ranked_by == "size" and labels(report) == ["prune>rtn4", "prune"]
    assert report.sentences()[0] == "nothing measured the perplexity of the final models, so pipelines are ranked by size"
    assert report.suggestion is None and not any(row.pareto for row in report.rows)


def test_the_cheapest_that_passes_every_gate_is_named_though_another_is_better(jobs: Jobs) -> None:
    order = ("prune", "distill", "quantize", "evaluate")
    jobs.add(order, losses(0.1), decision="deploy")
    jobs.add(PQ, losses(0.3), decision="deploy")
    jobs.add(("quantize", "evaluate"), losses(0.6), decision="investigate", exit_code=6)
    report = build_sweep(jobs.sweep())
    assert report.cheapest is not None and report.cheapest.label == "prune>rtn4" and report.suggestion is None
    assert [row.name for row in report.rows] == ["prune>distill>rtn4", "prune>rtn4", "rtn4"]  # stopped by its gate, and measured
    assert [job.exit_code for job in report.failed] == [6]
    assert report.sentences()[-1] == "the cheapest pipeline that passes all of its gates: prune>rtn4, made in 25.0 s"


def test_a_row_passes_only_where_all_of_its_seeds_do(jobs: Jobs) -> None:
    order = ("prune", "distill", "quantize", "evaluate")
    for seed, decision in enumerate(("deploy", "inconclusive")):
        jobs.add(order, losses(0.1), stages={"distill": {"seed": seed}}, decision=decision)
    report = build_sweep(jobs.sweep())
    assert report.rows[0].decision == "inconclusive" and report.cheapest is None
    assert report.sentences()[-1] == "no pipeline passes all of its gates"


def test_failed_and_lost_jobs_stand_below_and_leave_the_others_alone(jobs: Jobs) -> None:
    jobs.add(PQ, losses(0.2))
    jobs.add(QP, fail="prune")
    lost = JobRecord(digest="f" * 64, overrides=("recipe=rehearsed", "stages.prune.mlp_ratio=0.3"))
    report = build_sweep(jobs.sweep(lost))
    assert labels(report) == ["prune>rtn4"]
    assert [(job.name, job.exit_code, job.error) for job in report.failed] == [
        ("rtn4>dequantize>prune>rtn4", 4, "prune: out of memory"), ("", None, NEVER_ENDED),
    ]  # fmt: skip
    assert report.failed[1].command == "run recipe=rehearsed stages.prune.mlp_ratio=0.3"
    assert report.executions.distinct > report.executions.ran + report.executions.hits  # what came behind was not reached


def test_a_report_that_cannot_be_read_is_told(jobs: Jobs) -> None:
    jobs.add(PQ, losses(0.2))
    record = jobs.add(QP, losses(0.3))
    (Path(record.run_dir) / "report.json").write_text("{")
    report = build_sweep(jobs.sweep())
    assert labels(report) == ["prune>rtn4"]
    assert len(report.notes) == 1 and "cannot be read" in report.notes[0] and record.run_dir in report.notes[0]


def test_a_sweep_that_made_nothing_says_so(tmp_path: Path) -> None:
    job = JobRecord(digest="f" * 64, overrides=("recipe=rehearsed",), exit_code=2, error="prune: no")
    report = build_sweep(Sweep(folder=tmp_path, command="run -m", jobs=(job,)))
    assert report.sentences() == ["no job has made its model, so there is nothing to rank"]
    assert (report.recipe, report.metrics["jobs_failed"], "perplexity" in report.metrics) == ("rehearsed", 1.0, False)


def test_run_again_everything_is_a_hit_and_costs_what_it_cost(jobs: Jobs) -> None:
    jobs.add(PQ, losses(0.2))
    first = build_sweep(jobs.sweep())
    jobs.records.clear()
    jobs.add(PQ, losses(0.2))
    again = build_sweep(jobs.sweep())
    assert (first.executions.ran, first.executions.hits) == (5, 0)
    assert (again.executions.ran, again.executions.hits) == (0, 4)
    assert again.rows[0].cost_seconds == first.rows[0].cost_seconds == 25
    assert (first.rows[0].measuring_seconds, again.rows[0].measuring_seconds) == (37.5, 25), "hits need no stored hidden states"


def test_what_a_stage_did_is_known_by_position_from_jobs_that_end_before_and_after_it(jobs: Jobs) -> None:
    jobs.add(("prune", "evaluate"), losses(0.1, wobble=0))
    jobs.add(("quantize", "evaluate"), losses(0.2, wobble=0))
    jobs.add(PQ, losses(0.4, wobble=0))
    jobs.add(QP, losses(0.9, wobble=0))
    costs = {(cost.stage, cost.position): cost for cost in build_sweep(jobs.sweep()).positions}
    assert set(costs) == {("prune", 1), ("prune", 2), ("quantize", 1), ("quantize", 2), ("requantize", 3)}
    assert all(cost.executions == 1 and cost.seconds == 12.5 for cost in costs.values())
    assert costs["quantize", 2].change_pct == pytest.approx(100 * (2.718281828 ** (0.4 - 0.1) - 1), rel=1e-6)
    assert (costs["prune", 2].change_pct, costs["prune", 2].measured) == (None, 0)  # what came out was never measured, only what rtn made


def test_a_pipeline_with_a_removed_run_folder_is_left_out(jobs: Jobs) -> None:
    jobs.add(PQ, losses(0.2))
    shutil.rmtree(jobs.add(QP, losses(0.3)).run_dir)
    assert labels(build_sweep(jobs.sweep())) == ["prune>rtn4"]


@pytest.mark.parametrize(
    ("codes", "problem", "expected"),
    [
        ((0, 0), "", 0),
        ((0, 6, 4, 5), "", 4),
        ((6, 0), "", 6),
        ((0, None, 4), "", 1),
        ((4, None), "", 4),
        ((4, 130, 6), "", 130),
        ((0, 0), "a worker was lost", 1),
        ((6, 0), "a worker was lost", 1),
        ((0, 3), "a worker was lost", 3),
        ((0, None), "interrupted", 130),
        ((), "", 0),
    ],
)
def test_the_exit_code_is_the_first_real_failures(codes: tuple[int | None, ...], problem: str, expected: int, tmp_path: Path) -> None:
    records = tuple(JobRecord(digest=str(number), overrides=(), exit_code=code) for number, code in enumerate(codes))
    assert exit_code(Sweep(folder=tmp_path, command="run -m", jobs=records, problem=problem)) == expected
