"""Slot values of the booking prompts: invented names, and everyday cities, dates, times, numbers.

Every kind of value has two lists. ``TRAIN`` may occur in training text; ``HELD_OUT`` occurs only in
the evaluation prompts, so that a model cannot know those values by heart. Dates, times and counts
are closed classes and are shared.
"""

from __future__ import annotations

__all__ = ["CLOSED", "HELD_OUT", "TRAIN", "values_of"]

_ORDINALS = {1: "1st", 2: "2nd", 3: "3rd", 21: "21st", 22: "22nd", 23: "23rd"}
_MONTHS = ("March", "April", "May", "June", "October")
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _dates() -> tuple[str, ...]:
    days = [_ORDINALS.get(day, f"{day}th") for day in range(1, 29)]
    monthly = [f"{month} {day}" for month in _MONTHS for day in days]
    # "March" is far the commonest month of the dialogues the model grew up with.
    march = [f"March {day}" for day in days[:14]] * 3
    weekly = [
        *_WEEKDAYS,
        *(f"next {day}" for day in _WEEKDAYS),
        *(f"this {day}" for day in _WEEKDAYS),
    ]
    return (*monthly, *march, *weekly * 3, *("tomorrow", "today") * 4)


def _times() -> tuple[str, ...]:
    whole = [f"{hour} am" for hour in range(7, 12)] + [f"{hour} pm" for hour in range(1, 11)]
    parts = [
        f"{hour}:{minute} {half}"
        for half, hours in (("am", range(7, 12)), ("pm", range(1, 11)))
        for hour in hours
        for minute in ("15", "30", "45")
    ]
    return (*whole * 2, *parts)


CLOSED: dict[str, tuple[str, ...]] = {
    "date": _dates(),
    "time": _times(),
    "count": tuple(
        ["1", "2", "2", "2", "3", "3", "4", "4", "4", "5", "5", "6", "6", "7", "8", "9", "10", "12"]
    ),
    "nights": tuple(["1", "2", "2", "3", "3", "4", "5", "6", "7", "10"]),
    "amount": tuple(
        f"${value}"
        for value in (
            15,
            20,
            35,
            40,
            50,
            65,
            75,
            80,
            120,
            150,
            180,
            200,
            240,
            275,
            310,
            350,
            420,
            500,
            640,
            750,
            830,
            900,
            1200,
        )
    ),
    "account": ("checking", "savings"),
    "car": ("compact", "standard", "full-size"),
    "ride": ("shared", "regular", "luxury"),
    "cabin": ("economy", "business class", "first class", "premium economy"),
}

