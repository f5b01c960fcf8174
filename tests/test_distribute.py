"""resnet_cifar10.py on several devices and on several machines, here all on one processor."""

import json
import os
import re
import signal
import socket

import numpy as np
import pytest
from helpers import environment, fails_in_one_line, finish, start

import resnet_cifar10 as script

# One block keeps the start short.
WORKER = """
import json, os, sys, numpy as np
import resnet_cifar10 as script
script.NUM_RES_NET_BLOCKS = 1
index, kill_in_epoch = json.loads(os.environ["TF_CONFIG"])["task"]["index"], int(sys.argv[1])
save, on_epoch_end = script.keras.Model.save, script.Recorder.on_epoch_end
def keep_weights(model, path):
    np.savez(f"weights_{index}.npz", *model.get_weights())
    save(model, path)
def struck(self, epoch, logs=None):
    if epoch + 1 == kill_in_epoch:
        os.kill(os.getpid(), 9)
    on_epoch_end(self, epoch, logs)
script.keras.Model.save, script.Recorder.on_epoch_end = keep_weights, struck
script.run_as_command(lambda: script.main(sys.argv[2:]))
"""
TWO_DEVICES = """
import sys, numpy as np, tensorflow as tf, resnet_cifar10 as script
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
script.NUM_RES_NET_BLOCKS = 2
layers = script.layers
layers.Dropout = lambda rate: layers.Activation("linear")
layers.BatchNormalization = lambda: layers.Activation("linear")  # each device has its own means
data, losses = script.load_data(True), {}
for device in ("auto", "all"):
    strategy = script.make_strategy(device)
    script.keras.utils.set_random_seed(0)
    images, labels = zip(*script.make_datasets(data, 64, 0)[0].take(10))
    images, labels = tf.concat(images, 0), tf.concat(labels, 0)  # the same ten batches for both
    train_dataset = tf.data.Dataset.from_tensor_slices((images, labels)).batch(64).repeat()
    with strategy.scope():
        model = script.build_model("resnet")
        model.compile(script.keras.optimizers.Adam(), "sparse_categorical_crossentropy")
    # epochs of one step: Keras gathers the devices' losses at the end of an epoch only
    fitted = model.fit(train_dataset, steps_per_epoch=1, epochs=10, verbose=0, shuffle=False)
    losses[device] = np.array(fitted.history["loss"])
    print("replicas", strategy.num_replicas_in_sync)
print("difference", np.abs(losses["auto"] - losses["all"]).max(), losses["auto"][[0, -1]])
script.main(["--synthetic", "--epochs", "1", "--steps-per-epoch", "4", "--device", "all"])
"""


def test_two_devices_give_the_losses_of_one(tmp_path):
    run = finish(start(["-c", TWO_DEVICES], tmp_path), tmp_path)
    assert run.code == 0, run.stderr
    assert "replicas 1\nreplicas 2\n" in run.stdout
    assert float(re.search(r"difference ([\d.e-]+)", run.stdout)[1]) < 1e-4
    assert run.results["complete"]
    assert len(run.results["arms"]["plain"]["history"]["acc"]) == 1


def run_workers(folder, flags, kill_in_epoch=0):
    """Run two workers on this machine; return their Runs. The second is killed in that epoch."""
    sockets = [socket.socket() for _ in range(2)]
    for each in sockets:
        each.bind(("localhost", 0))
    cluster = {"worker": [f"localhost:{each.getsockname()[1]}" for each in sockets]}
    for each in sockets:
        each.close()
    processes = []
    for index in (0, 1):
        os.environ["TF_CONFIG"] = json.dumps(
            {"cluster": cluster, "task": {"type": "worker", "index": index}}
        )
        processes.append(start(["-c", WORKER, kill_in_epoch * index, *flags], folder))
    del os.environ["TF_CONFIG"]
    try:
        if kill_in_epoch:
            processes[1].wait(timeout=120)
            processes[0].kill()  # it waits for the other; a user stops it as well
        return [finish(process, folder) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_two_workers_train_one_model_and_go_on_after_a_kill(tmp_path):
    flags = ["--synthetic", "--steps-per-epoch", "3", "--arms", "resnet", "--epochs"]
    runs = run_workers(tmp_path, [*flags, "3"], kill_in_epoch=2)
    assert [run.code for run in runs] == [-signal.SIGKILL] * 2
    assert 1 <= len(runs[0].results["arms"]["resnet"]["history"]["acc"]) < 3
    folder = runs[0].folder
    runs = run_workers(tmp_path, ["--resume", str(folder)])
    assert [run.code for run in runs] == [0, 0], runs[0].stderr + runs[1].stderr
    assert runs[0].folder == folder
    history = runs[0].results["arms"]["resnet"]["history"]
    assert [len(values) for values in history.values()] == [3] * 4
    # only the chief left files in the log, and both ended with the same weights
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    one, other = (np.load(tmp_path / f"weights_{index}.npz") for index in (0, 1))
    assert len(one.files) == len(other.files) > 10
    for name in one.files:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(
    "config",
    [
        "not json",
        '{"cluster": 3}',
        '{"cluster": {"worker": ["localhost:1"]}, "task": {"type": "worker", "index": 7}}',
        '{"cluster": {"worker": ["localhost:1"]}, "task": {"type": "cook", "index": 0}}',
    ],
)
def test_malformed_tf_config(config, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TF_CONFIG", config)
    code, line = fails_in_one_line(lambda: script.main(["--synthetic", "--epochs", "0"]), capsys)
    assert code == 2
    assert line.startswith("error: TF_CONFIG")
    assert not (tmp_path / "log").exists()


def test_environment_is_clean():
    assert "TF_CONFIG" not in {**os.environ, **environment(script.pathlib.Path())}
