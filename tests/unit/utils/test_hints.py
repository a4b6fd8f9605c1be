"""Commands that we tell the user to run: with the run directory that the user gave."""

import sys
from pathlib import Path

import pytest

from worker.cli.main import main
from worker.utils.hints import option_of, with_run_dir


@pytest.mark.parametrize(
    ("sentence", "placed"),
    [
        ("start `tandem worker`, it takes over", "start `tandem worker --run-dir '/run/a b'`, it takes over"),
        (
            "`tandem serve` or `tandem worker -x`",
            "`tandem serve --run-dir '/run/a b'` or `tandem worker -x --run-dir '/run/a b'`",
        ),
        ("(`tandem log` lists who was)", "(`tandem log --run-dir '/run/a b'` lists who was)"),
        ("`tandem worker --run-dir DIRECTORY`", "`tandem worker --run-dir DIRECTORY`"),
        ("`tandem resume` ends it; a tandem worker", "`tandem resume` ends it; a tandem worker"),
    ],
)
def test_a_command_gets_the_run_directory_where_it_has_the_flag(
    sentence: str, placed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert with_run_dir(sentence, Path("/run/a b")) == placed
    monkeypatch.setenv("TANDEM_RUN_DIR", "/run/a b")
    assert with_run_dir(sentence, Path("/run/a b")) == sentence == with_run_dir(sentence, None)


def test_what_an_option_says() -> None:
    assert option_of(["worker", "--run-dir", "a", "--x", "--run-dir=b"], "--run-dir") == "b"
    assert option_of(["worker", "--run-dir", "a"], "--run-dir") == "a"
    assert option_of(["--run-dirs", "a"], "--run-dir") is None and option_of(["--run-dir"], "--run-dir") is None


def test_an_error_s_hint_has_the_place_of_its_replica(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ["worker", "--replica", "1/2", "--run-dir", str(tmp_path / "run-{replica}")]
    monkeypatch.setattr(sys, "argv", ["tandem", *given])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert f"start one with `tandem serve --run-dir {tmp_path}/run-1`" in capsys.readouterr().err
