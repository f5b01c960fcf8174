"""metrics_summaries.py: metrics against NumPy and against fit, and its differences."""

import pathlib
import types

import helpers
import numpy as np
import oracles
import pytest
import tensorflow as tf
from helpers import events
from oracles import numbered

import metrics_summaries as script

keras = script.keras

ACCURACY = "sparse_categorical_accuracy"
STD = "std_of_conv2d_kernel"
TWO_DEVICES = """
import tensorflow as tf, metrics_summaries as script
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
script.main("--synthetic --epochs 1 --fit-epochs 1 --steps-per-epoch 15 --device all".split())
print("replicas", tf.distribute.MirroredStrategy().num_replicas_in_sync)
"""


def test_difference_1_scaled_once_and_one_channel():
    for dataset in script.make_datasets(*[numbered(256, 28, 28)] * 2, 64, seed=0):
        images, labels = next(iter(dataset))
        assert images.dtype == tf.float32
        expected = labels.numpy()[:, None, None, None] / 255 * np.ones((28, 28, 1))
        np.testing.assert_allclose(images, expected, rtol=1e-6)
        assert images.shape == expected.shape


def test_difference_2_images_are_shuffled_not_batches():
    data = numbered(64, 28, 28), numbered(8, 28, 28)
    oracles.check_shuffle(lambda seed: script.make_datasets(*data, 8, seed)[0], 64, 8)


def test_difference_5_validation_sees_each_image_once():
    _, valid_dataset = script.make_datasets(*[numbered(2500, 28, 28)] * 2, 8, seed=0)
    assert sum(oracles.labels_of(valid_dataset), []) == list(range(2500))


def test_network_is_the_articles():
    model = script.build_model()
    # By hand: 2x2 kernels and biases, four numbers a filter of batch norm, the dense layer
    assert model.count_params() == (4 * 32 + 32) + 128 + (4 * 32 * 32 + 32) + 128 + 11530
    assert (model.input_shape, model.output_shape) == ((None, 28, 28, 1), (None, 10))
    assert model.layers[0].name == script.build_model().layers[0].name == "conv2d"


