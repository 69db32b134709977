"""Functions and requests for them: what scripts/make_task.py calls `function_calls`.

A function is a verb, an object and some parameters: `def book_hotel(city: str, nights: int, guests: int
= ...)`. A request says in words what the parameters are to be, in any order and with some of the optional
ones left out; the right call follows from the same choices. An eighth of the numbers are written as words.
Functions of one object are parts of one whole: they stand in training or in the test, never in both.
"""

import random

CITIES = "Rome Paris Oslo Vienna Tokyo Lima Cairo Berlin Madrid Dublin Boston Denver Seattle Toronto Sydney Athens".split()
COUNTRIES = "France Japan Brazil Kenya Canada Norway India Mexico Spain Egypt Chile Poland".split()
PEOPLE = "Anna Bruno Clara David Elena Frank Grace Hugo Irene Jonas Karla Liam Maria Nora Oscar Paula".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
COLORS = "red blue green black white yellow orange purple brown grey".split()
SIZES = "small medium large".split()
LANGUAGES = "English French German Spanish Italian Japanese Portuguese Dutch".split()
TOPICS = "budget holiday contract roof garden schedule results insurance concert delivery".split()
GENRES = "jazz rock classical folk comedy drama horror romance fantasy history".split()
ROOMS = ["kitchen", "bedroom", "living room", "bathroom", "office", "hall", "garage", "garden"]
MODES = "eco normal fast silent".split()
CLASSES = "economy business first".split()
LEVELS = "low normal high".split()
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def numbers(low, high, step=1):
    return range(low, high + 1, step)


# What may be asked for: possible names of the parameter, the values, how a request says it.
SLOTS = {
    "city": (["city", "location", "place"], CITIES, ["in {}"]),
    "origin": (["origin", "departure_city", "start"], CITIES, ["from {}", "leaving from {}"]),
    "destination": (["destination", "arrival_city", "to_city"], CITIES, ["to {}", "going to {}"]),
    "country": (["country", "nation"], COUNTRIES, ["in {}", "for {}"]),
    "recipient": (["recipient", "to", "receiver"], PEOPLE, ["to {}"]),
    "guest": (["person", "attendee", "contact"], PEOPLE, ["with {}"]),
    "customer": (["customer", "name", "customer_name"], PEOPLE, ["for {}", "in the name of {}"]),
    "author": (["author", "artist", "creator"], PEOPLE, ["by {}"]),
    "day": (["day", "date", "weekday"], DAYS, ["on {}"]),
    "time": (["time", "start_time"], [f"{h}:{m}" for h in range(10, 23) for m in ("00", "15", "30")], ["at {}"]),
    "people": (["people", "guests", "seats", "number_of_people"], numbers(2, 12), ["for {} people"]),
    "nights": (["nights", "number_of_nights"], numbers(2, 14), ["for {} nights"]),
    "minutes": (["minutes", "duration", "duration_minutes"], numbers(10, 90, 5), ["for {} minutes"]),
    "quantity": (["quantity", "count", "amount"], numbers(2, 20), ["with a quantity of {}", "in a quantity of {}"]),
    "price": (["max_price", "budget", "price_limit"], numbers(20, 500, 10), ["for at most {} dollars", "under {} dollars"]),
    "color": (["color", "colour"], COLORS, ["in {}", "in the color {}"]),
    "size": (["size"], SIZES, ["in size {}", "of {} size"]),
    "language": (["language", "lang"], LANGUAGES, ["in {}"]),
    "topic": (["subject", "topic", "about"], TOPICS, ["about the {}", "with the subject {}"]),
    "genre": (["genre", "category", "style"], GENRES, ["of the genre {}", "in the category {}"]),
    "year": (["year"], numbers(1950, 2025), ["from the year {}", "from {}"]),
    "limit": (["limit", "max_results"], numbers(3, 25), ["with at most {} results", "limited to {} results"]),
    "room": (["room", "location", "area"], ROOMS, ["in the {}"]),
    "level": (["level", "intensity", "power"], numbers(1, 10), ["to level {}", "with level {}"]),
    "mode": (["mode", "program"], MODES, ["in {} mode"]),
    "class": (["travel_class", "seat_class"], CLASSES, ["in {} class"]),
    "priority": (["priority", "urgency"], LEVELS, ["with {} priority"]),
}
# Objects, the verbs and the slots that go with them.
DOMAINS = [
    (
        "flight train bus ferry taxi rental_car cruise shuttle limousine",
        "book find cancel reserve",
        "origin destination day people class price",
    ),
    (
        "hotel apartment campsite cabin hostel villa guesthouse holiday_home motel",
        "book find reserve",
        "city nights people day price customer",
    ),
    (
        "meeting lesson appointment interview workshop lunch rehearsal checkup tour",
        "schedule plan cancel arrange",
        "guest day time minutes city topic",
    ),
    (
        "email message letter invitation postcard report reminder memo fax",
        "send write draft",
        "recipient topic language priority day",
    ),
    (
        "pizza shirt chair lamp bicycle umbrella backpack blanket sofa jacket teapot mug",
        "order buy find",
        "size color quantity customer price city",
    ),
    (
        "song film podcast book play poem album documentary cartoon magazine",
        "search find recommend play",
        "genre author year language limit",
    ),
    (
        "light heater fan oven speaker radio dishwasher humidifier television sprinkler",
        "start set adjust",
        "room level minutes mode time",
    ),
    (
        "weather population unemployment rainfall air_quality house_price crime_rate traffic tuition tourism",
        "get fetch check",
        "country year limit language",
    ),
]
# Quantities to be computed, and what of.
FORMULAS = {
    "rectangle_area": "width height",
    "triangle_area": "base height",
    "cylinder_volume": "radius height",
    "box_volume": "length width depth",
    "kinetic_energy": "mass velocity",
    "momentum": "mass velocity",
    "density": "mass volume",
    "average_speed": "distance time",
    "electric_power": "voltage current",
    "loan_payment": "principal rate months",
    "compound_interest": "principal rate years",
    "sales_tax": "price tax_rate",
    "tip": "bill percentage",
    "discount": "price percentage",
    "body_mass_index": "weight height",
    "fuel_cost": "distance consumption price_per_liter",
    "trapezoid_area": "top bottom height",
    "work": "force distance",
    "pressure": "force area",
    "profit": "revenue cost",
}
# Verbs whose object there is but one of.
INQUIRIES = ["get", "fetch", "check"]
OPENINGS = ["{}.", "Please {}.", "Can you {}?", "I want to {}.", "I would like to {}.", "Could you please {}?"]
EXAMPLES = 6


