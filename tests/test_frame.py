"""The frame, one text in every script: flags, folders, faults, Ctrl-C, kill and resume, once."""

import argparse
import functools
import importlib
import json
import os
import pathlib
import runpy
import signal
import sys
import time
from unittest import mock

import helpers
import numpy as np
import oracles
import pytest
from helpers import ROOT, error_lines, exit_of, start
from PIL import Image, ImageSequence

import double_q_cartpole as episodes_script
import resnet_cifar10 as fit_script

QUICK = ["--epochs", "2", "--arms", "dqn"]  # of double_q_cartpole: seconds
FIT = ["--synthetic", "--epochs", "2", "--steps-per-epoch", "2", "--arms", "plain", "--seed", "4"]


@pytest.fixture
def one_block(monkeypatch):
    """Let the ResNet be small: its start is long."""
    build_model = fit_script.build_model
    monkeypatch.setattr(fit_script, "build_model", lambda arm: build_model(arm, 1))


def recorded(folder):
    """Return how many numbers the newest run in a folder has kept in its histories so far."""
    return sum(helpers.recorded(helpers.newest_results(folder)[1]))


def parse(*flags):
    return episodes_script.parse_flags(episodes_script.make_parser("--epochs", default=7), flags)


# --- Flags ---
@pytest.mark.parametrize(
    "flags",
    [
        *(["--epochs", value] for value in ("0", "1.5", "4294967296")),
        ["--epochs"],
        ["--epoch", "1"],  # no abbreviations
        ["--no-such-flag"],
        ["stray"],
        *(["--seed", value] for value in ("-1", "99999999999")),
        ["--max-steps", "0"],
        *(["--random-reward-std", value] for value in ("x", "-1", "nan", "inf")),
        ["--runs", "0"],
        ["--arms"],
        ["--arms", "double", "dueling"],
        *(["--device", value] for value in ("tpu", "gpu", "all")),  # all only where fit trains
        ["--logdir", ""],
    ],
    ids=" ".join,
)
def test_bad_flags_are_one_line_and_leave_nothing(flags, capsys):
    code, line = exit_of(lambda: episodes_script.main(["--epochs", "1", *flags]), capsys)
    assert code == 2
    assert "error: " in line
    assert flags[0] in line
    assert os.listdir() == []


def test_help_shows_defaults_and_the_run_lines_of_the_docstring():
    text = " ".join(episodes_script.make_parser("--epochs", default=7).format_help().split())
    assert "(default: 7)" in text
    assert "python double_q_cartpole.py --random-reward-std 0; python double_q" in text


def test_a_kernels_command_line_is_not_ours(monkeypatch):
    parser = episodes_script.make_parser("--epochs", default=7)
    for name in ("ipykernel_launcher.py", "colab_kernel_launcher.py", "ipykernel/__main__.py"):
        monkeypatch.setattr(sys, "argv", [f"/x/{name}", "-f", "kernel.json", "--f=x"])
        assert episodes_script.parse_flags(parser, None).epochs == 7
    monkeypatch.setattr(sys, "argv", ["/kernels/double_q_cartpole.py", "--epochs", "3"])
    assert episodes_script.parse_flags(parser, None).epochs == 3
    assert episodes_script.parse_flags(parser, ["--epochs", "4"]).epochs == 4


def test_devices(monkeypatch, capsys):
    gpus = [argparse.Namespace(name=f"/physical_device:GPU:{number}") for number in (0, 1)]
    chosen = []
    config = fit_script.tf.config
    monkeypatch.setattr(config, "list_physical_devices", lambda kind: gpus)
    monkeypatch.setattr(config, "set_visible_devices", lambda devices, kind: chosen.append(devices))
    for name in ("auto", "cpu", "gpu"):
        assert parse("--device", name).device == name
    assert chosen == [gpus, [], gpus]
    too_late = RuntimeError("Visible devices cannot be modified after being initialized")
    monkeypatch.setattr(config, "set_visible_devices", mock.Mock(side_effect=too_late))
    code, line = exit_of(lambda: parse("--device", "cpu"), capsys)
    assert code == 2
    assert "restart Python" in line


