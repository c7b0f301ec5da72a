"""Shards to groups: merging, boundaries, end tokens, truncation, splits; nothing silent."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from feedback.errors import InputError, ShardError
from feedback.records import Preference, Ranking
from feedback.shards import ShardWriter
from train.chat import ChatFormat, DataReport
from train.data import Group, Pair, read_groups, split_by_prompt
from train.documents import read_documents
from train.labels import with_ranked_pairs
from train.training_data import warn_of_repeats


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    """The byte-level chat tokenizer: one token per byte, markers apart."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def preference(prompt: Any, chosen: Any, rejected: Any, **fields: Any) -> Preference:
    values = {"margin": 0.0, "p_chosen": 0.8, "prompt_id": str(prompt)} | fields
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, **values)


def write(folder: Path, kind: str, rows: list[Any]) -> Path:
    with ShardWriter(folder, kind) as writer:
        for row in rows:
            writer.append(row)
        writer.finish({})
    return folder


def read(path: Path, tokenizer: Any, **options: Any) -> tuple[list[Group], DataReport]:
    return read_groups([path], tokenizer, **({"max_length": 200} | options))


def text(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(list(ids)))


def test_rows_of_one_prompt_make_one_group(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        preference("Hi", "Hello!", "Go away", p_chosen=0.9, weight=2.0, margin=0.8),
        preference("Bye", "See you", "Go away"),
        preference("Hi", "Hello!", "What?", p_chosen=0.5, tie=True),
        preference("Hi", "What?", "Go away", p_chosen=0.7),
    ]
    groups, report = read(write(tmp_path / "p", "preferences", rows), tokenizer)
    assert len(groups) == 2
    first = groups[0]
    assert text(tokenizer, first.prompt_ids) == "<|user|>Hi<eos><|assistant|>"
    assert [text(tokenizer, ids) for ids in first.completions] == [
        "Hello!<eos>",
        "Go away<eos>",
        "What?<eos>",
    ]
    assert first.pairs == (
        Pair(0, 1, 0.9, 2.0, False, 0.8),
        Pair(0, 2, 0.5, 1.0, True, 0.0),
        Pair(2, 1, 0.7, 1.0, False, 0.0),
    )
    assert (report.rows, report.groups, report.completions) == (4, 2, 5)
    assert (report.pairs, report.ties) == (4, 1)
    assert report.warnings == []


def test_labels_are_settled_on_reading(tmp_path: Path, tokenizer: Any) -> None:
    """The preferred side first, p = 1/2 and ties are one thing, weight 0 is left out."""
    rows = [
        preference("Hi", "a", "b", p_chosen=0.3, margin=0.4),
        preference("Hi", "a", "c", p_chosen=0.5),
        preference("Hi", "b", "c", p_chosen=0.8, tie=True),
        preference("Hi", "d", "a", p_chosen=0.9, weight=0.0),
    ]
    groups, report = read(write(tmp_path / "p", "preferences", rows), tokenizer)
    assert [text(tokenizer, ids) for ids in groups[0].completions] == ["b<eos>", "a<eos>", "c<eos>"]
    assert groups[0].pairs == (
        Pair(0, 1, 0.7, 1.0, False, 0.4),
        Pair(1, 2, 0.5, 1.0, True, 0.0),
        Pair(0, 2, 0.5, 1.0, True, 0.0),
    )
    assert (report.rows, report.pairs, report.ties, report.weightless) == (4, 3, 2, 1)
    assert report.warnings == ["1 rows left out: their weight is 0"]


def test_messages_and_text_of_one_meaning_are_told_apart_only_by_content(
    tmp_path: Path, tokenizer: Any
) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "More"},
    ]
    answer = [{"role": "assistant", "content": "Sure"}]
    rows = [preference(turns, answer, "No", prompt_id="chat")]
    groups, _ = read(write(tmp_path / "p", "preferences", rows), tokenizer)
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text(tokenizer, groups[0].prompt_ids) == expected
    assert text(tokenizer, groups[0].completions[0]) == "Sure<eos>"


