"""Where a run is recorded: the tracking URI, how to look at it, and whether it holds a run already. MLflow is not imported."""

import os
import re
import sqlite3
from pathlib import Path
from urllib.parse import quote

from pipeline.identity import digest
from pipeline.recipe import TrackingSettings
from pipeline.spool import Recorded

SQLITE = "sqlite:///"
RESULTS_VIEW = "results"  # the table of runs with the headline metrics as columns
MLFLOW_UI = "http://127.0.0.1:5000"  # where `mlflow ui` listens


def chosen_uri(settings: TrackingSettings) -> str | None:
    return settings.uri or os.environ.get("MLFLOW_TRACKING_URI")  # MLflow's own variable, as its users expect


def default_uri(outputs: Path) -> str:
    return f"{SQLITE}{(outputs / 'mlflow.db').resolve()}"


def place_of(uri: str, experiment: str) -> dict[str, str]:
    """Where a spool is to be recorded, without a secret: a changed password is the same place, another working folder is not."""
    if uri.startswith(SQLITE):
        uri = SQLITE + str(Path(uri.removeprefix(SQLITE)).resolve())
    return {"experiment": experiment, "uri_digest": digest("uri", {"uri": without_password(uri)})}


def is_recorded(run_dir: Path, uri: str, state: str) -> bool:
    """Whether MLflow holds this very run; a sqlite file is asked, a server is trusted."""
    recorded = Recorded.read(run_dir)
    if recorded is None or recorded.state != state:
        return False
    if not uri.startswith(SQLITE):
        return True
    query = "SELECT 1 FROM runs WHERE run_uuid = ? AND lifecycle_stage = 'active' AND status = 'FINISHED'"
    try:
        connection = sqlite3.connect(f"file:{uri.removeprefix(SQLITE)}?mode=ro", uri=True, timeout=1)
    except sqlite3.Error:  # no such file any more
        return False
    try:
        return connection.execute(query, (recorded.run_id,)).fetchone() is not None
    except sqlite3.Error:  # not a database of MLflow: the recorder will say so
        return False
    finally:
        connection.close()


def where(chosen: str | None, outputs: Path, recorded: Recorded | None, remark: str = "", view: str = RESULTS_VIEW) -> str:
    """The command, and the address of a view of the table: MLflow's own way in leads to traces of its GenAI product."""
    command = view_command(chosen, outputs)
    if recorded is None:
        return command + remark
    server = command if command.startswith("http") else MLFLOW_UI
    table = f"{server}/#/experiments/{recorded.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={quote(view)}"
    return f"{command}{remark}\n{table}"


def view_command(uri: str | None, outputs: Path) -> str:
    """What a person types, or opens, to see the runs."""
    if uri is None:
        here = Path.cwd()
        uri = SQLITE + str((outputs.relative_to(here) if outputs.is_relative_to(here) else outputs) / "mlflow.db")
    uri = without_password(uri)
    return uri.rstrip("/") if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"


def without_password(text: str) -> str:
    """`https://user:secret@host` as `https://***@host`."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)
