"""metrics_summaries.py: metrics against NumPy and against fit, and its differences."""

import json

import helpers
import numpy as np
import pytest
import tensorflow as tf
from helpers import Case

import metrics_summaries as script

keras = script.keras

ACCURACY = "sparse_categorical_accuracy"
STD = "std_of_conv2d_kernel"
FITTED = [name for key in ("loss", ACCURACY, STD) for name in (key, f"val_{key}")]
EPOCHS = {f"epoch_{key}" for key in ("loss", ACCURACY, STD)}
BATCHES = {f"batch_{key}" for key in ("loss", ACCURACY, STD)}
EVALUATIONS = {f"evaluation_{key}_vs_iterations" for key in ("loss", ACCURACY, STD)}
CASE = Case(
    tiny=["--synthetic", "--epochs", "2", "--fit-epochs", "2", "--steps-per-epoch", "15"],
    final_epochs={"loop": 2, "fit": 2},
    history={"loop": ["loss", ACCURACY], "fit": FITTED},
    events={
        "mean_metric": {"scalars": {"mean"}},
        "loop": {"scalars": {"loss", "acc"}},
        "fit/train": {"scalars": EPOCHS | BATCHES},
        "fit/validation": {"scalars": EPOCHS | EVALUATIONS},
    },
    figures=["fit.png", "loop.png"],
    started="Epoch 1 of 10",
    again="Epoch 2 of",
    bad_flags=[
        ["--steps-per-epoch", "0"],
        ["--batch-size", "0"],
        ["--fit-epochs", "-1"],
        ["--log-freq", "0"],
    ],
)


def events(folder, tag):
    """Return [(step, value)] of a scalar in a run's folder, as TensorBoard reads it."""
    from tensorboard.backend.event_processing import event_accumulator

    accumulator = event_accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0})
    accumulator.Reload()
    found = accumulator.Tensors(tag)
    return [(event.step, float(tf.make_ndarray(event.tensor_proto))) for event in found]


def numbered(count):
    """Return images whose every pixel is their number, and the numbers as labels."""
    numbers = np.arange(count, dtype="uint8")
    return np.broadcast_to(numbers[:, None, None], (count, 28, 28)), numbers


def labels_of(dataset, count):
    return [labels.numpy().tolist() for _, labels in dataset.take(count)]


# --- The datasets ---


def test_difference_1_scaled_once_and_one_channel():
    for dataset in script.mnist_datasets((numbered(256), numbered(256)), 64, seed=0):
        images, labels = next(iter(dataset))
        assert images.shape[1:] == (28, 28, 1)
        assert images.dtype == tf.float32
        expected = labels.numpy()[:, None, None, None] / 255 * np.ones((28, 28, 1))
        np.testing.assert_allclose(images, expected, rtol=1e-6)


def test_difference_2_images_are_shuffled_not_batches():
    train_dataset, _ = script.mnist_datasets((numbered(64), numbered(8)), 8, seed=0)
    found = labels_of(train_dataset, 16)
    first, second = found[:8], found[8:]
    for one_pass in (first, second):  # each pass has each image once
        assert sorted(sum(one_pass, [])) == list(range(64))
    companions = [{frozenset(batch) for batch in one_pass} for one_pass in (first, second)]
    assert not companions[0] & companions[1]  # batch().shuffle() keeps all eight


def test_difference_5_validation_sees_each_image_once():
    images, labels = np.zeros((2500, 28, 28), "uint8"), np.arange(2500)
    _, valid_dataset = script.mnist_datasets((numbered(8), (images, labels)), 8, seed=0)
    assert sum(labels_of(valid_dataset, -1), []) == list(range(2500))


