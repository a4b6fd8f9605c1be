"""The main job, end to end: a model is served by vLLM, is taught through the queue, and answers differently.

Without options: SmolLM2-135M-Instruct, a real instruct model, learns from 100 short conversations who it is, and one of
the versions is brought back. Exit code 0 only if everything that it says at its end is so.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from demo_parts import models, screen

from producer.errors import TandemError

ROOT = Path(__file__).parents[1]
OUR_MODEL = "SmolLM2-135M-Instruct"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--model", metavar="NAME_OR_DIR", help=f"a hub's name, as Qwen/Qwen3.5-0.8B, or a directory ({OUR_MODEL})"
    )
    which.add_argument("--tiny", action="store_true", help="the small story: a tiny Qwen3.5 learns one answer by heart")
    parser.add_argument("--keep", action="store_true", help="leave everything running, with a dashboard and a prompt")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "build" / "demo",
        metavar="DIR",
        help="for plot and figures (build/demo)",
    )
    parser.add_argument("--record", type=Path, metavar="FILE.svg", help="also save what is printed as a picture")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    asked = parse(arguments)
    check_places(asked)
    os.environ.update(VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))  # server and trainer share them
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave through every `with`
    with tempfile.TemporaryDirectory(prefix="tandem-demo-") as name:
        code = tell(Path(name), asked)
    if asked.record:
        screen.save_picture(asked.record, "bash scripts/demo")
    return code


def check_places(asked: argparse.Namespace) -> None:
    """What is written at the end can be written. Raises TandemError naming the flag, before minutes of work."""
    for flag, folder in (("--out", asked.out), ("--record", asked.record and asked.record.parent)):
        if folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TandemError(f"{flag}: the folder {folder} cannot be made ({error.strerror})") from None
        if not os.access(folder, os.W_OK):
            raise TandemError(f"{flag}: the folder {folder} is not writable; name another")


def tell(folder: Path, asked: argparse.Namespace) -> int:
    if asked.tiny:
        from demo_parts import tiny_story

        os.environ["HF_HUB_OFFLINE"] = "1"
        return tiny_story.tell(folder, asked.keep)
    if asked.model:
        model = models.find_model(asked.model)  # a hub shows its own progress
    else:
        with screen.status(f"making the directory of {OUR_MODEL} from its package; this happens once"):
            model = models.find_model(None)
    os.environ["HF_HUB_OFFLINE"] = "1"  # it is here now
    from demo_parts import identity_story

    return identity_story.tell(folder, model, asked.model or OUR_MODEL, asked.out, asked.keep)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (TandemError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
