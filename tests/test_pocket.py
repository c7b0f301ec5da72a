"""The models that ship: they load, fit, speak and judge, and read exactly what they learned."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from feedback.errors import InputError
from feedback.pocket import NAMES, model_path
from feedback.records import Message
from feedback.templates import load_rubric, load_template, render
from recipes.pocket_model.chat import LABELS, TAGS, chat_text
from recipes.pocket_model.contests import Contest
from recipes.pocket_model.evaluate import load
from recipes.pocket_model.judge_rows import TEMPLATES
from recipes.pocket_model.scoring import compare, perplexity

DIALOGUE: tuple[Message, ...] = (
    {"role": "user", "content": "I need a bus from Napa to Fresno."},
    {"role": "assistant", "content": "Sure. What day would you like to travel?"},
    {"role": "user", "content": "On March 8th please."},
    {"role": "assistant", "content": "How many tickets do you need?"},
    {"role": "user", "content": "Just two."},
    {
        "role": "assistant",
        "content": "Please confirm: 2 bus tickets from Napa to Fresno on March 8th.",
    },
)
TABLE = "Please book a table for 4 at Villa Romana in Boston on May 9th at 7 pm."
ROOM = "I need a hotel room in Orlando for 3 nights."
# What the customer says, the better reply, the worse one.
PAIRS = (
    (TABLE, "Please confirm: a table for 4 at Villa Romana in Boston on May 9th at 7 pm.",
     "Please confirm: a table for 4 at Villa Romana in Boston on May 9th at 9 pm."),
    (TABLE, "Please confirm: a table for 4 at Villa Romana in Boston on May 9th at 7 pm.",
     "Please confirm: a table for 6 at Villa Romana in Boston on May 9th at 7 pm."),
    (TABLE, "You want a table for 4 at Villa Romana in Boston on May 9th at 7 pm. Is that right?",
     "You want a table for 4 at Villa Romana in Chicago on May 9th at 7 pm. Is that right?"),
    (TABLE, "You want a table for 4 at Villa Romana in Boston on May 9th at 7 pm. Is that right?",
     "What time would you like?"),
    (TABLE, "Please confirm: a table for 4 at Villa Romana in Boston on May 9th at 7 pm.",
     "Please confirm: a table for 4 at"),
    (ROOM, "What is your check-in date?", "Figure it out yourself."),
    (ROOM, "What is your check-in date?", "Cats sleep most of the day."),
    (ROOM, "Which hotel would you like?", "How many nights will you stay?"),
    (ROOM, "Okay, a room in Orlando for 3 nights. Which hotel would you like?",
     "Okay, a room in Denver for 3 nights. Which hotel would you like?"),
    (ROOM, "Sure. What day will you arrive?", "Goodbye."),
    ("Can you transfer $75 to Karen?", "Sure. From which account?",
     "Your transfer has been made."),
    ("I want to rent a car in Boston tomorrow.", "What type of car would you like?",
     "Which movie would you like to see?"),
)  # fmt: skip
# Changing one of these texts changes what the shipped judge reads: it must be trained again.
LEARNED = {
    "pairwise": "30b462a3f525e3e9",
    "pairwise-tie": "24cb381d0c82c426",
    "pairwise-numbers": "88e2ad9feebb541e",
    "pairwise-brief": "65b3272f8dafad95",
    "pairwise-rationale": "9615440572e9a1cf",
    "rating": "6c7242be397a3af0",
    "listwise": "c3cb5c79709a6e61",
}
RUBRICS = {"booking": "4c37ec64551aa7fd", "helpfulness": "ce25a2f1f7504da7"}


@pytest.fixture(scope="module")
def assistant() -> tuple[Any, Any]:
    return load(model_path("pocket:judge"))


@pytest.fixture(scope="module")
def second_judge() -> tuple[Any, Any]:
    return load(model_path("pocket:second-judge"))


def test_everything_fits() -> None:
    files = [path for path in model_path("policy").parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if "__pycache__" not in path.parts) < 25e6


def test_names_resolve_and_typos_are_answered() -> None:
    assert all((model_path(name) / "model.safetensors").exists() for name in NAMES)
    with pytest.raises(InputError, match="second-judge"):
        model_path("pocket:second-juge")


@pytest.mark.parametrize("name", ["policy", "second-judge"])
def test_transformers_reads_the_folder_as_the_recipe_does(name: str) -> None:
    """AutoTokenizer, the chat template and the recipe's own text make the same ids."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path(name))
    text = tokenizer.apply_chat_template(list(DIALOGUE), tokenize=False)
    assert text == chat_text(DIALOGUE)
    opened = tokenizer.apply_chat_template(
        list(DIALOGUE[:1]), tokenize=False, add_generation_prompt=True
    )
    assert opened == chat_text(DIALOGUE[:1], add_generation_prompt=True)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for token in (*LABELS, *TAGS):
        assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) == 1, token


def test_the_engine_reads_questions_as_the_judge_learned_them() -> None:
    """Token for token: a broken tag would leave the judge guessing."""
    from transformers import AutoTokenizer

    from feedback.backends.chat import ChatTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path("judge"))
    chat = ChatTokenizer(tokenizer)
    question = render(
        load_template("pairwise"),
        prompt=list(DIALOGUE[:1]),
        completions=["For what date?", "Goodbye."],
        rubric=load_rubric("booking"),
    )
    learned = tokenizer(chat_text(question, add_generation_prompt=True))["input_ids"]
    assert chat.ids(question) == learned
    assert tokenizer.convert_tokens_to_ids("<reply_a>") in learned
    assert len(chat.label_ids(LABELS)) == len(LABELS)


def test_learned_texts_are_unchanged() -> None:
    found = {}
    for name in TEMPLATES:
        template = load_template(name)
        text = json.dumps([template.system, template.user, list(template.labels)])
        found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert found == LEARNED
    rubrics = {
        name: hashlib.sha256(load_rubric(name).encode()).hexdigest()[:16] for name in RUBRICS
    }
    assert rubrics == RUBRICS


def test_invented_dialogue_is_no_surprise(
    assistant: tuple[Any, Any], second_judge: tuple[Any, Any]
) -> None:
    """Far below the 4,096 of a uniform guess; turned words are far more surprising."""
    turned = [
        Message(role=m["role"], content=" ".join(m["content"].split()[::-1])) for m in DIALOGUE
    ]
    for model in (assistant, second_judge):
        plain = perplexity(*model, [DIALOGUE])
        assert plain < 12
        assert perplexity(*model, [turned]) > 5 * plain


@pytest.mark.parametrize("judge", ["assistant", "second_judge"])
def test_judges_tell_the_better_reply(judge: str, request: pytest.FixtureRequest) -> None:
    contests = [
        Contest((Message(role="user", content=said),), (good, bad), ("", ""))
        for said, good, bad in PAIRS
    ]
    answers = compare(*request.getfixturevalue(judge), contests)
    right = (answers.first > 0.5) & (answers.second > 0.5)
    assert right.sum() >= len(PAIRS) - 1, [PAIRS[place] for place in (~right).nonzero()[0]]
    assert answers.mass.min() > 0.9


def test_prompt_sets_are_what_the_generator_writes() -> None:
    from feedback.records import encode
    from recipes.pocket_model.prompts import SETS, make_sets

    sets = make_sets()
    for name, rows in sets.items():
        written = Path(SETS / f"{name}.jsonl").read_bytes().splitlines()
        assert [encode(row) for row in rows] == written
    assert sum(map(len, sets.values())) >= 600
    ids = [row.prompt_id for rows in sets.values() for row in rows]
    assert len(set(ids)) == len(ids)