def an(words):
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def functions(random):
    """(object, name, verb phrase, parameters as (name, type, values, phrases), how many are required)"""
    for objects, verbs, slots in DOMAINS:
        for thing in objects.split():
            for verb in verbs.split():
                chosen = random.sample(slots.split(), random.randint(1, 3))
                parameters = []
                for slot in chosen:
                    names, values, phrases = SLOTS[slot]
                    parameters.append((random.choice(names), values, phrases))
                words = thing.replace("_", " ")
                phrase = f"{verb} the {words}" if verb in INQUIRIES else f"{verb} {an(words)}"
                yield thing, f"{verb}_{thing}", phrase, parameters, random.randint(1, len(chosen))
    for thing, inputs in FORMULAS.items():
        for verb in ["calculate", "compute", "get"]:
            parameters = [
                (name, numbers(2, 60), [f"with {an(name.replace('_', ' '))} of {{}}"])
                for name in inputs.split()
            ]
            words = thing.replace("_", " ")
            yield thing, f"{verb}_{thing}", f"{verb} the {words}", parameters, len(parameters)


def signature(name, parameters, required):
    kinds = [f"{p}: {'int' if isinstance(values, range) else 'str'}" for p, values, _ in parameters]
    return f"def {name}({', '.join(kinds[:required] + [f'{kind} = ...' for kind in kinds[required:]])})"


def request(phrase, parameters, required, random):
    """What is asked, and the arguments that it means."""
    asked = parameters[:required] + [p for p in parameters[required:] if random.random() < 0.5]
    arguments, said = {}, []
    for name, values, phrases in asked:
        value = random.choice(values)
        arguments[name] = value
        word = value
        if isinstance(value, int) and value < len(WORDS) and random.random() < 0.5:
            word = WORDS[value]
        said.append(random.choice(phrases).format(word))
    random.shuffle(said)
    text = random.choice(OPENINGS).format(f"{phrase} {', '.join(said) if random.random() < 0.3 else ' '.join(said)}")
    return text[0].upper() + text[1:], arguments


def items(seed):
    """(key, object, fields) without end."""
    draw = random.Random(f"function calls {seed}")
    by_object = {}
    for function in functions(draw):
        by_object.setdefault(function[0], []).append(function)
    objects = list(by_object)
    draw.shuffle(objects)

    def entry(thing):
        function = draw.choice(by_object[thing])
        shown = [function]
        if draw.random() < 0.2:
            shown.append(draw.choice([other for other in by_object[thing] if other is not function]))
            draw.shuffle(shown)
        _, name, phrase, parameters, required = function
        text, arguments = request(phrase, parameters, required, draw)
        signatures = "\n".join(signature(other[1], *other[3:]) for other in shown)
        return f"{signatures}\nRequest: {text}\nCall:", name, arguments

    head = ""
    for thing in objects[:EXAMPLES]:
        text, name, arguments = entry(thing)
        given = ", ".join(f"{parameter}={value!r}" for parameter, value in arguments.items())
        head += f"{text} {name}({given})\n\n"
    seen = set()
    while True:
        thing = draw.choice(objects[EXAMPLES:])
        text, name, arguments = entry(thing)
        if text not in seen:
            seen.add(text)
            truth = {name: {parameter: [value] for parameter, value in arguments.items()}}
            yield text, thing, {"prompt": head + text, "ground_truth": [truth], "stop": "\n"}
