"""How the transcripts of a micro-batch are divided among several trainers.

Must not know: torch, Redis, vLLM.
Invariant: the division follows from the transcripts' lengths, their order and the number of parts alone; a
transcript is one part's, whole.
"""

from collections.abc import Sequence
from dataclasses import replace

from worker.data.examples import Example


def divided(examples: Sequence[Example], parts: int) -> list[list[Example]]:
    """`parts` times the whole list, in which all that are another part's stand empty. The longest first, each to the
    part that has the fewest tokens, and of those to the first: so the first part is never the only empty one."""
    loads = [0] * parts
    owner = [0] * len(examples)
    costs = [one.tokens + one.teacher_tokens for one in examples]
    for i in sorted(range(len(examples)), key=lambda i: (-costs[i], i)):
        owner[i] = min(range(parts), key=lambda part: (loads[part], part))
        loads[owner[i]] += costs[i]
    return [
        [one if owner[i] == part else replace(one, sequences=(), teachers=()) for i, one in enumerate(examples)]
        for part in range(parts)
    ]


def has_work(part: Sequence[Example]) -> bool:
    """Whether anything in it is trained."""
    return any(one.sequences for one in part)
