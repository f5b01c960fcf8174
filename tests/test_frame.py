"""The frame, one text in every script: flags, folders, faults, Ctrl-C, kill and resume, once."""

import argparse
import json
import os
import pathlib
import signal
import sys
import time

import helpers
import numpy as np
import oracles
import pytest
from helpers import ROOT, error_lines, exit_of, run_script, start

import double_q_cartpole as episodes_script
import dueling_q_spaceinvaders as script
import resnet_cifar10 as fit_script

QUICK = ["--epochs", "2", "--arms", "dqn"]  # of double_q_cartpole: seconds
FIT = ["--synthetic", "--epochs", "2", "--steps-per-epoch", "2", "--arms", "plain"]


@pytest.fixture
def one_block(monkeypatch):
    """Let the ResNet be small: its start is long."""
    monkeypatch.setattr(fit_script, "NUM_RES_NET_BLOCKS", 1)


def wait_for(condition, process):
    """Wait until condition() is true, while the process runs; return its value."""
    deadline = time.monotonic() + 240
    while not (value := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


# --- Flags ---
@pytest.mark.parametrize(
    "flags",
    [
        *(["--epochs", value] for value in ("0", "1.5")),
        ["--epochs"],
        ["--epoch", "1"],  # no abbreviations
        ["--no-such-flag"],
        ["stray"],
        ["--seed", "-1"],
        ["--max-steps", "0"],
        ["--gamma", "x"],
        ["--runs", "0"],
        ["--arms"],
        ["--arms", "double", "dueling"],
        *(["--device", value] for value in ("tpu", "gpu", "gpu:99")),
        ["--device", "all"],  # only where fit trains
        ["--logdir", "gs://bucket/log"],
    ],
    ids=" ".join,
)
def test_bad_flags(flags, capsys):
    code, line = exit_of(lambda: episodes_script.main(["--epochs", "1", *flags]), capsys)
    assert code == 2
    assert "error: " in line
    assert flags[0] in line
    assert os.listdir() == []


def test_a_kernels_command_line_is_not_ours(monkeypatch):
    parser = episodes_script.make_parser("--epochs", default=7)
    for launcher in (
        "/x/ipykernel_launcher.py",
        "/x/colab_kernel_launcher.py",
        "/x/ipykernel/__main__.py",
    ):
        monkeypatch.setattr(sys, "argv", [launcher, "-f", "kernel.json", "--f=x"])
        assert episodes_script.parse_flags(parser, None).epochs == 7
    monkeypatch.setattr(sys, "argv", ["/kernels/double_q_cartpole.py", "--epochs", "3"])
    assert episodes_script.parse_flags(parser, None).epochs == 3
    assert episodes_script.parse_flags(parser, ["--epochs", "4"]).epochs == 4


def test_an_arm_named_twice_is_trained_once():
    episodes_script.main([*QUICK, "--arms", "dqn", "dqn", "--runs", "2"])
    _, results = helpers.newest_results(".")
    assert [run["seed"] for run in results["arms"]["dqn"]["runs"]] == [0, 1]


def test_runs_are_mean_and_spread():
    numbers = episodes_script.main([*QUICK, "--runs", "2"])
    record = helpers.newest_results(".")[1]["arms"]["dqn"]
    first, second = record["runs"]
    assert record["history"] == first["history"] != second["history"]
    for metric, value in numbers["dqn"].items():
        values = [run["final"][metric] for run in (first, second)]
        assert value == pytest.approx(np.mean(values))
        assert record["spread"][metric] == pytest.approx(np.std(values, ddof=1))


@pytest.mark.parametrize("falls", [True, False])
def test_play_ends_with_the_episode(falls):
    env = oracles.Scripted(4, falls=falls)
    assert episodes_script.play(env, lambda state: int(state[0])) == 4.0
    assert env.actions == [1, 2, 3, 4]  # each chosen from the state before it


def test_gif_is_a_greedy_episode():
    from PIL import Image, ImageSequence

    episodes_script.main([*QUICK, "--gif"])
    (path,) = pathlib.Path("log").rglob("dqn.gif")
    with Image.open(path) as gif:
        assert gif.size == (600, 400)
        assert len(list(ImageSequence.Iterator(gif))) > 4


@pytest.mark.parametrize("count", [1, 19, 20, 21, 50])
def test_moving_average(count):
    values = np.random.default_rng(0).integers(1, 200, count).tolist()
    expected = [np.mean(values[max(0, i - 20) : i]) for i in range(1, count + 1)]
    np.testing.assert_allclose(episodes_script.moving_average(values), expected)
    assert np.isnan(episodes_script.moving_average([None, *values])[0])


# --- Device ---
def test_devices(monkeypatch, capsys):
    gpus = [argparse.Namespace(name=f"/physical_device:GPU:{number}") for number in (0, 1)]
    chosen = []
    config = fit_script.tf.config
    monkeypatch.setattr(config, "list_physical_devices", lambda kind: gpus)
    monkeypatch.setattr(config, "set_visible_devices", lambda devices, kind: chosen.append(devices))
    parser = fit_script.make_parser("--epochs", default=1, several=True)
    names = {"auto": gpus[:1], "cpu": [], "gpu": gpus[:1], "gpu:1": gpus[1:], "all": gpus}
    for name, visible in names.items():
        assert parser.parse_args(["--device", name]).device == name
        assert chosen[-1] == visible
    code, line = exit_of(lambda: parser.parse_args(["--device", "gpu:2"]), capsys)
    assert code == 2
    assert "gpu:2 is not here; use auto, cpu, all, gpu:0, gpu:1" in line

    def too_late(devices, kind):
        raise RuntimeError("Visible devices cannot be modified after being initialized")

    monkeypatch.setattr(config, "set_visible_devices", too_late)
    code, line = exit_of(lambda: parser.parse_args(["--device", "gpu:1"]), capsys)
    assert code == 2
    assert "restart Python" in line


# --- Folders and results ---
def test_two_runs_in_one_second(monkeypatch):
    monkeypatch.setattr(episodes_script.time, "strftime", lambda form: "20300101-120000")
    parser = episodes_script.make_parser("--epochs", default=1)
    args = episodes_script.parse_flags(parser, [])
    folders = [episodes_script.Run(args, "CartPole").folder for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(folder.name.startswith("20300101-120000") for folder in folders)


def test_tilde_is_the_home_folder(tmp_path):
    episodes_script.main([*QUICK, "--logdir", "~/log"])
    assert (tmp_path / "log" / "double_q_cartpole").exists()
    assert not pathlib.Path("~").exists()


@pytest.mark.parametrize("logdir", ["occupied", "/proc/nowhere"])
def test_a_logdir_that_cannot_be_made(logdir, capsys):
    pathlib.Path("occupied").touch()
    code, line = exit_of(lambda: episodes_script.main([*QUICK, "--logdir", logdir]), capsys)
    assert code == 1
    assert line.startswith("error: ")
    assert logdir in line


def test_versions_are_the_modules(smoke_run):
    versions = smoke_run("double_q_cartpole").results["versions"]
    assert versions == {module.__name__: module.__version__ for module in episodes_script.MODULES}


def test_write_replaces_results_in_one_step_and_refuses_nan(capsys):
    parser = episodes_script.make_parser("--epochs", default=1)
    run = episodes_script.Run(episodes_script.parse_flags(parser, []), "CartPole")
    run.results["arms"]["dqn"] = {"final": {"reward": 1.0}}
    run.write()
    run.results["arms"]["dqn"]["final"]["reward"] = float("nan")
    code, line = exit_of(run.write, capsys)
    assert code == 1
    assert "not finite" in line
    text = (run.folder / "results.json").read_text()
    assert json.loads(text)["arms"]["dqn"]["final"]["reward"] == 1.0
    assert [path.name for path in run.folder.iterdir()] == ["results.json"]


# --- Where the scripts run ---
def test_output_is_line_by_line_and_its_reader_may_go_away(tmp_path):
    """A log that is redirected to a file can be followed, and outlives a SIGTERM."""
    process = start([ROOT / "double_q_cartpole.py", *QUICK, "--epochs", "300"], tmp_path)
    line = process.stdout.readline()  # it comes long before the buffer of 8 kB is full
    assert line.startswith("double_q_cartpole on CartPole")
    process.stdout.close()  # as `| head -1` does
    stderr = process.stderr.read()
    assert process.wait() == 1
    (line,) = error_lines(stderr)
    assert "BrokenPipeError" in line
    assert "Traceback" not in stderr


# --- Faults ---
def test_no_network(tmp_path):
    run = run_script("mnist_eager_mlp", ["--epochs", "1"], tmp_path)
    assert run.code == 1
    (line,) = error_lines(run.stderr)
    assert "Traceback" not in run.stderr
    assert line.startswith("error: Exception: URL fetch failure")
    assert "mnist.npz is fetched once (11 MB); --synthetic needs no network" in run.stdout
    assert "delete" not in line
    assert "empty" not in line


def in_a_run(error):
    """Raise an error within a run."""
    parser = episodes_script.make_parser("--epochs", default=1)
    with episodes_script.Run(episodes_script.parse_flags(parser, []), "CartPole") as run:
        run.results["arms"]["dqn"] = {"history": {"reward": [1.0]}}
        raise error


def interrupted_within_c_code():
    error = SystemError("returned a result with an exception set")  # as NumPy makes of Ctrl-C
    error.__cause__ = KeyboardInterrupt()
    return error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), interrupted_within_c_code()])
