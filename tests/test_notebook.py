"""Every script as one cell of a real Jupyter kernel: it trains at once, stops, and runs again."""

import os
import queue
import re
import time

import helpers
import jupyter_client
import pytest
from helpers import SCRIPTS, case

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
import pathlib, numpy as np, tensorflow as tf, tensorflow_datasets as tfds
from keras.applications import resnet50
class Builder:
    data_path = pathlib.Path.cwd() / "a" / "b"
    data_path.mkdir(parents=True)
def photographs(name, split, **options):
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (100, 50, 60, 3), dtype="uint8"), rng.integers(0, 2, 100)
    return [tf.data.Dataset.from_tensor_slices(data) for _ in split]
tfds.builder, tfds.load = (lambda name, data_dir: Builder), photographs
original = resnet50.ResNet50
resnet50.ResNet50 = lambda top, weights, *options: original(top, None, *options)
"""


class KernelDiedError(Exception):
    """TensorFlow aborts, rarely, where an interrupt reaches Python from within its C++."""


class Kernel:
    """A Jupyter kernel in a folder, and what its cells print and show."""

    def __init__(self, folder):
        env = {**os.environ, **helpers.environment(folder)}
        del env["MPLBACKEND"]  # a notebook brings its own
        self.manager = jupyter_client.KernelManager(kernel_name="python3")
        self.manager.start_kernel(cwd=str(folder), env=env)
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(self, code, interrupt_at=None, timeout=180):
        """Run a cell; return (stdout, stderr, errors, number of pictures)."""
        request = self.client.execute(code)
        streams, errors, pictures = {"stdout": "", "stderr": ""}, [], 0
        again, deadline = False, time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                message = self.client.get_iopub_msg(timeout=1)
            except queue.Empty:
                if not self.manager.is_alive():
                    raise KernelDiedError(streams["stdout"] + streams["stderr"]) from None
                continue
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                streams[content["name"]] += content["text"]
                if interrupt_at and interrupt_at in streams["stdout"]:
                    interrupt_at = None
                    self.manager.interrupt_kernel()
                if not again and re.search(r"Exception ignored[^\0]*KeyboardI", streams["stderr"]):
                    again = True  # Python lost it in a destructor: a user presses again
                    self.manager.interrupt_kernel()
            elif kind == "error":
                errors.append(f"{content['ename']}: {content['evalue']}")
            elif kind == "display_data":
                pictures += "image/png" in content["data"]
            elif kind == "status" and content["execution_state"] == "idle":
                return streams["stdout"], streams["stderr"], errors, pictures
        raise TimeoutError(streams["stdout"] + streams["stderr"])

    def stop(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def start_kernel(tmp_path):
    """Return a function that starts a kernel, in a folder of its own."""
    kernels = []

    def start_kernel():
        folder = tmp_path / str(len(kernels))
        folder.mkdir()
        kernels.append(Kernel(folder))
        return kernels[-1]

    yield start_kernel
    for kernel in kernels:
        kernel.stop()


def paste_and_interrupt(kernel, script):
    """Run a script as a cell with its defaults, interrupted once it trains."""
    assert kernel.run(PREPARE)[2] == []
    if "import tensorflow_datasets" in helpers.source(script):
        assert kernel.run(PREPARE_PHOTOGRAPHS)[2] == []
    return kernel.run(helpers.source(script), interrupt_at=case(script).started)


@pytest.mark.parametrize("script", SCRIPTS)
def test_paste_interrupt_and_run_again(start_kernel, script):
    kernel = start_kernel()
    try:
        stdout, stderr, errors, _ = paste_and_interrupt(kernel, script)
    except KernelDiedError:  # a second time it would be ours
        kernel = start_kernel()
        stdout, stderr, errors, _ = paste_and_interrupt(kernel, script)
    assert case(script).started in stdout
    assert errors == []
    assert "interrupted" in stderr

    flags = case(script).tiny
    kernel.run("NUM_RES_NET_BLOCKS = 1")  # resnet_cifar10's: its start is long
    if "--synthetic" in flags and '"--arms"' in helpers.source(script):  # one is enough here
        flags = [*flags, "--arms", list(case(script).history)[0]]
    stdout, _, errors, pictures = kernel.run(f"numbers = main({flags!r})")
    assert errors == []
    assert "tensorboard --logdir" in stdout
    assert pictures >= 1

    stdout, _, errors, _ = kernel.run("print(sorted(numbers))")
    assert errors == []
    assert stdout.startswith("[")

    _, stderr, errors, _ = kernel.run("main(['--epohcs', '1'])")
    assert errors == ["SystemExit: 2"]
    assert "error: unrecognized arguments: --epohcs 1" in stderr
