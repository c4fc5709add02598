"""The small model's tasks beside chance and an order-3 model: the table in assets/README.md.

    python assets/task_baselines.py

The order-3 model is a trigram over the small model's own tokens, counted on data/train.jsonl, its orders interpolated with Witten-Bell
weights (Witten and Bell, 1991). It answers the same requests through the same harness; it generates greedily too. Chance is
one in four where there are four choices; no text drawn at random is a Python function.
"""

import ast
import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from make_tasks import whole_part

from pipeline.artifact import Checkpoint, Dataset
from pipeline.stage import Context
from stages.lm_eval import LMEval
from stages.runtime.harness_model import HarnessModel
from stages.runtime.task_folder import load_tasks, sandboxed_templates, task_manager
from stages.runtime.task_metrics import json_validity
from stages.runtime.task_report import flat_metrics, task_result
from stages.runtime.text import load_tokenizer

HERE = Path(__file__).parent
CHANCE = {"next_line/acc": 0.25, "bracket_close/acc": 0.25, "python_validity/python_validity": 0.0}


class Trigram(TemplateLM):  # type: ignore[misc]
    """Tokens from the two before them."""

    backend = "causal"

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        super().__init__()
        self.tokenizer, self.size = tokenizer, len(tokenizer)
        self.after: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        for text in texts:
            ids = [self.eot_token_id, self.eot_token_id, *self.tok_encode(text)]
            for n in range(2, len(ids)):
                for order in range(3):
                    self.after[tuple(ids[n - order : n])][ids[n]] += 1
        self.probabilities = lru_cache(maxsize=1 << 14)(self._probabilities)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return list(self.tokenizer(string, add_special_tokens=False)["input_ids"])

    def _probabilities(self, context: tuple[int, ...]) -> np.ndarray:
        """[vocabulary] float64 after the last tokens of a text, at most two."""
        lower = np.full(self.size, 1 / self.size) if not context else self.probabilities(context[1:])
        seen = self.after.get(context)
        if not seen:
            return lower
        counts = np.zeros(self.size)
        counts[list(seen)] = list(seen.values())
        return (counts + len(seen) * lower) / (counts.sum() + len(seen))

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
        found = []
        for _pair, context, continuation in requests:
            ids, total, greedy = [self.eot_token_id, *context], 0.0, True
            for token in continuation:
                probabilities = self.probabilities(tuple(ids[-2:]))
                total += float(np.log(probabilities[token]))
                greedy &= int(probabilities.argmax()) == token
                ids.append(token)
            found.append((total, greedy))
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("no task here scores whole texts")

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        return [self._generate(*request.args) for request in requests]

    def _generate(self, prompt: str, options: dict[str, Any]) -> str:
        ids = [self.eot_token_id, *self.tok_encode(prompt)]
        start = len(ids)
        while len(ids) < start + options["max_gen_toks"] and (ids[-1] != self.eot_token_id or len(ids) == start):
            ids.append(int(self.probabilities(tuple(ids[-2:])).argmax()))
        text = str(self.tokenizer.decode(ids[start:], skip_special_tokens=True))
        for stop in options["until"]:
            text = text.partition(stop)[0]
        return text


def trigram_metrics() -> dict[str, float]:
    texts = [json.loads(line)["text"] for line in (HERE / "data/train.jsonl").read_text(encoding="utf-8").splitlines()]
    model = Trigram(load_tokenizer(HERE / "small-llama"), texts)
    names = [name.partition("/")[0] for name in CHANCE]
    with tempfile.TemporaryDirectory() as cache, sandboxed_templates():
        tasks, _ = load_tasks(task_manager(HERE / "tasks", Path(cache)), names)
        samples = evaluate(lm=model, task_dict={"tasks": tasks, "groups": {}}, bootstrap_iters=0)["samples"]
        return flat_metrics({name: task_result(task, samples[name]) for name, task in tasks.items()})


def model_metrics() -> tuple[dict[str, float], float]:
    """And the CPU seconds that they took."""
    stage = LMEval.from_dict({"tasks": [name.partition("/")[0] for name in CHANCE]}, {"device": "cpu"})
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "report"
        output.mkdir()
        context = Context(output, emit=lambda event: None)
        report = stage.run(context, Checkpoint(HERE / "small-llama"), Dataset(HERE / "tasks"))
    return report.metrics, time.process_time() - started


def json_share() -> tuple[int, int]:
    """Records begun in JSON that the small model ends as JSON, and how many: what there is no task for.

    Each describes a held-out function and is cut after its name, below three whole ones of the same module.
    """
    prompts, starts = [], []
    for line in (HERE / "data/eval.jsonl").read_text(encoding="utf-8").splitlines():
        records = [
            {"name": node.name, "line": node.lineno, "args": [argument.arg for argument in node.args.args]}
            for node in ast.walk(whole_part(json.loads(line)["text"]))
            if isinstance(node, ast.FunctionDef)
        ]
        for n in range(3, len(records), 12):
            starts.append(json.dumps({"name": records[n]["name"]}).removesuffix("}") + ",")
            prompts.append("\n".join([*map(json.dumps, records[n - 3 : n]), starts[-1]]))
    model = HarnessModel(HERE / "small-llama", torch.device("cpu"), 16, 512, lambda *_: None)
    options = {"until": ["\n"], "max_gen_toks": 64, "do_sample": False}
    texts = model.generate_until([Instance("generate_until", {}, (prompt, options), 0) for prompt in prompts])
    return int(sum(json_validity([start], [text]) for start, text in zip(starts, texts, strict=True))), len(starts)


def main() -> None:
    trigram = trigram_metrics()
    model, seconds = model_metrics()
    print("| | items | chance | order-3 model | small model |\n|---|---|---|---|---|")
    for name, chance in CHANCE.items():
        task = name.partition("/")[0]
        items = len((HERE / "tasks" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines())
        ours, theirs = (f"{found[name]:.3f} +- {found[f'{name}_stderr']:.3f}" for found in (model, trigram))
        print(f"| `{name}` | {items} | {chance:.2f} | {theirs} | **{ours}** |")
    print(f"{seconds:.0f} CPU seconds for the small model")
    print("of {1} records begun in JSON the small model ends {0} as JSON".format(*json_share()))


if __name__ == "__main__":
    main()
