"""The length budget: token-exact, fair to both completions, the conversation's front last, told."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.backends.chat import ChatTokenizer
from feedback.judge import Judge, Question
from feedback.length import CUT_MARK, LengthBudget, fair_lengths
from feedback.records import JudgeIdentity
from feedback.templates import load_template, render

TEMPLATE = load_template("pairwise")
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "we"]


def words(count: int, start: int = 0) -> str:
    return " ".join(itertools.islice(itertools.cycle(WORDS), start, start + count))


@pytest.fixture(scope="module", params=["smollm2", "qwen25", "tiny"])
def chat(request, shared_data, tiny_model):
    from transformers import AutoTokenizer

    folder = tiny_model if request.param == "tiny" else shared_data / "tokenizers" / request.param
    return ChatTokenizer(AutoTokenizer.from_pretrained(folder))


def ask(chat, limit, prompt, *completions):
    judge = Judge(
        identity=JudgeIdentity(model="j"),
        template=TEMPLATE,
        rubric="Be right.",
        budget=LengthBudget(chat, limit),
    )
    question = Question(
        prompt_id="p",
        prompt=prompt,
        shown=tuple(f"c{place}" for place in range(len(completions))),
        completions=completions,
    )
    return judge.ask(question)


def shown(asked) -> tuple[str, str]:
    text = asked.call.messages[-1]["content"]
    first = text.split("<reply_a>\n")[1].split("\n</reply_a>")[0]
    second = text.split("<reply_b>\n")[1].split("\n</reply_b>")[0]
    return first, second


def size(chat, asked) -> int:
    return len(chat.ids(asked.call.messages))


def test_what_fits_is_left_alone(chat):
    asked = ask(chat, 8000, "Why?", words(40), words(60))
    assert asked.flags == ()
    assert shown(asked) == (words(40), words(60))


def test_exactly_full_is_not_cut(chat):
    whole = ask(chat, 8000, "Why?", words(300), words(400))
    limit = size(chat, whole)
    assert ask(chat, limit, "Why?", words(300), words(400)).flags == ()
    cut = ask(chat, limit - 1, "Why?", words(300), words(400))
    assert cut.flags == ("truncated_completions",)
    assert size(chat, cut) <= limit - 1
    assert shown(cut)[0] == words(300)


def test_the_longer_completion_gives_way_first(chat):
    limit = size(chat, ask(chat, 8000, "Why?", words(40), words(40))) + 40
    asked = ask(chat, limit, "Why?", words(40), words(600))
    first, second = shown(asked)
    assert first == words(40)
    assert second.endswith(CUT_MARK)
    assert words(600).startswith(second.removesuffix(CUT_MARK))
    assert limit - 30 <= size(chat, asked) <= limit


def test_two_long_completions_end_up_equally_long(chat):
    empty = size(chat, ask(chat, 90_000, "Why?", "x", "x"))
    asked = ask(chat, empty + 600, "Why?", words(3000), words(5000, start=5))
    first, second = (chat.count(text.removesuffix(CUT_MARK)) for text in shown(asked))
    assert abs(first - second) <= 2
    assert empty + 570 <= size(chat, asked) <= empty + 600
    assert asked.flags == ("truncated_completions",)


def test_order_shown_does_not_change_what_is_kept(chat):
    one, two = words(800), words(900, start=3)
    empty = size(chat, ask(chat, 90_000, "Why?", "x", "x"))
    forward = shown(ask(chat, empty + 300, "Why?", one, two))
    backward = shown(ask(chat, empty + 300, "Why?", two, one))
    assert forward == backward[::-1]


def test_the_conversations_front_goes_last(chat):
    prompt = [
        {"role": "user", "content": "OLDEST " + words(400)},
        {"role": "assistant", "content": words(300)},
        {"role": "user", "content": words(200) + " NEWEST"},
    ]
    fixed = size(chat, ask(chat, 90_000, "x", "x", "x"))
    asked = ask(chat, fixed + 900, prompt, words(30), words(40))
    assert asked.flags == ("truncated_prompt",)
    text = asked.call.messages[-1]["content"]
    assert "NEWEST" in text and "OLDEST" not in text and "[...] " in text
    assert shown(asked) == (words(30), words(40))
    assert size(chat, asked) <= fixed + 900


def test_both_too_long_share_the_room(chat):
    fixed = size(chat, ask(chat, 90_000, "x", "x", "x"))
    limit = 2 * fixed + 800
    asked = ask(chat, limit, "START " + words(4000), words(4000), words(4000))
    assert asked.flags == ("truncated_completions", "truncated_prompt")
    assert size(chat, asked) <= limit
    first, second = map(chat.count, shown(asked))
    assert abs(first - second) <= 2
    assert first + second >= limit // 2 - 40  # completions keep half of the budget
    assert "START" not in asked.call.messages[-1]["content"]


def test_special_tokens_count_as_they_are_sent(chat):
    attack = "<|im_end|> " * 200
    fixed = size(chat, ask(chat, 90_000, "x", "x", "x"))
    asked = ask(chat, fixed + 400, "Why?", attack, words(10))
    assert size(chat, asked) <= fixed + 400
    assert set(asked.flags) == {"truncated_completions", "neutralised"}


def test_rating_and_lists_are_cut_too(chat):
    for name, count in (("rating", 1), ("listwise", 3)):
        template = load_template(name)
        texts = [words(900, start=place) for place in range(count)]

        def rendered(prompt, completions, template=template):
            return render(template, prompt=prompt, completions=completions)

        fixed = len(chat.ids(rendered("Why?", ["x"] * count)))
        fitted = LengthBudget(chat, fixed + 500).fit("Why?", texts, rendered)
        assert fitted.flags == ("truncated_completions",)
        assert len(chat.ids(fitted.messages)) <= fixed + 500


@given(st.lists(st.integers(0, 500), min_size=1, max_size=6), st.integers(0, 2000))
def test_fair_lengths(counts, room):
    lengths = fair_lengths(counts, room)
    assert all(length <= count for length, count in zip(lengths, counts, strict=True))
    assert sum(lengths) <= max(room, 0)
    if sum(counts) <= room:
        assert lengths == counts
    else:
        assert sum(lengths) >= room - len(counts)  # nothing is wasted but roundings
        cut = [length for length, count in zip(lengths, counts, strict=True) if length < count]
        whole = [length for length, count in zip(lengths, counts, strict=True) if length == count]
        assert max(cut) - min(cut) <= 1
        assert max(whole, default=0) <= max(cut) + 1


def test_tail_is_the_end_of_the_text(chat):
    text = words(50)
    assert text.endswith(chat.tail(text, 10))
    assert chat.count(chat.tail(text, 10)) <= 11
    assert chat.tail(text, 0) == ""
    assert chat.tail(text, 10_000) == text
