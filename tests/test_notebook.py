"""Each script as one cell of a real Jupyter kernel: it trains at once, stops, and runs again."""

import os
import queue
import time

import helpers
import jupyter_client
import pytest
from helpers import CASES, SCRIPTS

# The defaults want real data; these stand in for the downloads, with the real shapes and types.
PREPARE = """
import numpy as np, keras
def fake(shape, label_shape):
    def load_data():
        rng = np.random.default_rng(0)
        sets = [rng.integers(0, 256, (n, *shape), dtype="uint8") for n in (2000, 1000)]
        return [(x, rng.integers(0, 10, (len(x), *label_shape), dtype="uint8")) for x in sets]
    return load_data
keras.datasets.mnist.load_data = fake((28, 28), ())
keras.datasets.cifar10.load_data = fake((32, 32, 3), (1,))
"""

# For the scripts that need them: photographs without TFDS, a ResNet50 without its weights.
PREPARE_PHOTOGRAPHS = """
import numpy as np, tensorflow as tf, tensorflow_datasets as tfds
from keras.applications import resnet50
def photographs(name, split, **options):
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (100, 50, 60, 3), dtype="uint8"), rng.integers(0, 2, 100)
    return [tf.data.Dataset.from_tensor_slices(data) for _ in split]
tfds.load = photographs
def untrained(original=resnet50.ResNet50, **options):
    return original(**{**options, "weights": None})
keras.applications.ResNet50 = resnet50.ResNet50 = untrained
"""


class KernelDiedError(Exception):
    """TensorFlow aborts, rarely, where an interrupt reaches Python from within its C++."""


class Kernel:
    """A Jupyter kernel in a folder, and what its cells print and show."""

    def __init__(self, folder):
        self.folder = folder
        self.start()

    def start(self):
        env = {**os.environ, **helpers.environment(self.folder)}
        env.pop("MPLBACKEND", None)  # a notebook brings its own
        self.manager = jupyter_client.KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(self.folder), env=env)
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)

    def run(self, code, interrupt_at=None, timeout=240):
        """Run a cell; return (what it printed, errors, number of pictures)."""
        request = self.client.execute(code)
        printed, errors, pictures, interrupted = "", [], 0, 0.0
        deadline = time.monotonic() + timeout
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
            elif kind == "display_data":
                pictures += "image/png" in content["data"]
            elif kind == "status" and content["execution_state"] == "idle":
                return printed, errors, pictures
        raise TimeoutError(printed)

    def stop(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """Return one kernel for all scripts, as a learner may have them in one notebook."""
    kernel = Kernel(tmp_path_factory.mktemp("notebook"))
    yield kernel
    kernel.stop()


def paste_and_interrupt(kernel, script):
    """Run a script as a cell with its defaults, interrupted once it trains."""
    assert kernel.run(PREPARE)[1] == []
    if "import tensorflow_datasets" in helpers.source(script):
        assert kernel.run(PREPARE_PHOTOGRAPHS)[1] == []
    return kernel.run(helpers.source(script), interrupt_at=CASES[script].started)


@pytest.mark.parametrize("script", SCRIPTS)
def test_paste_interrupt_and_run_again(kernel, script):
    try:
        printed, errors, _ = paste_and_interrupt(kernel, script)
    except KernelDiedError:  # a second time it would be ours
        kernel.stop()
        kernel.start()
        printed, errors, _ = paste_and_interrupt(kernel, script)
    assert CASES[script].started in printed
    assert errors == ["SystemExit: 130"]
    assert "interrupted; what was finished is in " in printed

    flags = CASES[script].tiny
    kernel.run("NUM_RES_NET_BLOCKS = 1")  # resnet_cifar10's: its start is long
    if "--synthetic" in flags and '"--arms"' in helpers.source(script):  # one is enough here
        flags = [*flags, "--arms", list(CASES[script].history)[0]]
    printed, errors, pictures = kernel.run(f"numbers = main({flags!r})")
    assert errors == []
    assert "tensorboard --logdir" in printed
    assert pictures >= 1

    printed, errors, _ = kernel.run("print(sorted(numbers))")
    assert errors == []
    assert printed.startswith("[")

    printed, errors, _ = kernel.run("main(['--epochs', 'one'])")
    assert errors == ["SystemExit: 2"]
    assert "invalid int value: 'one'" in printed


def test_percent_run_keeps_its_flags(kernel):
    flags = " ".join(CASES["double_q_cartpole"].tiny)
    path = helpers.ROOT / "double_q_cartpole.py"
    printed, errors, _ = kernel.run(f"%run {path} {flags}")
    assert errors == []
    assert 'tensorboard --logdir "' in printed


def test_a_kernel_that_sets_file(kernel):
    """As VS Code's interactive window does: the command line is the kernel's all the same."""
    source = helpers.source("double_q_cartpole")
    kernel.run("__file__ = 'somewhere/double_q_cartpole.py'")
    printed, errors, _ = kernel.run(source, interrupt_at=CASES["double_q_cartpole"].started)
    assert errors == ["SystemExit: 130"], printed
    kernel.run("del __file__")
