"""What the clients of a serving benchmark send: how many they are, how long their prompts, and whether they are chats.

    16x3500              16 clients, each prompt 3,500 random tokens of its own
    8x128+3500+16000     8 clients; each request draws one of the lengths
    16xchat3500          16 conversations: 3,500 tokens at first, and with every turn all of it again with the answer
                         and a new question; after 6 turns another conversation

Must not know: servers. Invariant: the same load sends the same prompts in the same turn, but for the answers in a chat;
in another turn it sends none of them, which a cache would have.
"""

import random
import re
from collections.abc import Generator
from dataclasses import dataclass

TURNS = 6
QUESTION = 32
"""Tokens of each question but the first."""
FIRST_TOKEN = 300
"""Ids below may be special."""

Prompts = Generator[list[int], list[int], None]
"""Yields a prompt's token ids, is sent the answer's."""


@dataclass(frozen=True)
class Load:
    """lengths: tokens of a prompt; of a chat's first one."""

    name: str
    clients: int
    lengths: tuple[int, ...]
    chat: bool = False

    @classmethod
    def parse(cls, name: str) -> "Load":
        """Raises ValueError, saying what a load looks like."""
        found = re.fullmatch(r"(\d+)x(chat)?(\d+(?:\+\d+)*)", name)
        if not found or int(found[1]) < 1:
            raise ValueError(f"{name!r} is no load: write 16x3500, 8x128+3500+16000 or 16xchat3500")
        return cls(name, int(found[1]), tuple(int(part) for part in found[3].split("+")), bool(found[2]))

    def longest(self, answer: int) -> int:
        """Tokens of the longest prompt with its answer of `answer` tokens."""
        turns = TURNS * (answer + QUESTION) if self.chat else answer
        return max(self.lengths) + turns

    def prompts(self, client: int, vocabulary: int, turn: int = 0) -> Prompts:
        """What `client` sends, for ever. vocabulary: token ids are below it. turn: how often the load was sent
        before."""
        draw = random.Random(f"{self.name} {client} {turn}")

        def fresh(count: int) -> list[int]:
            return [draw.randrange(FIRST_TOKEN, vocabulary) for _ in range(count)]

        while True:
            prompt = fresh(draw.choice(self.lengths))
            for _ in range(TURNS if self.chat else 1):
                answer = yield prompt
                prompt = [*prompt, *answer, *fresh(QUESTION)]