# --- Folders and results ---
def test_two_runs_in_one_second(monkeypatch):
    monkeypatch.setattr(episodes_script.time, "strftime", lambda form: "20300101-120000")
    folders = [episodes_script.Run(parse(), "CartPole").folder for _ in range(3)]
    assert len(set(folders)) == 3
    assert all(folder.name.startswith("20300101-120000") for folder in folders)


def test_records_and_final_numbers():
    """An epoch that is trained again replaces its record; results.json is soon up to date."""
    run = fit_script.Run(parse(), "CIFAR-10")
    kept = lambda: json.loads((run.folder / "results.json").read_text())  # noqa: E731
    for epoch, value in ((1, 0.1), (2, 0.2), (3, 0.3), (2, 0.25)):
        run.record("plain", epoch, {"acc": value, "loss": 2 * value})
    run.write()
    assert kept()["arms"]["plain"]["history"] == {"acc": [0.1, 0.25], "loss": [0.2, 0.5]}
    run.record("plain", 3, {"acc": 0.5, "loss": 1.0})
    assert len(kept()["arms"]["plain"]["history"]["acc"]) == 2  # no second has passed
    time.sleep(1.1)
    run.record("plain", 4, {"acc": 0.6, "loss": 0.9})
    assert kept()["arms"]["plain"]["history"]["acc"] == [0.1, 0.25, 0.5, 0.6]
    assert 1.1 < kept()["arms"]["plain"]["seconds"] < 60
    run.conclude("plain", {"parameters": 3})
    assert kept()["arms"]["plain"]["final"] == {"parameters": 3}
    assert kept()["complete"] is False
    assert [path.name for path in run.folder.iterdir()] == ["results.json"]


def test_the_table_and_the_lines_to_paste(capsys):
    run = fit_script.Run(parse("--logdir", "a log"), "CIFAR-10")
    run.record("plain", 1, {})
    final = {"acc": 0.73456, "val_acc": 1e-7, "parameters": 1234567, "episodes": None}
    run.conclude("plain", final)
    (run.folder / "plain.keras").touch()
    (run.folder / "a.png").touch()
    capsys.readouterr()
    assert run.report('x = "y"') == {"plain": final}
    lines = capsys.readouterr().out.splitlines()
    rows = {tuple(line.split()[:2]): line.split()[2:] for line in lines if line[:5] == "plain"}
    assert rows == {  # here, then what the article gives
        ("plain", "acc"): ["0.7346", "0.6876"],
        ("plain", "val_acc"): ["1e-07", "0.6394"],
        ("plain", "parameters"): ["1,234,567", "-"],
        ("plain", "episodes"): ["never", "-"],
    }
    assert lines[1].split() == ["arm", "metric", "here", "article"]
    folder = run.folder.as_posix()
    assert lines[-5:] == [
        f"{folder}/a.png",
        "",
        f'import keras; model = keras.models.load_model("{folder}/plain.keras")',
        'x = "y"',
        f'tensorboard --logdir "{folder}"',
    ]
    assert json.loads((run.folder / "results.json").read_text())["complete"] is True


# --- Episodes ---
def test_final_numbers_are_means_over_the_trainings():
    run = episodes_script.Run(parse(), "CartPole")
    for seed, never in ((3, None), (4, 90)):
        episodes_script.start_training(run, "dqn", seed)
        run.record("dqn", 1, {"reward": 10 * seed})
        run.conclude("dqn", {"reward": seed, "never": None, "at_times": never})
    episodes_script.compare_rewards(run, "a title")
    record = run.results["arms"]["dqn"]
    assert [training["seed"] for training in record["runs"]] == [3, 4]
    assert record["final"] == {"reward": 3.5, "never": None}  # of a part no mean is made
    assert record["spread"] == {"reward": pytest.approx(0.5**0.5)}


@pytest.mark.parametrize("falls", [True, False])
def test_play_is_greedy_and_ends_with_the_episode(falls):
    env = oracles.Scripted(4, falls=falls)

    def predict(state):  # the states are 1, 2, 3, ...: action 0 for even ones
        return np.array([[0.5, state[0, 0] % 2]])

    states = episodes_script.play(env, predict)
    assert states[:, 0].tolist() == [1, 2, 3, 4]
    assert env.actions == [1, 0, 1, 0]  # each chosen in its state


