"""distilabel 1.5.3's PrometheusEval: the task alone, or (third word ``pipeline``) a whole pipeline.

The task alone, a batch of 50 at a time as its pipelines do, is the faster of the two; what becomes
of a batch with a bad row shows in the pipeline.
"""

from __future__ import annotations

import sys

from distilabel.models.llms import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import PrometheusEval
from measuring import report

BATCH = 50


def make_task(name: str = "judge") -> PrometheusEval:
    """Return the relative judge against the mock endpoint."""
    model = OpenAILLM(model="mock", base_url=sys.argv[1], api_key="none")
    return PrometheusEval(name=name, llm=model, mode="relative", rubric="helpfulness")


def inputs(rows: list[dict[str, str]]) -> list[dict[str, object]]:
    """Return rows as the task wants them."""
    return [{"instruction": row["prompt"], "generations": [row["a"], row["b"]]} for row in rows]


def run_task(rows: list[dict[str, str]]) -> int:
    """Batches through the task, one after the other."""
    task = make_task()
    task.load()
    work = inputs(rows)
    answered = 0
    for start in range(0, len(work), BATCH):
        batch = next(task.process(work[start : start + BATCH]))
        answered += sum(row["result"] is not None for row in batch)
    return answered


def run_pipeline(rows: list[dict[str, str]]) -> int:
    """Rows through a pipeline of two steps."""
    with Pipeline(name="bench") as pipeline:
        load = LoadDataFromDicts(data=inputs(rows), batch_size=BATCH)
        load >> make_task()
    found = pipeline.run(use_cache=False)["default"]["train"]
    return sum(row["result"] is not None for row in found)


if __name__ == "__main__":
    report(run_pipeline if sys.argv[4:] == ["pipeline"] else run_task)
