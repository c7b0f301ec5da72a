"""The README's table of measured results, from benchmarks/results/*.json.

    python benchmarks/table.py            print it
    python benchmarks/table.py --write    put it into README.md between its markers

Each line names the figure, the value, and the script that made it; the whole command stands in the
result file. A result that is missing is missing in the table: nothing here has a value of its own.
"""

# ruff: noqa: E501  (one line of the table is one line here)
from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


class Line(NamedTuple):
    """One line of the table: which figure of which bench, in words, and how to print it."""

    bench: str
    figure: str
    words: str
    form: str = "{:.3g}"


LINES = [
    Line("demo", "minutes", "`make demo`, minutes on 2 CPU cores", "{:.1f}"),
    Line("demo", "second_judge_win_rate", "demo: win rate over the start, second judge", "{:.3f}"),
    Line("demo", "second_judge_win_rate_low", "lower end of its 95% interval", "{:.3f}"),
    Line("demo", "gold_before", "demo: gold check before", "{:.3f}"),
    Line("demo", "gold_after", "demo: gold check after", "{:.3f}"),
    Line("demo_fresh", "mean_second_judge_win_rate", "demo on fresh requests: win rate, mean of the seeds", "{:.3f}"),
    Line("demo_fresh", "least_second_judge_win_rate_low", "lowest lower end among the seeds", "{:.3f}"),
    Line("pocket", "judge_accuracy", "embedded judge: accuracy on constructed pairs", "{:.3f}"),
    Line("pocket", "judge_order_consistency", "embedded judge: same verdict in both orders", "{:.3f}"),
    Line("pocket", "judge_accuracy_true_vs_sample", "embedded judge: true turn against own sample", "{:.3f}"),
    Line("pocket", "judge_ece", "embedded judge: expected calibration error", "{:.3f}"),
    Line("pocket", "policy_perplexity", "embedded policy: held-out perplexity", "{:.2f}"),
    Line("pocket", "megabytes", "embedded models: megabytes", "{:.1f}"),
    Line("judge_client", "pairs_per_s", "judge client, 50 ms server: pairs/s", "{:,.0f}"),
    Line("judge_client", "ratio_to_bare_asyncio", "the same, over bare asyncio", "{:.2f}"),
    Line("judge_client", "ratio_to_best_peer", "the same, over the best peer", "{:.1f}x"),
    Line("judge_client", "rows_lost_at_400", "rows of 1,000 without a verdict when 5 requests get HTTP 400", "{:.0f}"),
    Line("judge_faults", "kills", "kill -9 at random points, then resume: kills", "{:.0f}"),
    Line("judge_faults", "lost", "verdicts lost", "{:.0f}"),
    Line("judge_faults", "doubled", "verdicts doubled", "{:.0f}"),
    Line("judge_faults", "invented", "verdicts invented", "{:.0f}"),
    Line("judge_gpu", "verdicts_per_s", "vLLM in process, 0.41B judge, 787 tokens a question: verdicts/s", "{:,.0f}"),
    Line("judge_gpu", "ratio_to_bare_generate", "the same, over bare `LLM.generate`", "{:.2f}"),
    Line("judge_gpu", "http_ratio_to_in_process", "HTTP path over in process", "{:.2f}"),
    Line("judge_gpu", "adjacency_speedup", "both orders adjacent over not adjacent", "{:.2f}x"),
    Line("judge_gpu", "one_token_speedup_over_rationale", "one token over rationale first", "{:.1f}x"),
    Line("judge_rounding", "distinct_rounded", "bfloat16 judge, 100 questions: values that P(first) takes, logits rounded", "{:.0f}"),
    Line("judge_rounding", "distinct_float32", "the same, logits in float32", "{:.0f}"),
    Line("parse", "agreement", "reply parsers: agreement with stored verdicts", "{:.4f}"),
    *(
        Line(bench, f"{figure}{setting}", f"{name} {size}: {words}", form)
        for bench, name in (("train_dpo", "DPO"), ("train_reward", "reward model"), ("train_rrhf", "RRHF"))
        for setting, size in (("_362m_hh", "362M, HH-like"), ("_1500m_uf", "1.5B, UltraFeedback-like"))
        for figure, words, form in (
            ("speedup_vs_trl_best", "times the best of TRL" if bench != "train_rrhf" else "times the authors' loss at batch 1", "{:.1f}x"),
            ("speedup_vs_trl_default", "times TRL's defaults", "{:.1f}x"),
            ("memory_per_pair_ratio", "memory per pair over TRL's", "{:.3f}"),
            ("mfu", "MFU on processed tokens", "{:.2f}"),
            ("real_tokens_per_s", "real tokens/s", "{:,.0f}"),
        )
    ),
    Line("reward_quality", "ukp_accuracy", "reward model on unseen UKP debates: accuracy", "{:.3f}"),
    Line("reward_quality", "ukp_bag_of_words", "the same, bag of words", "{:.3f}"),
    Line("reward_quality", "blimp_accuracy", "reward model on unseen BLiMP paradigms: accuracy", "{:.3f}"),
    Line("reward_quality", "blimp_bag_of_words", "the same, bag of words", "{:.3f}"),
    Line("train_ppo", "speedup_vs_trl112", "PPO: times TRL 1.12, `generate` on both sides", "{:.1f}x"),
    Line("train_ppo", "speedup_vs_trl112_vllm", "PPO with vLLM rollouts: times TRL 1.12", "{:.1f}x"),
    Line("ppo_learning", "win_rate", "PPO, embedded policy, vLLM rollouts: win rate over its start", "{:.3f}"),
    Line("ppo_learning", "win_rate_low", "lower end of its 95% interval", "{:.3f}"),
    Line("train_ppo", "peak_gib", "PPO: peak memory, GiB", "{:.1f}"),
    Line("train_ppo", "rrhf_memory_over_ppo", "RRHF's peak memory over PPO's", "{:.2f}"),
    *(
        Line("compare", f"{figure}_{name}", f"compare, {name}: {words}", "{:.3f}")
        for name in ("dpo", "rrhf", "ppo", "bon")
        for figure, words in (("win_rate", "win rate over the start"), ("kl", "KL to the start, nats"))
    ),
    Line("report_simulation", "coverage", "report card: coverage of its 95% intervals", "{:.3f}"),
    Line("report_simulation", "recovered", "report card: planted biases recovered", "{:.3f}"),
    Line("abtest_simulation", "false_positive_rate", "judge A/B: false positives with repeated looks", "{:.3f}"),
    Line("abtest_simulation", "power", "judge A/B: power at the planned size", "{:.3f}"),
    Line("publish_load", "rows_per_s", "publishing 1,000,000 rows: rows/s", "{:,.0f}"),
    Line("publish_load", "peak_mib", "the same: peak memory, MiB", "{:,.0f}"),
]  # fmt: skip


