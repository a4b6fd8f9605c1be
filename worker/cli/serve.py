"""`tandem serve MODEL [vllm options]`: vLLM, its weights open to a trainer. See serving/launch.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from producer.cli import redis_option
from producer.connection import checked_url, resolve_url, safe_url
from worker.config.optimizers import DEFAULT, OPTIMIZER_ENV, OPTIMIZERS, WHAT
from worker.serving.cache_policy import CachePolicy, cache_options
from worker.serving.expert_kernels import kernel_options
from worker.serving.feedback_options import check_feedback, feedback_options, options_of
from worker.serving.launch import (
    build_environment,
    check_installed,
    entry_module,
    is_cpu_build,
    lock,
    with_defaults,
)
from worker.serving.memory_share import TrainerMemory, make_room
from worker.serving.refused_options import check_options
from worker.serving.step_size import step_size
from worker.serving.vllm_flags import LaunchError
from worker.utils import supported_versions, unix_socket


@click.command("serve", context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]})
@click.argument("model")
@click.argument("vllm_options", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    help="Folder for the server's sockets; the worker needs the same. By default $TANDEM_RUN_DIR, else a folder of"
    " your own below $XDG_RUNTIME_DIR or /tmp.",
)
@click.option(
    "--trainer-memory",
    type=TrainerMemory(),
    default="auto",
    show_default=True,
    help="GPU memory, in GB, that vLLM leaves to the trainer. auto: what training MODEL needs. 0: what vLLM leaves by"
    " itself.",
)
@click.option(
    "--optimizer",
    type=click.Choice(OPTIMIZERS),
    default=DEFAULT,
    show_default=True,
    help=f"What will train the weights. Its state lies in the server's memory and is sized now. {WHAT} At 27 billion"
    " parameters the state takes 68 MB with apollo-mini and 52 MB with factored.",
)
@cache_options
@feedback_options
@redis_option
def command(
    model: str,
    vllm_options: tuple[str, ...],
    run_dir: Path | None,
    trainer_memory: float | None,
    optimizer: str,
    running: str,
    prefix_max_age: int,
    redis_url: str | None,
    **values: Any,
) -> None:
    """Serve MODEL (a directory or a hub name) with vLLM, its weights open to `tandem worker` and `tandem train`.

    Every other option goes to vLLM as it is: see `vllm serve --help`. Without --host, only 127.0.0.1 is bound.
    Redis is needed for --record and --feedback alone.
    """
    if model.startswith("-"):
        raise LaunchError(f"MODEL comes first: tandem serve MODEL {model} ...")
    policy = CachePolicy(running, prefix_max_age)
    feedback, variables = options_of(values, os.environ)
    check_feedback(feedback, vllm_options, os.environ)
    if feedback.any:
        variables["REDIS_URL"] = checked_url(resolve_url(redis_url))
    supported_versions.check_versions("torch", "transformers", "vllm")
    on_cpu = is_cpu_build()
    check_installed()
    check_options(vllm_options, os.environ)
    run_dir = unix_socket.prepare_run_dir((run_dir or unix_socket.default_run_dir()).absolute())
    lock(run_dir, model, tell=say)
    options, notes = with_defaults(vllm_options, os.environ, on_cpu)
    share = make_room(model, vllm_options, trainer_memory, os.environ, on_cpu, optimizer)
    kernels = kernel_options(model, vllm_options, on_cpu)
    step = step_size(vllm_options, on_cpu)
    options = [*options, *share.options, *kernels.options, *step.options]
    notes = [*notes, *share.notes, *kernels.notes, *step.notes]
    environment = build_environment(os.environ, run_dir, vllm_options, on_cpu)
    environment |= policy.environment() | share.environment() | {OPTIMIZER_ENV: optimizer} | variables
    notes += feedback.notes(safe_url(resolve_url(redis_url)))
    for note in notes:
        say(note)
    arguments = [sys.executable, "-P", "-m", *entry_module(on_cpu, model), *options]
    os.execve(sys.executable, arguments, environment)


def say(note: str) -> None:
    """One sentence for whoever started the server."""
    click.echo(f"tandem serve: {note}", err=True)
