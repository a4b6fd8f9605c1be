"""Flags that say where the files of server and worker are, for the commands that ask in the same words."""

from pathlib import Path

import click

run_dir_option = click.option("--run-dir", type=click.Path(path_type=Path), help="The server's run directory.")
state_dir_option = click.option("--state-dir", type=click.Path(path_type=Path), help="The worker's state directory.")
model_dir_option = click.option(
    "--model", "model_dir", type=click.Path(path_type=Path), help="Model directory, where no server runs."
)
