"""Does a reward model learn more than words and length? UKP debates and BLiMP, unseen parts.

    python benchmarks/reward_quality.py prepare --data ../shared/data --out .bench/reward_quality
    python benchmarks/reward_quality.py run --prepared .bench/reward_quality --out .bench/results

``prepare`` (CPU) writes training text, a tokenizer, folds and floors. ``run`` (GPU) trains a small
language model from scratch on the text by ``rlaif sft``, then reward models on it by ``rlaif
reward``, and scores the held-out folds. Nothing of what it trains is shipped.

Four folds each, by debate (both stances together), by BLiMP paradigm, and by BLiMP phenomenon (its
paradigms together, so that no sibling of a held-out paradigm is seen). The floors see the same
folds: a Bradley-Terry model on hashed unigrams and bigrams, given its best regularisation in
hindsight, and "the longer one wins". Intervals resample debates, paradigms or phenomena.

BLiMP's rate and epochs were the best of four, tried on a quarter of each fold's training paradigms
(50 or 51 of 67 train, and a quarter of those was held out for the choice).
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import platform
import random
import re
import shutil
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix

from feedback.records import Preference, encode
from feedback.shards import package_versions, write_json

FOLDS = 4
# BLiMP's twelve phenomena, by how the names of their paradigms start.
PHENOMENA = {
    "anaphor agreement": ("anaphor",),
    "argument structure": (
        "animate",
        "causative",
        "drop_argument",
        "inchoative",
        "intransitive",
        "passive",
        "transitive",
    ),
    "binding": ("principle_A",),
    "control and raising": (
        "existential_there_object",
        "existential_there_subject",
        "expletive",
        "tough",
    ),
    "determiner-noun agreement": ("determiner_noun",),
    "ellipsis": ("ellipsis",),
    "filler-gap": ("wh_questions", "wh_vs_that"),
    "irregular forms": ("irregular_past",),
    "island effects": (
        "adjunct_island",
        "complex_NP",
        "coordinate_structure",
        "left_branch",
        "sentential_subject",
        "wh_island",
    ),
    "NPI licensing": ("matrix_question", "npi_present", "only_npi", "sentential_negation"),
    "quantifiers": ("existential_there_quantifiers", "superlative"),
    "subject-verb agreement": ("distractor", "irregular_plural", "regular_plural"),
}
BUCKETS = 2**16
ITEMS = 400
REPLIES = 10
"""Of a hundred models' replies to one instruction: more would teach the instruction by heart."""


TASKS = ("blimp", "ukp", "blimp_phenomena")
SETTINGS = {
    "ukp": {"learning_rate": 1e-4, "epochs": 8.0},
    "blimp": {"learning_rate": 2e-4, "epochs": 3.0},
}


class JudgedPair(NamedTuple):
    """A pair as people judged it."""

    prompt: str
    a: str
    b: str
    p: float
    """P(a preferred)."""
    tie: bool
    cluster: str
    """Debate or paradigm: folds and intervals go by it."""


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a gzipped JSONL file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


# --- prepare


