"""All kinds of feedback through the queue: trained once, said in the manifest, journaled, recovered and dropped."""

import json
from pathlib import Path
from typing import Any

from durable_parts import QUIET, Site, transcripts
from test_rollback import run_batches

SAID: list[dict[str, Any]] = [
    {},
    {"rating": -1},
    {"rating": True},
    {"rejected": "I have no idea."},
    {"rating": -0.5},
    {},
    {"comment": "Say it in fewer words."},
    {"method": "distill"},
]


def feedback() -> list[dict[str, Any]]:
    return [item | said for item, said in zip(transcripts("f", len(SAID)), SAID, strict=True)]


def test_every_kind_is_trained_once_recovered_and_dropped(site: Site, tmp_path: Path, tiny_model: Path) -> None:
    sent = feedback()
    for item in sent:
        site.producer.enqueue(**item)
    site.work(*QUIET)
    assert site.agree() == 4 and sorted(site.trained()) == [item["id"] for item in sent]
    kinds = [json.loads(site.manifest(version)["kinds"]) for version in (1, 2, 3, 4)]
    assert [{kind: of["jobs"] for kind, of in one.items()} for one in kinds] == [
        {"demonstration": 1, "disliked": 1}, {"liked": 1, "correction": 1}, {"disliked": 1, "demonstration": 1},
        {"comment": 1, "distilled": 1},
    ]  # fmt: skip
    assert all(of["loss"] > 0 for one in kinds for of in one.values())
    losses = [json.loads(site.manifest(version)["losses"]) for version in (1, 2, 3, 4)]
    assert [len(of) for of in losses] == [1, 1, 1, 0], "the outlier guard learns from what is imitated"
    assert all("gradient_norm" not in site.manifest(version) for version in (1, 2, 3, 4)), "and so does that of norms"

    before = site.everything()
    assert before == run_batches(tiny_model, tmp_path / "same", [sent[:2], sent[2:4], sent[4:6], sent[6:]])
    site.recover()
    assert site.agree() == 4 and site.everything() == before, "recovery"
    site.recover(from_journal=True)
    assert site.everything() == before, "recovery, from the journal alone"
    site.tandem("rollback", "4", "--drop", "f-1", "--drop", "f-3")
    kept = [[sent[0]], [sent[2]], sent[4:6], sent[6:]]
    assert site.everything() == run_batches(tiny_model, tmp_path / "without", kept)


def test_a_flood_of_dislikes_is_stopped_with_a_reason_and_the_rest_goes_on(site: Site) -> None:
    """The bound is small: what counts here is who is refused, and what the next worker knows."""
    said = transcripts("f", 1)[0]["messages"]
    guarded = [*QUIET, "--lr", "1e-2", "--dislikes-bound", "1e-4"]
    for number in range(12):  # an answer that nobody expects has nothing to unlearn
        site.producer.enqueue(said, id=f"up-{number}")
    site.work(*guarded)
    taught = len(site.trained())
    for number in range(8):
        site.producer.enqueue(said, id=f"down-{number}", rating=-1)
    site.work(*guarded)
    flood = site.trained()[taught:]
    assert 0 < len(flood) < 8 and float(site.manifest(site.agree())["dislikes_moved"]) > 1e-4
    reasons = [site.producer.status(f"down-{number}").reason for number in range(8) if f"down-{number}" not in flood]
    assert all(reason and "moved what the model expects" in reason and "roll back" in reason for reason in reasons)
    site.producer.enqueue(said, id="down-8", rating=-1)
    site.producer.enqueue(said, id="up-12")
    site.work(*guarded)
    assert site.trained()[taught + len(flood) :] == ["up-12"], "another worker knows it too"
