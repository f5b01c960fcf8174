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
LIMIT = 900  # seconds; it only ends what hangs, also on a busy machine

# A script's flags for a run of seconds, which changes every flag; {arm: names of its histories};
# {folder of events: {kind: tags}}; what else the run leaves in its folder, sorted; and what the
# script prints, with its defaults, once training is under way
Case = collections.namedtuple("Case", "tiny history tags files started")
Run = collections.namedtuple("Run", "code stdout stderr folder results figures")

PHOTOGRAPHS = ["accuracy", "loss", "val_accuracy", "val_loss"]
EPOCHS = {"scalars": {"epoch_accuracy", "epoch_loss"}}
EPISODES = {"scalars": {"reward", "avg loss"}}
TWO_RUNS = ["--gif", "--runs", "2", "--epochs", "40", "--max-steps"]
SYNTHETIC = ["--synthetic", "--epochs", "2", "--steps-per-epoch", "2"]
CURVES = ["training_accuracy.png", "validation_accuracy.png"]
LINES = ["constant_noise", "growing_noise"]
ACCURACY = "sparse_categorical_accuracy"
KERNEL = "std_of_conv2d_kernel"

CASES = {
    "gap_cats_dogs": Case(
        tiny=[*SYNTHETIC, "--batch-size", "8", "--arms", "fc", "gap"],
        history=dict.fromkeys(["fc", "gap"], PHOTOGRAPHS),
        tags={"fc/train": EPOCHS, "gap/validation": EPOCHS},
        files=["accuracy.png", "fc.keras", "gap.keras", "loss.png", "samples.png"],
        started="Epoch 1/7",
    ),
    "transfer_resnet50": Case(
        tiny=[*SYNTHETIC, "--batch-size", "8", "--weights", "none"],
        history=dict.fromkeys(["cnn", "resnet50"], PHOTOGRAPHS),
        tags={"cnn/train": {"scalars": {"batch_loss"}}, "resnet50/validation": EPOCHS},
        files=["cnn.keras", "resnet50.keras", "samples.png", *CURVES],
        started="Epoch 1/7",
    ),
    "resnet_cifar10": Case(
        tiny=[*SYNTHETIC, "--batch-size", "16", "--arms", "plain"],
        history={"plain": ["acc", "loss", "val_acc", "val_loss"]},
        tags={
            "plain/train": {"scalars": {"epoch_acc"}, "graph_keras_model": {"keras"}},
            "plain/validation": {"scalars": {"epoch_acc"}},
        },
        files=["plain.keras", *CURVES],
        started="Epoch 1/30",
    ),
    "mnist_eager_mlp": Case(
        tiny=["--synthetic", "--epochs", "2", "--steps-per-epoch", "30", "--compile"],
        history={"mlp": ["loss", "accuracy"]},
        tags={"mlp": {"scalars": {"loss", "accuracy"}}, "simple_graph": {"graph": True}},
        files=["accuracy.png", "mlp.npz"],
        started="Epoch: 2,",  # the first imports TensorBoard, where no interrupt should fall
    ),
    "metrics_summaries": Case(
        tiny=["--synthetic", "--epochs", "2", "--fit-epochs", "3", "--steps-per-epoch", "15"],
        history={
            "loop": ["loss", ACCURACY],
            "fit": ["loss", ACCURACY, KERNEL, "val_loss", f"val_{ACCURACY}", f"val_{KERNEL}"],
        },
        tags={
            "mean_metric": {"scalars": {"mean"}},
            "loop": {"scalars": {"loss", "acc"}},
            "fit/train": {"scalars": {f"epoch_{KERNEL}", f"batch_{KERNEL}", f"epoch_{ACCURACY}"}},
            "fit/validation": {"scalars": {"epoch_loss", f"epoch_{ACCURACY}"}},
        },
        files=["fit.keras", "loop.keras"],
        started="Batch",
    ),
    "bayes_mle": Case(
        tiny=["--epochs", "4", "--converge"],
        history={"prior": ["mean", "stddev"]} | dict.fromkeys(LINES, ["loss"]),
        tags={"prior": {"scalars": {"mean"}}} | dict.fromkeys(LINES, {"scalars": {"loss"}}),
        files=[
            *("constant_noise.weights.h5", "constant_noise_data.png", "constant_noise_fit.png"),
            *("growing_noise.weights.h5", "growing_noise_data.png", "growing_noise_fit.png"),
            "prior.png",
        ],
        started="epoch",
    ),
    "double_q_cartpole": Case(
        tiny=[*TWO_RUNS, "180", "--arms", "double", "--random-reward-std", "0"],
        history={"double": ["reward", "avg loss"]},
        tags={"double/seed_3": EPISODES, "double/seed_4": EPISODES},
        files=["double.gif", "double.keras", "reward.png"],
        started="Episode: 50,",
    ),
    "dueling_q_cartpole": Case(
        tiny=[*TWO_RUNS, "350", "--arms", "dueling", "--random-reward-std", "0"],
        history={"dueling": ["reward", "avg loss"]},
        tags={"dueling/seed_3": EPISODES, "dueling/seed_4": EPISODES},
        files=["dueling.gif", "dueling.keras", "reward.png"],
        started="Episode: 25,",
    ),
    "reinforce_cartpole": Case(
        tiny=[*TWO_RUNS, "150"],
        history={"reinforce": ["reward", "avg loss"]},
        tags={"reinforce/seed_3": EPISODES, "reinforce/seed_4": EPISODES},
        files=["reinforce.gif", "reinforce.keras", "reward.png"],
        started="Episode: ",
    ),
    "keras_pg_weighted_ce": Case(
        tiny=[*TWO_RUNS, "150"],
        history={"identity": ["samples", "error"], "agent": ["reward", "avg loss"]},
        tags={"identity": {"scalars": {"error"}}, "agent/seed_4": EPISODES},
        files=["agent.gif", "agent.keras", "identity.png", "reward.png"],
        started="Episode: ",
    ),
    "dueling_q_spaceinvaders": Case(
        tiny=[
            *["--epochs", "3", "--max-steps", "70", "--replay-size", "50"],
            *["--delay-training", "40", "--epsilon-min-iter", "20", "--gif-every", "1"],
        ],
        history={"dueling": ["reward", "avg loss"]},
        tags={"dueling": EPISODES},
        files=["checkpoint.npz", "dueling.keras", "episode_1.gif", "reward.png"],
        started="Pre-training... Episode: 1,",
    ),
}