def test_gif_shows_a_greedy_episode_and_asks_for_pygame_first(monkeypatch, capsys):
    episodes_script.main([*QUICK, "--gif"])
    (path,) = pathlib.Path("log").rglob("dqn.gif")
    with Image.open(path) as gif:
        assert gif.size == (600, 400)
        assert len(list(ImageSequence.Iterator(gif))) > 4
    monkeypatch.setattr(episodes_script.importlib.util, "find_spec", lambda name: None)
    code, line = exit_of(lambda: episodes_script.main([*QUICK, "--gif", "--logdir", "x"]), capsys)
    assert code == 2
    assert "pip install pygame" in line
    assert not pathlib.Path("x").exists()


# --- Where the scripts run ---
def test_without_an_output(one_block, monkeypatch):
    """pythonw has no stdout, and Keras's progress bar asks for one."""
    monkeypatch.setattr(sys, "stdout", None)
    fit_script.main([*FIT, "--epochs", "1"])
    assert helpers.newest_results(".")[1]["complete"]


# --- Faults ---
@pytest.mark.parametrize("script", ["mnist_eager_mlp", "metrics_summaries", "resnet_cifar10"])
def test_no_network_is_the_librarys_own_error(script, tmp_path, capsys):
    with pytest.raises(Exception, match="URL fetch failure on https://") as stop:
        importlib.import_module(script).main([])
    assert stop.type is Exception  # so it is one line, at the end of the file
    printed = capsys.readouterr().out
    assert f"{tmp_path}/keras/datasets" in printed  # KERAS_HOME is where Keras keeps it
    assert "--synthetic needs no network" in printed
    assert not (tmp_path / "log").exists()  # a run that cannot start leaves nothing


@pytest.mark.parametrize(
    ("error", "code", "last_line"),
    [
        (OSError(28, "No space left", "x"), 1, "error: OSError: [Errno 28] No space left: 'x'"),
        (Exception("URL fetch failure"), 1, "error: Exception: URL fetch failure"),
        (KeyboardInterrupt(), 130, "interrupted; what was finished is kept"),
    ],
)
def test_faults_of_disk_and_network_are_one_line(error, code, last_line, monkeypatch, capsys):
    monkeypatch.setattr(episodes_script.gymnasium, "make", mock.Mock(side_effect=error))
    monkeypatch.setattr(sys, "argv", ["x.py", "--epochs", "1"])
    run = functools.partial(runpy.run_path, episodes_script.__file__, run_name="__main__")
    assert exit_of(run, capsys) == (code, last_line)
    episodes_script.gymnasium.make.side_effect = ValueError("nobody foresaw it")
    with pytest.raises(ValueError, match="nobody"):  # so it keeps its traceback
        run()


def test_lines_come_at_once_and_control_c_keeps_what_was_finished(tmp_path):
    """A log that is redirected to a file can be followed, and outlives a SIGTERM."""
    # Games at random: an interrupt within TensorFlow becomes, rarely, a SystemError
    flags = ["--replay-size", "100", "--max-steps", "40000"]  # they print less than 8 kB
    process = start([ROOT / "dueling_q_spaceinvaders.py", *flags], tmp_path)
    assert process.stdout.readline().startswith("dueling_q_spaceinvaders on ALE")
    helpers.wait_for(lambda: recorded(tmp_path) >= 8, process)
    process.send_signal(signal.SIGINT)
    run = helpers.finish(process, tmp_path)
    assert run.code == 130, run.stderr
    assert "Traceback" not in run.stderr
    assert len(error_lines(run.stderr)) == 1
    assert run.results["complete"] is False
    rewards, losses = helpers.recorded(run.results)
    assert rewards == losses >= 4


# --- Going on ---
@pytest.fixture
def begun(one_block):
    """Return the folder of a finished run of two epochs, which is in the home folder."""
    fit_script.main([*FIT, "--logdir", "~/log"])
    return helpers.newest_results(".")[0]


