"""resnet_cifar10.py: images and networks by hand, its differences, several devices."""

import json
import socket

import helpers
import numpy as np
import oracles
import pytest

import resnet_cifar10 as script

RUN = ["--synthetic", "--steps-per-epoch", "3", "--epochs"]
CONV = "Conv2D 64 (3, 3) (1, 1)"
PLAIN = [f"{CONV} same relu", oracles.NORM] * 2
RESIDUAL = [*PLAIN[:2], f"{CONV} same linear", oracles.NORM, "Add", "Activation relu"]
CHILD = "import functools, sys, tensorflow as tf, resnet_cifar10 as script\n"
CHILD += "script.build_model = functools.partial(script.build_model, num_res_net_blocks=1)\n"
CHILD += "tf.get_logger().setLevel('INFO')\n"  # it tells among how many a gradient is shared
TWO_DEVICES = f"""{CHILD}
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
linear = lambda *settings: script.layers.Activation("linear")
script.layers.Dropout = script.layers.BatchNormalization = linear  # each device has its own
tf.image.random_flip_left_right = lambda images: images
tf.data.Dataset.shuffle = lambda dataset, *size, **seed: dataset
losses = [script.main([*sys.argv[1:], device])["plain"]["loss"] for device in ("all", "cpu")]
assert abs(losses[0] - losses[1]) < 1e-4, losses
"""


def make_datasets(data, seed=0):
    return script.make_datasets(data, data, script.argparse.Namespace(batch_size=64, seed=seed))


def test_difference_1_images_are_shuffled_not_batches():
    data = oracles.numbered(640, 32, 32, 3)
    oracles.check_shuffle(lambda seed: make_datasets(data, seed)[0], 640, 64)


def test_crop_scale_flip_and_difference_2_each_test_image_once():
    images = np.random.default_rng(0).integers(0, 256, (2500, 32, 32, 3), dtype="uint8")
    train_dataset, valid_dataset = make_datasets((images, np.arange(2500)))
    cropped = images[:, 4:28, 4:28].astype("float32") / 255
    valid_images = np.concatenate([batch for batch, _ in valid_dataset.take(9)])
    np.testing.assert_allclose(valid_images, cropped, rtol=1e-6)
    batch, numbers = next(iter(train_dataset))
    kept = np.isclose(batch, cropped[numbers]).all((1, 2, 3))
    mirrored = np.isclose(batch, cropped[numbers, :, ::-1]).all((1, 2, 3))
    assert (kept ^ mirrored).all()
    assert 15 < mirrored.sum() < 49  # 32 +- 4, as each image has its own draw; else 0 or 64


@pytest.mark.parametrize(("arm", "block"), [("resnet", RESIDUAL), ("plain", PLAIN)])
def test_networks_and_loss_are_the_articles(arm, block):
    model = script.build_model(arm)
    begin = ["InputLayer", "Conv2D 32 (3, 3) (1, 1) valid relu", f"{CONV} valid relu"]
    begin += ["MaxPooling2D (3, 3) (3, 3) valid"]
    end = [f"{CONV} valid relu", "GlobalAveragePooling2D", "Dense 256 relu", "Dropout 0.5"]
    assert oracles.layers_as_text(model) == [*begin, *block * 10, *end, "Dense 10 softmax"]
    oracles.check_classifier(model, np.random.default_rng(0).uniform(size=(20, 24, 24, 3)))


def test_a_silent_residual_block_passes_its_input_on():
    x, inputs = np.random.default_rng(0).normal(size=(2, 6, 6, 64)), script.keras.Input((6, 6, 64))
    for block, expected in ((script.res_net_block, np.maximum(x, 0)), (script.non_res_block, 0)):
        model = script.keras.Model(inputs, block(inputs, 64, 3))
        model.set_weights([weight * 0 for weight in model.get_weights()])
        np.testing.assert_allclose(model(x) + 0 * x, expected, rtol=1e-6)


def test_difference_3_both_start_alike(monkeypatch):
    starts, build_model = [], script.build_model

    def build_one_block(arm):
        model = build_model(arm, num_res_net_blocks=1)
        starts.append(model.get_weights())
        return model

    monkeypatch.setattr(script, "build_model", build_one_block)
    script.main([*RUN, "1"])
    oracles.assert_same(*starts)


def test_two_devices_give_the_loss_of_one(tmp_path):
    flags = [*RUN, "3", "--steps-per-epoch", "1", "--arms", "plain", "--device"]
    run = helpers.finish(helpers.start(["-c", TWO_DEVICES, *flags], tmp_path), tmp_path)
    assert run.code == 0, run.stderr
    assert "group_size = 2" in run.stderr


def test_two_workers_train_one_model_and_go_on(tmp_path, monkeypatch, request):
    tf_keras = pytest.importorskip("tf_keras")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the second one writes
    command = ["-c", CHILD + "script.main()", *RUN, "1", "--arms", "resnet"]
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):  # bound, so that nobody takes it; TensorFlow may reuse it
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            each.bind(("localhost", 0))
        cluster = {"worker": [f"localhost:{each.getsockname()[1]}" for each in (one, other)]}
        tasks = [{"cluster": cluster, "task": {"type": "worker", "index": i}} for i in (0, 1)]
        for _ in range(2):
            workers = [helpers.start(command, tmp_path, TF_CONFIG=json.dumps(x)) for x in tasks]
            request.addfinalizer(workers[1].kill)  # should the first hang
            first, second = [helpers.finish(worker, tmp_path) for worker in workers]
            assert [first.code, second.code] == [0, 0], first.stderr + second.stderr
            assert "group_size = 2" in first.stderr
            (folder,) = tmp_path.glob("log/*/*")
            command[2:] = ["--resume", folder, "--epochs", "2"]
    assert len(first.results["arms"]["resnet"]["history"]["acc"]) == 2
    paths = [folder / "resnet.keras", *tmp_path.glob("tmp*/run/resnet.keras")]
    oracles.assert_same(*[tf_keras.models.load_model(path).get_weights() for path in paths])


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_claim_resnet_learns_faster(seed):
    final = script.main(["--seed", str(seed)])  # 30 epochs, the real images: 0.052 to 0.061
    assert final["resnet"]["acc"] > final["plain"]["acc"] + 0.04
