"""Open-ended tasks on words: sorted lists, sentences that agree, JSON records that add up."""

import itertools
import json
import random
import re

from mlx_dgemma.demo.tasks.example import Example, ask

CATEGORIES = {
    "animals": (
        "ant bear cat cow deer dog duck fox frog goat hen horse lion mouse owl pig rabbit sheep"
        " tiger wolf"
    ),
    "fruits": (
        "apple banana cherry date fig grape kiwi lemon lime mango melon orange peach pear plum"
        " quince"
    ),
    "colors": (
        "amber black blue brown cyan gold green gray orange pink purple red silver violet white"
        " yellow"
    ),
}
WORDS = {category: words.split() for category, words in CATEGORIES.items()}


def word_list(rng: random.Random) -> Example:
    """Distinct words of a category, sorted; the first is given, or the first and the last."""
    category = rng.choice(list(WORDS))
    words = WORDS[category]
    size = rng.randint(4, 5)
    chosen = sorted(rng.sample(words, size))
    first, last = chosen[0], chosen[-1]
    prompt, ends = rng.choice(
        [
            (f"List {size} {category} in alphabetical order, starting with {first}.", False),
            (f"Name {size} {category} from A to Z, the first is {first}.", False),
            (f"Write {size} {category} in order, from {first} to {last}.", True),
        ]
    )

    def verify(text: str, thought: str | None = None) -> bool:
        items = text.strip().split(", ")
        in_order = all(a < b for a, b in itertools.pairwise(items))
        ends_right = items[0] == first and (items[-1] == last or not ends)
        return len(items) == size and in_order and ends_right and set(items) <= set(words)

    return Example("list", ask(prompt), ", ".join(chosen), verify)


NOUNS = ["cat", "dog", "bird", "girl", "boy", "farmer", "teacher", "robot", "king", "doctor"]
ADJECTIVES = ["brave", "young", "small", "big", "happy", "quiet", "tired"]
SINGULAR = ["the", "a", "one", "this"]
PLURAL = ["the", "two", "three", "these", "many"]
VERBS = {
    "chase": "chases",
    "see": "sees",
    "watch": "watches",
    "help": "helps",
    "follow": "follows",
    "like": "likes",
}
PLACES = [
    "in the garden",
    "near the river",
    "on the hill",
    "at the market",
    "by the house",
    "under the tree",
]

_ADJECTIVE = f"(?:(?:{'|'.join(ADJECTIVES)}) )?"
_ONE = rf"(?:{'|'.join(SINGULAR)}) {_ADJECTIVE}(?:{'|'.join(NOUNS)})"
_MANY = rf"(?:{'|'.join(PLURAL)}) {_ADJECTIVE}(?:{'|'.join(NOUNS)})s"
_SENTENCE = re.compile(
    rf"(?:{_ONE} (?:{'|'.join(VERBS.values())})|{_MANY} (?:{'|'.join(VERBS)}))"
    rf" (?:{_ONE}|{_MANY})(?: (?:{'|'.join(PLACES)}))?\."
)


def _noun_phrase(rng: random.Random, noun: str, plural: bool) -> str:
    determiner = rng.choice(PLURAL if plural else SINGULAR)
    adjective = [rng.choice(ADJECTIVES)] if rng.random() < 0.5 else []
    return " ".join([determiner, *adjective, noun + "s" * plural])


def is_sentence(text: str) -> bool:
    """Whether the small grammar makes the text: it agrees, has a capital and a full stop."""
    return text[:1].isupper() and _SENTENCE.fullmatch(text[:1].lower() + text[1:]) is not None