def test_an_interruption_keeps_what_was_recorded(error, capsys):
    code, line = exit_of(lambda: in_a_run(error), capsys)
    assert code == 130
    assert line.startswith("interrupted")
    assert helpers.newest_results(".")[1]["arms"]["dqn"]["history"]["reward"] == [1.0]


def test_a_full_disk_is_one_line_with_its_own_name(capsys):
    code, line = exit_of(lambda: in_a_run(OSError(28, "No space left on device", "x")), capsys)
    assert (code, line) == (1, "error: OSError: [Errno 28] No space left on device: 'x'")


@pytest.mark.parametrize("error", [SystemError("a fault"), TypeError("a fault"), ValueError("x")])
def test_what_nobody_foresaw_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        in_a_run(error)


def test_control_c(tmp_path):
    process = start([ROOT / "double_q_cartpole.py", "--epochs", "1000"], tmp_path)
    wait_for(lambda: "episode 50:" in process.stdout.readline(), process)
    process.send_signal(signal.SIGINT)
    run = helpers.finish(process, tmp_path)
    assert run.code == 130, run.stderr
    assert "Traceback" not in run.stderr
    assert len(error_lines(run.stderr)) == 1
    assert run.results["complete"] is False
    assert len(run.results["arms"]["dqn"]["history"]["reward"]) >= 50


