"""The queue's benchmark runs, and batches save round trips."""

import json
import subprocess
import sys
from pathlib import Path


def test_the_benchmark_runs_and_batches_save_round_trips(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "queue_speed.py"
    command = [sys.executable, str(script), "--jobs", "64", "--rounds", "1", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    found = json.loads((tmp_path / "queue.json").read_text())["results"]
    trips = {name: row["round_trips_per_job"] for name, row in found.items()}
    assert trips["RQ SimpleWorker"] > 15 > trips["Tandem, batch 1"] > trips["Tandem, batch 8"]
    assert trips["Tandem, batch 32"] < 1 and (tmp_path / "queue.png").stat().st_size > 5000
