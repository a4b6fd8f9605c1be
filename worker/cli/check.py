"""`tandem check MODEL...`: whether a model can be trained here, without reading a weight."""

import json

import click

from worker.config.optimizers import DEFAULT, OPTIMIZER_ENV, OPTIMIZERS, optimizer_of


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--gpu-memory", type=click.FloatRange(1), default=80.0, help="GB of the GPU, the server's part included.")
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), default=DEFAULT, help="As in `tandem serve`.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
@click.option("--table", "as_table", is_flag=True, help="A table in Markdown.")
def command(models: tuple[str, ...], gpu_memory: float, optimizer: str, as_json: bool, as_table: bool) -> None:
    """Say whether each MODEL (a directory, or a name on the hub) can be trained, in which way, with how much memory,
    and why not. Only its config.json is read. The exit code is 1 if none of them can be trained anywhere."""
    from worker.operations.model_check import check_model, sentences, table
    from worker.serving.memory_share import find_config

    size = int(gpu_memory * 1e9)
    rule = optimizer_of({OPTIMIZER_ENV: optimizer})
    answers = [check_model(find_config(model, {}).parent, size, rule) | {"model": model.rstrip("/").rpartition("/")[2]}
               for model in models]  # fmt: skip
    if as_table:
        click.echo(table(answers), nl=False)
    else:
        for answer in answers:
            click.echo(json.dumps(answer) if as_json else "\n".join(sentences(answer, size)))
    if not any(answer[device]["trainable"] for answer in answers for device in ("cpu", "gpu")):
        raise SystemExit(1)