# --- Going on ---
@pytest.fixture
def begun(one_block):
    """Return the folder of a finished run of two epochs."""
    fit_script.main(FIT)
    return helpers.newest_results(".")[0]


def test_what_resume_refuses(begun, capsys):
    results = (begun / "results.json").read_text()
    resume = ["--resume", str(begun)]
    cases = {
        "--seed": ([*resume, "--seed", "5"], results),
        "No such file": (["--resume", "nowhere"], results),
        "double_q": (resume, results.replace('"resnet_cifar10"', '"double_q_cartpole"')),
        "(char ": (resume, results[:100]),
    }
    for reason, (flags, text) in cases.items():
        (begun / "results.json").write_text(text)
        code, line = exit_of(lambda flags=flags: fit_script.main(flags), capsys)
        assert code == 2
        assert reason in line


def test_resume_takes_new_limits_and_keeps_all_else():
    parser = script.make_parser("--epochs", default=1500)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--resume")
    config = vars(parser.parse_args(["--max-steps", "300", "--seed", "4"]))
    pathlib.Path("results.json").write_text(json.dumps({"script": script.SCRIPT, "config": config}))
    flags = ["--resume", ".", "--max-steps", "600", "--epochs", "9", "--device", "cpu"]
    args, _ = script.read_run(parser, flags)
    assert (args.max_steps, args.epochs, args.device, args.seed) == (600, 9, "cpu", 4)


