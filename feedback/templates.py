"""Judge templates: text files under ``prompts/`` that say what is asked, and in which form.

A template is a TOML file; its header names the kind of verdict, the mode, the labels and the tie
label, so that code never guesses them. Placeholders are filled in one pass over the template: an
unknown ``{word}`` stays as written, and text that was filled in is never scanned again. Everything
filled in is data: it is fenced by tags, and what could end a fence or steer a chat template inside
it is defused (``neutralise``).

This module knows nothing of engines or replies.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from feedback.errors import TemplateError, nearest
from feedback.records import Message, PromptText, content_id
from feedback.rubric import Rubric, parse_rubric

__all__ = [
    "Template",
    "describe",
    "load_criteria",
    "load_rubric",
    "load_template",
    "neutralise",
    "prompts_folder",
    "render",
    "render_prompt",
]

Kind = Literal["pairwise", "listwise", "rating"]
Mode = Literal["label", "rationale", "structured"]

_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
# Zero-width joiners stay in the text (scripts and emoji need them), so patterns look through them.
_JOINERS = "[\u200c\u200d]*"
# Control tokens of the chat formats in use. Inside data each loses its first character to a
# look-alike, so that no tokenizer maps it to a control token.
_CONTROL = re.compile(
    r"<\|[^|<>\n]{1,40}\|>"  # ChatML, Llama 3 and 4, Phi, Command R, Granite, this project's own
    r"|<｜[^｜<>\n]{1,40}｜>"  # DeepSeek
    r"|</?s>|<(?:bos|eos|pad|unk|mask|sop|eop)>|<[BE]OS_TOKEN>"
    r"|(?-i:\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_(?:CALLS|RESULTS|CONTENT)|IMG(?:_BREAK|_END)?"
    r"|ARGS|CALL_ID|THINK|PREFIX|SUFFIX|MIDDLE|[gs]?MASK|CLS|SEP|PAD|UNK|BOS|EOS)\])"
    r"|<</?SYS>>|</?(?:start|end)_of_turn>|<\|?im_(?:start|end)\|?>"
    r"|</?(?:think|tool_call|tool_response|tools)>"
    r"|<(?:repo_?name|file_sep|filename|gh_stars|issue_(?:start|comment|closed)"
    r"|jupyter_(?:start|text|code|output|script)|empty_output)>",  # SmolLM, StarCoder
    re.IGNORECASE,
)
_FENCE_WORDS = ("conversation", "reply", "replies", "reference", "principle", "criteria")
_FENCE = re.compile(
    r"[<＜﹤](?=[\s\u200c\u200d]*[/／]?[\s\u200c\u200d]*(?:"
    + "|".join(_JOINERS.join(word) for word in _FENCE_WORDS)
    + "))",
    re.IGNORECASE,
)
_LOOKALIKE = {"<": "\u2039", "＜": "\u2039", "﹤": "\u2039", "[": "\u27e6"}
# What no reader sees: control characters (terminal escapes among them), bidirectional overrides,
# zero-width characters other than joiners, tag characters.
_INVISIBLE = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
)
_DROPPED = re.compile(f"[{_INVISIBLE}]+")
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
_LONG_BLANK = re.compile(r"(\s{100})\s{100,}")
_SUSPECT = re.compile(f"[<＜﹤\\[\r\x0b\x0c\x85\u2028\u2029{_INVISIBLE}]")
_LONG_TEXT = 2000  # blank space in shorter texts pushes nothing out of sight


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """One judge template, as loaded."""

    name: str
    kind: Kind
    user: str
    """Text of the user turn, with placeholders."""
    labels: tuple[str, ...]
    """Pairwise: the labels of the first-shown and second-shown completion. Listwise: the labels of
    the places, as many as the longest list. Rating: the scale's points, worst first."""
    mode: Mode = "label"
    """``label``: the verdict is the first generated token; ``rationale``: reasons first, then a
    marked verdict; ``structured``: a JSON object."""
    tie: str | None = None
    """Label that means 'equally good'; None: the judge must choose."""
    system: str = ""
    rubric: str = "helpfulness"
    """File in ``prompts/rubrics`` that fills ``{rubric}`` unless the run names another."""
    max_tokens: int = 1
    compare_with: str = ""
    """The published prompt that this one can be compared with, in words."""
    sha256: str = ""
    """Hash of everything above that reaches the judge."""

    @property
    def choices(self) -> tuple[str, ...]:
        """All labels the judge may answer with; the tie label, if any, is last."""
        return self.labels if self.tie is None else (*self.labels, self.tie)

    @property
    def reads_labels(self) -> bool:
        """Whether the verdict can be read from the labels' probabilities at one token."""
        return self.mode == "label" and self.kind != "listwise"


