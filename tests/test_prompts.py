"""Every shipped template, rubric and constitution loads, renders and says what it is."""

from __future__ import annotations

import re
import tomllib

import pytest

from feedback.backends.chat import ChatTokenizer
from feedback.constitution import draw_principle, load_constitution
from feedback.errors import TemplateError
from feedback.parsing import parse_reply
from feedback.rubric import parse_rubric
from feedback.structured import reply_schema
from feedback.templates import load_criteria, load_rubric, load_template, prompts_folder, render

FOLDER = prompts_folder()
TEMPLATES = sorted(path.stem for path in (FOLDER / "judges").glob("*.toml"))
RUBRICS = sorted(path.stem for path in (FOLDER / "rubrics").glob("*.md"))
CONSTITUTIONS = sorted(path.stem for path in (FOLDER / "constitutions").glob("*.toml"))
SHOWN = {"pairwise": 2, "listwise": 3, "rating": 1}


def rendered(name: str):
    template = load_template(name)
    return render(
        template,
        prompt=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "First question?"},
            {"role": "assistant", "content": "First answer."},
            {"role": "user", "content": "Second question?"},
        ],
        completions=[f"reply number {place}" for place in range(SHOWN[template.kind])],
        rubric=load_rubric(template.rubric),
        principle="Prefer the kinder reply.",
        gold="The known answer.",
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_renders_whole(name):
    template = load_template(name)
    assert template.name == name
    assert template.compare_with, "say which published prompt it can be compared with"
    assert (FOLDER / "judges" / f"{name}.toml").read_text().startswith("# ")
    messages = rendered(name)
    assert messages[-1]["role"] == "user"
    text = "\n".join(turn["content"] for turn in messages)
    assert not re.search(r"\{[a-z_]+\}", text), "a placeholder was left unfilled"
    for place in range(SHOWN[template.kind]):
        assert text.count(f"reply number {place}\n") == 1
    assert text.count("Second question?") == 1
    if "{rubric}" in template.user + template.system:
        assert load_rubric(template.rubric).splitlines()[0] in text
    for opening in re.findall(r"<([a-z_]+)(?: [^<>]*)?>", text):
        assert text.count(f"</{opening}>") == len(re.findall(rf"<{opening}[ >]", text))


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_changes_least_stands_first(name):
    """Engines reuse a shared head: criteria, then the conversation, then completions."""
    template = load_template(name)
    places = [template.user.find(f"{{{word}}}") for word in ("rubric", "prompt")]
    completions = min(
        template.user.find(word)
        for word in ("{completion", "{completion_a}", "{completions}")
        if word in template.user
    )
    assert max(places) < completions
    assert places[0] < places[1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_reply_asked_for_can_be_read(name):
    template = load_template(name)
    label = template.labels[1]
    if template.mode == "structured":
        key = {"pairwise": "verdict", "rating": "score", "listwise": "ranking"}[template.kind]
        value = {"pairwise": f'"{label}"', "rating": label, "listwise": '[["B"], ["A", "C"]]'}
        text = f'{{"rationale": "so", "{key}": {value[template.kind]}}}'
        assert key in reply_schema(template)["required"]
    elif template.kind == "listwise":
        text = " > ".join(reversed(template.labels[:3]))
        text = text if template.mode == "label" else f"Remarks.\nRanking: {text}"
    elif template.mode == "rationale":
        word = "Rating" if template.kind == "rating" else "Verdict"
        assert f"'{word}: " in template.user
        text = f"Some reasons.\n{word}: {label}"
    else:
        text = label
    reading = parse_reply(text, template, shown=SHOWN[template.kind])
    assert reading.outcome == "decided"
    assert reading.label in (label, None)
    if template.tie is not None and template.kind == "pairwise":
        tie = text.replace(label, template.tie)
        assert parse_reply(tie, template).outcome == "tie"


@pytest.mark.parametrize("tokenizer_name", ["smollm2", "qwen25"])
def test_labels_are_single_tokens_for_real_tokenizers(shared_data, tokenizer_name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / tokenizer_name)
    chat = ChatTokenizer(tokenizer)
    for name in TEMPLATES:
        template = load_template(name)
        if template.mode == "label":
            assert len(set(chat.label_ids(template.choices))) == len(template.choices)


def test_rubric_with_criteria():
    rubric = load_criteria("helpfulness-criteria")
    assert rubric.weights == {
        "correctness": 3.0,
        "completeness": 2.0,
        "clarity": 1.0,
        "brevity": 1.0,
    }
    assert "- correctness (weight 3): " in rubric.text
    assert "+++" not in rubric.text
    assert rubric.criteria[0].shown.startswith("correctness: Every")


@pytest.mark.parametrize("name", RUBRICS)
def test_rubric_loads(name):
    assert load_rubric(name)


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ("+++\n[[criteria]]\n+++", "criterion name None"),
        ('+++\n[[criteria]]\nname = "a"\n+++', "has no text"),
        ('+++\n[[criteria]]\nname = "a"\ntext = "x"\nweigth = 2\n+++', "did you mean 'weight'"),
        ('+++\n[[criteria]]\nname = "a"\ntext = "x"\nweight = 0\n+++', "not a positive number"),
        ('+++\n[[criteria]]\nname = "A b"\ntext = "x"\n+++', "lower-case"),
        ("+++\ncriteria = 3\n+++", "must be tables"),
        ("+++\nnot toml\n+++", "not valid TOML"),
        ("+++\n[[criteria]]", "no closing line"),
        ("+++\nscale = 5\n+++", "unknown key 'scale'"),
        ('+++\ncriteria = [{name = "a", text = "x"}, {name = "a", text = "y"}]\n+++', "twice"),
    ],
)
def test_wrong_rubric_headers_are_named(tmp_path, header, problem):
    path = tmp_path / "mine.md"
    path.write_text(header + "\nBody.\n")
    with pytest.raises(TemplateError, match=problem) as caught:
        load_criteria(str(path))
    assert "mine.md" in str(caught.value)


