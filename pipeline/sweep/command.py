"""`run -m ...`: the jobs launched, and at the end, however it came, what they found side by side.

A sweep's folder is named after its command line, `outputs/sweeps/<recipe>-<digest8>/`: the same command again finds its MLflow run and its
report, and brings them up to date instead of beginning others. What only says how it is computed or shown is not part of the name.
"""

import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from pipeline import compose
from pipeline.claim import Claims
from pipeline.compute_dtype import DECIDED, processor_dtype
from pipeline.errors import Interrupted, LlmpressError, StoreError, sentences
from pipeline.identity import digest
from pipeline.recipe import Settings, read_settings
from pipeline.resources import resources
from pipeline.store import explain_os_error
from pipeline.sweep.axes import overrides, quoted
from pipeline.sweep.orders_sweeper import SweepFailed
from pipeline.sweep.record import JobRecord, Sweep, forget_jobs, read_jobs
from pipeline.task import LAUNCHER, process_name, run_job

NOT_THE_SWEEP = re.compile(r"[+~]*(mode|format|outputs|fit|lock|tracking[.\w]*|hydra/launcher|hydra\.(?!sweeper)[.\w]*)=")
FOLDER = "hydra.sweep.dir"
RUNNING = "running"  # claimed by the command whose sweep it is


def run_sweep(typed: Sequence[str], arguments: Sequence[str]) -> int:
    """The exit code. `typed` is what the user wrote, `arguments` the same with recipe files under their names.

    LlmpressError where no job began.
    """
    arguments = [*arguments, *overrides(compose.axes_of(arguments), arguments)]
    folder = sweep_folder(arguments)
    named = any(argument.startswith(f"{FOLDER}=") for argument in arguments)
    decided = f"+hydra.job.env_set.{DECIDED}={processor_dtype()}"  # once, for jobs that may run on unlike machines
    sys.argv[1:] = [*arguments, decided, *([] if named else [f"{FOLDER}={quoted(str(folder))}"])]
    if "mode=plan" in arguments:
        raised = _launch(folder)
        if raised is not None:
            raise raised
        return 0
    try:
        with _claimed(folder):
            return _run(folder, typed)
    except TimeoutError:
        raise StoreError(f"this very sweep is running already; wait for it to end, or name another folder: {FOLDER}=...") from None
    except OSError as error:
        raise StoreError(explain_os_error(error, folder)) from None


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """For one command at a time. TimeoutError where another runs. A folder in which nothing came to be is gone afterwards."""
    new = [place for place in (folder, *folder.parents[:2]) if not place.exists()]
    with Claims(folder).hold(RUNNING, timeout=0) as claim:
        try:
            yield
        finally:
            claim.file.unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                for place in new:
                    place.rmdir()


def _run(folder: Path, typed: Sequence[str]) -> int:
    forget_jobs(folder)
    raised = _launch(folder)
    if raised is not None and not raised.told:
        print(sentences(raised), file=sys.stderr)
        raised.told = True
    jobs = read_jobs(folder)
    if not jobs:
        if raised is not None:
            raise raised
        return 0
    ended_early = str(raised) if raised is not None and not isinstance(raised, SweepFailed) and not _is_of_a_job(raised, jobs) else ""
    code = _finish(Sweep(folder=folder, command=shlex.join(["run", *typed]), jobs=jobs, problem=ended_early))
    return raised.exit_code if isinstance(raised, Interrupted) else code


def _launch(folder: Path) -> LlmpressError | None:
    """Run every job. What was raised at the end: the first job's error that Hydra took note of, or why not every job was begun."""
    os.environ[LAUNCHER] = process_name(os.getpid())
    try:
        hydra.main(config_path=str(resources() / "conf"), config_name="config", version_base="1.3")(run_job)()
    except KeyboardInterrupt:
        return Interrupted("interrupted; what is finished is kept, and the same command continues from there")
    except LlmpressError as error:
        return error
    except (HydraException, OmegaConfBaseException) as error:
        return compose.explain(error)
    except Exception as error:  # of a launcher whose worker was killed or whose cluster is gone, each has its own
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "launcher.log"
        log.write_text(traceback.format_exc(), encoding="utf-8")
        return LlmpressError(f"the launcher gave up ({type(error).__name__}, log: {log}); the same command runs what is missing")
    return None


def _is_of_a_job(error: LlmpressError, jobs: Sequence[JobRecord]) -> bool:
    return any(job.error == str(error) for job in jobs)


def _finish(sweep: Sweep) -> int:
    """Write the report, hand it to MLflow, print it. The exit code. What draws pages is imported here: a plan does without."""
    from pipeline.sweep.page import write_sweep
    from pipeline.sweep.report import build_sweep, exit_code
    from pipeline.sweep.table import print_sweep
    from pipeline.sweep.tracked import record_sweep

    first = list(sweep.jobs[0].overrides)
    written = tuple(job.model_copy(update={"overrides": tuple(map(compose.as_written, job.overrides))}) for job in sweep.jobs)
    sweep = sweep.model_copy(update={"jobs": written})
    report = build_sweep(sweep)
    for problem in write_sweep(report, sweep.folder):
        print(f"warning: {problem}", file=sys.stderr)
    settings = _settings(first)
    began = any(job.run_dir for job in sweep.jobs)  # what was refused before it ran is nowhere in MLflow
    line = record_sweep(sweep, report, settings) if began and settings.tracking.enabled else ""
    if settings.format == "json":
        print(report.model_dump_json(indent=1))
        print(line, file=sys.stderr)
    else:
        print_sweep(report, Console(), line)
    return exit_code(sweep)


def _settings(overrides: list[str]) -> Settings:
    content = OmegaConf.to_container(compose.composed(overrides), resolve=True)
    assert isinstance(content, dict)
    return read_settings({str(key): value for key, value in content.items()})


def sweep_folder(arguments: Sequence[str]) -> Path:
    """Where a sweep of these arguments keeps its records: where the user says, else below `outputs` under a name of its own."""
    chosen = {key: value for key, _, value in (argument.partition("=") for argument in arguments)}
    if FOLDER in chosen:
        return Path(chosen[FOLDER].strip("'\"")).expanduser().absolute()
    choices = sorted(argument for argument in arguments if argument not in compose.FLAGS and not NOT_THE_SWEEP.match(argument))
    recipe = re.sub(r"\W+", "_", compose.display_name(chosen.get("recipe", "sweep")))
    name = f"{recipe}-{digest('sweep', choices)[:8]}"
    outputs = Path(chosen.get("outputs", "outputs").strip("'\"")).expanduser().absolute()
    return outputs / "sweeps" / name
