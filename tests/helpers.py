"""The scripts, their tiny settings, and how a test starts and reads them."""

import collections
import importlib
import json
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))

Case = collections.namedtuple(
    "Case",
    [
        "tiny",  # flags of a run of seconds
        "history",  # {arm: the names of its histories}
        "tags",  # {folder of events: {kind: tags}}
        "figures",  # the names of the PNGs, sorted
        "started",  # what the script prints, with its defaults, once training is under way
    ],
)
Run = collections.namedtuple("Run", "code stdout stderr folder results")

PHOTOGRAPHS = ["accuracy", "loss", "val_accuracy", "val_loss"]
RESNET = ["acc", "loss", "val_acc", "val_loss"]
EPOCHS = {"scalars": {"epoch_accuracy", "epoch_loss"}}
EPISODES = {"scalars": {"reward", "avg loss"}}
Q_EPISODES = {"scalars": {"reward", "avg loss", "mean q"}}
SYNTHETIC = ["--synthetic", "--epochs", "1", "--steps-per-epoch", "2"]
LINES = ["constant_noise", "growing_noise"]
ACCURACY = "sparse_categorical_accuracy"
KERNEL = "std_of_conv2d_kernel"

CASES = {
    "gap_cats_dogs": Case(
        tiny=[*SYNTHETIC, "--batch-size", "8"],
        history=dict.fromkeys(["fc", "fc_dropout", "gap", "avgpool"], PHOTOGRAPHS),
        tags={"fc/train": EPOCHS, "avgpool/validation": EPOCHS},
        figures=["accuracy.png", "loss.png", "samples.png"],
        started="Epoch 2/7",
    ),
    "transfer_resnet50": Case(
        tiny=[*SYNTHETIC, "--batch-size", "8", "--weights", "none"],
        history=dict.fromkeys(["cnn", "resnet50"], PHOTOGRAPHS),
        tags={
            "cnn/train": {"scalars": {"epoch_accuracy", "batch_loss"}},
            "resnet50/validation": EPOCHS,
        },
        figures=["samples.png", "training_accuracy.png", "validation_accuracy.png"],
        started="Epoch 2/7",
    ),
    "dueling_q_cartpole": Case(
        tiny=["--epochs", "25", "--delay-training", "150", "--epsilon-min-iter", "200"],
        history=dict.fromkeys(["double", "dueling"], ["reward", "avg loss"]),
        tags=dict.fromkeys(["double/seed_0", "dueling/seed_0"], EPISODES),
        figures=["reward.png"],
        started="episode 25:",
    ),
    "reinforce_cartpole": Case(
        tiny=["--epochs", "12"],
        history={"reinforce": ["reward", "avg loss"]},
        tags={"reinforce/seed_0": EPISODES},
        figures=["rewards.png"],
        started="episode 75:",
    ),
    "dueling_q_spaceinvaders": Case(
        tiny=[
            *["--epochs", "1", "--max-steps", "70", "--replay-size", "50"],
            *["--delay-training", "40", "--epsilon-min-iter", "20", "--gif-every", "1"],
        ],
        history={"dueling": ["reward", "avg loss", "mean q"]},
        tags={"dueling": Q_EPISODES},
        figures=["reward.png"],
        started="Pre-training... episode 1,",
    ),
    "bayes_mle": Case(
        tiny=["--epochs", "4", "--converge"],
        history={"prior": ["mean", "stddev"]} | dict.fromkeys(LINES, ["loss"]),
        tags={"prior": {"scalars": {"mean"}}} | dict.fromkeys(LINES, {"scalars": {"loss"}}),
        figures=[f"{arm}_{kind}.png" for arm in LINES for kind in ("data", "fit")] + ["prior.png"],
        started="constant_noise, epoch 100 of 500",
    ),
    "keras_pg_weighted_ce": Case(
        tiny=["--epochs", "12"],
        history={"identity": ["samples", "error"], "agent": ["reward", "avg loss", "steps"]},
        tags={
            "identity": {"scalars": {"error"}},
            "agent/seed_0": {"scalars": {"reward", "avg loss", "steps"}},
        },
        figures=["agent.png", "identity.png"],
        started="agent, seed 0, episode 75",
    ),
    "mnist_eager_mlp": Case(
        tiny=["--synthetic", "--epochs", "2", "--steps-per-epoch", "30"],
        history={"mlp": ["loss", "accuracy"]},
        tags={"mlp": {"scalars": {"loss", "accuracy"}}, "simple_graph": {"graph": True}},
        figures=["accuracy.png"],
        started="Epoch: 2, loss=",  # the first imports TensorBoard, where no interrupt should fall
    ),
    "metrics_summaries": Case(
        tiny=["--synthetic", "--epochs", "2", "--fit-epochs", "2", "--steps-per-epoch", "15"],
        history={
            "loop": ["loss", ACCURACY],
            "fit": [
                f"{part}{name}" for part in ("", "val_") for name in ("loss", ACCURACY, KERNEL)
            ],
        },
        tags={
            "mean_metric": {"scalars": {"mean"}},
            "loop": {"scalars": {"loss", "acc"}},
            "fit/train": {"scalars": {f"epoch_{KERNEL}", f"batch_{KERNEL}", f"epoch_{ACCURACY}"}},
            "fit/validation": {"scalars": {"epoch_loss", f"epoch_{ACCURACY}"}},
        },
        figures=["fit.png", "loop.png"],
        started="Batch 10, average loss",
    ),
    "resnet_cifar10": Case(
        tiny=SYNTHETIC,
        history={"resnet": RESNET, "plain": RESNET},
        tags={
            "resnet": {"images": {"kernels"}},
            "resnet/train": {"scalars": {"epoch_acc"}, "graph_keras_model": {"keras"}},
            "plain/validation": {"scalars": {"epoch_acc"}},
        },
        figures=["training_accuracy.png", "validation_accuracy.png"],
        started="Epoch 1/30",
    ),
    "double_q_cartpole": Case(
        tiny=["--epochs", "25", "--epsilon-decay", "0.01"],
        history=dict.fromkeys(["dqn", "double"], ["reward", "avg loss", "mean q"]),
        tags={"dqn/seed_0": Q_EPISODES, "double/seed_0": Q_EPISODES},
        figures=["max_bias.png", "mean_q.png", "reward.png"],
        started="episode 50:",
    ),
}


