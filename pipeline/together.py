"""Whether the inputs of a node go together: models that read the same tokens, and text that the stage and its model can read."""

from collections.abc import Mapping
from pathlib import Path

from pipeline.artifact import Artifact, Checkpoint, has_chat_template, tokenizer_digest
from pipeline.artifact_spec import DatasetSpec, Spec
from pipeline.graph import Node, Ref
from pipeline.stage import Stage

TASKS_PORT = "tasks"


def token_problems(node: Node, tokenizers: Mapping[Ref, str | None]) -> list[str]:
    """Why models that the stage reads together cannot be compared. `tokenizers` are digests; None: not known, or not text."""
    known = {port: found for port, ref in node.inputs.items() if (found := tokenizers.get(ref))}
    first = next(iter(known), "")
    return [
        f"stages.{node.name}.inputs.{port}: {node.inputs[port]} and {node.inputs[first]} ({first}) have different tokenizers; "
        "only models that read the same tokens can be compared, token by token"
        for port, other in list(known.items())[1:]
        if other != known[first]
    ]


def conversation_problems(node: Node, chats: Mapping[Ref, bool | None], specs: Mapping[Ref, Spec]) -> list[str]:
    """Why the stage, or its model, cannot read the conversations that it is given. `chats`: whether a model has a template for them."""
    told = f"{node.stage.name} reads plain text; name a split of format text"
    if node.stage.reads_conversations:
        if all(chats.get(ref) is not False for ref in node.inputs.values()):
            return []
        told = "the model has no chat template; put its chat_template.jinja beside its tokenizer, or name a split of format text"
    given = {port: (ref, specs[ref]) for port, ref in node.inputs.items()}
    return [
        f"stages.{node.name}.inputs.{port}: {ref} holds conversations and {told}"
        for port, (ref, spec) in given.items()
        if isinstance(spec, DatasetSpec) and spec.format == "messages"
    ]


def task_problems(node: Node, specs: Mapping[Ref, Spec]) -> list[str]:
    """A folder of evaluation tasks is no text, and no text is one."""
    problems = []
    for port, ref in node.inputs.items():
        spec = specs[ref]
        if isinstance(spec, DatasetSpec) and (spec.format == "tasks") != (port == TASKS_PORT):
            held = "holds evaluation tasks and" if spec.format == "tasks" else f"is of format {spec.format} and"
            needed = "reads text; name a split of format text"
            if port == TASKS_PORT:
                needed = "needs a folder of tasks; name a split of format tasks"
            problems.append(f"stages.{node.name}.inputs.{port}: {ref} {held} {node.stage.name} {needed}")
    return problems


def idle_dtype(stage: Stage) -> list[str]:
    """A dtype of the computation where nothing is computed with it."""
    chosen = getattr(stage.params, "compute_dtype", "auto")
    if stage.computes or chosen == "auto":
        return []
    return [f"compute_dtype: with these settings {stage.name} multiplies nothing with the model's weights itself; leave it out"]


def read_tokenizer(artifact: Artifact) -> str | None:
    """Digest of that of a checkpoint whose files are here."""
    return tokenizer_digest(artifact.path) if isinstance(artifact, Checkpoint) and artifact.path != Path() else None


def reads_chats(artifact: Artifact) -> bool | None:
    """Of a checkpoint whose files are here."""
    return has_chat_template(artifact.path) if isinstance(artifact, Checkpoint) and artifact.path != Path() else None


def located(node: Node, problem: str) -> str:
    """A stage's own sentence, `rank: too large`, with the place in the recipe before it."""
    field = problem.partition(":")[0].partition(".")[0]
    if field in type(node.stage.params).model_fields or field in ("inputs", "execution"):
        return f"stages.{node.name}.{problem}"
    return f"stages.{node.name}.inputs.{problem}" if field in node.stage.inputs() else f"stages.{node.name}: {problem}"
