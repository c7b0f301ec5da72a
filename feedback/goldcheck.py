"""A programmatic check of replies to prompts whose details are known; no model takes part in it.

The prompts of ``prompts/sets/booking-*.jsonl`` carry in ``meta`` which details the customer gave
and which are still missing. From that follows what a sound next reply does: it asks for something
that is missing, or, when nothing is, confirms what was given; it names no value that the customer
did not give; it ends by itself, at a full stop or question mark; it is neither a stub nor a
ramble; it does not repeat itself. Each part is a number in [0, 1] and the score is their product,
so that a reply is worth no more than its weakest part.

The check measures policies and judges. It never labels training data: what it sees is a narrow,
mechanical notion of a good reply, and a policy trained on it would learn its gaps. Known gaps: an
invented name at the very beginning of a sentence passes; a question in words that ``_ASKS`` does
not know counts as none; fluency is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["GoldCheck", "gold_check", "gold_score"]

_FEWEST_WORDS, _MOST_WORDS = 2, 45
_WORDS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7,
    "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12,
}  # fmt: skip
_NUMBER = "|".join(list(_WORDS)[2:])
_MONTH = "january|february|march|april|may|june|july|august|september|october|november|december"
_DAY = "(?:mon|tues|wednes|thurs|fri|satur|sun)day"
_HALF = {"a": "am", "p": "pm", "in the morning": "am", "in the afternoon": "pm"} | {
    "in the evening": "pm",
    "at night": "pm",
}
_TIME = re.compile(
    r"\b(\d{1,2})(?::(\d\d))? ?(?:(a|p)\.?m\b\.?|(in the (?:morning|afternoon|evening)|at night))"
    r"|\b(\d{1,2}):(\d\d)\b",
    re.IGNORECASE,
)
_DATE = re.compile(
    rf"\b(?:({_MONTH}) (\d{{1,2}})(?:st|nd|rd|th)?|(?:(next|this) )?({_DAY})|(today|tomorrow))\b",
    re.IGNORECASE,
)
_MONEY = re.compile(r"\$ ?\d[\d,]*(?:\.\d+)?")
# "one" alone is too often a pronoun ("Which one?").
_COUNT = re.compile(
    rf"\b(?:\d+|{_NUMBER}|one(?= (?:people|person|ticket|night|seat|passenger)))\b", re.IGNORECASE
)
_NAME = re.compile(r"(?<![.?!:] )(?<!^)\b[A-Z][\w'&@]*(?: (?:[A-Z][\w'&@]*|of|the))*")
_PLAIN = frozenset(
    re.findall(
        r"\S+",
        """
        a account alright also am an and any appointment are at bus but cab can car certainly city
        confirm correct could date details did do does doctor event flight for from got hotel how i
        i'd i'll i'm i've if in is it it's just may movie my no of ok okay on or our please pm
        rental restaurant ride room salon shall should so sure table thank thanks that the theater
        there this ticket tickets time to train transfer was we were what when where which who whom
        will would yes you your
        """,
    )
)
"""Words that are no names even where they are capitalised inside a sentence."""
_OPTIONS: dict[str, tuple[str, ...]] = {
    "account": ("checking", "savings"),
    "car": ("compact", "standard", "full-size"),
    "ride": ("shared", "regular", "luxury"),
    "cabin": ("premium", "economy", "premium economy", "business class", "first class"),
    "doctor": (
        "dentist",
        "dermatologist",
        "eye doctor",
        "general practitioner",
        "gynecologist",
        "pediatrician",
    ),
    "place": ("airport", "library", "museum", "zoo", "university", "station", "city hall"),
    "event": ("festival", "rodeo", "comedy night"),
}
"""Values that are ordinary words; everything else is found by its form."""

_WH = r"\b(?:what|which|have an?|any|your)(?: [\w'-]+){0,2} "
_ASK = r"\b(?:what|which|the|your|any)(?: [\w'-]+){0,2} "
_PLACE = r"\b(?:where|(?:what|which|the|your)(?: [\w'-]+){0,2} (?:city|area|town|location))\b"
_ASKS: dict[str, str] = {
    "date": _ASK + r"(?:dates?|days?)\b|\bwhen\b|what day",
    "time": _ASK + r"times?\b|\bwhen\b|\bhow (?:early|late)\b",
    "city": _PLACE,
    "origin": r"\b(?:leav|depart|start|origin|coming)\w*",
    "destination": r"\bdestination|\b(?:going|travel+ing|headed|heading|go)\b|\barriv",
    "place": r"\bwhere\b|\bdestination|\baddress|drop",
    "count": r"\bhow (?:many|large|big)\b(?! nights)|\b(?:number of|party size)",
    "nights": r"\bhow (?:many nights|long)\b|number of nights|check-?(?: )?out|nights\?",
    "restaurant": _WH + r"(?:restaurants?|place)\b",
    "hotel": _WH + r"(?:hotels?|property|place)\b",
    "event": _WH + r"(?:events?|shows?|concerts?|games?)\b|\bsee\b.*\?",
    "movie": _WH + r"(?:movies?|films?)\b|\bwhat movie|\blike to (?:see|watch)\b",
    "theater": _WH + r"(?:theat(?:er|re)s?|cinema)\b",
    "ride": _WH + r"(?:rides?|cabs?)\b|\bor (?:a )?(?:luxury|regular|shared)\b",
    "doctor": _WH + r"(?:doctors?|specialist)\b|\bwho would you like to see\b",
    "salon": _WH + r"(?:salons?|stylist|barber)\b",
    "car": _WH + r"(?:cars?|car type|car class)\b",
    "amount": r"\bhow much\b|" + _WH + r"amount\b|\bamount (?:should|would|do)\b",
    "person": r"\bwho(?:m)?\b|\brecipient\b",
    "account": r"\b(?:what|which)(?: [\w'-]+){0,2} account\b|\bor (?:your )?(?:savings|checking)\b",
    "cabin": _WH + r"(?:class|cabin)\b",
}
_QUESTION = re.compile(
    r"\?$|^(?:and |also,? |okay,? |sure,? |for |at |in |on |to |from )?"
    r"(?:what|which|when|where|how|who|whom|do you|would you like|is that)\b",
    re.IGNORECASE,
)


_OFFER = re.compile(
    r"^(?:\w+, )?(?:do|would) you (?:\w+ )?(?:want|like|need|prefer|have)\b", re.IGNORECASE
)


class GoldCheck(NamedTuple):
    """A reply's score and the parts that it is the product of; each lies in [0, 1]."""

    score: float
    purpose: float
    """Asks for what is missing (1), for that and something known (0.5), or only confirms what was
    given (half of the share named); with nothing missing: the share of given values confirmed."""
    grounding: float
    """Halved by each value that the customer did not give, or has taken back."""
    ending: float
    """1 for a reply that the model ended itself, after ``.``, ``?`` or ``!``; else 0.5."""
    length: float
    """1 between 2 and 45 words, else 0.5."""
    repetition: float
    """0.5 where a word stands twice in a row, or a sentence or six words come twice; else 1."""
    invented: tuple[str, ...]
    """The values that ``grounding`` was lowered for."""
    asked: tuple[str, ...]
    """The slots that the reply asks for."""