# --- The network ---


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
        x = np.maximum(x + bias, 0)
        half = x[:, : height // 2 * 2, : width // 2 * 2]
        half = half.reshape(len(x), height // 2, 2, width // 2, 2, -1)
        x = half.max((2, 4))
        deviation = np.sqrt(x.var((0, 1, 2)) + 1e-3)
        x = gamma * (x - x.mean((0, 1, 2))) / deviation + beta
    return x.reshape(len(x), -1) @ next(weights) + next(weights)


# --- The custom loop ---


def run_loop(monkeypatch, *flags, rate=0.0):
    """Run only the custom loop, with plain gradient descent; return (rows, results, model)."""
    made, build_model = [], script.build_model

    def watched():
        made.append(build_model())
        return made[-1]

    monkeypatch.setattr(script, "build_model", watched)
    descent = keras.optimizers.SGD(rate)
    monkeypatch.setattr(script.keras.optimizers, "Adam", lambda: descent)
    run_dir = script.pathlib.Path("run")
    run_dir.mkdir()
    args = script.parse_args(["--synthetic", *flags])
    results = {"arms": {}}
    rows = script.train(args, script.load_data(True), run_dir, results)
    return rows, results["arms"]["loop"], made[0], descent


def test_metrics_of_the_loop_equal_numpy(monkeypatch):
    """With a step of zero the network stays, so NumPy can tell what every batch gave."""
    flags = ["--epochs", "2", "--steps-per-epoch", "3", "--log-freq", "2", "--batch-size", "32"]
    rows, record, model, _ = run_loop(monkeypatch, *flags)
    keras.utils.set_random_seed(0)
    train_dataset, _ = script.mnist_datasets(script.load_data(True), 32, 0)
    losses, accuracies = [], []
    for images, labels in train_dataset.take(6):
        logits, labels = numpy_logits(images.numpy(), model), labels.numpy()
        logits -= logits.max(1, keepdims=True)
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        losses.append(-logs[np.arange(32), labels].mean())
        accuracies.append(np.mean(logits.argmax(1) == labels))
    summaries = zip((2, 4, 6), np.mean(np.reshape((losses, accuracies), (2, 3, 2)), 2).T)
    expected = [(step, *values) for step, values in summaries]
    np.testing.assert_allclose(rows, expected, rtol=1e-4)
    by_epoch = np.mean(np.reshape((losses, accuracies), (2, 2, 3)), 2)
    np.testing.assert_allclose(record["history"]["loss"], by_epoch[0], rtol=1e-4)
    np.testing.assert_allclose(record["history"][ACCURACY], by_epoch[1], rtol=1e-4)
    for tag, column in (("loss", 1), ("acc", 2)):
        written = [(row[0], pytest.approx(row[column])) for row in rows]
        assert events("run/loop", tag) == written


def test_difference_3_batch_norm_learns_its_averages(monkeypatch):
    _, _, model, _ = run_loop(monkeypatch, "--epochs", "1", "--steps-per-epoch", "3")
    train_dataset, _ = script.mnist_datasets(script.load_data(True), 64, 0)
    images = np.concatenate([images for images, _ in train_dataset.take(8)])
    pooled = keras.Sequential(model.layers[:2])(images).numpy()
    norm = model.layers[2]  # after three batches: 3 % of the way, momentum being 0.99
    weight = 1 - 0.99**3
    mean, variance = pooled.mean((0, 1, 2)), pooled.var((0, 1, 2))
    np.testing.assert_allclose(norm.moving_mean.numpy(), weight * mean, rtol=0.1, atol=1e-4)
    np.testing.assert_allclose(
        norm.moving_variance.numpy(), 1 - weight + weight * variance, rtol=1e-3
    )


def test_difference_4_compiled_counted_and_ten_batches_a_summary(monkeypatch):
    seen, loss = [], keras.losses.SparseCategoricalCrossentropy

    class Watched(loss):
        def call(self, labels, logits):
            seen.append(tf.executing_eagerly())
            return super().call(labels, logits)

    monkeypatch.setattr(script.keras.losses, "SparseCategoricalCrossentropy", Watched)
    rows, _, _, descent = run_loop(monkeypatch, "--epochs", "2", "--steps-per-epoch", "11")
    assert set(seen) == {False}
    assert len(seen) <= 2  # traced, then run 22 times
    assert int(descent.iterations.numpy()) == 22  # two more an epoch in the article
    assert [row[0] for row in rows] == [10, 20]  # and its rows at 1 and 11, anew each epoch


def test_the_loop_trains_as_fit_does(smoke_run):
    """`fit`, given the same seed, is the oracle of the loop by hand: loss, accuracy, weights."""
    run = smoke_run("metrics_summaries")
    arms = run.results["arms"]
    for metric in ("loss", ACCURACY):
        loop, fit = (arms[arm]["history"][metric] for arm in ("loop", "fit"))
        np.testing.assert_allclose(loop, fit, rtol=1e-3)
    assert arms["loop"]["final"]["test_accuracy"] == pytest.approx(
        arms["fit"]["final"][f"val_{ACCURACY}"], abs=0.01
    )
    models = [keras.models.load_model(run.folder / f"{arm}.keras") for arm in ("loop", "fit")]
    keras.utils.set_random_seed(0)
    begun = script.build_model().get_weights()
    for start_value, loop, fit in zip(begun, *(model.get_weights() for model in models)):
        # Adam makes steps of rounding where a gradient is all but zero: hence kernels, and means
        if start_value.ndim > 1:
            assert np.abs(loop - fit).mean() < 0.1 * np.abs(loop - start_value).mean()


# --- The mean, and fit with its metric layer ---


def test_difference_8_the_mean_is_written_before_its_reset(smoke_run):
    run = smoke_run("metrics_summaries")
    assert events(run.folder / "mean_metric", "mean") == [(1, 3.0)]
    lines = run.stdout.splitlines()
    assert "the mean metric after 2, 3 and 4: 3.0" in lines
    assert "the mean metric after its reset: 0.0" in lines


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


def test_kernel_deviation_of_the_run(smoke_run):
    run = smoke_run("metrics_summaries")
    history = run.results["arms"]["fit"]["history"]
    kernel = keras.models.load_model(run.folder / "fit.keras").layers[0].kernel.numpy()
    assert history[f"val_{STD}"][-1] == pytest.approx(kernel.std(), rel=1e-5)
    by_batch = events(run.folder / "fit" / "train", f"batch_{STD}")
    assert len(by_batch) == 30
    keras.utils.set_random_seed(0)
    first = script.build_model().layers[0].kernel.numpy().std()
    assert by_batch[0][1] == pytest.approx(first, rel=1e-5)


def test_difference_7_fit_starts_afresh(smoke_run):
    """The loop ends with a loss far below the one at which `fit` begins."""
    arms = smoke_run("metrics_summaries").results["arms"]
    assert arms["fit"]["history"]["loss"][0] > 3 * arms["loop"]["history"]["loss"][-1]


def test_no_epochs():
    final = script.main(["--synthetic", "--epochs", "0", "--fit-epochs", "0"])
    assert final["fit"] == {"parameters": 16074}
    assert final["loop"].keys() == {"parameters", "test_accuracy"}


def test_device_all_trains_on_two_devices(tmp_path):
    flags = ["--synthetic", "--epochs", "1", "--fit-epochs", "1", "--steps-per-epoch", "15"]
    run = helpers.run_on_two_devices("metrics_summaries", flags, tmp_path)
    history = run.results["arms"]["fit"]["history"]
    assert sorted(history) == sorted(FITTED)
    kernel = keras.models.load_model(run.folder / "fit.keras").layers[0].kernel.numpy()
    assert history[f"val_{STD}"][-1] == pytest.approx(kernel.std(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_claim_validation_accuracy(seed):
    """Five epochs of fit on the real images; the article's record is 0.0982."""
    final = script.main(["--seed", str(seed)])
    assert final["fit"][f"val_{ACCURACY}"] >= 0.97
    assert final["loop"]["test_accuracy"] >= 0.97
    (path,) = script.pathlib.Path("log").glob("*/*/results.json")
    assert json.loads(path.read_text())["complete"]
