"""What can be foreseen to go wrong: one line, the right exit code, nothing left behind."""

import importlib
import json
import os
import signal
import time

import helpers
import pytest
from helpers import SCRIPTS, case, fails_in_one_line

WITH_DATA = [script for script in SCRIPTS if '"--synthetic"' in helpers.source(script)]
WITH_RESUME = [script for script in SCRIPTS if '"--resume"' in helpers.source(script)]
WITHOUT_FIT = [script for script in SCRIPTS if "several=True" not in helpers.source(script)]

BAD_FLAGS = [
    ["--epochs", "-1"],
    ["--epochs", "1.5"],
    ["--no-such-flag"],
    ["stray"],
    ["--seed", "-1"],
    ["--device", "tpu"],
    ["--device", "gpu:99"],
    ["--device", "gpu:"],
]
CASES = [(script, flags) for script in SCRIPTS for flags in BAD_FLAGS + case(script).bad_flags]


@pytest.mark.parametrize(("script", "flags"), CASES, ids=lambda value: "_".join([*value][:3]))
def test_bad_flags(script, flags, capsys):
    module = importlib.import_module(script)
    code, line = fails_in_one_line(lambda: module.main(flags), capsys)
    assert code == 2
    assert line.startswith("error: ")
    assert flags[0] in line
    assert not os.path.exists("log")


def wrong_uses(action, flag):
    """Return command lines that a parser's action does not take under one of its flags."""
    lines = [[flag[:-1], "1"], [flag[1:], "1"]]  # neither shortened nor with one dash
    if action.nargs == 0:
        return [*lines, [f"{flag}=1"], [flag, "stray"]]
    values = ["no-such-choice", ""] if action.choices else []
    if action.type:
        values += ["x", "", "nan", "inf", "-inf", "1e999", "-99999999999", "99999999999", "0x1"]
    return [*lines, [flag], *([flag, value] for value in values), [flag, "1", "stray"]]


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_uses_of_every_flag(script, capsys):
    module = importlib.import_module(script)
    actions = [action for action in module.build_parser()._actions if action.dest != "help"]
    names = [(action, flag) for action in actions for flag in action.option_strings]
    lines = [flags for action, flag in names for flags in wrong_uses(action, flag)]
    assert len(lines) > 40
    for flags in lines:
        code, line = fails_in_one_line(lambda flags=flags: module.main(flags), capsys)
        assert (code, line[:7]) == (2, "error: "), flags
        assert flags[0].partition("=")[0] in line or "stray" in line, flags
    assert not os.path.exists("log")


@pytest.mark.parametrize("script", SCRIPTS)
def test_logdir_is_a_file(script, capsys):
    module = importlib.import_module(script)
    with open("occupied", "w"):
        pass
    flags = [*case(script).tiny, "--logdir", "occupied"]
    code, line = fails_in_one_line(
        lambda: module.run_as_command(lambda: module.main(flags)), capsys
    )
    assert code == 1
    assert line.startswith("error: ")
    assert "occupied" in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_logdir_cannot_be_written(script, capsys):
    module = importlib.import_module(script)
    flags = [*case(script).tiny, "--logdir", "/proc/nowhere"]
    code, line = fails_in_one_line(
        lambda: module.run_as_command(lambda: module.main(flags)), capsys
    )
    assert code == 1
    assert "/proc/nowhere" in line


def test_two_runs_in_one_second(monkeypatch):
    import mnist_eager_mlp as script

    monkeypatch.setattr(script.time, "strftime", lambda form: "20300101-120000")
    args = script.parse_args(["--synthetic"])
    names = [script.new_run_dir(args, "MNIST", "CPU")[0].name for _ in range(3)]
    assert names == ["20300101-120000", "20300101-120000-1", "20300101-120000-2"]


@pytest.mark.parametrize("script", WITH_DATA)
def test_no_network(script, tmp_path, run_fork):
    begin = time.monotonic()
    run = run_fork(script, ["--epochs", "1"], tmp_path)
    assert run.code == 1
    (line,) = helpers.error_lines(run.stderr)
    assert "Traceback" not in run.stderr
    assert "--synthetic" in line
    assert "~/.keras/datasets" in line or "tensorflow_datasets/downloads/manual" in line
    assert time.monotonic() - begin < 60
    assert run.results["complete"] is False


