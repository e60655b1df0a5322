"""Where a bundle may be written: nothing that was there before is lost, or vouched for."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import harness.cli  # noqa: F401 - it adds the commands
from bridge.cli import app
from bridge.errors import BridgeError, EnvironmentMissingError, UsageError
from harness.qualify.bundle import refuse_foreign, refuse_other_config


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    """Before the model is read, which is not even there."""
    (tmp_path / "config.json").write_text("mine")
    for more in ([], ["--resume"]):
        arguments = ["qualify", "--config", "nothere", "--report", str(tmp_path), *more]
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, BridgeError)
        assert "holds something else" in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "mine"


def test_nothing_is_made_where_there_is_nothing_to_resume(tmp_path: Path) -> None:
    """No directory, neither."""
    arguments = ["qualify", "--config", "nothere", "--report", str(tmp_path / "no"), "--resume"]
    assert "no run to resume" in str(CliRunner().invoke(app, arguments).exception)
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there_is_said_before_any_work(
    tmp_path: Path, odd_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error, exit code 3, and no bundle that says "failed"; `--list` needs none."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    report = tmp_path / "bundle"
    arguments = ["qualify", "--config", str(odd_config), "--device", "cuda"]
    done = CliRunner().invoke(app, [*arguments, "--report", str(report)])
    assert isinstance(done.exception, EnvironmentMissingError)
    assert done.exception.exit_code == 3
    assert not report.exists()
    assert CliRunner().invoke(app, [*arguments, "--list"]).exit_code == 0


def test_an_earlier_run_may_be_gone_on_with_and_a_file_is_no_directory(tmp_path: Path) -> None:
    """Its configuration is not another's."""
    refuse_foreign(tmp_path / "new", resume=False)
    (tmp_path / "ranks").mkdir()
    refuse_foreign(tmp_path, resume=False)
    (tmp_path / "journal.jsonl").touch()
    refuse_foreign(tmp_path, resume=True)
    with pytest.raises(UsageError, match="an unfinished run is there") as caught:
        refuse_foreign(tmp_path, resume=False)
    assert "--resume" in str(caught.value.hint)
    refuse_other_config(tmp_path, b"{}")
    (tmp_path / "config.json").write_text("{}")
    refuse_other_config(tmp_path, b"{}")
    with pytest.raises(UsageError):
        refuse_other_config(tmp_path, b"[]")
    with pytest.raises(UsageError):
        refuse_foreign(tmp_path / "config.json", resume=False)
