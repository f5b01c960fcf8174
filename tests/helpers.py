"""The scripts, their tiny settings, and how a test starts and reads them."""

import ast
import collections
import importlib
import io
import json
import os
import pathlib
import select
import shutil
import signal
import subprocess
import sys
import time
import tokenize

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))

# What a script's own tests say of it to the others: the CASE in tests/test_<script>.py.
Case = collections.namedtuple(
    "Case",
    [
        "tiny",  # flags for a run of seconds
        "final_epochs",  # how many values each history then has: {arm: number}
        "history",  # {arm: the names of its histories}
        "events",  # {folder in the run's: {kind of event: tags}}
        "figures",  # names of the PNGs, sorted
        "started",  # what the script prints when training has started, with its defaults
        "again",  # what it prints when its first epoch or episode is written
        "bad_flags",  # lists of flags that exit with code 2, beside those of all scripts
    ],
)
Run = collections.namedtuple("Run", "code stdout stderr folder results")


def case(script):
    """Return what a script's own tests tell the tests of all scripts about it."""
    return importlib.import_module(f"test_{script}").CASE


def environment(folder):
    """Return what a run's environment needs so that it leaves nothing outside `folder`."""
    return {
        "HOME": str(folder),
        "KERAS_HOME": str(folder / "keras"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "MPLBACKEND": "agg",
        "CUDA_VISIBLE_DEVICES": "",
        # Nobody listens there: a download fails at once, with a network and without.
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "no_proxy": "localhost,127.0.0.1",
    }


def start(arguments, folder, **options):
    """Start Python with `arguments` in `folder`; return the process, its output piped as text."""
    env = {**os.environ, **environment(folder), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    arguments = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(arguments, cwd=folder, env=env, **pipes)


def newest_results(folder):
    """Return the newest run's folder under folder/log, and its results; or twice None."""
    paths = sorted(pathlib.Path(folder, "log").glob("*/*/results.json"), key=os.path.getmtime)
    return (paths[-1].parent, json.loads(paths[-1].read_text())) if paths else (None, None)


def finish(process, folder):
    """Wait for a process; return its Run, with the newest results.json under folder/log."""
    stdout, stderr = process.communicate(timeout=300)
    return Run(process.returncode, stdout, stderr, *newest_results(folder))


def run_script(script, flags, folder):
    """Run a script as a user starts it, in `folder`."""
    return finish(start([ROOT / f"{script}.py", *flags], folder), folder)


# Imports TensorFlow once; for each line that it reads it runs a script in a fork of itself.
FORK_SERVER = """
import json, os, runpy, sys
os.environ["KERAS_HOME"] = "keras"  # which Keras reads now: a folder in that of each fork
import gymnasium, matplotlib.pyplot, tensorflow
for line in sys.stdin:
    sys.argv, folder, environment = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(folder)
        os.environ.update(environment)
        for number in (1, 2):
            os.dup2(os.open(f"output{number}", os.O_WRONLY), number)
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run_fork(server, script, flags, folder, interrupt_at=None):
    """Run a script as `run_script` does, 3 s quicker; Ctrl-C once it has printed `interrupt_at`."""
    outputs = [folder / "output1", folder / "output2"]
    for output in outputs:
        output.touch()
    arguments = [str(ROOT / f"{script}.py"), *flags], str(folder), environment(folder)
    server.stdin.write(json.dumps(arguments) + "\n")
    server.stdin.flush()
    child, deadline = int(server.stdout.readline()), time.monotonic() + 300
    while not select.select([server.stdout], [], [], 0.05)[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)  # the server is then free for the next one
        elif interrupt_at and interrupt_at in outputs[0].read_text():
            os.kill(child, signal.SIGINT)
            select.select([server.stdout], [], [], 30)  # Python may lose one: then again
    code = int(server.stdout.readline())
    return Run(code, *(output.read_text() for output in outputs), *newest_results(folder))


ON_TWO_DEVICES = """
import importlib, sys, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategies, mirrored = [], tf.distribute.MirroredStrategy
def watched(devices):
    strategies.append(mirrored(devices))
    return strategies[-1]
tf.distribute.MirroredStrategy = watched
script = importlib.import_module(sys.argv[1])
PREPARATION
script.main([*sys.argv[2:], "--device", "all"])
print("replicas", strategies[0].num_replicas_in_sync)
"""


def run_on_two_devices(script, flags, folder, preparation=""):
    """Run a script's `main` with --device all where TensorFlow sees two processors; a Run."""
    code = ON_TWO_DEVICES.replace("PREPARATION", preparation)
    run = finish(start(["-c", code, script, *flags], folder), folder)
    assert run.code == 0, run.stderr
    assert "replicas 2" in run.stdout
    return run


def fails_in_one_line(function, capsys):
    """Call `function`, which must exit; return its code and the one line it left on stderr."""
    capsys.readouterr()
    try:
        function()
    except SystemExit as stop:
        code = stop.code
    else:
        raise AssertionError("it did not exit")
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return code, lines[0]


def error_lines(stderr):
    """Return the lines of a process's stderr that are ours: TensorFlow writes there too."""
    return [line for line in stderr.splitlines() if line.startswith(("error:", "interrupted"))]


def resume_a_damaged_checkpoint(module, run, kind, tmp_path, capsys, folder="checkpoint"):
    """Truncate a checkpoint's file of a `kind` in a copy of a run; return what resuming says.

    That is the exit code and the one line on stderr; results.json must stay as it is.
    """
    run_dir = tmp_path / "copy"
    shutil.copytree(run.folder, run_dir)
    (path,) = run_dir.glob(f"{folder}/*.{kind}")
    path.write_bytes(path.read_bytes()[:100])
    before = (run_dir / "results.json").read_text()
    flags = ["--resume", str(run_dir), "--epochs", "20"]
    answer = fails_in_one_line(lambda: module.run_as_command(lambda: module.main(flags)), capsys)
    assert (run_dir / "results.json").read_text() == before
    return answer


def source(script):
    """Return a script's text."""
    return (ROOT / f"{script}.py").read_text()


def code_line_numbers(text):
    """Return the sorted numbers of the lines that hold code: no blanks, comments, docstrings."""
    lines = set()
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout | {tokenize.ENDMARKER}:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        kinds = (ast.Module, ast.FunctionDef, ast.ClassDef)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sorted(lines)


def tags(folder):
    """Return {kind: tags} of the TensorBoard events in a folder, read by TensorBoard itself."""
    from tensorboard.backend.event_processing import event_accumulator

    accumulator = event_accumulator.EventAccumulator(str(folder))
    accumulator.Reload()
    found = accumulator.Tags()
    # TensorFlow 2 writes scalars and images as tensors that name their plugin
    plugins = {tag: accumulator.SummaryMetadata(tag) for tag in found["tensors"]}
    kinds = collections.defaultdict(set)
    for tag, metadata in plugins.items():
        kinds[metadata.plugin_data.plugin_name].add(tag)
    kinds["graph"] = found["graph"]
    return kinds
