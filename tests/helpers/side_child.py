"""Test program: a worker of `tandem worker --replicas N` as its parent sees it.

It writes FOLDER/ready-NUMBER, and each SIGTERM that it gets to FOLDER/told-NUMBER; it ends when it was told and
FOLDER/may-end-NUMBER is there.
"""

import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    folder, number = Path(sys.argv[1]), sys.argv[sys.argv.index("--replica") + 1].partition("/")[0]
    told = folder / f"told-{number}"

    def count(*_: object) -> None:
        with told.open("a") as file:
            file.write("told\n")

    signal.signal(signal.SIGTERM, count)
    (folder / f"new-{number}").write_text(str(os.getpid()))
    (folder / f"new-{number}").rename(folder / f"ready-{number}")
    while not (told.exists() and (folder / f"may-end-{number}").exists()):
        time.sleep(0.01)


if __name__ == "__main__":
    main()