TRAIN: dict[str, tuple[str, ...]] = {
    "city": (
        "San Jose",
        "San Francisco",
        "Oakland",
        "Berkeley",
        "Palo Alto",
        "Napa",
        "Fremont",
        "Santa Rosa",
        "Sacramento",
        "Los Angeles",
        "San Diego",
        "Long Beach",
        "Anaheim",
        "Fresno",
        "Seattle",
        "Portland",
        "Vancouver",
        "Las Vegas",
        "Phoenix",
        "Denver",
        "Chicago",
        "Atlanta",
        "New York",
        "Philadelphia",
        "Washington",
        "Toronto",
        "Mexico City",
        "London",
        "Paris",
        "Sydney",
        "Livermore",
        "San Mateo",
        "Sunnyvale",
        "Mountain View",
        "Hayward",
        "Concord",
        "Walnut Creek",
        "Petaluma",
        "Sausalito",
        "Dallas",
        "Houston",
        "Austin",
        "Miami",
        "Nashville",
        "Detroit",
        "Minneapolis",
        "Salt Lake City",
    ),
    "restaurant": (
        "Blue Lantern",
        "Casa Verde",
        "The Copper Pot",
        "Olive Garden House",
        "Golden Wok",
        "Mama Rosa",
        "Little Saigon Kitchen",
        "The Fig Tree",
        "Harbor Grill",
        "Taj Corner",
        "Red Chili Cafe",
        "La Paloma",
        "Sakura Garden",
        "The Old Mill",
        "Bella Notte",
        "Corner Bistro",
        "Green Leaf Cafe",
        "Smoky Joe's",
        "Lotus Garden",
        "The Rusty Anchor",
        "Pasta Piazza",
        "El Camino Taqueria",
        "Sunset Diner",
        "Ocean Pearl",
        "Magnolia Kitchen",
        "Chez Colette",
        "Noodle House",
        "The Brass Spoon",
        "Thai Orchid",
        "Big Oak Barbecue",
    ),
    "hotel": (
        "Harborview Inn",
        "Grand Plaza Hotel",
        "The Maple Lodge",
        "Parkside Suites",
        "Hotel Aurora",
        "Seaside Resort",
        "City Garden Hotel",
        "The Lakehouse Inn",
        "Royal Court Hotel",
        "Riverside Suites",
        "The Willow Inn",
        "Union Square Hotel",
        "Bayfront Lodge",
        "Station Hotel",
        "Palm Court Inn",
        "The Regent House",
        "Hillcrest Suites",
        "Cedar Grove Hotel",
    ),
    "event": (
        "the Giants game",
        "the Kings game",
        "the Red Maples concert",
        "the jazz festival",
        "the Silver Strings concert",
        "the Lions game",
        "the Moonlight Choir concert",
        "the Rockets game",
        "the Paper Boats concert",
        "the blues festival",
        "the Falcons game",
        "the Velvet Foxes concert",
        "the Hawks game",
        "the rodeo",
        "the Bears game",
        "the comedy night",
        "the Northern Echo concert",
        "the Tigers game",
    ),
    "movie": (
        "The Last Harbor",
        "Midnight Train",
        "Summer Rain",
        "The Glass Garden",
        "Return to Mars",
        "Silent Hill Road",
        "The Baker's Secret",
        "Winter Light",
        "Dragon Island",
        "Two Brothers",
        "The Long Drive",
        "Paper Moon Rising",
        "City of Owls",
        "The Third Key",
        "Golden Fields",
        "A Quiet Town",
    ),
    "theater": (
        "the Grand Cinema",
        "Plaza Theater",
        "the Orpheum",
        "Century Hall",
        "Bayside Cinema",
        "the Rialto",
        "Star Theater",
        "Empire Cinema",
        "Lakeside Theater",
        "the Majestic",
    ),
    "doctor": (
        "a dentist",
        "a dermatologist",
        "an eye doctor",
        "a general practitioner",
        "a gynecologist",
        "a pediatrician",
    ),
    "salon": (
        "Shear Magic",
        "The Hair Loft",
        "Golden Scissors",
        "Bella Salon",
        "Curl Studio",
        "The Barber Room",
        "Style House",
        "Silver Comb",
        "Hair by Nina",
        "The Cutting Edge",
        "Urban Roots",
        "Main Street Barbers",
    ),
    "person": (
        "Maria",
        "David",
        "Susan",
        "Ahmed",
        "Linda",
        "Kevin",
        "Rosa",
        "Peter",
        "Helen",
        "Carlos",
        "Emily",
        "Jacob",
        "Diana",
        "Tom",
        "Grace",
        "Victor",
        "Julia",
        "Sam",
        "Nora",
        "Frank",
        "Amy",
        "Oscar",
        "Laura",
        "Ben",
    ),
    "place": (
        "the airport",
        "Union Station",
        "1240 Market Street",
        "85 Oak Avenue",
        "the city library",
        "300 Pine Street",
        "the art museum",
        "42 Lake Drive",
        "2100 Broadway",
        "Central Park",
        "16 Mission Street",
        "the bus station",
        "710 Sunset Boulevard",
        "the zoo",
        "530 First Avenue",
        "the university",
    ),
}

HELD_OUT: dict[str, tuple[str, ...]] = {
    "city": (
        "Santa Clara",
        "Pleasanton",
        "Boston",
        "Santa Cruz",
        "Milpitas",
        "Alameda",
        "New Orleans",
        "Santa Barbara",
        "Orlando",
    ),
    "restaurant": (
        "Silver Spoon Cafe",
        "Villa Romana",
        "The Green Door",
        "Dragon Palace",
        "Pepper Tree Grill",
        "Casa Luna",
        "The Blue Plate",
        "River House",
    ),
    "hotel": (
        "The Garden Inn",
        "Hotel Bellevue",
        "Lakeview Suites",
        "Market Street Hotel",
        "The Summit Lodge",
    ),
    "event": (
        "the Eagles game",
        "the Golden River concert",
        "the folk festival",
        "the Sharks game",
    ),
    "movie": ("The Lost Garden", "Night Flight", "Three Sisters", "The Silver Road"),
    "theater": ("Park Cinema", "the Regal", "Harbor Theater"),
    "doctor": ("a dentist", "an eye doctor", "a dermatologist", "a general practitioner"),
    "salon": ("Sunrise Salon", "The Hair Garden", "Park Street Barbers"),
    "person": ("Anna", "Michael", "Sophie", "Daniel", "Karen", "Leo"),
    "place": (
        "the train station",
        "925 Park Avenue",
        "18 Harbor Street",
        "the city hall",
        "61 King Street",
    ),
}


def values_of(kind: str, *, held_out: bool) -> tuple[str, ...]:
    """Return the values of one kind; with ``held_out`` both lists, so that evaluation mixes them."""
    if kind in CLOSED:
        return CLOSED[kind]
    return (*TRAIN[kind], *HELD_OUT[kind] * 2) if held_out else TRAIN[kind]