def test_a_completion_of_several_messages_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    answer = [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    path = write(tmp_path / "p", "preferences", [preference("Hi", answer, "c")])
    with pytest.raises(InputError, match="2 messages"):
        read(path, tokenizer)


def test_equal_completions_are_dropped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [preference("Hi", "Yes  please", "yes please"), preference("Hi", "a", "b")]
    groups, report = read(write(tmp_path / "p", "preferences", rows), tokenizer)
    assert (len(groups), report.identical) == (1, 1)
    assert any("same text" in warning for warning in report.warnings)


def test_pairs_that_the_cut_makes_equal_are_dropped(tmp_path: Path, tokenizer: Any) -> None:
    rows = [preference("Hi", "a" * 60 + "b", "a" * 60 + "c"), preference("Hi", "a" * 60 + "b", "d")]
    path = write(tmp_path / "p", "preferences", rows)
    groups, report = read(path, tokenizer, max_length=40)
    assert [len(group.completions) for group in groups] == [2]
    assert (report.pairs, report.cut_equal, report.unlabelled) == (1, 1, 0)
    assert any("completions are the same" in warning for warning in report.warnings)
    assert read(path, tokenizer, max_length=200)[1].pairs == 2
    path = write(tmp_path / "q", "preferences", rows[:1])
    with pytest.raises(InputError, match="no labelled completions"):
        read(path, tokenizer, max_length=40)


def test_evaluation_prompts_that_are_trained_on_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "a", "completion": "x"}, {"text": "one"}, {"text": "two"}]
    training, report = documents(tmp_path / "a.jsonl", rows, tokenizer)
    others = [{"prompt": "a", "completion": "y"}, {"text": "two"}, {"text": "three"}]
    held_out, _ = documents(tmp_path / "b.jsonl", others, tokenizer)
    warn_of_repeats(training, held_out[2:], report)
    assert report.warnings == []
    warn_of_repeats(training, held_out, report)
    assert "2 of 3 evaluation rows have a prompt of the training data" in report.warnings[0]


def test_nothing_left_is_an_error(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "p", "preferences", [preference("Hi", "a", "A")])
    with pytest.raises(InputError, match="no labelled completions"):
        read(path, tokenizer)


@pytest.mark.parametrize(("field", "value"), [("p_chosen", 1.2), ("weight", -1.0)])
def test_impossible_labels_are_refused(
    tmp_path: Path, tokenizer: Any, field: str, value: float
) -> None:
    path = write(tmp_path / "p", "preferences", [preference("Hi", "a", "b", **{field: value})])
    with pytest.raises(InputError, match=field):
        read(path, tokenizer)