def environment(folder):
    """Return what a run's environment needs so that it leaves nothing outside `folder`."""
    return {
        "HOME": str(folder),
        "KERAS_HOME": str(folder / "keras"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_NUM_INTRAOP_THREADS": "1",  # a fifth faster: the workers share the cores anyway
        "TF_NUM_INTEROP_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        # Nobody listens there: a download fails at once, with a network and without.
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "no_proxy": "localhost,127.0.0.1",
    }


# Runs a script as a user does, and notes what each figure shows at the moment it is saved.
WATCH = """
import json, pathlib, runpy, sys
from matplotlib.figure import Figure
figures, savefig = {}, Figure.savefig
def look(axes):
    legend = axes.get_legend()
    lines = [[str(line.get_label()), list(map(float, line.get_xdata())),
              list(map(float, line.get_ydata()))] for line in axes.get_lines()]
    bands = [[str(band.get_label()), [list(map(float, p)) for p in band.get_paths()[0].vertices]]
             for band in axes.collections if band.get_paths()]
    return {"title": axes.get_title(), "xlabel": axes.get_xlabel(), "ylabel": axes.get_ylabel(),
            "lines": lines, "bands": bands, "images": len(axes.get_images()),
            "legend": [text.get_text() for text in legend.get_texts()] if legend else []}
def noted(figure, path, *args, **options):
    figures[pathlib.Path(path).name] = [look(axes) for axes in figure.axes]
    return savefig(figure, path, *args, **options)
Figure.savefig, sys.argv = noted, sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    pathlib.Path("figures.json").write_text(json.dumps(figures))
"""


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


def recorded(results):
    """Return how many epochs or episodes each history of each training has."""
    records = results["arms"].values() if results else ()
    trainings = [training for record in records for training in record.get("runs", [record])]
    return [len(values) for training in trainings for values in training["history"].values()]


def finish(process, folder):
    """Wait for a process; return its Run, with the newest results.json under folder/log."""
    try:
        stdout, stderr = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    noted = folder / "figures.json"
    figures = json.loads(noted.read_text()) if noted.exists() else {}
    return Run(process.returncode, stdout, stderr, *newest_results(folder), figures)


def wait_for(condition, process):
    """Wait until condition() is true, while the process runs; return its value."""
    deadline = time.monotonic() + LIMIT
    while not (value := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


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


def run_once(script, shared):
    """Return the Run of a script's tiny flags with seed 3; of all processes one makes it."""
    folder, kept = shared / script, shared / f"{script}.pickle"
    try:
        folder.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + LIMIT
        while not kept.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return pickle.loads(kept.read_bytes())
    try:
        flags = [*CASES[script].tiny, "--seed", "3"]
        command = ["-c", WATCH, ROOT / f"{script}.py", *flags]
        run = finish(start(command, folder, KERAS_BACKEND="jax"), folder)
    except BaseException as error:
        run = Run(None, "", f"no run: {error!r}", None, None, {})
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