def gold_score(meta: Mapping[str, Any], completion: str, *, ended: bool) -> float:
    """Return the score of ``gold_check`` alone."""
    return gold_check(meta, completion, ended=ended).score


def gold_check(meta: Mapping[str, Any], completion: str, *, ended: bool) -> GoldCheck:
    """Check one reply against what is known about its prompt.

    Args:
        meta: a prompt's ``meta``, with ``given`` (slot name to value) and ``missing`` (slot names).
        completion: the reply.
        ended: whether the model ended the reply itself.

    Raises:
        KeyError: ``meta`` lacks ``given`` or ``missing``.
    """
    given: dict[str, str] = dict(meta["given"])
    missing = set(meta["missing"])
    text = " ".join(completion.split())
    confirmed, invented = _values(given, text)
    asked = _asked(text, given, missing)
    if missing:
        purpose = _purpose_of_question(asked, missing, len(confirmed) / len(given))
    else:
        purpose = len(confirmed) / len(given) * (0.5 if asked else 1.0)
    words = text.split()
    parts = (
        purpose,
        0.5 ** len(invented),
        1.0 if ended and text.endswith((".", "?", "!")) else 0.5,
        1.0 if _FEWEST_WORDS <= len(words) <= _MOST_WORDS else 0.5,
        0.5 if _repeats(text) else 1.0,
    )
    score = 1.0
    for part in parts:
        score *= part
    return GoldCheck(score, *parts, tuple(invented), tuple(sorted(asked)))


def _purpose_of_question(asked: set[str], missing: set[str], confirmed: float) -> float:
    if not asked:
        return 0.5 * confirmed
    return 0.0 if not asked & missing else 1.0 if asked <= missing else 0.5


def _values(given: Mapping[str, str], text: str) -> tuple[set[str], list[str]]:
    """Return the given slots whose value the text names, and the values that nobody gave."""
    confirmed: set[str] = set()
    invented = _swapped_ways(given, text)
    # Names come first and longest first: "June" may be a person, "Union Station" holds "Union".
    for slot in sorted(given, key=lambda name: -len(given[name])):
        value = re.sub(r"^(?:the|an?) ", "", given[slot], flags=re.IGNORECASE)
        if slot in ("date", "time", "count", "nights", "amount"):
            continue
        pattern = re.compile(rf"(?<!\w)(?:the )?{re.escape(value)}(?!\w)", re.IGNORECASE)
        if pattern.search(text):
            confirmed.add(slot)
            text = pattern.sub(" , ", text)
    text = _take(text, _TIME, {"time": given.get("time", "")}, _same_time, confirmed, invented)
    text = _take(text, _DATE, {"date": given.get("date", "")}, _same_date, confirmed, invented)
    money = {"amount": given.get("amount", "")}
    text = _take(text, _MONEY, money, _same_money, confirmed, invented)
    counts = {slot: given[slot] for slot in ("count", "nights") if slot in given}
    text = _take(text, _COUNT, counts, _same_count, confirmed, invented)
    return confirmed, invented + _options(text) + _names(text)