def test_preferences_made_elsewhere_are_told_how_to_come_in(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "Q", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(InputError, match="come in by rlaif import --format trl") as caught:
        read(path, tokenizer)
    assert f"{path}:1: not a preference row" in str(caught.value)


def test_other_shards_are_refused_by_kind(tmp_path: Path, tokenizer: Any) -> None:
    from feedback.records import Prompt

    path = write(tmp_path / "p", "prompts", [Prompt(prompt_id="1", prompt="Hi")])
    with pytest.raises(ShardError, match="holds prompts"):
        read(path, tokenizer)


def ranking(**fields: Any) -> Ranking:
    values: dict[str, Any] = {
        "prompt": "Hi",
        "completions": ["a", "b", "c"],
        "scores": [0.5, 2.0, 0.5],
        "ranking": [[1], [0, 2]],
        "prompt_id": "1",
    }
    return Ranking(**(values | fields))


def test_rankings_keep_scores_tiers_and_comparisons(tmp_path: Path, tokenizer: Any) -> None:
    rows = [ranking(comparisons=[(0, 1, 0.2), (0, 2, 0.5)])]
    groups, report = read(write(tmp_path / "r", "rankings", rows), tokenizer)
    group = groups[0]
    assert group.scores == (0.5, 2.0, 0.5)
    assert group.ranking == ((1,), (0, 2))
    assert group.pairs[0][:3] == (1, 0, pytest.approx(0.8))  # turned round: b is preferred
    assert group.pairs[1] == Pair(0, 2, 0.5, 1.0, True, 0.0)
    assert (report.rankings, report.pairs, report.ties) == (1, 2, 1)
    assert with_ranked_pairs(groups) == groups


def test_order_alone_implies_pairs(tmp_path: Path, tokenizer: Any) -> None:
    groups, _ = read(write(tmp_path / "r", "rankings", [ranking()]), tokenizer)
    assert groups[0].pairs == ()
    assert with_ranked_pairs(groups)[0].pairs == (
        Pair(1, 0, 1.0, 1.0, False, 1.5),
        Pair(1, 2, 1.0, 1.0, False, 1.5),
        Pair(0, 2, 0.5, 1.0, True, 0.0),
    )


def test_rankings_without_two_judged_completions_are_left_out(
    tmp_path: Path, tokenizer: Any
) -> None:
    empty = ranking(ranking=[])
    alone = ranking(completions=["a"], scores=[1.0], ranking=[[0]])
    groups, report = read(write(tmp_path / "r", "rankings", [empty, ranking(), alone]), tokenizer)
    assert (len(groups), report.unjudged) == (1, 2)
    assert any("2 rankings left out" in warning for warning in report.warnings)
    for name, kind, row, counted in (
        ("e", "rankings", empty, "1 with fewer than two"),
        ("a", "rankings", alone, "1 with fewer than two"),
        ("w", "preferences", preference("Hi", "a", "b", weight=0.0), "1 of weight 0"),
    ):
        with pytest.raises(InputError, match=counted):
            read(write(tmp_path / name, kind, [row]), tokenizer)


@pytest.mark.parametrize(
    "fields",
    [
        {"scores": [1.0]},
        {"ranking": [[0], [3]]},
        {"ranking": [[0], [1, 0]]},
        {"comparisons": [(0, 5, 0.7)]},
        {"comparisons": [(-1, 0, 0.7)]},
        {"comparisons": [(1, 1, 0.7)]},
        {"comparisons": [(0, 1, 1.9)]},
    ],
)
def test_inconsistent_rankings_are_refused(
    tmp_path: Path, tokenizer: Any, fields: dict[str, Any]
) -> None:
    path = write(tmp_path / "r", "rankings", [ranking(), ranking(**fields)])
    with pytest.raises(InputError, match="prompt '1'") as caught:
        read(path, tokenizer)
    assert str(caught.value).startswith(f"{path / 'rankings-00000.jsonl'}:2: ")


LONG = preference("Hi", "x" * 40, "short")  # 5 prompt tokens: <|user|> H i <eos> <|assistant|>


def test_truncation_cuts_the_end_and_says_so(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "p", "preferences", [LONG])
    groups, report = read(path, tokenizer, max_length=20)
    assert text(tokenizer, groups[0].completions[0]) == "x" * 15  # and no end token
    assert text(tokenizer, groups[0].completions[1]) == "short<eos>"
    assert (report.truncated_completions, report.truncated_prompts) == (1, 0)
    assert any("max_length 20" in warning for warning in report.warnings)


def test_long_prompts_lose_their_beginning(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "p", "preferences", [preference("abcdefghij" * 5, "x" * 40, "y")])
    groups, report = read(path, tokenizer, max_length=20)
    assert text(tokenizer, groups[0].prompt_ids) == "cdefghij<eos><|assistant|>"
    assert text(tokenizer, groups[0].completions[0]) == "x" * 10
    assert (report.truncated_completions, report.truncated_prompts) == (1, 1)


def test_dropping_keeps_what_fits(tmp_path: Path, tokenizer: Any) -> None:
    rows = [LONG, preference("Hi", "short", "b"), preference("Ho", "x" * 40, "y")]
    path = write(tmp_path / "p", "preferences", rows)
    groups, report = read(path, tokenizer, max_length=20, overlong="drop")
    assert len(groups) == 1
    assert [text(tokenizer, ids) for ids in groups[0].completions] == ["short<eos>", "b<eos>"]
    assert groups[0].pairs[0][:2] == (0, 1)
    assert (report.dropped_overlong, report.unlabelled) == (2, 1)


def test_overlong_can_be_an_error(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path / "p", "preferences", [LONG])
    with pytest.raises(InputError, match="exceed max_length 20"):
        read(path, tokenizer, max_length=20, overlong="error")


def test_groups_too_large_for_a_row_are_split_by_pairs(tmp_path: Path, tokenizer: Any) -> None:
    names = [letter * 9 for letter in "abcd"]  # 10 tokens each with the end
    rows = [preference("Hi", names[i], names[i + 1]) for i in range(3)]
    path = write(tmp_path / "p", "preferences", rows)
    groups, report = read(path, tokenizer, row_tokens=35)
    assert report.split_groups == 1
    assert [len(group.completions) for group in groups] == [3, 2]  # a b c, then c d
    assert [[pair[:2] for pair in group.pairs] for group in groups] == [[(0, 1), (1, 2)], [(0, 1)]]


def test_the_split_is_by_prompt_and_steady() -> None:
    def groups(count: int) -> list[Group]:
        return [
            Group(prompt_id=str(i), prompt_ids=[i // 2, 7], completions=[[1]]) for i in range(count)
        ]

    train, held_out = split_by_prompt(groups(400), 0.25, seed=0)
    assert 60 <= len(held_out) <= 140
    assert not {g.prompt_ids[0] for g in train} & {g.prompt_ids[0] for g in held_out}
    more_held_out = {g.prompt_id for g in split_by_prompt(groups(600), 0.25, seed=0)[1]}
    assert {g.prompt_id for g in held_out} <= more_held_out
    assert {g.prompt_id for g in split_by_prompt(groups(400), 0.25, seed=1)[1]} != {
        g.prompt_id for g in held_out
    }
    with pytest.raises(InputError, match="leaves a side empty"):
        split_by_prompt(groups(2), 0.01, seed=0)
    with pytest.raises(InputError, match=r"all 20 rows share one prompt.*give eval_data"):
        split_by_prompt(groups(1) * 20, 0.3, seed=0)


def real_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["smollm2", "qwen25"])
def test_real_chat_templates(shared_data: Path, name: str) -> None:
    """Prompt, completion and end joined as ids spell what the template writes."""
    tokenizer = real_tokenizer(shared_data / "tokenizers" / name)
    chat = ChatFormat(tokenizer)
    assert tokenizer.decode(chat.end_ids) == "<|im_end|>"
    prompt = chat.prompt_text("Name a bird.")
    ids = [*chat.prompt_ids([prompt])[0], *chat.completion_ids(["Heron"])[0]]
    turns = [{"role": "user", "content": "Name a bird."}, {"role": "assistant", "content": "Heron"}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(ids) == whole.rstrip("\n")
    assert (
        list(chat.prompt_ids([prompt])[0]) == tokenizer(prompt, add_special_tokens=False).input_ids
    )


def test_plain_tokenizers_end_in_eos_and_start_once(tokenizer: Any) -> None:
    from copy import deepcopy

    plain = deepcopy(tokenizer)
    plain.chat_template = None
    chat = ChatFormat(plain)
    assert chat.end_ids == [plain.eos_token_id]
    assert list(chat.prompt_ids([""])[0]) == [plain.eos_token_id]  # something must predict token 1
    with pytest.raises(InputError, match="no chat template"):
        chat.prompt_text([{"role": "user", "content": "Hi"}])
    plain.eos_token = None
    with pytest.raises(InputError, match="never stop"):
        ChatFormat(plain)


def test_a_template_without_an_end_gets_eos_or_is_refused(tokenizer: Any) -> None:
    from copy import deepcopy

    bare = deepcopy(tokenizer)
    bare.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert ChatFormat(bare).end_ids[-1] == bare.eos_token_id
    bare.eos_token = None
    with pytest.raises(InputError, match="never stop"):
        ChatFormat(bare)
    bare.chat_template = "{{ messages | nonsense }}"
    with pytest.raises(InputError, match="template fails"):
        ChatFormat(bare)


def test_pad_equal_to_end_is_a_warning(tokenizer: Any) -> None:
    from copy import deepcopy

    same = deepcopy(tokenizer)
    same.pad_token = same.eos_token
    report = DataReport()
    ChatFormat(same, report=report)
    assert any("pad token" in warning for warning in report.warnings)


def documents(
    path: Path, rows: list[dict[str, Any]], tokenizer: Any, **options: Any
) -> tuple[list[Group], DataReport]:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(lines)
    return read_documents([path], tokenizer, **({"max_length": 100} | options))


def test_text_rows_carry_loss_from_the_second_token(tmp_path: Path, tokenizer: Any) -> None:
    groups, _ = documents(tmp_path / "a.jsonl.gz", [{"text": "abc"}], tokenizer)
    group = groups[0]
    assert text(tokenizer, group.prompt_ids) == "<eos>"  # no BOS here: EOS starts a document
    assert text(tokenizer, group.completions[0]) == "abc<eos>"
    assert group.loss_masks == ()


def test_long_texts_go_on_and_lose_nothing(tmp_path: Path, tokenizer: Any) -> None:
    groups, report = documents(
        tmp_path / "a.jsonl", [{"text": "abcdefghij"}], tokenizer, max_length=5
    )
    predicted = "".join(text(tokenizer, group.completions[0]) for group in groups)
    assert predicted == "abcdefghij<eos>"  # every token is predicted once
    assert all(len(g.prompt_ids) + len(g.completions[0]) <= 5 for g in groups)
    assert report.split_groups == 1


def test_conversations_count_assistant_turns_only(tmp_path: Path, tokenizer: Any) -> None:
    turns = [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "cd"},
        {"role": "user", "content": "ef"},
        {"role": "assistant", "content": "gh"},
    ]
    groups, _ = documents(tmp_path / "a.jsonl", [{"messages": turns}], tokenizer)
    group = groups[0]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text(tokenizer, [*group.prompt_ids, *group.completions[0]]) == whole
    assert text(tokenizer, group.prompt_ids) == "<|user|>ab<eos><|assistant|>"
    counted = [
        token
        for token, counts in zip(group.completions[0], group.loss_masks[0], strict=True)
        if counts
    ]
    assert text(tokenizer, counted) == "cd<eos>gh<eos>"


def test_prompt_and_completion_rows(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "ab", "completion": "cd"}]
    groups, _ = documents(tmp_path / "a.jsonl", rows, tokenizer)
    assert text(tokenizer, groups[0].completions[0]) == "cd<eos>"
    assert text(tokenizer, groups[0].prompt_ids) == "<|user|>ab<eos><|assistant|>"
    everywhere, _ = documents(tmp_path / "a.jsonl", rows, tokenizer, completion_only=False)
    assert text(tokenizer, everywhere[0].prompt_ids) == "<|user|>"
    assert len(everywhere[0].completions[0]) == 3 + 1 + 3  # a b <eos> <|assistant|> c d <eos>


def test_a_conversation_as_prompt_and_completion(tmp_path: Path, tokenizer: Any) -> None:
    """Only the completion's turns count, also when the prompt holds assistant turns."""
    row = {
        "prompt": [
            {"role": "user", "content": "ab"},
            {"role": "assistant", "content": "cd"},
            {"role": "user", "content": "ef"},
        ],
        "completion": [{"role": "assistant", "content": "gh"}],
    }
    groups, _ = documents(tmp_path / "a.jsonl", [row], tokenizer)
    assert text(tokenizer, groups[0].completions[0]) == "gh<eos>"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"question": "a"}', "a row needs text"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "use rlaif dpo or rlaif reward"),
        ('{"prompt": "a", "completions": ["b"], "ranking": [[0]]}', "use rlaif rrhf"),
        ('{"text": 3}', "wrong type"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant message"),
    ],
)
def test_bad_rows_name_file_and_line(
    tmp_path: Path, tokenizer: Any, line: str, message: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=message) as caught:
        read_documents([path], tokenizer, max_length=50)
    assert f"{path}:2:" in str(caught.value)