def test_resume_trains_only_what_is_missing(begun):
    before = helpers.newest_results(".")[1]["arms"]["plain"]
    fit_script.main(["--resume", str(begun)])
    _, results = helpers.newest_results(".")
    assert results["arms"]["plain"] == before
    assert results["config"]["steps_per_epoch"] == 2
    _, arms = helpers.run_main(fit_script, ["--resume", str(begun), "--epochs", "3"])
    history = arms["plain"]["history"]
    assert {len(values) for values in history.values()} == {3}
    assert all(history[metric][:2] == before["history"][metric] for metric in history)


def test_the_epoch_after_resuming_equals_the_undisturbed_one(one_block, monkeypatch):
    """Weights, Adam's moments and batch norm's averages come back from one file."""
    # Not dropout's masks and the order of the images: these are drawn anew, and so left out here.
    linear = fit_script.layers.Activation("linear")
    monkeypatch.setattr(fit_script.layers, "Dropout", lambda rate: linear)
    make_datasets = fit_script.make_datasets

    def same_batch_each_step(*args):
        train_dataset, valid_dataset = make_datasets(*args)
        return train_dataset.take(1).cache().repeat(), valid_dataset

    monkeypatch.setattr(fit_script, "make_datasets", same_batch_each_step)
    _, undisturbed = helpers.run_main(fit_script, [*FIT, "--epochs", "3"])
    interrupted, _ = helpers.run_main(fit_script, FIT)
    _, resumed = helpers.run_main(fit_script, ["--resume", str(interrupted), "--epochs", "3"])
    assert undisturbed["plain"]["history"] == resumed["plain"]["history"]


def begin(script, settings):
    """Return the command that runs a script with some of its constants changed."""
    return ["-c", f"import {script} as script; {settings}; script.main()"]


SHORT_GAMES = (
    "make_env = script.make_env;"
    "script.make_env = lambda game: script.gymnasium.wrappers.TimeLimit(make_env(game), 200)"
)
# How each is started, its flags, and what its record must have at last
KILLED = {
    "resnet_cifar10": (
        begin("resnet_cifar10", "script.NUM_RES_NET_BLOCKS = 1"),
        [*FIT, "--epochs", "4"],
        lambda record: len(record["history"]["acc"]) == 4,
    ),
    "dueling_q_spaceinvaders": (
        begin("dueling_q_spaceinvaders", "script.EVALUATION_GAMES = 1"),
        ["--delay-training", "1500", "--replay-size", "1000", "--max-steps", "1600"],
        lambda record: record["final"]["steps"] == 1600,
    ),
    "keras_pg_weighted_ce": (
        begin("keras_pg_weighted_ce", f"script.BATCH_SIZE = 2; {SHORT_GAMES}"),  # saves every two
        ["--arms", "agent", "--env", "ALE/Pong-v5", "--epochs", "12"],
        lambda record: len(record["history"]["reward"]) == 12,
    ),
}


@pytest.mark.parametrize("script", KILLED)
def test_kill_and_resume(script, tmp_path):
    """Killed twice, in a folder that a glob would not find: no hole in the history, no double."""
    command, flags, is_whole = KILLED[script]

    def recorded():
        _, results = helpers.newest_results(tmp_path)
        records = results["arms"].values() if results else ()
        return sum(len(values) for record in records for values in record["history"].values())

    flags = [*flags, "--logdir", f"log/a [1] {chr(252)}"]  # an umlaut
    for _ in range(2):
        before, process = recorded(), start([*command, *flags], tmp_path)
        wait_for(lambda before=before: recorded() > before, process)
        process.kill()
        process.communicate()
        flags = ["--resume", str(helpers.newest_results(tmp_path)[0])]
    run = helpers.finish(start([*command, *flags], tmp_path), tmp_path)
    assert run.code == 0, run.stderr
    assert run.results["complete"]
    (record,) = run.results["arms"].values()
    assert len({len(values) for values in record["history"].values()}) == 1
    assert is_whole(record)
