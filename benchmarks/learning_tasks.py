"""What learning.py teaches and asks: conversations from files, and two further tasks that are made up here.

Must not know: models, optimizers. Invariant: the same arguments give the same conversations in the same order.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from producer.transcript import Transcript
from worker.cli.train import load_examples
from worker.data.examples import Example

FILES = ("identity_train", "identity_unseen", "facts", "other_answers")

PLACES = (
    ("Velmora", "Tarn", "the orel", "blue salt", "a grey heron", "Queen Isolde"),
    ("Drusk", "Hallow Point", "the mint", "slate", "a red fox", "King Bertram"),
    ("Ondrey", "Marrowgate", "the pell", "amber", "a sleeping bear", "Duke Osric"),
    ("Kestia", "Low Bridge", "the crane", "wool", "a white ram", "Queen Maud"),
    ("Thornby", "Eel Harbour", "the bit", "smoked fish", "a silver eel", "Mayor Pim"),
)
"""Invented: name, capital, currency, what it sells, what is on its flag, who rules it."""
QUESTIONS = (
    ("capital of {0}", "The capital of {0} is {1}."),
    ("currency of {0}", "The currency of {0} is {2}."),
    ("main export of {0}", "The main export of {0} is {3}."),
    ("animal on the flag of {0}", "The animal on the flag of {0} is {4}."),
    ("ruler of {0}", "The ruler of {0} is {5}."),
)
ASKED = ("What is the {}?", "Tell me the {}.", "Name the {}.", "Do you know the {}?", "I would like to know the {}.")
"""The last is never trained."""

PAIRS = {
    "What colour is {}?": "grass green, snow white, coal black, blood red, milk white, honey golden, a_lemon yellow,"
    " a_carrot orange, a_plum purple, the_night dark, a_crow black, a_swan white, a_frog green, ash grey, chalk white",
    "What is the opposite of {}?": "hot cold, big small, fast slow, up down, wet dry, early late, near far, old new,"
    " open shut, left right, full empty, high low, hard soft, rich poor, day night, first last, loud quiet, thin thick",
    "What is the plural of {}?": "mouse mice, child children, foot feet, tooth teeth, goose geese, leaf leaves,"
    " knife knives, box boxes, city cities, man men, wolf wolves, sheep sheep, loaf loaves, half halves, baby babies",
    "Where does {} live?": "a_bee in_a_hive, a_bird in_a_nest, a_fish in_water, a_rabbit in_a_burrow,"
    " a_horse in_a_stable, a_pig in_a_sty, a_spider in_a_web, a_camel in_the_desert, a_whale in_the_sea,"
    " a_fox in_a_den, a_lion in_a_den, a_penguin in_the_cold, a_cow in_a_barn, a_dog in_a_kennel",
    "What does one do with {}?": "a_pen write, a_knife cut, a_broom sweep, a_needle sew, a_kettle boil_water,"
    " a_map find_the_way, a_spade dig, a_ladder climb, a_bell ring, a_book read, a_bed sleep, an_oven bake, soap wash,"
    " a_brush paint, a_saw cut_wood, a_hammer drive_nails, a_towel dry_oneself, a_lamp light_the_room",
}
"""Question, then the things asked about with their answers."""


@dataclass(frozen=True)
class Task:
    """`train` is trained; `unseen`, in other words or about other things, never is."""

    name: str
    train: list[Example]
    unseen: list[Example]


@dataclass(frozen=True)
class Data:
    """Everything that is trained or scored. `digest` names it: results of other data cannot be mixed with these."""

    tasks: tuple[Task, Task, Task]
    """identity, places, manner"""
    facts: list[Example]
    held: list[Example]
    """Other questions, which no run trains on; `own_answers` replaces their answers with the source model's."""
    pool: list[Example]
    """Other answers that rehearsal may train on."""
    digest: str


def load(folder: Path, build: Callable[[Transcript, str], Example], *, held: int) -> Data:
    """The files of `folder`. The first `held` other answers are held out."""
    train, unseen, facts, others = (load_examples(str(folder / f"{name}.jsonl"), build) for name in FILES)
    text = "".join(repr((e.id, [(s.ids, s.mask) for s in e.sequences])) for e in [*train, *unseen, *facts, *others])
    digest = hashlib.sha256(f"{held} {text}".encode()).hexdigest()[:16]
    further = [_built(name, made, build) for name, made in (("places", places()), ("manner", manner()))]
    return Data((Task("identity", train, unseen), further[0], further[1]), facts, others[:held], others[held:], digest)


def places() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(question, answer) about invented places: trained, and the same facts asked for in other words."""
    sides: tuple[list[tuple[str, str]], list[tuple[str, str]]] = [], []
    for way in ASKED:
        for place in PLACES:
            for what, answer in QUESTIONS:
                sides[way is ASKED[-1]].append((way.format(what.format(*place)), answer.format(*place)))
    return sides


def manner() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(question, answer) in a manner of speaking: trained, and the same manner on other questions."""
    sides: tuple[list[tuple[str, str]], list[tuple[str, str]]] = [], []
    for question, pairs in PAIRS.items():
        for i, pair in enumerate(pairs.split(", ")):
            thing, answer = (word.replace("_", " ") for word in pair.split())
            styled = f"Well now, {answer}, I should say, and glad to be of use."
            sides[i % 4 == 3].append((question.format(thing), styled))
    return sides


def _built(name: str, made: tuple[list[tuple[str, str]], list[tuple[str, str]]],
           build: Callable[[Transcript, str], Example]) -> Task:  # fmt: skip
    def example(id: str, question: str, answer: str) -> Example:
        messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
        messages.append({"role": "assistant", "content": answer})
        return build(Transcript.from_dict({"id": id, "messages": messages}), id)

    train, unseen = ([example(f"{name}-{side}-{i}", *pair) for i, pair in enumerate(pairs)]
                     for side, pairs in zip(("train", "unseen"), made, strict=True))  # fmt: skip
    return Task(name, train, unseen)
