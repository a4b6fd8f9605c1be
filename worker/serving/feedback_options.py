"""What `tandem serve` does with completions and feedback: --record, --feedback and what belongs to them.

`tandem serve` takes them as flags and hands them to vLLM's API process through environment variables. Must not know:
vLLM, Redis.
Invariants: both are off unless asked for; the key of feedback is on no command line and in no error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from worker.serving.vllm_flags import LaunchError, parse_flags

KEY_ENV, KEY_FILE_ENV = "TANDEM_FEEDBACK_KEY", "TANDEM_FEEDBACK_KEY_FILE"
RECORD_ENV, BYTES_ENV, LOGPROBS_ENV = "TANDEM_RECORD_HOURS", "TANDEM_RECORD_BYTES", "TANDEM_RECORD_LOGPROBS"
FEEDBACK_ENV, RATE_ENV = "TANDEM_FEEDBACK", "TANDEM_FEEDBACK_PER_MINUTE"
DEFAULT_BYTES = 1 << 30
DEFAULT_PER_MINUTE = 60
SHORTEST_KEY = 16
"""Characters. `openssl rand -hex 32` makes 64."""


@dataclass(frozen=True)
class FeedbackOptions:
    """record: hours that completions are kept, 0: not at all. record_bytes: most bytes of all that are kept.
    feedback: whether /v1/feedback answers. key: what its callers must show. per_minute: most calls by one user.
    logprobs: whether the engine computes log-probabilities for the records, also where the client asks for none."""

    record: float = 0.0
    record_bytes: int = DEFAULT_BYTES
    feedback: bool = False
    key: str = ""
    per_minute: int = DEFAULT_PER_MINUTE
    logprobs: bool = False

    @property
    def any(self) -> bool:
        """Whether the server needs Redis at all."""
        return self.feedback or self.record > 0

    @property
    def seconds(self) -> int:
        """How long a completion is kept."""
        return max(1, round(self.record * 3600))

    def environment(self) -> dict[str, str]:
        """The options as variables for vLLM's processes, without the key."""
        return {
            RECORD_ENV: str(self.record),
            BYTES_ENV: str(self.record_bytes),
            LOGPROBS_ENV: str(int(self.logprobs)),
            FEEDBACK_ENV: str(int(self.feedback)),
            RATE_ENV: str(self.per_minute),
        }

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> FeedbackOptions:
        """The options that `environment` was given; off where nothing is said. Raises LaunchError for a bad key."""
        feedback = environment.get(FEEDBACK_ENV, "0") == "1"
        return cls(
            float(environment.get(RECORD_ENV, "0")),
            int(environment.get(BYTES_ENV, DEFAULT_BYTES)),
            feedback,
            read_key(environment) if feedback else "",
            int(environment.get(RATE_ENV, DEFAULT_PER_MINUTE)),
            environment.get(LOGPROBS_ENV, "0") == "1",
        )

    def notes(self, where: str) -> list[str]:
        """One sentence for each that is on. where: the Redis, as it may be printed."""
        said = []
        if self.record:
            said.append(
                f"completions are kept in Redis at {where} for {self.record:g} hours, at most"
                f" {self.record_bytes / 1e6:,.0f} MB: messages and answers, except where a request says"
                ' "store": false'
            )
        if self.feedback:
            said.append(
                f"POST /v1/feedback teaches the model, for who has the key; at most {self.per_minute} calls a minute"
                " by one user"
            )
        return said


def read_key(environment: Mapping[str, str]) -> str:
    """The key of /v1/feedback, from the environment or from the file that it names. Raises LaunchError."""
    path = environment.get(KEY_FILE_ENV)
    if path:
        try:
            key = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise LaunchError(f"--feedback-key-file {path}: cannot be read as text ({type(error).__name__})") from None
    else:
        key = environment.get(KEY_ENV, "").strip()
    if not key:
        raise LaunchError(
            f"--feedback needs a key of its own: set {KEY_ENV}, or give --feedback-key-file (openssl rand -hex 32 makes"
            " one)"
        )
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise LaunchError(
            f"the key of --feedback must be at least {SHORTEST_KEY} printable ASCII characters without spaces"
        )
    return key


def check_feedback(options: FeedbackOptions, vllm_options: tuple[str, ...], environment: Mapping[str, str]) -> None:
    """Raises LaunchError where the key of feedback is one that lets ask, too."""
    asking = [*parse_flags(vllm_options).get("--api-key", []), environment.get("VLLM_API_KEY", "")]
    if options.feedback and options.key in asking:
        raise LaunchError("the key of --feedback is also an --api-key: whoever may ask may not teach; make another key")


def feedback_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of --record and of --feedback to a click command."""
    for option in (
        click.option(
            "--feedback-per-minute",
            type=click.IntRange(1),
            default=DEFAULT_PER_MINUTE,
            show_default=True,
            help="Most calls of POST /v1/feedback by one `user`; all that name none are one.",
        ),
        click.option(
            "--feedback-key-file",
            type=click.Path(path_type=Path),
            help=f"File with the key that callers of /v1/feedback must show. Default: ${KEY_ENV}.",
        ),
        click.option(
            "--feedback",
            is_flag=True,
            help="Answer POST and GET /v1/feedback: ratings, corrections and comments on kept completions, and whole"
            " transcripts, are queued for training.",
        ),
        click.option(
            "--record-logprobs",
            is_flag=True,
            help="Keep the log-probabilities of the sampled tokens too. The engine then computes them for every token,"
            " which slows answers down.",
        ),
        click.option(
            "--record-bytes",
            type=click.IntRange(1_000_000),
            default=DEFAULT_BYTES,
            show_default=True,
            help="Most bytes of Redis for all kept completions; the oldest go first.",
        ),
        click.option(
            "--record",
            type=click.FloatRange(0, 24 * 366),
            default=0.0,
            metavar="HOURS",
            help="Keep completions in Redis for so long, with messages, answers and sampled tokens, so that feedback"
            ' needs only their key (X-Tandem-Completion). "store": false in a request keeps it out. 0 (the default):'
            " keep none.",
        ),
    ):
        command = option(command)
    return command


def options_of(values: dict[str, Any], environment: Mapping[str, str]) -> tuple[FeedbackOptions, dict[str, str]]:
    """(the options, what the environment of vLLM's processes needs for them), from a command's values.

    Takes out of `values` what is its own. Raises LaunchError.
    """
    file: Path | None = values.pop("feedback_key_file")
    record, feedback = values.pop("record"), values.pop("feedback")
    given = {KEY_FILE_ENV: os.fspath(file.absolute())} if file else {}
    key = read_key({**environment, **given}) if feedback else ""
    most, rate, logprobs = (values.pop(name) for name in ("record_bytes", "feedback_per_minute", "record_logprobs"))
    options = FeedbackOptions(record, most, feedback, key, rate, logprobs)
    return options, {**options.environment(), **given}
