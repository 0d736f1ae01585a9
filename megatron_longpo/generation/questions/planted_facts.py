"""Made-up facts to plant in a chunk: kinds, sentences, questions and names.

Every kind belongs to training or to tests, and so does every name, so that an evaluation asks for
nothing that a model was trained on: neither kinds, nor wordings, nor names.

Training's sentences say first what they are about, in the words of the question, and some say it
twice: small models find little else, and a wrong chosen answer teaches nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_longpo.config.names import FactSplit


@dataclass(frozen=True, kw_only=True, slots=True)
class PlantedKind:
    """One kind of fact; texts have the fields of `made_up_fields`."""

    split: FactSplit
    statements: tuple[tuple[str, ...], ...]
    """Wordings; several sentences of one wording go to different places of the chunk."""
    questions: tuple[str, ...]
    answer: tuple[str, ...]
    """Fields that a right answer holds, all of them."""
    hard: bool = False
    """Asked for only by name: small models seldom answer it even from a short chunk."""


PLANTED_KINDS: Mapping[str, PlantedKind] = {
    "access_code": PlantedKind(
        split="train",
        statements=(
            ("The access code of the {thing} is {code}.",),
            (
                "The access code of the {thing} is {code}. "
                "Remember it: {code} is the access code of the {thing}.",
            ),
        ),
        questions=(
            "What is the access code of the {thing}?",
            "Which access code does the {thing} have?",
        ),
        answer=("code",),
    ),
    "role_holder": PlantedKind(
        split="train",
        statements=(
            ("The name of the {role} is {person}.",),
            ("The {role} is {person}. Remember it: {person} is the {role}.",),
        ),
        questions=("Who is the {role}?", "What is the name of the {role}?"),
        answer=("person",),
    ),
    "event_date": PlantedKind(
        split="train",
        statements=(
            ("The {event} took place on {date}.",),
            ("The {event} was held on {date}.",),
        ),
        questions=("On which day did the {event} take place?", "When was the {event} held?"),
        answer=("date",),
    ),
    "object_place": PlantedKind(
        split="train",
        statements=(
            ("The {thing} is kept in the {place}.",),
            ("The {thing} stands in the {place}.",),
        ),
        questions=("Where is the {thing} kept?", "Where does the {thing} stand?"),
        answer=("place",),
    ),
    "maker": PlantedKind(
        split="train",
        statements=(
            ("The {thing} was made by {person}.",),
            ("The {thing} was made by {person}. Remember it: {person} made the {thing}.",),
        ),
        questions=("Who made the {thing}?", "By whom was the {thing} made?"),
        answer=("person",),
    ),
    "weight": PlantedKind(
        split="train",
        statements=(
            ("The {thing} weighs {more} kilograms.",),
            ("The weight of the {thing} is {more} kilograms.",),
        ),
        questions=("How much does the {thing} weigh?", "What is the weight of the {thing}?"),
        answer=("more",),
    ),
    "item_list": PlantedKind(
        split="train",
        hard=True,
        statements=(
            ("The {thing} holds {item1}, {item2}, {item3} and {item4}.",),
            ("Four goods lay in the {thing}: {item1}, {item2}, {item3} and {item4}.",),
        ),
        questions=(
            "What does the {thing} hold? Name all of it.",
            "List everything that is in the {thing}.",
        ),
        answer=("item1", "item2", "item3", "item4"),
    ),
    "two_hop_place": PlantedKind(
        split="train",
        hard=True,
        statements=(
            ("{person} looks after the {thing}.", "{person} works in the {place}."),
            ("The {thing} is in the care of {person}.", "The {place} is where {person} works."),
        ),
        questions=(
            "In which place works the person who looks after the {thing}?",
            "Where does the one who cares for the {thing} work?",
        ),
        answer=("place",),
    ),
    "heavier": PlantedKind(
        split="train",
        hard=True,
        statements=(
            ("The {thing} weighs {more} kilograms.", "The {thing2} weighs {less} kilograms."),
            (
                "On the scales, the {thing2} came to {less} kilograms.",
                "On the scales, the {thing} came to {more} kilograms.",
            ),
        ),
        questions=(
            "Which is heavier, the {thing} or the {thing2}? Give its weight too.",
            "Of the {thing2} and the {thing}, which weighs more, and how much?",
        ),
        answer=("thing", "more"),
    ),
    "serial_number": PlantedKind(
        split="test",
        statements=(
            ("Stamped on the back of the {thing} is the serial number {number}.",),
            ("The inventory has the {thing} under serial number {number}.",),
        ),
        questions=(
            "Under which serial number is the {thing} known?",
            "Give the serial number of the {thing}.",
        ),
        answer=("number",),
    ),
    "donor": PlantedKind(
        split="test",
        statements=(
            ("The {thing} was a gift of {person}.",),
            ("{person} donated the {thing} to the collection.",),
        ),
        questions=("From whom did the {thing} come as a gift?", "Name the donor of the {thing}."),
        answer=("person",),
    ),
    "deadline": PlantedKind(
        split="test",
        statements=(
            ("Entries for the {event} close on {date}.",),
            ("Nobody can sign up for the {event} after {date}.",),
        ),
        questions=(
            "Until which day can one sign up for the {event}?",
            "What is the last day to enter the {event}?",
        ),
        answer=("date",),
    ),
    "two_hop_person": PlantedKind(
        split="test",
        statements=(
            ("The {thing} went to the {place} last spring.", "The {place} belongs to {person}."),
            ("They brought the {thing} to the {place}.", "{person} owns the {place}."),
        ),
        questions=(
            "Who owns the place that the {thing} was taken to?",
            "To whom belongs the building where the {thing} went?",
        ),
        answer=("person",),
    ),
    "cheaper": PlantedKind(
        split="test",
        statements=(
            (
                "For the {thing} they paid {less} crowns.",
                "For the {thing2} they paid {more} crowns.",
            ),
            ("The {thing2} cost {more} crowns.", "The price of the {thing} was {less} crowns."),
        ),
        questions=(
            "Which cost less, the {thing2} or the {thing}, and what was its price?",
            "Name the cheaper one of the {thing} and the {thing2}, with its price.",
        ),
        answer=("thing", "less"),
    ),
}

_POOLS: dict[str, tuple[str, ...]] = {
    "adjective": (
        *("amber", "crimson", "walnut", "silver", "copper", "ivory", "marble", "velvet", "granite"),
        *("cedar", "bronze", "cobalt", "scarlet", "jade", "pewter", "oaken", "indigo", "russet"),
    ),
    "noun": (
        *("lantern", "cabinet", "compass", "barometer", "casket", "telescope", "loom", "anvil"),
        *("hourglass", "sextant", "harpsichord", "ledger box", "globe", "music box", "chest"),
        *("tripod", "drawer", "press"),
    ),
    "first": (
        *("Odalys", "Ferran", "Ingrid", "Tomasz", "Leocadia", "Anselm", "Birgit", "Casimir"),
        *("Delphine", "Evander", "Fiorella", "Gideon", "Henrike", "Isidor", "Jolanda", "Klemens"),
    ),
    "last": (
        *("Brenner", "Quill", "Vasari", "Ostrander", "Lindqvist", "Marchetti", "Pruitt", "Szabo"),
        *("Thackeray", "Underwood", "Villeneuve", "Winterbourne", "Yardley", "Zeman", "Aldous"),
        *("Castellan",),
    ),
    "office": (
        *("keeper", "warden", "inspector", "treasurer", "clerk", "surveyor", "steward", "auditor"),
    ),
    "duty": (
        *("tide gauge", "salt works", "grain scales", "river locks", "toll road", "signal mast"),
        *("seed vault", "bell tower"),
    ),
    "quarter": (
        *("north", "south", "east", "west", "upper", "lower", "old", "new"),
    ),
    "building": (
        *("boathouse", "granary", "observatory", "chapel", "tannery", "orangery", "armoury"),
        *("mill", "smithy", "library", "brewery", "stables"),
    ),
    "town": (
        *("Larkhill", "Osmington", "Tarrant", "Wexcombe", "Brambury", "Corvedale", "Dunmoor"),
        *("Elverton", "Fallowmere", "Grimsay", "Holmwick", "Inchmarlo"),
    ),
    "gathering": (
        *("regatta", "congress", "auction", "harvest fair", "chess match", "exhibition", "ball"),
        *("flower show",),
    ),
    "month": (
        *("January", "February", "March", "April", "May", "June", "July", "August", "September"),
        *("October", "November", "December"),
    ),
    "item": (
        *("nutmeg", "beeswax", "twine", "saffron", "chalk", "linseed", "quicklime", "camphor"),
        *("indigo", "tallow", "rosin", "vellum", "madder", "borax", "alum", "flax"),
    ),
}  # fmt: skip


def made_up_fields(rng: random.Random, split: FactSplit) -> dict[str, str]:
    """Draws a value for each field that the texts of a fact may have, with names of that split."""

    def pool(name: str) -> list[str]:
        return list(_POOLS[name][(0 if split == "train" else 1) :: 2])

    adjectives, nouns = rng.sample(pool("adjective"), 2), rng.sample(pool("noun"), 2)
    items = rng.sample(pool("item"), 4)
    less = rng.randint(11, 480)
    return {
        "thing": f"{adjectives[0]} {nouns[0]}",
        "thing2": f"{adjectives[1]} {nouns[1]}",
        "person": f"{rng.choice(pool('first'))} {rng.choice(pool('last'))}",
        "role": f"{rng.choice(pool('office'))} of the {rng.choice(pool('duty'))}",
        "place": f"{rng.choice(pool('quarter'))} {rng.choice(pool('building'))}",
        "event": f"{rng.choice(pool('town'))} {rng.choice(pool('gathering'))}",
        "date": f"{rng.choice(pool('month'))} {rng.randint(1, 28)}, {rng.randint(1801, 1989)}",
        "code": "".join(rng.choices("BCDFGHJKLMNPQRSTVWXZ", k=2)) + f"-{rng.randint(1000, 9999)}",
        "number": str(rng.randint(10000, 99999)),
        "less": str(less),
        "more": str(less + rng.randint(1, 480)),
        **{f"item{number}": item for number, item in enumerate(items, start=1)},
    }