def test_what_resume_refuses(begun, capsys):
    results = (begun / "results.json").read_text()
    resume = ["--resume", str(begun)]
    for flags, text, reason in (
        ([*resume, "--seed", "5"], results, "--seed: must be as in the run to resume"),
        (resume, results.replace('"resnet_cifar10"', '"double_q"'), "is a run of double_q.py"),
        (resume, results.replace('"keras": ', '"tf_keras": '), "TF_CONFIG must be set, or not"),
    ):
        (begun / "results.json").write_text(text)
        code, line = exit_of(lambda flags=flags: fit_script.main(flags), capsys)
        assert code == 2
        assert reason in line
    with pytest.raises(FileNotFoundError, match="nowhere"):  # one line, at the end of the file
        fit_script.main(["--resume", "nowhere"])


def test_resume_trains_only_what_is_missing(begun):
    before = helpers.newest_results(".")[1]["arms"]["plain"]
    fit_script.main(["--resume", str(begun), "--device", "cpu"])
    _, results = helpers.newest_results(".")
    assert results["arms"]["plain"] == before
    config = results["config"]
    assert [config[name] for name in ("device", "steps_per_epoch", "seed")] == ["cpu", 2, 4]
    _, arms = helpers.run_main(fit_script, [f"--resume=~/{begun}", "--epochs", "3"])
    assert not pathlib.Path("~").exists()
    history = arms["plain"]["history"]
    assert {len(values) for values in history.values()} == {3}
    assert all(history[metric][:2] == before["history"][metric] for metric in history)
    resumed = sorted(begun.glob("resumed-*/plain/train"))[-1]
    steps = [step for step, _ in helpers.events(resumed, "epoch_acc")]
    assert steps == [2]  # counted from 0: no step stands twice in one folder


def test_the_epoch_after_resuming_equals_the_undisturbed_one(one_block, monkeypatch):
    """Weights, Adam's moments and batch norm's averages come back from one file."""
    # Not dropout's masks and the flips: these are drawn anew, and so left out here.
    linear = fit_script.layers.Activation("linear")
    monkeypatch.setattr(fit_script.layers, "Dropout", lambda rate: linear)
    monkeypatch.setattr(fit_script.tf.image, "random_flip_left_right", lambda images: images)
    _, undisturbed = helpers.run_main(fit_script, [*FIT, "--epochs", "3"])
    interrupted, _ = helpers.run_main(fit_script, FIT)
    _, resumed = helpers.run_main(fit_script, ["--resume", str(interrupted), "--epochs", "3"])
    for metric, values in undisturbed["plain"]["history"].items():
        np.testing.assert_allclose(resumed["plain"]["history"][metric], values, rtol=1e-5)


ONE_BLOCK = "build = script.build_model; script.build_model = lambda arm: build(arm, 1)"
NO_GAMES = "script.evaluate = lambda *args: {}"
GAMES = ["--delay-training", "1500", "--replay-size", "1000", "--max-steps", "1600"]


@pytest.mark.parametrize(
    ("script", "settings", "flags", "kills"),
    [
        ("resnet_cifar10", ONE_BLOCK, [*FIT, "--epochs", "4"], 2),
        ("dueling_q_spaceinvaders", NO_GAMES, GAMES, 1),
    ],
)
def test_kill_and_resume(script, settings, flags, kills, tmp_path):
    """Killed, in a folder that a glob would not find: no hole in the history, no double."""
    command = ["-c", f"import {script} as script; {settings}; script.main()"]
    flags = [*flags, "--logdir", f"log/a [1] {chr(252)}"]  # an umlaut
    for _ in range(kills):
        before, process = recorded(tmp_path), start([*command, *flags], tmp_path)
        helpers.wait_for(lambda before=before: recorded(tmp_path) > before, process)
        process.kill()
        process.communicate()
        flags = ["--resume", str(helpers.newest_results(tmp_path)[0])]
    run = helpers.finish(start([*command, *flags], tmp_path), tmp_path)
    assert run.code == 0, run.stderr
    assert run.results["complete"]
    (record,) = run.results["arms"].values()
    assert len({len(values) for values in record["history"].values()}) == 1
    assert record["final"].get("steps") == 1600 or len(record["history"]["acc"]) == 4