def prompts_folder() -> Path:
    """Return the folder of shipped prompts: inside the package, or beside it in a source tree."""
    inside = Path(__file__).parent / "prompts"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "prompts"


def load_template(name: str) -> Template:
    """Load a template by the name of a shipped one, or by the path of a TOML file.

    Raises:
        TemplateError: not found, a field is unknown, missing or inconsistent; names the way out.
    """
    path = _template_path(name)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TemplateError(f"not valid TOML: {error}", path=path) from error
    known = {field.name for field in fields(Template)} - {"sha256"}
    for key in table:
        if key not in known:
            raise TemplateError(f"unknown field {key!r}{nearest(key, known)}", path=path)
    for key in ("name", "kind", "user", "labels"):
        if key not in table:
            raise TemplateError(f"field {key!r} is missing", path=path)
    table["labels"] = tuple(table["labels"])
    sent = {key: table.get(key) for key in ("kind", "mode", "labels", "tie", "system", "user")}
    template = Template(**table, sha256=content_id(sent, length=64))
    _check(template, path)
    return template


def _template_path(name: str) -> Path:
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise TemplateError("no such template file", path=path)
        return path
    if Path(name).is_file():
        raise TemplateError("a template is a .toml file", path=name)
    folder = prompts_folder() / "judges"
    path = folder / f"{name}.toml"
    if not path.is_file():
        known = sorted(file.stem for file in folder.glob("*.toml"))
        raise TemplateError(
            f"no template named {name!r}{nearest(name, known)} "
            f"(there are: {', '.join(known)}; or give the path of a .toml file)"
        )
    return path


def _check(template: Template, path: Path) -> None:
    needed = {
        "pairwise": {"completion_a", "completion_b"},
        "listwise": {"completions"},
        "rating": {"completion"},
    }
    if template.kind not in needed:
        raise TemplateError(
            f"kind {template.kind!r} is not pairwise, listwise or rating", path=path
        )
    if template.mode not in ("label", "rationale", "structured"):
        raise TemplateError(
            f"mode {template.mode!r} is not label, rationale or structured", path=path
        )
    present = set(_PLACEHOLDER.findall(template.user + template.system))
    if missing := (needed[template.kind] | {"prompt"}) - present:
        raise TemplateError(f"placeholder {{{min(missing)}}} does not occur in it", path=path)
    if template.kind == "pairwise" and len(template.labels) != 2:
        raise TemplateError("a pairwise template offers two labels (and 'tie' apart)", path=path)
    if len(set(template.choices)) != len(template.choices):
        raise TemplateError("labels must differ from each other and from the tie label", path=path)
    if template.mode == "label" and template.kind != "listwise" and template.max_tokens != 1:
        raise TemplateError("mode 'label' reads one token: max_tokens must be 1", path=path)


def neutralise(text: str) -> str:
    """Defuse what could end a fence, act as a control token or hide from a reader inside ``text``.

    The first character of each fence tag and control token becomes a look-alike; invisible
    characters go, line ends become line feeds, and endless blank space is cut short. All other text
    is unchanged.
    """
    if _is_plain(text):
        return text
    text = _DROPPED.sub("", _LINE_ENDS.sub("\n", text))
    text = _CONTROL.sub(lambda found: _LOOKALIKE[found[0][0]] + found[0][1:], text)
    text = _FENCE.sub(lambda found: _LOOKALIKE[found[0]], text)
    return _LONG_BLANK.sub(r"\1", text) if len(text) >= _LONG_TEXT else text