def prepare(options: argparse.Namespace) -> None:
    """Write text, tokenizer, pairs and floors."""
    out: Path = options.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    texts = training_text(options.data, int(options.megabytes * 1e6))
    with gzip.open(out / "text.jsonl.gz", "wt", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    make_tokenizer(texts, options.vocabulary, out / "tokenizer")
    for task in TASKS:
        pairs = ukp_pairs(options.data) if task == "ukp" else blimp_pairs(options.data, task)
        if options.pairs:
            pairs = random.Random(0).sample(pairs, min(options.pairs, len(pairs)))
        floors = [measure_floors(pairs, fold) for fold in range(FOLDS)]
        with gzip.open(out / f"{task}.json.gz", "wt", encoding="utf-8") as file:
            json.dump({"pairs": pairs, "floors": floors}, file)
        print(task, {name: mean_of(floors, name) for name in ("bag_of_words", "longer")})


def training_text(data: Path, limit: int) -> list[str]:
    """Return about ``limit`` characters of documents; a prompt seen before leaves its reply."""
    texts: list[str] = []
    seen: set[int] = set()
    size = 0
    documents = list(prompts_and_replies(data))
    random.Random(0).shuffle(documents)
    for document in documents:
        keys = [zlib.crc32(part[:200].encode()) for part in document]
        parts = document if keys[0] not in seen else document[1:]
        text = "\n".join(parts).replace("<|endoftext|>", "").strip()
        if len(text) < 100 or (keys[1] in seen and len(document[1]) > 100):
            continue
        seen.update(keys)
        texts.append(text)
        size += len(text)
        if size > limit:
            break
    return texts


def prompts_and_replies(data: Path) -> Iterator[tuple[str, str]]:
    """Yield instructions with replies of people and of models."""
    for row in lines(data / "lm_sft.jsonl.gz"):
        yield row["prompt"], row["response"]
    prompts = {row["p"]: row["prompt"] for row in lines(data / "alpaca_eval_prompts.jsonl.gz")}
    replies = list(lines(data / "alpaca_eval_responses.jsonl.gz"))
    random.Random(2).shuffle(replies)
    used: Counter[int] = Counter()
    for row in replies:
        used[row["p"]] += 1
        if used[row["p"]] <= REPLIES:
            yield prompts[row["p"]], row["text"]


def make_tokenizer(texts: Sequence[str], size: int, folder: Path) -> None:
    """Train a byte-level BPE tokenizer without a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts[:20_000], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    fast.save_pretrained(folder)


def ukp_pairs(data: Path) -> list[JudgedPair]:
    """Return the argument pairs, P(a) from the five votes."""
    pairs = []
    for row in lines(data / "human_pairs.jsonl.gz"):
        if row["source"] != "ukpconvarg" or row["a"].strip() == row["b"].strip():
            continue
        votes = [{"a": 1.0, "b": 0.0, "tie": 0.5}[vote] for vote in row["votes"]]
        p = sum(votes) / len(votes)
        if row["label"] != "tie" and (p > 0.5) != (row["label"] == "a"):
            p = {"a": 0.6, "b": 0.4}[row["label"]]
        debate = row["meta"]["topic"].split("_")[0]
        tie = row["label"] == "tie"
        prompt = row["prompt"].strip() + "\n"
        pairs.append(JudgedPair(prompt, row["a"], row["b"], 0.5 if tie else p, tie, debate))
    return pairs


def blimp_pairs(data: Path, task: str) -> list[JudgedPair]:
    """Return BLiMP's sentence pairs, the first 400 of each paradigm, right ones on random sides."""
    draw = random.Random(1)
    pairs = []
    for row in lines(data / "minimal_pairs.jsonl.gz"):
        if row["source"] == "blimp" and int(row["id"].rpartition("/")[2]) < ITEMS:
            good, bad = (row["a"], row["b"]) if row["label"] == "a" else (row["b"], row["a"])
            left = draw.random() < 0.5
            a, b = (good, bad) if left else (bad, good)
            paradigm = row["meta"]["uid"]
            cluster = paradigm if task == "blimp" else phenomenon(paradigm)
            pairs.append(JudgedPair("", a, b, float(left), False, cluster))
    return pairs


def phenomenon(paradigm: str) -> str:
    """Return the phenomenon that a BLiMP paradigm belongs to."""
    found = [name for name, starts in PHENOMENA.items() if paradigm.startswith(starts)]
    if len(found) != 1:
        raise ValueError(f"paradigm {paradigm!r} is of {found or 'no phenomenon known here'}")
    return found[0]


class Fold(NamedTuple):
    """Training pairs in a fixed random order, and decided pairs of clusters unseen in training."""

    train: list[JudgedPair]
    held: list[JudgedPair]


def split(pairs: Sequence[JudgedPair], fold: int) -> Fold:
    """Return one fold of the pairs."""
    clusters = sorted({pair.cluster for pair in pairs})
    random.Random(7).shuffle(clusters)
    place = {cluster: number % FOLDS for number, cluster in enumerate(clusters)}
    held = [pair for pair in pairs if place[pair.cluster] == fold and not pair.tie]
    train = [pair for pair in pairs if place[pair.cluster] != fold]
    # One prompt may stand for all pairs (BLiMP): its rows are cut into groups in this order.
    random.Random(fold).shuffle(train)
    return Fold(train, held)


def measure_floors(pairs: Sequence[JudgedPair], fold: int) -> dict[str, Any]:
    """Return what the floors get right of a fold, pair by pair (1, 0, or 0.5 for a draw)."""
    train, held = split(pairs, fold)
    won = np.array([pair.p > 0.5 for pair in held])
    longer = np.array([len(pair.a) - len(pair.b) for pair in held])
    return {
        "bag_of_words": best_bag_of_words([p for p in train if not p.tie], held, won).tolist(),
        "longer": np.where(longer == 0, 0.5, (longer > 0) == won).tolist(),
    }


def write_preferences(path: Path, pairs: Sequence[JudgedPair]) -> None:
    """Write pairs as preference rows, the preferred one first."""
    with path.open("wb") as file:
        for pair in pairs:
            first = pair.p >= 0.5
            chosen, rejected = (pair.a, pair.b) if first else (pair.b, pair.a)
            p = max(pair.p, 1 - pair.p)
            row = Preference(
                prompt=pair.prompt,
                chosen=chosen,
                rejected=rejected,
                margin=2 * p - 1,
                p_chosen=p,
                prompt_id=pair.cluster,
                tie=pair.tie,
            )
            file.write(encode(row) + b"\n")


def best_bag_of_words(
    train: Sequence[JudgedPair], held: Sequence[JudgedPair], won: np.ndarray
) -> np.ndarray:
    """Return which held-out pairs a linear model of words gets right, at its best penalty."""
    x, y = features(train), np.array([pair.p > 0.5 for pair in train], dtype=float)
    test = features(held)
    results = []
    for penalty in (1e-4, 1e-3, 1e-2):
        weights = fit_linear(x, y, penalty)
        score = test @ weights
        results.append(np.where(score == 0, 0.5, (score > 0) == won))
    return max(results, key=lambda right: right.mean())


def features(pairs: Sequence[JudgedPair]) -> csr_matrix:
    """Return hashed counts of unigrams and bigrams of a minus those of b."""
    rows, columns, values = [], [], []
    for number, pair in enumerate(pairs):
        for text, sign in ((pair.a, 1.0), (pair.b, -1.0)):
            words = ["<s>", *re.findall(r"\w+|[^\w\s]", text.lower())]
            for gram in (*words[1:], *map(" ".join, pairwise(words))):
                rows.append(number)
                columns.append(zlib.crc32(gram.encode()) % BUCKETS)
                values.append(sign)
    return csr_matrix((values, (rows, columns)), shape=(len(pairs), BUCKETS))


def fit_linear(x: csr_matrix, y: np.ndarray, penalty: float) -> np.ndarray:
    """Return the weights of a logistic regression without intercept."""

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        score = x @ w
        loss = np.logaddexp(0, score) - y * score
        slope = 1 / (1 + np.exp(-score)) - y
        return loss.mean() + penalty / 2 * w @ w, x.T @ slope / len(y) + penalty * w

    found = minimize(
        objective, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 60}
    )
    return np.asarray(found.x)


