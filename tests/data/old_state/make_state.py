"""Made the state directory beside it, with the code of commit b2ecaf2: see README.md.

PYTHONPATH=.:tests python make_state.py NEW_FOLDER     in a checkout of that commit
"""

import json
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

from durable_parts import Site
from worker.tiny import make_tiny

SMALL = ("--lr", "1e-6")
"""Few weights change, so that a checkpoint differs little from the model."""
KEPT = ("--no-checkpoint-at-stop", "--checkpoint-every", "1000")


def talk(id: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"What is {id}?"}, {"role": "assistant", "content": f"{id} is a name."}]
    return {"id": id, "messages": messages}


def note(site: Site, seen: dict[int, dict[str, Any]]) -> None:
    everything, step = site.everything()
    seen[site.agree()] = {"digest": site.digest(), "everything": everything, "step": step}


def plain(site: Site, key: bytes) -> Any:
    """What Redis has under `key`: a text, a map, or a stream's maps."""
    kind = site.redis.type(key)
    if kind == b"string":
        return site.redis.get(key).decode()
    if kind == b"hash":
        return {name.decode(): value.decode() for name, value in site.redis.hgetall(key).items()}
    return [{name.decode(): value.decode() for name, value in entry.items()} for _, entry in site.redis.xrange(key)]


def as_difference(weights: Path, model: Path) -> None:
    """Put what differs from the model in the place of `weights`: nearly all zeros, which compress."""
    ours, source = weights.read_bytes(), (model / weights.name).read_bytes()
    assert len(ours) == len(source)
    weights.write_bytes(bytes(a ^ b for a, b in zip(ours, source, strict=True)))


def main(out: Path) -> None:
    out.mkdir(parents=True)
    model = make_tiny(out / "model")
    site, seen = Site(out / "site", model), dict[int, dict[str, Any]]()
    for ids, options in ((("a-0", "a-1"), KEPT), (("b-0",), ()), (("c-0", "c-1"), KEPT)):
        site.producer.enqueue_many([talk(id) for id in ids])
        site.work(*options, *SMALL)  # the second writes a checkpoint when it stops
        note(site, seen)
    site.tandem("rollback", "3", "--drop", "c-0")
    note(site, seen)
    site.producer.enqueue_many([talk("d-0")])
    site.work(*KEPT, *SMALL)
    note(site, seen)
    said = {key.decode(): plain(site, key) for key in sorted(site.redis.scan_iter("weights:*"))}
    site.close()
    shutil.rmtree(site.state / "checkpoints" / "4")  # the rollback's: version 5 then comes from 2 and the journal
    as_difference(site.state / "checkpoints" / "2" / "model.safetensors", model)
    (site.state / "lock").unlink()
    with tarfile.open(out / "state.tar.xz", "w:xz") as archive:
        archive.add(site.state, "state")
    (out / "expected.json").write_text(json.dumps({"versions": seen, "redis": said}, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