def _is_plain(text: str) -> bool:
    """Return whether nothing in ``text`` needs defusing: most texts, told by a glance at each."""
    if "<" in text or "[" in text or len(text) >= _LONG_TEXT:
        return False
    if text.isascii():
        return text.replace("\n", "").replace("\t", "").isprintable()
    return _SUSPECT.search(text) is None


def render_prompt(prompt: PromptText) -> str:
    """Return a prompt as the transcript that judges read, one ``Role: text`` paragraph a turn."""
    if isinstance(prompt, str):
        return "User: " + neutralise(prompt)
    return "\n".join(
        f"{neutralise(turn['role']).capitalize()}: {neutralise(turn['content'])}" for turn in prompt
    )


def render(
    template: Template,
    *,
    prompt: PromptText,
    completions: Sequence[str],
    rubric: str = "",
    principle: str = "",
    gold: str = "",
) -> tuple[Message, ...]:
    """Return the messages that ask the judge about ``completions``, in the order shown.

    Raises:
        ValueError: the number of completions does not fit the template's kind.
    """
    values: dict[str, str] = {
        "prompt": render_prompt(prompt),
        "rubric": rubric.strip(),
        "principle": principle.strip(),
        "gold": neutralise(gold),
    }
    values |= _completion_values(template, [neutralise(text) for text in completions])

    def fill(found: re.Match[str]) -> str:
        return values.get(found[1], found[0])

    user = Message(role="user", content=_PLACEHOLDER.sub(fill, template.user).strip())
    if not template.system:
        return (user,)
    return (Message(role="system", content=_PLACEHOLDER.sub(fill, template.system).strip()), user)


def _completion_values(template: Template, completions: list[str]) -> dict[str, str]:
    if template.kind == "pairwise":
        if len(completions) != 2:
            raise ValueError(f"a pairwise template shows 2 completions, got {len(completions)}")
        return {"completion_a": completions[0], "completion_b": completions[1]}
    if template.kind == "rating":
        if len(completions) != 1:
            raise ValueError(f"a rating template shows 1 completion, got {len(completions)}")
        return {"completion": completions[0]}
    if not 2 <= len(completions) <= len(template.labels):
        raise ValueError(
            f"template {template.name!r} shows 2 to {len(template.labels)} completions, "
            f"got {len(completions)}"
        )
    blocks = (
        f'<reply name="{label}">\n{text}\n</reply>'
        for label, text in zip(template.labels, completions, strict=False)
    )
    return {
        "completions": "\n\n".join(blocks),
        "labels": ", ".join(template.labels[: len(completions)]),
    }


def load_rubric(name: str) -> str:
    """Return the text of a rubric as judges read it; see ``load_criteria``."""
    return load_criteria(name).text


def load_criteria(name: str) -> Rubric:
    """Return a shipped rubric by name, or one by the path of a .md or .txt file.

    Raises:
        TemplateError: there is none of that name, or its header is wrong.
    """
    path = Path(name)
    if path.suffix in (".md", ".txt"):
        if not path.is_file():
            raise TemplateError("no such file", path=path)
    else:
        folder = prompts_folder() / "rubrics"
        path = folder / f"{name}.md"
        if not path.is_file():
            known = sorted(file.stem for file in folder.glob("*.md"))
            raise TemplateError(
                f"no rubric named {name!r}{nearest(name, known)} (there are: {', '.join(known)})"
            )
    return parse_rubric(path.read_text(encoding="utf-8"), path=path)


def describe(template: Template) -> dict[str, Any]:
    """Return what a manifest records of a template."""
    return {
        "name": template.name,
        "kind": template.kind,
        "mode": template.mode,
        "sha256": template.sha256,
    }
