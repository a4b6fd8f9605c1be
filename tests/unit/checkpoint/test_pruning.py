"""Which checkpoints stay, however far apart they are."""

from hypothesis import example, given
from hypothesis import strategies as st

from worker.checkpoint.pruning import kept
from worker.config.retention import Policy


class Kept:
    """A worker's checkpoints, as versions go by. Of the marked ones nothing is deleted."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.version, self.base = 0, 0
        self.checkpoints: list[int] = []
        self.longest, self.longest_drop, self.oldest, self.most = 0, 0, 0, 0

    def train(self, versions: int) -> None:
        """So many versions, and then a checkpoint."""
        for _ in range(versions):
            self.version += 1
            self.measure()
        found = kept([*self.checkpoints, self.version], keep=self.policy.keep, history=self.policy.history)
        assert found.base >= self.base, "what was let go of is not needed again"
        self.base = found.base
        self.checkpoints = sorted(found.checkpoints)
        self.most = max(self.most, len(self.checkpoints))
        self.measure()

    def measure(self) -> None:
        """The batches that a rollback within the history replays; with --drop, from before the dropped one's batch."""
        first = max(0, self.version - self.policy.history)
        assert self.base <= first, "a version of the history is gone"
        for target in range(first, self.version + 1):
            self.longest = max(self.longest, target - self.point(target))
        self.longest_drop = max(self.longest_drop, self.version - self.point(max(first - 1, self.base)))
        self.oldest = max(self.oldest, self.version - self.base)

    def point(self, version: int) -> int:
        """The newest one at or below `version` that a replay can begin from."""
        return max(found for found in [self.base, *self.checkpoints] if found <= version)


DEFAULT = Policy()


@given(distances=st.lists(st.integers(1, DEFAULT.every), min_size=1, max_size=8))
@example(distances=[30])
@example(distances=[10])
@example(distances=[5])
@example(distances=[1, 1, 50])
def test_the_longest_replay_of_the_defaults(distances: list[int]) -> None:
    """Whatever the time between two versions makes of --checkpoint-minutes."""
    worker, longest = Kept(DEFAULT), DEFAULT.history + DEFAULT.every
    while worker.version < 700:
        for distance in distances:
            worker.train(distance)
    assert worker.longest <= longest == 150
    assert worker.longest_drop <= 2 * DEFAULT.history + DEFAULT.every == 250
    assert worker.oldest <= 2 * DEFAULT.history + DEFAULT.every, "the journal grows no longer than this"
    assert worker.most <= DEFAULT.keep + 2


@given(
    distances=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    keep=st.integers(2, 5),
    history=st.integers(0, 60),
)
def test_the_base_follows_the_history(distances: list[int], keep: int, history: int) -> None:
    worker = Kept(Policy(keep=keep, history=history))
    while worker.version < 400:
        for distance in distances:
            worker.train(distance)
    most = max(distances)
    assert worker.oldest <= 2 * history + (keep + 1) * most
    newest = worker.checkpoints[-keep:]
    assert worker.base <= newest[0], "when a newer one is damaged, the journal leads on from there"
