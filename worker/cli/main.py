"""The console script `tandem`: one name a subcommand, each loaded only when it is called."""

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from producer.errors import TandemError
from worker.config.replica_options import PLACE
from worker.utils.hints import FLAG, option_of, with_run_dir

COMMANDS = {
    "serve": ("worker.cli.serve", "Serve MODEL with vLLM, ready to be trained in place."),
    "worker": ("worker.cli.worker", "Drain the queue and train the served weights."),
    "enqueue": ("producer.cli", "Queue the conversations of a file."),
    "feedback": ("producer.cli_feedback", "Say of a recorded answer how it was, or what it should have been."),
    "version": ("producer.cli", "Print the version of the weights that is live."),
    "eval": ("worker.cli.eval", "Say how well a version does on the conversations of a file."),
    "diff": ("worker.cli.diff", "Say what changed between two versions."),
    "train": ("worker.cli.train", "Train on FILE.jsonl without a queue."),
    "tiny": ("worker.cli.tiny", "Write a tiny Qwen3.5 to try things with."),
    "rollback": ("worker.cli.rollback", "Go back to an older version, with transcripts left out if asked."),
    "forget": ("worker.cli.forget", "Take a user's transcripts out of queue, records, journal and weights."),
    "pause": ("worker.cli.pause", "Pause training; the server goes on serving."),
    "resume": ("worker.cli.resume", "Let paused training go on."),
    "log": ("worker.cli.log", "List versions: transcripts, tokens, loss, checkpoints."),
    "status": ("worker.cli.status", "Show the state of server, worker and queue, and what is wrong."),
    "dashboard": ("worker.cli.dashboard", "Serve the page: how learning goes, and rq-dashboard."),
    "check": ("worker.cli.check", "Say whether a model can be trained here, from its config.json alone."),
    "doctor": ("worker.cli.doctor", "Check every part, and say what is wrong and how to mend it."),
}
SHARED_MODULES = {"producer.cli"}
"""Modules that hold several commands, each under its own name; elsewhere the object is called `command`."""


class LazyGroup(click.Group):
    """A click group that imports a subcommand's module when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module_name, _ = COMMANDS[cmd_name]
        if cmd_name == "worker":  # read when torch is loaded, which logs traces of its stack where replica 0 is gone
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] in ("worker", "producer"):
                raise
            raise TandemError(
                f"`tandem {cmd_name}` needs {error.name}: pip install 'tandem-worker[worker]' on a GPU machine, "
                "or run bash scripts/setup for the CPU"
            ) from None
        command: click.Command = getattr(module, cmd_name if module_name in SHARED_MODULES else "command")
        command.name = cmd_name  # else it is its function's: "command"
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="tandem-worker")
def tandem() -> None:
    """Fine-tune the model your vLLM is serving, in the very weights it serves."""


def _run_dir(arguments: Sequence[str]) -> Path | None:
    """The run directory that they name, with a replica's number in its place."""
    if (named := option_of(arguments, FLAG)) is None:
        return None
    number = (option_of(arguments, "--replica") or "").partition("/")[0]
    return Path(named.replace(PLACE, number) if number else named)


def main() -> None:
    """Entry point: errors we raise on purpose become one line and exit code 1."""
    try:
        tandem.main(prog_name="tandem", standalone_mode=True)
    except TandemError as error:
        print(f"error: {with_run_dir(str(error), _run_dir(sys.argv[1:]))}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