def numpy_logits(images, model):
    """The network in training mode, in float64: batch norm with the moments of the batch."""
    weights = iter([weight.numpy().astype("float64") for weight in model.weights])
    x = images.astype("float64")
    for _ in range(2):
        kernel, bias = next(weights), next(weights)
        gamma, beta, _, _ = (next(weights) for _ in range(4))
        height, width = x.shape[1] - 1, x.shape[2] - 1
        patches = [x[:, i : i + height, j : j + width] for i in (0, 1) for j in (0, 1)]
        x = sum(patch @ k for patch, k in zip(patches, kernel.reshape(4, *kernel.shape[2:])))
        x = np.maximum(x + bias, 0)[:, : height // 2 * 2, : width // 2 * 2]
        x = x.reshape(len(x), height // 2, 2, width // 2, 2, -1).max((2, 4))
        deviation = np.sqrt(x.var((0, 1, 2)) + 1e-3)
        x = gamma * (x - x.mean((0, 1, 2))) / deviation + beta
    return x.reshape(len(x), -1) @ next(weights) + next(weights)


def run_loop(monkeypatch, epochs, steps, log_freq):
    """Run only the custom loop, whose steps move nothing; return its history and what it used."""
    model, optimizer = script.build_model(), keras.optimizers.SGD(0.0)
    monkeypatch.setattr(script, "build_model", lambda: model)
    monkeypatch.setattr(script.keras.optimizers, "Adam", lambda: optimizer)
    run = types.SimpleNamespace(folder=pathlib.Path(), results={"arms": {}}, write=lambda: None)
    run.args = types.SimpleNamespace(epochs=epochs, log_freq=log_freq)
    datasets = script.make_datasets(*script.load_data(True), 32, seed=0)
    script.train(run, *datasets, steps)
    return run.results["arms"]["loop"]["history"], model, optimizer


def summaries():
    """Return what the loop wrote for TensorBoard: (step, average loss, average accuracy)."""
    losses, accuracies = events("loop", "loss"), events("loop", "acc")
    assert [step for step, _ in losses] == [step for step, _ in accuracies]
    return [(*loss, accuracy) for loss, (_, accuracy) in zip(losses, accuracies)]


def test_metrics_of_the_loop_equal_numpy(monkeypatch):
    """The network stays as it is, so NumPy can tell what every batch gave."""
    history, model, _ = run_loop(monkeypatch, epochs=2, steps=3, log_freq=2)
    train_dataset, _ = script.make_datasets(*script.load_data(True), 32, seed=0)
    losses, accuracies = [], []
    for images, labels in train_dataset.take(6):  # it runs on from epoch to epoch
        logits, labels = numpy_logits(images.numpy(), model), labels.numpy()
        losses.append(-np.log(oracles.softmax(logits)[np.arange(32), labels]).mean())
        accuracies.append(np.mean(logits.argmax(1) == labels))
    pairs = np.mean(np.reshape((losses, accuracies), (2, 3, 2)), 2).T
    expected = [(step, *values) for step, values in zip((2, 4, 6), pairs)]
    np.testing.assert_allclose(summaries(), expected, rtol=1e-4)
    by_epoch = np.mean(np.reshape((losses, accuracies), (2, 2, 3)), 2)
    np.testing.assert_allclose([history["loss"], history[ACCURACY]], by_epoch, rtol=1e-4)


def test_difference_3_batch_norm_learns_its_averages(monkeypatch):
    _, model, _ = run_loop(monkeypatch, epochs=1, steps=3, log_freq=10)
    train_dataset, _ = script.make_datasets(*script.load_data(True), 64, seed=0)
    images = np.concatenate([images for images, _ in train_dataset.take(8)])
    pooled = keras.Sequential(model.layers[:2])(images).numpy()
    norm = model.layers[2]  # after three batches: 3 % of the way, momentum being 0.99
    share = 1 - 0.99**3
    mean, variance = share * pooled.mean((0, 1, 2)), 1 - share + share * pooled.var((0, 1, 2))
    np.testing.assert_allclose(norm.moving_mean.numpy(), mean, rtol=0.1, atol=1e-4)
    np.testing.assert_allclose(norm.moving_variance.numpy(), variance, rtol=1e-3)


def test_difference_4_compiled_counted_and_ten_batches_a_summary(monkeypatch):
    eager_losses, loss = [], keras.losses.SparseCategoricalCrossentropy

    class Watched(loss):
        def call(self, labels, logits):
            eager_losses.append(tf.executing_eagerly())
            return super().call(labels, logits)

    monkeypatch.setattr(script.keras.losses, "SparseCategoricalCrossentropy", Watched)
    _, _, optimizer = run_loop(monkeypatch, epochs=2, steps=11, log_freq=10)
    assert set(eager_losses) == {False}
    assert len(eager_losses) <= 2  # traced, then run 22 times
    assert int(optimizer.iterations) == 22  # two more an epoch in the article
    assert [row[0] for row in summaries()] == [10, 20]  # the article's: 1 and 11, anew each epoch


def test_difference_6_metric_layer_by_hand():
    layer = keras.layers.Dense(3, name="watched")
    model = keras.Sequential([keras.Input((2,)), layer])
    wrapped = keras.Sequential([model, script.MetricLayer(layer)])
    wrapped.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse")
    x = np.random.default_rng(0).normal(size=(8, 2)).astype("float32")
    kernel = np.array([[1, 2, 3], [4, 5, 6]], "float32")
    layer.kernel.assign(kernel)
    np.testing.assert_array_equal(wrapped(x), model(x))
    history = wrapped.fit(x, np.zeros((8, 3)), 4, validation_split=0.5, verbose=0).history
    deviation = np.sqrt(35 / 12)  # of 1 to 6: (36 - 1) / 12
    assert history["std_of_watched_kernel"] == [pytest.approx(deviation)]
    assert history["val_std_of_watched_kernel"] == [pytest.approx(deviation)]
    layer.kernel.assign(2 * kernel)  # read anew with each batch, reset with each epoch
    history = wrapped.fit(x, np.zeros((8, 3)), verbose=0).history
    assert history["std_of_watched_kernel"] == [pytest.approx(2 * deviation)]


def test_fit_is_the_oracle_of_the_loop_and_difference_7():
    """`fit`, given the same seed, starts afresh and trains as the loop by hand does."""
    flags = ["--synthetic", "--epochs", "2", "--fit-epochs", "2", "--steps-per-epoch", "15"]
    folder, arms = helpers.run_main(script, flags)
    loop, fit = arms["loop"]["history"], arms["fit"]["history"]
    for metric in ("loss", ACCURACY):
        np.testing.assert_allclose(loop[metric], fit[metric], rtol=1e-3)
    assert fit["loss"][0] > 3 * loop["loss"][-1]  # the loop's network would go on from there
    accuracy = arms["fit"]["final"][f"val_{ACCURACY}"]
    assert arms["loop"]["final"]["test_accuracy"] == pytest.approx(accuracy, abs=0.01)
    kernel = keras.models.load_model(folder / "fit.keras").layers[0].kernel.numpy()
    assert fit[f"val_{STD}"][-1] == pytest.approx(kernel.std(), rel=1e-5)
    keras.utils.set_random_seed(0)
    _, deviation = events(folder / "fit" / "train", f"batch_{STD}")[0]
    assert deviation == pytest.approx(script.build_model().get_weights()[0].std(), rel=1e-5)


def test_difference_8_the_mean_is_written_before_its_reset(tmp_path, capsys):
    script.show_mean_metric(tmp_path)
    assert events(tmp_path / "mean_metric", "mean") == [(1, 3.0)]
    printed = capsys.readouterr().out
    assert printed.index("3.0") < printed.index("0.0")


def test_two_devices_report_the_kernel_they_trained(tmp_path):
    run = helpers.finish(helpers.start(["-c", TWO_DEVICES], tmp_path), tmp_path)
    assert "replicas 2" in run.stdout, run.stderr
    kernel = keras.models.load_model(run.folder / "fit.keras").layers[0].kernel.numpy()
    history = run.results["arms"]["fit"]["history"]
    assert history[f"val_{STD}"] == [pytest.approx(kernel.std(), rel=1e-5)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_claim_validation_accuracy(seed):
    final = script.main(["--seed", seed])  # the real images; the article's record is 0.0982
    assert final["fit"][f"val_{ACCURACY}"] >= 0.97
    assert final["loop"]["test_accuracy"] >= 0.97