@pytest.mark.parametrize("script", WITH_DATA)
def test_damaged_data(script, tmp_path, run_fork):
    datasets = tmp_path / "keras" / "datasets"
    batches = datasets / "cifar-10-batches-py-target" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    (datasets / "mnist.npz").write_bytes(b"PK\x03\x04 half a file")
    (datasets / "cifar-10-batches-py-target_archive").write_bytes(b"half an archive")
    for i in range(1, 6):
        (batches / f"data_batch_{i}").write_bytes(b"\x80\x04 half a pickle")
    run = run_fork(script, ["--epochs", "1"], tmp_path)
    assert run.code == 1
    assert len(helpers.error_lines(run.stderr)) == 1
    assert "Traceback" not in run.stderr


def test_a_loss_that_is_not_finite(monkeypatch, capsys):
    import mnist_eager_mlp as script

    flags = ["--synthetic", "--epochs", "3", "--steps-per-epoch", "5", "--logdir", "log"]
    adam = script.keras.optimizers.SGD
    monkeypatch.setattr(script.keras.optimizers, "Adam", lambda: adam(learning_rate=1e30))
    code, line = fails_in_one_line(
        lambda: script.run_as_command(lambda: script.main(flags)), capsys
    )
    assert code == 1
    assert "not finite" in line
    (path,) = script.pathlib.Path("log").glob("*/*/results.json")
    assert json.loads(path.read_text())["complete"] is False


def test_write_results_keeps_the_old_file(tmp_path):
    import mnist_eager_mlp as script

    script.write_results(tmp_path, {"loss": 1.0})
    with pytest.raises(FloatingPointError):
        script.write_results(tmp_path, {"loss": float("nan")})
    assert json.loads((tmp_path / "results.json").read_text()) == {"loss": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_control_c_within_c_code(capsys):
    import mnist_eager_mlp as script

    def interrupted():  # as NumPy does where the signal comes while TensorFlow reads an array
        raise SystemError("returned a result with an exception set") from KeyboardInterrupt()

    code, line = fails_in_one_line(lambda: script.run_as_command(interrupted), capsys)
    assert code == 130
    assert line.startswith("interrupted")


@pytest.mark.parametrize("script", SCRIPTS)
def test_control_c(script, tmp_path, run_fork):
    flags = [*case(script).tiny, "--epochs", "1000"]
    run = run_fork(script, flags, tmp_path, interrupt_at=case(script).again)
    if run.code == -signal.SIGABRT:  # rarely, from within TensorFlow's C++; not twice running
        assert run.results["complete"] is False  # even then results.json can be read
        (tmp_path / "again").mkdir()
        run = run_fork(script, flags, tmp_path / "again", interrupt_at=case(script).again)
    assert run.code == 130, run.stderr
    assert helpers.error_lines(run.stderr)
    assert "Traceback" not in run.stderr
    assert any(all(record["history"].values()) for record in run.results["arms"].values())
    assert run.results["complete"] is False


@pytest.mark.parametrize("script", WITH_RESUME)
def test_what_resume_refuses(script, smoke_run, tmp_path, capsys):
    module = importlib.import_module(script)
    folder = smoke_run(script).folder
    code, line = fails_in_one_line(
        lambda: module.main(["--resume", str(folder), "--seed", "5"]), capsys
    )
    assert (code, "--seed" in line) == (2, True)
    other = tmp_path / "other"
    other.mkdir()
    results = {**smoke_run(script).results, "script": "another"}
    for content in (json.dumps(results), '{"script": "' + script, ""):
        (other / "results.json").write_text(content)
        code, line = fails_in_one_line(lambda: module.main(["--resume", str(other)]), capsys)
        assert (code, "--resume" in line) == (2, True)


@pytest.mark.parametrize("script", WITH_RESUME)
def test_resume_warns_of_other_versions(script, smoke_run, tmp_path, capsys):
    module, results = importlib.import_module(script), smoke_run(script).results
    argv = ["--resume", str(tmp_path)]
    for keras_version, warned in ((results["versions"]["keras"], False), ("3.8.0", True)):
        results = {**results, "versions": {**results["versions"], "keras": keras_version}}
        (tmp_path / "results.json").write_text(json.dumps(results))
        args, run_dir, resumed = module.resume_run(module.parse_args(argv), argv)
        out = capsys.readouterr().out
        assert str(tmp_path) in out
        assert ("warning" in out, "['keras 3.8.0']" in out) == (warned, warned)
        assert run_dir == tmp_path
        # the run keeps its flags, and the versions that it was begun with
        assert {**vars(args), "resume": None} == results["config"]
        assert resumed["versions"] == results["versions"]