def mean_of(folds: Sequence[dict[str, Any]], name: str) -> float:
    """Return the mean over the pairs of all folds."""
    return float(np.mean([value for fold in folds for value in fold[name]]))


# --- run


def run(options: argparse.Namespace) -> None:
    """Train the language model and reward models, score the held-out folds, write the result."""
    started = time.perf_counter()
    shutil.rmtree(options.work, ignore_errors=True)
    figures = pretrain(options, options.work / "lm")
    figures["pretrain_seconds"] = time.perf_counter() - started
    print(json.dumps(figures), flush=True)
    done: list[FoldResult] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        waiting = [pool.submit(run_fold, options, t, f) for t in TASKS for f in range(FOLDS)]
        for future in as_completed(waiting):
            done.append(future.result())
            print(json.dumps(done[-1].row), flush=True)
            # After every fold: a run that is cut short keeps what it has.
            figures["seconds"] = time.perf_counter() - started
            write_result(options, figures, done)
    print(json.dumps(figures, indent=1))


class FoldResult(NamedTuple):
    """One fold: its row for the record, and per held-out pair what was right, and its cluster."""

    row: dict[str, Any]
    scored: tuple[np.ndarray, ...]


def run_fold(options: argparse.Namespace, task: str, number: int) -> FoldResult:
    """Train on one fold and score what it holds out."""
    begun = time.perf_counter()
    with gzip.open(options.prepared / f"{task}.json.gz", "rt", encoding="utf-8") as file:
        prepared = json.load(file)
    fold = split([JudgedPair(*pair) for pair in prepared["pairs"]], number)
    right = train_and_score(options, options.work / f"{task}-{number}", task, fold)
    floors = prepared["floors"][number]
    row = {"task": task, "fold": number, "pairs": len(right), "accuracy": float(np.mean(right))}
    row |= {name: float(np.mean(values)) for name, values in floors.items()}
    row["seconds"] = time.perf_counter() - begun
    names = [pair.cluster for pair in fold.held]
    scored = map(np.array, (right, floors["bag_of_words"], floors["longer"], names))
    return FoldResult(row, tuple(scored))