def sentence(rng: random.Random) -> Example:
    """Subject, verb, object and place; the phrase asked for must be in it.

    What a sentence is "about" is its subject; what it is "with" or "mentions", its object.
    """
    plural = rng.random() < 0.5
    first, second = rng.sample(NOUNS, 2)
    subject = _noun_phrase(rng, first, plural)
    target = _noun_phrase(rng, second, rng.random() < 0.5)
    verb, singular_verb = rng.choice(list(VERBS.items()))
    text = " ".join([subject, verb if plural else singular_verb, target, rng.choice(PLACES)]) + "."
    phrase, prompt = rng.choice(
        [
            (subject, "Write a sentence about {}."),
            (target, "Write a sentence with {}."),
            (target, "Make a sentence that mentions {}."),
        ]
    )
    prompt = prompt.format(phrase)

    def verify(text: str, thought: str | None = None) -> bool:
        text = text.strip()
        return (
            is_sentence(text)
            and re.search(rf"\b{phrase}\b", text[:1].lower() + text[1:]) is not None
        )

    return Example("sentence", ask(prompt), text[0].upper() + text[1:], verify)


NAMES = [
    "Anna",
    "Ben",
    "Carl",
    "Dora",
    "Emma",
    "Finn",
    "Greta",
    "Hugo",
    "Ida",
    "Jack",
    "Kate",
    "Leo",
    "Mia",
    "Nora",
    "Otto",
    "Paula",
]
COUNTRIES = {
    "Paris": "France",
    "Lyon": "France",
    "Rome": "Italy",
    "Milan": "Italy",
    "Madrid": "Spain",
    "Tokyo": "Japan",
    "Kyoto": "Japan",
    "Cairo": "Egypt",
    "Lima": "Peru",
    "Delhi": "India",
}
PETS = ["cat", "dog", "horse", "rabbit", "mouse", "duck"]
KEYS = ["name", "age", "adult", "city", "country", "pet", "color"]
PAIRS = [("age", "adult"), ("city", "country")]


def _record(rng: random.Random) -> dict[str, object]:
    city = rng.choice(list(COUNTRIES))
    age = rng.randint(10, 79)
    return {
        "name": rng.choice(NAMES),
        "age": age,
        "adult": age >= 18,
        "city": city,
        "country": COUNTRIES[city],
        "pet": rng.choice(PETS),
        "color": rng.choice(WORDS["colors"]),
    }


def is_record(text: str, keys: list[str] | None = None) -> bool:
    """Whether the text is a JSON record of known values whose fields agree."""
    try:
        record = json.loads(text)
    except ValueError:
        return False
    if (
        not isinstance(record, dict)
        or not set(record) <= set(KEYS)
        or (keys and list(record) != keys)
    ):
        return False
    allowed = {
        "name": NAMES,
        "city": list(COUNTRIES),
        "country": list(COUNTRIES.values()),
        "pet": PETS,
        "color": WORDS["colors"],
    }
    known = all(record[key] in values for key, values in allowed.items() if key in record)
    age, adult = record.get("age", 18), record.get("adult", True)
    if not known or type(age) is not int or type(adult) is not bool or not 10 <= age <= 79:
        return False
    agree_on_age = not {"age", "adult"} <= set(record) or adult == (age >= 18)
    agree_on_place = (
        not {"city", "country"} <= set(record) or COUNTRIES[record["city"]] == record["country"]
    )
    return agree_on_age and agree_on_place


def json_record(rng: random.Random) -> Example:
    """A JSON record with the keys asked for, in that order, whose fields agree.

    Half of the records have two keys that must: age and adult, or city and country.
    """
    size = rng.choice([2, 3, 3])
    keys = rng.sample(KEYS, size)
    if rng.random() < 0.5:
        pair = rng.choice(PAIRS)
        keys = [*pair, *rng.sample([key for key in KEYS if key not in pair], size - 2)]
        rng.shuffle(keys)
    record = _record(rng)
    prompt = rng.choice(
        ["Write a JSON record with {}.", "Make a JSON object with {}.", "Write JSON with {}."]
    )
    text = json.dumps({key: record[key] for key in keys})
    asked = ", ".join(keys[:-1]) + " and " + keys[-1]
    return Example(
        "json", ask(prompt.format(asked)), text, lambda text, thought=None: is_record(text, keys)
    )
