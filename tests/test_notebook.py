"""Each script as one cell of a real Jupyter kernel: it trains at once, stops, and runs again."""

import functools
import os
import queue
import re
import tempfile
import time

import helpers
import jupyter_client
import pytest
from helpers import CASES, LIMIT, SCRIPTS

# Stand-ins for the downloads, with the real shapes and types, once the script has made its imports
PREPARE = """
import keras, numpy, tensorflow
def random_set(count, shape, classes, label_shape=(), rng=numpy.random.default_rng(0)):
    labels = rng.integers(0, classes, (count, *label_shape), dtype="uint8")
    return rng.integers(0, 256, (count, *shape), dtype="uint8"), labels
def photographs(name, split, **options):
    return [tensorflow.data.Dataset.from_tensor_slices(random_set(100, (50, 60, 3), 2))] * 3
def untrained(weights, original=keras.applications.ResNet50, **options):
    return original(weights=None, **options)
small = random_set(2000, (28, 28), 10), random_set(1000, (28, 28), 10)
coloured = random_set(2000, (32, 32, 3), 10, (1,)), random_set(1000, (32, 32, 3), 10, (1,))
keras.datasets.mnist.load_data = lambda: small
keras.datasets.cifar10.load_data = lambda: coloured
if "tfds" in globals():
    assert tfds.load and tfds.builder("cats_vs_dogs").url_infos  # the import is whole
    tfds.load = photographs
if "resnet50" in globals():
    resnet50.ResNet50 = untrained
"""


class KernelDiedError(Exception):
    """An interrupt within TensorFlow may, rarely, abort it, or stop its tapes, or be lost."""


class Kernel:
    """A Jupyter kernel in a folder, and what its cells print and show."""

    def __init__(self, folder):
        self.folder = folder

    def start(self):
        env = {**os.environ, **helpers.environment(self.folder)}
        env.pop("MPLBACKEND", None)  # a notebook brings its own
        path = tempfile.mkdtemp(dir=self.folder) + "/kernel.json"
        self.manager = jupyter_client.KernelManager(transport="ipc", connection_file=path)
        self.manager.start_kernel(cwd=str(self.folder), env=env)
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=LIMIT)

    def stop(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def run(self, code, interrupt_at=None):
        """Run a cell; return (what it printed, errors, number of pictures)."""
        request = self.client.execute(code)
        printed, errors, pictures, interrupted = "", [], 0, 0.0
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            trains = interrupt_at and interrupt_at in printed and "interrupted" not in printed
            if trains and time.monotonic() > interrupted + 20:
                self.manager.interrupt_kernel()  # Python may lose one in a destructor: then again
                interrupted = time.monotonic()
            try:
                message = self.client.get_iopub_msg(timeout=1)
            except queue.Empty:
                if not self.manager.is_alive():
                    raise KernelDiedError(printed) from None
                continue
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                printed += content["text"]
            elif kind == "error":
                errors.append(f"{content['ename']}: {content['evalue']}")
                if re.search("No gradients provided|SystemError", errors[-1]):
                    raise KernelDiedError(printed)
            elif kind == "display_data":
                pictures += "image/png" in content["data"]
            elif kind == "status" and content["execution_state"] == "idle":
                return printed, errors, pictures
        self.stop()
        self.start()  # for the other tests
        raise TimeoutError(printed)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """Return one kernel for all scripts, as a learner may have them in one notebook."""
    kernel = Kernel(tmp_path_factory.mktemp("notebook"))
    try:
        kernel.start()
        yield kernel
    finally:
        kernel.stop()


def paste_and_interrupt(kernel, script):
    """Run a script as a cell with its defaults, interrupted once it trains."""
    source = helpers.source(script)
    for cell in ("__name__ = 'imported'", source, PREPARE, "__name__ = '__main__'"):
        assert kernel.run(cell)[1] == []
    return kernel.run(source, interrupt_at=CASES[script].started)


def again_in_a_new_kernel(test):
    """Repeat a test, once, in whose kernel an interrupt, or one before it, broke TensorFlow."""

    @functools.wraps(test)
    def repeated(kernel, **parameters):
        try:
            test(kernel, **parameters)
        except KernelDiedError:  # a second time it would be ours
            kernel.stop()
            kernel.start()
            test(kernel, **parameters)

    return repeated


@pytest.mark.parametrize("script", SCRIPTS)
@again_in_a_new_kernel
def test_paste_interrupt_and_run_again(kernel, script):
    printed, errors, _ = paste_and_interrupt(kernel, script)
    assert errors == ["SystemExit: 130"], printed
    assert "interrupted; what was finished is kept" in printed

    flags, arms = [*CASES[script].tiny, "--epochs", "2"], list(CASES[script].history)
    if "--synthetic" in flags and '"--arms"' in helpers.source(script):  # one is enough here
        flags, arms = [*flags, "--arms", arms[0]], arms[:1]
    if "--runs" in flags:
        flags += ["--runs", "1"]
    if script == "resnet_cifar10":  # its start is long
        kernel.run("ten = build_model; build_model = lambda arm: ten(arm, num_res_net_blocks=1)")
    printed, errors, pictures = kernel.run(f"numbers = main({flags!r})")
    assert errors == [], printed
    assert "tensorboard --logdir" in printed
    assert (pictures > 0) == any(name.endswith(".png") for name in CASES[script].files)
    assert kernel.run("print(list(numbers))") == (f"{arms}\n", [], 0)
    printed, errors, _ = kernel.run("main(['--epochs', 'one'])")
    assert errors == ["SystemExit: 2"]
    assert "invalid int value: 'one'" in printed


@again_in_a_new_kernel
def test_cell_by_cell(kernel):
    """As editors show the file; afterwards all lies open to play with."""
    *cells, last = re.split("^(?=# %%)", helpers.source("double_q_cartpole"), flags=re.MULTILINE)
    assert len(cells) >= 5
    kernel.run("%reset -f")
    for cell in cells:
        assert kernel.run(cell) == ("", [], 0)
    _, errors, _ = kernel.run(last, interrupt_at=CASES["double_q_cartpole"].started)
    assert errors == ["SystemExit: 130"]
    assert kernel.run("print(build_model()(np.ones((5, 4))).shape)") == ("(5, 2)\n", [], 0)


@again_in_a_new_kernel
def test_percent_run_keeps_its_flags(kernel):
    path = helpers.ROOT / "double_q_cartpole.py"
    printed, errors, _ = kernel.run(f"%run {path} --epochs 2 --arms double")
    assert errors == [], printed
    assert "Episode: 2," in printed
    assert "dqn" not in printed