def write_result(
    options: argparse.Namespace, figures: dict[str, float], done: list[FoldResult]
) -> None:
    """Add the figures of the tasks whose folds are all done, and write the file."""
    import torch

    for task in TASKS:
        scored = [result.scored for result in done if result.row["task"] == task]
        if len(scored) == FOLDS:
            figures |= summary(task, *map(np.concatenate, zip(*scored, strict=True)))
    cuda = torch.cuda.is_available()
    result = {
        "bench": "reward_quality",
        "command": "python benchmarks/reward_quality.py run",
        "date": date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if cuda else platform.processor(),
        "versions": package_versions(),
        "settings": {k: str(v) for k, v in vars(options).items() if k not in ("command",)},
        "figures": figures,
        "runs": sorted((x.row for x in done), key=lambda row: (row["task"], row["fold"])),
    }
    write_json(options.out / "reward_quality.json", result)


def pretrain(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Train a small Llama from scratch on the text."""
    from train import sft
    from train.config import ModelShape, SftOptions

    shape = ModelShape(
        layers=options.layers,
        width=options.width,
        heads=options.width // 64,
        kv_heads=options.width // 64,
        mlp=options.width * 8 // 3 // 64 * 64,
        max_positions=2048,
    )
    sft.run(
        SftOptions(
            data=(str(options.prepared / "text.jsonl.gz"),),
            model="scratch",
            tokenizer=str(options.prepared / "tokenizer"),
            shape=shape,
            output=folder,
            epochs=options.epochs,
            max_steps=options.steps,
            batch_size=0,
            row_tokens=options.row_tokens,
            max_length=512,
            learning_rate=options.learning_rate,
            warmup=0.05,
            min_learning_rate=0.1,
            weight_decay=0.1,
            adam_betas=(0.9, 0.95),
        )
    )
    found = json.loads((folder / "training.json").read_text(encoding="utf-8"))["figures"]
    kept = ("steps", "loss", "real_tokens_per_s", "mfu")
    return {f"lm_{name}": found[name] for name in kept if name in found}


def train_and_score(
    options: argparse.Namespace, folder: Path, task: str, fold: Fold
) -> list[float]:
    """Train on a fold and return which of its held-out pairs the model orders right."""
    from train import reward
    from train.config import RewardOptions
    from train.reward_model import load_reward_model

    folder.mkdir(parents=True)
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    write_preferences(train, fold.train)
    write_preferences(test, fold.held)
    output = folder / "reward-model"
    settings: dict[str, Any] = {
        "data": (str(train),),
        "eval_data": (str(test),),
        "model": str(options.work / "lm"),
        "output": output,
        "average": "pair",
        "max_length": 512,
        "compile": "none",
        "members": options.members,
        "weight_decay": 0.05,
        **SETTINGS["ukp" if task == "ukp" else "blimp"],
    }
    if task == "ukp":
        # A debate's stance is one prompt: some thirty arguments, all of their pairs in one step.
        settings["batch_size"] = 4
    else:
        # All sentences share the empty prompt: groups of a row's size, one a step.
        settings |= {"batch_size": 1, "row_tokens": options.blimp_row_tokens}
    reward.run(RewardOptions(**settings))
    model = load_reward_model(output)
    prompts = [pair.prompt for pair in fold.held]
    first = model.score(prompts, [pair.a for pair in fold.held])
    second = model.score(prompts, [pair.b for pair in fold.held])
    d = (first - second).numpy() * np.array([1.0 if p.p > 0.5 else -1.0 for p in fold.held])
    return np.where(d == 0, 0.5, d > 0).tolist()


def summary(
    task: str, right: np.ndarray, floor: np.ndarray, longer: np.ndarray, clusters: np.ndarray
) -> dict[str, float]:
    """Return accuracy, floors and gains with intervals over resampled clusters."""
    names, member = np.unique(clusters, return_inverse=True)
    counts = np.bincount(member)
    sums = np.stack([np.bincount(member, values) for values in (right, floor, longer)])
    draws = np.random.default_rng(0).multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=2000
    )
    means = (draws @ sums.T) / (draws @ counts)[:, None]
    gain = means[:, 0] - means[:, 1:].max(axis=1)
    best = max(float(floor.mean()), float(longer.mean()))
    return {
        f"{task}_pairs": len(right),
        f"{task}_accuracy": float(right.mean()),
        f"{task}_accuracy_low": float(np.quantile(means[:, 0], 0.025)),
        f"{task}_accuracy_high": float(np.quantile(means[:, 0], 0.975)),
        f"{task}_bag_of_words": float(floor.mean()),
        f"{task}_longer": float(longer.mean()),
        f"{task}_gain": float(right.mean()) - best,
        f"{task}_gain_low": float(np.quantile(gain, 0.025)),
        f"{task}_gain_high": float(np.quantile(gain, 0.975)),
    }


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare", help="write text, tokenizer, folds and floors (CPU)")
    first.add_argument("--data", type=Path, default=Path("../shared/data"))
    first.add_argument("--out", type=Path, required=True)
    first.add_argument("--megabytes", type=float, default=250.0, help="of training text")
    first.add_argument("--vocabulary", type=int, default=16384)
    first.add_argument("--pairs", type=int, default=0, help="of each task; 0: all")
    second = commands.add_parser("run", help="train and score (GPU)")
    second.add_argument("--prepared", type=Path, required=True)
    second.add_argument("--out", type=Path, required=True)
    second.add_argument("--work", type=Path, default=Path("/tmp/reward_quality"))
    second.add_argument("--jobs", type=int, default=3, help="folds at a time")
    second.add_argument("--layers", type=int, default=8)
    second.add_argument("--width", type=int, default=512)
    second.add_argument("--epochs", type=float, default=3.0)
    second.add_argument("--steps", type=int, default=0, help="of pretraining at most; 0: epochs")
    second.add_argument("--row-tokens", type=int, default=65536)
    second.add_argument("--learning-rate", type=float, default=1.5e-3)
    second.add_argument("--members", type=int, default=2, help="of each ensemble")
    second.add_argument("--blimp-row-tokens", type=int, default=8192)
    options = parser.parse_args()
    prepare(options) if options.command == "prepare" else run(options)


if __name__ == "__main__":
    main()