def _take(
    text: str,
    pattern: re.Pattern[str],
    values: Mapping[str, str],
    same: Any,
    confirmed: set[str],
    invented: list[str],
) -> str:
    """Sort the pattern's matches into confirmed and invented; return the text without them."""
    for match in pattern.finditer(text):
        slots = [slot for slot, value in values.items() if value and same(value, match[0])]
        confirmed.update(slots)
        if not slots:
            invented.append(match[0])
    return pattern.sub(" , ", text)


def _clock(text: str) -> tuple[int, int, str]:
    match = _TIME.search(text)
    assert match is not None
    hour, minute, letter, words, bare_hour, bare_minute = match.groups()
    half = _HALF.get((letter or words or "").lower(), "")
    return int(hour or bare_hour), int(minute or bare_minute or 0), half


def _same_time(value: str, found: str) -> bool:
    if not _TIME.search(value):
        return False
    known, other = _clock(value), _clock(found)
    return known[:2] == other[:2] and (not other[2] or not known[2] or known[2] == other[2])


def _same_date(value: str, found: str) -> bool:
    known, other = (_DATE.search(text.lower()) for text in (value, found))
    if known is None or other is None:
        return False
    *known_day, known_near = known[1], known[2], known[4], known[5], known[3]
    *other_day, other_near = other[1], other[2], other[4], other[5], other[3]
    # "Friday" leaves open which one; "next Friday" and "this Friday" do not.
    return known_day == other_day and (known_near == other_near or not (known_near and other_near))


def _same_money(value: str, found: str) -> bool:
    return _amount(value) == _amount(found)


def _amount(text: str) -> float:
    return float(re.sub(r"[^\d.]", "", text))


def _same_count(value: str, found: str) -> bool:
    return int(value) == _WORDS.get(found.lower(), int(found) if found.isdigit() else -1)


def _swapped_ways(given: Mapping[str, str], text: str) -> list[str]:
    """Find a trip in the wrong direction: its values are given, but not so."""
    found = []
    for word, wrong, right in (("from", "destination", "origin"), ("to", "origin", "destination")):
        value = given.get(wrong)
        if value and value != given.get(right):
            way = f"{word} {value}"
            if re.search(rf"\b{re.escape(way)}\b", text, re.IGNORECASE):
                found.append(way)
    return found


def _options(text: str) -> list[str]:
    """Find ordinary words that are a value nobody gave; what is offered as a choice is none."""
    found: list[str] = []
    for sentence in _sentences(text):
        if _OFFER.search(sentence):
            continue
        for options in _OPTIONS.values():
            # Longest first, so that "premium economy" is not also "economy".
            words = "|".join(sorted(options, key=len, reverse=True))
            named = set(re.findall(rf"\b(?:{words})\b", sentence.lower()))
            found += named if len(named) == 1 else []
    return found


def _names(text: str) -> list[str]:
    """Find capitalised words inside a sentence that are no ordinary words."""
    found = []
    for match in _NAME.finditer(text):
        words = [word for word in match[0].split() if word.lower() not in _PLAIN]
        if words:
            found.append(" ".join(words))
    return found


def _asked(text: str, given: Mapping[str, str], missing: set[str]) -> set[str]:
    """Return the slots of this booking that the text's questions are about."""
    slots = set(given) | missing
    asked: set[str] = set()
    for sentence in _sentences(text):
        if _QUESTION.search(sentence):
            asked |= _asked_by(sentence.lower(), slots, missing)
    return asked


def _asked_by(sentence: str, slots: set[str], missing: set[str]) -> set[str]:
    asked = {slot for slot in slots if re.search(_ASKS.get(slot, r"$^"), sentence)}
    if "when" in sentence and {"date", "time"} <= asked:
        # "When?" asks for the day, and for the time of day where that alone is unknown.
        asked -= {"date", "time"}
        asked |= {"date"} if "date" in missing or "time" not in missing else {"time"}
    ways = {"origin", "destination"} & slots
    if ways:
        asked -= ways
        if re.search(_PLACE, sentence) or "destination" in sentence:
            named = {way for way in ways if re.search(_ASKS[way], sentence)}
            # "In which city?" may mean either end of a trip.
            asked |= named or (ways & missing) or ways
    return asked


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.?!]) +", text.strip())


def _repeats(text: str) -> bool:
    words = re.findall(r"[\w':$-]+", text.lower())
    sentences = [part.lower().strip(" .?!") for part in _sentences(text)]
    runs = [tuple(words[place : place + 6]) for place in range(len(words) - 5)]
    return (
        re.search(r"\b(\w+) \1\b", text, re.IGNORECASE) is not None
        or len(set(sentences)) < len(sentences)
        or len(set(runs)) < len(runs)
    )
