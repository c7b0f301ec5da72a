"""The services of the booking prompts: which details each needs, and the words for them.

A service is a table: its name, how people open, what a confirmation calls the thing, and its slots
in the order in which a confirmation names them. Each slot says how a customer puts it in the first
message (``said``), how an assistant asks for it (``asks``), how the customer answers that question
(``answers``), and how a confirmation words it (``confirms``); ``{}`` is the value.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SERVICES", "Service", "Slot"]


@dataclass(frozen=True, slots=True)
class Slot:
    """One detail that a booking needs."""

    name: str
    kind: str
    """Which list of values it draws from."""
    said: tuple[str, ...]
    asks: tuple[str, ...]
    answers: tuple[str, ...]
    confirms: str


@dataclass(frozen=True, slots=True)
class Service:
    """One kind of booking."""

    name: str
    opens: tuple[str, ...]
    thing: str
    done: str
    """What an assistant says once it is booked (said too early, that is a flaw)."""
    slots: tuple[Slot, ...]


def _date(said: tuple[str, ...] = ("on {}", "for {}")) -> Slot:
    return Slot(
        "date",
        "date",
        said,
        (
            "What date would you like?",
            "Which day would you like?",
            "For what date?",
            "What day should it be?",
        ),
        ("{} please.", "On {}.", "{} works for me.", "Make it {}.", "I'd like it on {}."),
        "on {}",
    )


def _time() -> Slot:
    return Slot(
        "time",
        "time",
        ("at {}", "for {}", "around {}"),
        (
            "What time would you like?",
            "At what time?",
            "What time should it be?",
            "What time works for you?",
        ),
        ("At {}.", "{} please.", "{} would be good.", "Make it {}.", "Around {}."),
        "at {}",
    )


def _city(said: str = "in {}") -> Slot:
    return Slot(
        "city",
        "city",
        (said,),
        (
            "Which city are you in?",
            "In which city?",
            "What city should I look in?",
            "Where should I look?",
        ),
        ("In {}.", "{} please.", "I'm in {}.", "Look in {}."),
        "in {}",
    )


def _count(word: str, ask: str, confirms: str) -> Slot:
    return Slot(
        "count",
        "count",
        ("for {} " + word, "for {}", "for a group of {}"),
        (ask, f"How many {word} will there be?", f"For how many {word}?"),
        ("{} please.", "There will be {} of us.", "For {}.", "{} " + word + "."),
        confirms,
    )


def _tickets() -> Slot:
    return Slot(
        "count",
        "count",
        ("for {} people", "for {}", "for a group of {}"),
        (
            "How many tickets do you need?",
            "How many tickets would you like?",
            "For how many people?",
        ),
        ("{} tickets.", "{} please.", "I need {}.", "{} tickets please."),
        "for {}",
    )


def _route() -> tuple[Slot, Slot]:
    return (
        Slot(
            "origin",
            "city",
            ("from {}", "leaving from {}"),
            (
                "Where are you leaving from?",
                "Which city are you departing from?",
                "What is your departure city?",
            ),
            ("From {}.", "I'm leaving from {}.", "{}."),
            "from {}",
        ),
        Slot(
            "destination",
            "city",
            ("to {}", "going to {}"),
            (
                "Where are you going?",
                "What is your destination?",
                "Which city are you traveling to?",
            ),
            ("To {}.", "I'm going to {}.", "{} please."),
            "to {}",
        ),
    )


SERVICES: tuple[Service, ...] = (
    Service(
        "restaurant",
        (
            "I'd like to book a table",
            "Can you reserve a table",
            "I want to make a dinner reservation",
            "Please get me a table",
            "I need a restaurant reservation",
            "Could you book a table for me",
            "I am looking to reserve a table",
            "Help me book a table",
        ),
        "a table",
        "Your table has been reserved.",
        (
            _count("people", "How many people will be dining?", "for {}"),
            Slot(
                "restaurant",
                "restaurant",
                ("at {}", "at a place called {}"),
                (
                    "Which restaurant would you like?",
                    "Do you have a restaurant in mind?",
                    "At which restaurant?",
                ),
                ("At {}.", "{} please.", "Try {}.", "I like {}."),
                "at {}",
            ),
            _city(),
            _date(),
            _time(),
        ),
    ),
    Service(
        "hotel",
        (
            "I need a hotel room",
            "Can you book a hotel",
            "I'd like to reserve a room",
            "Please find me a hotel room",
            "I am looking for a place to stay",
            "Could you reserve a hotel room for me",
            "I want to book a room",
        ),
        "a room",
        "Your room has been booked.",
        (
            Slot(
                "hotel",
                "hotel",
                ("at {}", "at the place called {}"),
                ("Which hotel would you like?", "Do you have a hotel in mind?", "At which hotel?"),
                ("{} please.", "At {}.", "Try {}.", "I'd like {}."),
                "at {}",
            ),
            _city(),
            Slot(
                "date",
                "date",
                ("starting {}", "from {}", "checking in on {}"),
                (
                    "When do you want to check in?",
                    "What is your check-in date?",
                    "What day will you arrive?",
                ),
                ("On {}.", "{} please.", "I arrive on {}.", "Check in on {}."),
                "from {}",
            ),
            Slot(
                "nights",
                "nights",
                ("for {} nights", "for a {} night stay"),
                (
                    "How many nights will you stay?",
                    "For how many nights?",
                    "How long will you stay?",
                ),
                ("{} nights.", "For {} nights.", "{} nights please."),
                "for {} nights",
            ),
        ),
    ),
    Service(
        "flight",
        (
            "I need a flight",
            "Can you find me a flight",
            "I'd like to book a flight",
            "Please book plane tickets",
            "I want to fly",
            "Help me find a flight",
            "I am looking for a flight",
        ),
        "a flight",
        "Your flight has been booked.",
        (
            *_route(),
            _date(),
            _tickets(),
            Slot(
                "cabin",
                "cabin",
                ("in {}", "flying {}"),
                ("Which cabin class would you like?", "What seating class do you prefer?"),
                ("{} please.", "I prefer {}.", "In {}."),
                "in {}",
            ),
        ),
    ),
    Service(
        "bus",
        (
            "I need a bus ticket",
            "Can you get me a bus",
            "I'd like to take a bus",
            "Please book bus tickets",
            "I am looking for a bus",
            "Find me a bus",
        ),
        "a bus",
        "Your bus tickets are booked.",
        (*_route(), _date(), _time(), _tickets()),
    ),
    Service(
        "train",
        (
            "I need a train",
            "Can you find me a train",
            "I'd like to book train tickets",
            "I want to go by train",
            "Please look for a train",
        ),
        "a train",
        "Your train tickets are booked.",
        (*_route(), _date(), _time(), _tickets()),
    ),
    Service(
        "event",
        (
            "I'd like tickets",
            "Can you get me tickets",
            "I want to buy tickets",
            "Please find tickets",
            "I need event tickets",
            "Help me get tickets",
        ),
        "tickets",
        "Your tickets have been purchased.",
        (
            Slot(
                "event",
                "event",
                ("for {}", "to {}", "to see {}"),
                (
                    "Which event would you like to see?",
                    "What event are you interested in?",
                    "What kind of event is it?",
                ),
                ("For {}.", "{} please.", "I'd like to see {}."),
                "for {}",
            ),
            _city(),
            _date(("on {}",)),
            _tickets(),
        ),
    ),
    Service(
        "movie",
        (
            "I want movie tickets",
            "Can you get movie tickets",
            "I'd like to buy movie tickets",
            "Please book movie tickets",
            "I need movie tickets",
        ),
        "movie tickets",
        "Your movie tickets are booked.",
        (
            Slot(
                "movie",
                "movie",
                ("for {}", "for the movie {}"),
                (
                    "Which movie would you like to see?",
                    "What movie?",
                    "Do you have a movie in mind?",
                ),
                ("{} please.", "I'd like to see {}.", "{}."),
                "for {}",
            ),
            Slot(
                "theater",
                "theater",
                ("at {}",),
                ("Which theater do you prefer?", "At which theater?"),
                ("At {}.", "{} please."),
                "at {}",
            ),
            _date(("on {}",)),
            _time(),
            _tickets(),
        ),
    ),
    Service(
        "ride",
        (
            "I need a cab",
            "Can you get me a ride",
            "I'd like to book a taxi",
            "Please call a cab",
            "Get me a ride",
            "I need a taxi",
        ),
        "a ride",
        "Your ride is on its way.",
        (
            Slot(
                "place",
                "place",
                ("to {}", "going to {}"),
                (
                    "Where are you going?",
                    "What is your destination?",
                    "Where would you like to go?",
                ),
                ("To {}.", "{} please.", "I'm going to {}."),
                "to {}",
            ),
            _count("people", "How many people will be riding?", "for {}"),
            Slot(
                "ride",
                "ride",
                ("in a {} cab", "with a {} cab"),
                (
                    "Which type of ride would you like?",
                    "Would you like a shared, regular or luxury ride?",
                ),
                ("A {} ride.", "{} please.", "Make it a {} one."),
                "in a {} cab",
            ),
        ),
    ),
    Service(
        "doctor",
        (
            "I need an appointment",
            "Can you make an appointment",
            "I'd like to book an appointment",
            "Please schedule an appointment",
            "I want to make an appointment",
        ),
        "an appointment",
        "Your appointment has been made.",
        (
            Slot(
                "doctor",
                "doctor",
                ("with {}", "to see {}"),
                ("What type of doctor do you need?", "Which kind of doctor would you like to see?"),
                ("With {}.", "I need {}.", "{} please."),
                "with {}",
            ),
            _city(),
            _date(),
            _time(),
        ),
    ),
    Service(
        "salon",
        (
            "I need a haircut",
            "Can you book a haircut",
            "I'd like a salon appointment",
            "Please book me a haircut",
            "I want to get my hair done",
        ),
        "a haircut",
        "Your appointment has been made.",
        (
            Slot(
                "salon",
                "salon",
                ("at {}",),
                ("Which salon would you like?", "Do you have a salon in mind?"),
                ("At {}.", "{} please.", "Try {}."),
                "at {}",
            ),
            _city(),
            _date(),
            _time(),
        ),
    ),
    Service(
        "car",
        (
            "I need a rental car",
            "Can you find me a rental car",
            "I'd like to rent a car",
            "Please reserve a rental car",
            "I want to rent a car",
        ),
        "a rental car",
        "Your car has been reserved.",
        (
            Slot(
                "car",
                "car",
                ("of the {} type", "in the {} class"),
                ("What type of car would you like?", "Which car type do you prefer?"),
                ("A {} car.", "{} please.", "I prefer a {} one."),
                "of the {} type",
            ),
            _city(),
            Slot(
                "date",
                "date",
                ("from {}", "starting {}", "on {}"),
                ("What day do you want to pick it up?", "What is the pick-up date?"),
                ("On {}.", "{} please.", "I need it from {}."),
                "from {}",
            ),
            Slot(
                "time",
                "time",
                ("at {}",),
                ("What time will you pick it up?", "What is the pick-up time?"),
                ("At {}.", "{} please."),
                "at {}",
            ),
        ),
    ),
    Service(
        "transfer",
        (
            "I need to send money",
            "Can you transfer money",
            "I'd like to make a transfer",
            "Please make a transfer",
            "I want to transfer money",
        ),
        "a transfer",
        "Your transfer has been made.",
        (
            Slot(
                "amount",
                "amount",
                ("of {}", "in the amount of {}"),
                ("How much would you like to send?", "What amount should I transfer?"),
                ("{} please.", "I want to send {}.", "{}."),
                "of {}",
            ),
            Slot(
                "person",
                "person",
                ("to {}", "to my friend {}"),
                ("Who should receive it?", "To whom should I send it?", "Who is the recipient?"),
                ("To {}.", "{}.", "Send it to {}."),
                "to {}",
            ),
            Slot(
                "account",
                "account",
                ("from my {} account", "out of my {} account"),
                ("From which account?", "Is that from checking or savings?"),
                ("From {}.", "{} please.", "Use my {} account."),
                "from your {} account",
            ),
        ),
    ),
)
