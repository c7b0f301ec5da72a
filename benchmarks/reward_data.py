"""What reward_quality.py trains on: judged pairs in folds, and the floors on the same folds."""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import shutil
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.sparse import csr_matrix

from feedback.records import Preference, encode

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

TASKS = ("ukp", "blimp", "blimp_phenomena")


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


def prepare(options: argparse.Namespace) -> None:
    """Write pairs and floors."""
    out: Path = options.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for task in TASKS:
        pairs = ukp_pairs(options.data) if task == "ukp" else blimp_pairs(options.data, task)
        if options.pairs:
            pairs = random.Random(0).sample(pairs, min(options.pairs, len(pairs)))
        floors = [measure_floors(pairs, fold) for fold in range(FOLDS)]
        with gzip.open(out / f"{task}.json.gz", "wt", encoding="utf-8") as file:
            json.dump({"pairs": pairs, "floors": floors}, file)
        print(task, {name: mean_of(floors, name) for name in ("bag_of_words", "longer")})


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


def split(pairs: Sequence[JudgedPair], fold: int, *, seed: int = 7) -> Fold:
    """Return one of ``FOLDS`` folds of the pairs, by cluster."""
    clusters = sorted({pair.cluster for pair in pairs})
    random.Random(seed).shuffle(clusters)
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