def environment(folder):
    """Return what a run's environment needs so that it leaves nothing outside `folder`."""
    return {
        "HOME": str(folder),
        "KERAS_HOME": str(folder / "keras"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "",
        # Nobody listens there: a download fails at once, with a network and without.
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "no_proxy": "localhost,127.0.0.1",
    }


# A notebook sets the second for what it starts; no script may mind either.
OTHER_SETTINGS = {"KERAS_BACKEND": "jax", "MPLBACKEND": "module://no_such_package.backend"}


def start(arguments, folder, **variables):
    """Start Python with `arguments` in `folder`; return the process, its output piped as text."""
    env = {**os.environ, **environment(folder), "PYTHONPATH": str(ROOT), **variables}
    env.pop("PYTHONUNBUFFERED", None)  # it would hide an output that is not line-buffered
    arguments = [sys.executable, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell's background job ignores Ctrl-C, and so would what it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(arguments, cwd=folder, env=env, **pipes)


def newest_results(folder):
    """Return the newest run's folder under folder/log, and its results; or twice None."""
    paths = sorted(pathlib.Path(folder, "log").rglob("results.json"), key=os.path.getmtime)
    return (paths[-1].parent, json.loads(paths[-1].read_text())) if paths else (None, None)


def finish(process, folder):
    """Wait for a process; return its Run, with the newest results.json under folder/log."""
    stdout, stderr = process.communicate(timeout=300)
    return Run(process.returncode, stdout, stderr, *newest_results(folder))


def run_script(script, flags, folder, **variables):
    """Run a script as a user starts it, in `folder`."""
    return finish(start([ROOT / f"{script}.py", *flags], folder, **variables), folder)


def run_main(script, flags):
    """Call a script's main in this process; return the newest run's folder, and its arms."""
    script.main(flags)
    folder, results = newest_results(".")
    return folder, results["arms"]


def exit_of(function, capsys):
    """Call `function`, which must exit; return its code and its last line on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function()
    if isinstance(stop.value.code, str):  # Python prints it at the end, and exits with 1
        return 1, stop.value.code
    return stop.value.code, capsys.readouterr().err.strip().splitlines()[-1]


def run_once(script, flags, shared):
    """Run a script in a folder of `shared`, unless another process has: then return its Run."""
    folder, kept = shared / script, shared / f"{script}.pickle"
    try:
        folder.mkdir()
    except FileExistsError:
        while not kept.exists():  # the process that made the folder writes it, whatever happens
            time.sleep(0.1)
        return pickle.loads(kept.read_bytes())
    try:
        run = run_script(script, flags, folder, **OTHER_SETTINGS)
    except BaseException as error:
        run = Run(None, "", f"no run: {error!r}", None, None)
    kept.with_suffix(".tmp").write_bytes(pickle.dumps(run))
    kept.with_suffix(".tmp").rename(kept)
    return run


def error_lines(stderr):
    """Return the lines of a process's stderr that are ours: TensorFlow writes there too."""
    return [line for line in stderr.splitlines() if "error: " in line or "interrupted" in line]


def source(script):
    """Return a script's text."""
    return (ROOT / f"{script}.py").read_text()


def parser_of(script, monkeypatch):
    """Return the parser that a script's main makes."""
    module, parsers = importlib.import_module(script), []

    def parse_flags(parser, argv):
        parsers.append(parser)
        raise EOFError  # main has nothing more to do here

    monkeypatch.setattr(module, "parse_flags", parse_flags)
    with pytest.raises(EOFError):
        module.main([])
    return parsers[0]


def read_events(folder):
    """Return the TensorBoard events in a folder, read by TensorBoard itself."""
    from tensorboard.backend.event_processing import event_accumulator

    accumulator = event_accumulator.EventAccumulator(str(folder), {"tensors": 0})
    accumulator.Reload()
    return accumulator


def events(folder, tag):
    """Return [(step, value)] of a tag in a folder."""
    import tensorflow as tf

    found = read_events(folder).Tensors(tag)
    return [(event.step, tf.make_ndarray(event.tensor_proto).tolist()) for event in found]


def tags(folder):
    """Return {kind: tags} of the events in a folder."""
    accumulator = read_events(folder)
    found = accumulator.Tags()
    kinds = collections.defaultdict(set)
    for tag in found["tensors"]:  # TensorFlow 2 writes all as tensors that name their plugin
        kinds[accumulator.SummaryMetadata(tag).plugin_data.plugin_name].add(tag)
    kinds["graph"] = found["graph"]
    return kinds