@pytest.mark.parametrize("completion_only", [True, False])
def test_text_rows_split_by_row_and_others_by_prompt(
    tmp_path: Path, tokenizer: Any, completion_only: bool
) -> None:
    """All pieces of a text are on one side, and all completions of a prompt."""
    rows = [{"id": f"text {i}", "text": f"{i} " + "x" * 20} for i in range(40)]
    rows += [
        {"prompt_id": f"prompt {i // 2}", "prompt": f"q{i // 2}", "completion": f"a{i}"}
        for i in range(80)
    ]
    groups, _ = documents(
        tmp_path / "a.jsonl", rows, tokenizer, max_length=16, completion_only=completion_only
    )
    train, held_out = ({g.prompt_id for g in s} for s in split_by_prompt(groups, 0.3, seed=0))
    assert not train & held_out
    for kind in ("text", "prompt"):
        assert 4 <= sum(name.startswith(kind) for name in held_out) <= 24  # of 40


def test_a_row_without_room_for_its_completion_is_dropped(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": "abcdefghij" * 9, "completion": "xy"},
        {"prompt": "a", "completion": "x" * 90},
        {"prompt": "a", "completion": "x"},
    ]
    groups, report = documents(tmp_path / "a.jsonl", rows, tokenizer, max_length=40)
    assert len(groups) == 2
    assert (report.truncated_completions, report.dropped_overlong, report.unlabelled) == (1, 1, 0)
    assert any("1 rows dropped" in warning for warning in report.warnings)


def test_unused_fields_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": "a", "lable": 1}, {"text": "b", "lable": 2}]
    _, report = documents(tmp_path / "a.jsonl", rows, tokenizer)
    assert any("'lable' of 2 rows" in warning for warning in report.warnings)
