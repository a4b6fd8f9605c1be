"""Conversations that any language model finds likely, to see whether it still does. Nobody trains them.

Plain and short, of several kinds: facts, instructions, small talk, code, arithmetic, other languages. What counts is
not their loss, but that it does not rise.
"""

from contextlib import suppress

from producer.transcript import Transcript
from worker.data.examples import Example, ExampleBuilder, ExampleError

_PAIRS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Name the seasons of the year.", "The four seasons are spring, summer, autumn and winter."),
    ("What is 12 plus 30?", "12 plus 30 is 42."),
    (
        "How do I make tea?",
        "Boil some water, pour it over the tea, and wait for three to five minutes.",
    ),
    ("Why is the sky blue?", "The air scatters blue light more than red light, so the sky looks blue to us."),
    ("Can you help me?", "Of course! What would you like to know?"),
    ("Write a sentence about a cat.", "The cat slept on the warm window sill all afternoon."),
    ("Write a Python function that adds two numbers.", "def add(a, b):\n    return a + b"),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote Romeo and Juliet."),
    ("Quelle est la capitale de l'Italie ?", "La capitale de l'Italie est Rome."),
    ("¿Cuántos días tiene una semana?", "Una semana tiene siete días."),
)


def reference_examples(builder: ExampleBuilder) -> list[Example]:
    """The conversations for one model; those that are longer than `builder` allows are left out."""
    found = []
    for number, (question, answer) in enumerate(_PAIRS):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        with suppress(ExampleError):
            found.append(builder.build(Transcript(messages=messages), f"reference-{number}"))
    return found