def load_results(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Return every result file by its bench name."""
    files = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json")))
    return {result["bench"]: result for result in files if "figures" in result}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the table as Markdown; figures that no result file has are left out."""
    rows = ["| measured | value | on | by |", "|---|---|---|---|"]
    for line in LINES:
        result = results.get(line.bench)
        if result is None or result["figures"].get(line.figure) is None:
            continue
        value = line.form.format(result["figures"][line.figure])
        hardware = result["hardware"]
        name = hardware if isinstance(hardware, str) else hardware.get("name", "")
        where = name.partition(";")[0]
        script = re.search(r"\S+\.py|make \S+|-m (\S+)|rlaif \S+", result["command"])
        by = (script.group(1) or script.group()) if script else result["command"]
        rows.append(f"| {line.words} | {value} | {where} | `{by}` |")
    return "\n".join(rows)


def written(readme: str, body: str) -> str:
    """Return the README's text with the table between its markers replaced."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{body}\n{END}{after}"


def main() -> None:
    """Print the table, or write it into the README."""
    body = table(load_results())
    if "--write" not in sys.argv[1:]:
        print(body)
        return
    path = ROOT / "README.md"
    path.write_text(written(path.read_text(encoding="utf-8"), body), encoding="utf-8")


if __name__ == "__main__":
    main()
