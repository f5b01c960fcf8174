"""metrics_summaries.py: metrics against NumPy and against fit, and each difference."""

from unittest import mock

import helpers
import numpy as np
import oracles
import pytest
import tensorflow as tf
from helpers import ACCURACY, KERNEL

import metrics_summaries as script

keras = script.keras


def make_datasets(data, batch_size=8, seed=0):
    return script.make_datasets(data, data, mock.Mock(batch_size=batch_size, seed=seed))


def test_differences_1_and_5_scaled_once_one_channel_and_each_test_image_once():
    train_dataset, valid_dataset = make_datasets(oracles.numbered(2500, 28, 28), 256)
    assert sum(oracles.labels_of(valid_dataset), []) == list(range(2500))
    for dataset in (train_dataset, valid_dataset):
        images, labels = next(iter(dataset))
        assert (images.dtype, images.shape[1:]) == (tf.float32, (28, 28, 1))
        expected = labels.numpy()[:, None, None, None] % 256 / 255 + np.zeros((28, 28, 1))
        np.testing.assert_allclose(images, expected, rtol=1e-6)


def test_difference_2_images_are_shuffled_not_batches():
    data = oracles.numbered(64, 28, 28)
    oracles.check_shuffle(lambda seed: make_datasets(data, 8, seed)[0], 64, 8)


def test_network_is_the_articles():
    block = ["Conv2D 32 (2, 2) (1, 1) valid relu", "MaxPooling2D (2, 2) (2, 2) valid", oracles.NORM]
    network = oracles.layers_as_text(script.build_model())
    assert network == [*block, *block, "Flatten", "Dense 10 linear"]


def test_differences_3_and_4_the_loop_writes_what_numpy_counts():
    """The weights stay as they are, so a copy can tell what every batch of two epochs gives."""
    model, copy, optimizer = script.build_model(), script.build_model(), keras.optimizers.SGD(0.0)
    copy.set_weights(model.get_weights())
    loss_fn = mock.Mock(wraps=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    batches = list(make_datasets(script.load_data(True)[0], 32)[0].take(10))
    ds_train = iter(batches)
    with tf.summary.create_file_writer("loop").as_default():
        returned = [script.train(ds_train, optimizer, loss_fn, model, 5, 2) for _ in range(2)]
    assert loss_fn.call_count <= 2  # compiled: traced, and run ten times
    losses, accuracies = [], []
    for images, labels in batches:
        logits, labels = copy(images, training=True).numpy(), labels.numpy()
        losses.append(oracles.cross_entropy(oracles.softmax(logits), labels))
        accuracies.append(np.mean(logits.argmax(1) == labels))
    for place, tag, values in ((0, "loss", losses), (1, "acc", accuracies)):
        parts = np.split(values, [2, 4, 5, 7, 9])  # the article's are 1, 2, 2 in each epoch
        steps, written = zip(*helpers.events("loop", tag))
        assert steps == (2, 4, 5, 7, 9, 10)
        np.testing.assert_allclose(written, [part.mean() for part in parts], rtol=1e-4)
        assert [pair[place] for pair in returned] == pytest.approx([written[2], written[5]])
    oracles.assert_same(model.get_weights(), copy.get_weights(), atol=1e-5)  # also batch norm's


def test_difference_4_steps_of_an_epoch(monkeypatch):
    monkeypatch.setattr(script, "train_with_fit", mock.Mock())
    monkeypatch.setattr(script, "train_by_hand", train := mock.Mock())
    script.main(["--synthetic"])
    script.main(["--synthetic", "--batch-size", "100"])
    assert [call.args[-1] for call in train.call_args_list] == [156, 100]


def test_difference_6_metric_layer_by_hand():
    layer = keras.layers.Dense(3, name="watched")
    model = keras.Sequential([keras.Input((2,)), layer])
    wrapped = keras.Sequential([model, script.MetricLayer(layer)])
    wrapped.compile(optimizer=keras.optimizers.SGD(0.0), loss="mse")
    x, kernel = np.random.default_rng(0).normal(size=(8, 2)), np.array([[1, 2, 3], [4, 5, 6]])
    layer.kernel.assign(kernel)
    np.testing.assert_array_equal(wrapped(x), model(x))
    for scale in (1, 2):  # read anew with each batch, reset with each epoch
        layer.kernel.assign(scale * kernel)
        history = wrapped.fit(x, np.zeros((8, 3)), 4, validation_split=0.5, verbose=0).history
        deviation = scale * np.sqrt(35 / 12)  # of 1 to 6: (36 - 1) / 12
        for name in ("std_of_watched_kernel", "val_std_of_watched_kernel"):
            assert history[name] == [pytest.approx(deviation)]


def test_fit_is_the_oracle_of_the_loop_differences_7_and_9_and_what_is_saved():
    """`fit`, given the same seed, starts afresh and trains as the loop by hand does."""
    flags = ["--synthetic", "--epochs", "2", "--fit-epochs", "2", "--steps-per-epoch", "15"]
    folder, arms = helpers.run_main(script, [*flags, "--log-freq", "20"])
    loop, fit = arms["loop"]["history"], arms["fit"]["history"]
    for metric in ("loss", ACCURACY):
        np.testing.assert_allclose(loop[metric], fit[metric], rtol=1e-3)
    assert fit["loss"][0] > 3 * loop["loss"][-1]  # the loop's network would go on from there
    valid_dataset = make_datasets(script.load_data(True)[1])[1]
    for arm, metric in (("loop", "test_accuracy"), ("fit", f"val_{ACCURACY}")):
        model = keras.models.load_model(folder / f"{arm}.keras")
        assert model.optimizer.iterations == 30
        accuracy = model.evaluate(valid_dataset, verbose=0)[1]
        assert arms[arm]["final"][metric] == pytest.approx(accuracy, abs=1e-6)
    assert "graph_keras_model" not in helpers.tags(folder / "fit/train")
    kernel = model.layers[0].kernel.numpy()
    assert fit[f"val_{KERNEL}"][-1] == pytest.approx(kernel.std(), rel=1e-5)


def test_difference_8_the_mean_is_written_before_its_reset(tmp_path, capsys):
    script.show_mean_metric(tmp_path)
    assert helpers.events(tmp_path / "mean_metric", "mean") == [(1, 3.0)]
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["3.0", "0.0"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_claim_validation_accuracy(seed):
    final = script.main(["--seed", seed])  # the real images; the article's record is 0.0982
    assert min(final["fit"][f"val_{ACCURACY}"], final["loop"]["test_accuracy"]) >= 0.97
