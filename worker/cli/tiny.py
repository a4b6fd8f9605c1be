"""`tandem tiny DIRECTORY`: a small random Qwen3.5 to try things with."""

from pathlib import Path

import click

from worker.testing.tiny_model import TEMPLATES, make_tiny


@click.command("tiny")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--template", type=click.Choice(TEMPLATES), default="nothink", show_default=True, help="Chat template.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random weights.")
@click.option("--vision", is_flag=True, help="Add a vision tower of one layer; vLLM 0.26 needs one to serve Qwen3.5.")
def command(directory: Path, template: str, seed: int, vision: bool) -> None:
    """Write a small random Qwen3.5 to DIRECTORY."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    make_tiny(directory, seed=seed, template=template, vision=vision)
    size = sum(file.stat().st_size for file in directory.iterdir())
    click.echo(f"{directory}: Qwen3.5, random weights (seed {seed}), {size / 1e6:.1f} MB")