def test_rubric_without_header_is_its_text(tmp_path):
    rubric = parse_rubric("  Be kind.\n", path=tmp_path)
    assert (rubric.text, rubric.criteria) == ("Be kind.", ())


@pytest.mark.parametrize("name", CONSTITUTIONS)
def test_constitution_is_complete(name):
    constitution = load_constitution(name)
    assert constitution.name == name
    assert constitution.compare_with
    assert constitution.having("choose", "critique", "revise") == constitution.principles
    assert len(constitution.principles) >= 5


def test_principles_are_drawn_evenly_and_repeatably():
    principles = load_constitution("harmlessness").principles
    drawn = [draw_principle(principles, 7, f"p{number}").id for number in range(3200)]
    assert drawn == [draw_principle(principles, 7, f"p{number}").id for number in range(3200)]
    counts = [drawn.count(principle.id) for principle in principles]
    # 200 expected each; chi-square with 15 degrees of freedom stays under 37.7 with p = 0.999.
    assert sum((count - 200) ** 2 / 200 for count in counts) < 37.7
    assert drawn != [draw_principle(principles, 8, f"p{number}").id for number in range(3200)]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no \\[\\[principles\\]\\]"),
        ('[[principles]]\nchoose = "x"', "no 'id'"),
        ('[[principles]]\nid = "a"\nchose = "x"', "did you mean 'choose'"),
        ('[[principles]]\nid = "a"\ncritique = "x"', "belong together"),
        ('[[principles]]\nid = "a"\nchoose = ""', "empty"),
        ('principles = [{id = "a", choose = "x"}, {id = "a", choose = "y"}]', "twice"),
        ("title = 1", "unknown field 'title'"),
        ("[[", "not valid TOML"),
        ("principles = 3", "must be tables"),
    ],
)
def test_wrong_constitutions_are_named(tmp_path, text, problem):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(TemplateError, match=problem):
        load_constitution(str(path))


def test_unknown_names_name_the_nearest():
    with pytest.raises(TemplateError, match="did you mean 'harmlessness'"):
        load_constitution("harmlesness")
    with pytest.raises(TemplateError, match="did you mean 'summarisation'"):
        load_rubric("summarization")


def test_readme_lists_every_prompt():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in [*TEMPLATES, *RUBRICS, *CONSTITUTIONS]:
        assert f"`{name}`" in text, name


def test_toml_files_hold_no_unused_fields():
    for path in (FOLDER / "judges").glob("*.toml"):
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        if table["mode"] != "label":
            assert table["max_tokens"] > 1
