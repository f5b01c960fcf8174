"""mnist_eager_mlp.py against NumPy, and each of its differences from the article."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import Case

import mnist_eager_mlp as script

CASE = Case(
    tiny=["--synthetic", "--epochs", "2", "--steps-per-epoch", "30"],
    final_epochs={"mlp": 2},
    history={"mlp": ["loss", "accuracy"]},
    events={"mlp": {"scalars": {"loss", "accuracy"}}, "simple_graph": {"graph": True}},
    figures=["accuracy.png"],
    started="Epoch: 1",
    again="Epoch: 2",
    bad_flags=[["--steps-per-epoch", "0"], ["--batch-size", "0"], ["--device", "all"]],
)


def one_hot(labels):
    return np.eye(10)[labels]


def numpy_step(images, labels, weights, moments, step):
    """One step of Adam on the network, in float64: forward, gradient and update by hand."""
    W1, b1, W2, b2 = weights
    x = images.reshape(len(images), -1).astype("float64")
    hidden = np.maximum(x @ W1 + b1, 0)
    logits = hidden @ W2 + b2
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = shifted / shifted.sum(1, keepdims=True)
    loss = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
    d_logits = (probabilities - one_hot(labels)) / len(labels)
    d_hidden = (d_logits @ W2.T) * (hidden > 0)
    gradients = [x.T @ d_hidden, d_hidden.sum(0), hidden.T @ d_logits, d_logits.sum(0)]
    new_weights, new_moments = [], []
    for weight, gradient, (m, v) in zip(weights, gradients, moments):
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        # the paper's faster form, which Keras uses: epsilon is not corrected for the start
        rate = 0.001 * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        new_weights.append(weight - rate * m / (np.sqrt(v) + 1e-7))
        new_moments.append((m, v))
    return loss, new_weights, new_moments


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compile"])
def test_training_steps_equal_numpy(compiled):
    script.keras.utils.set_random_seed(3)
    weights = script.build_model()
    expected = [weight.numpy().astype("float64") for weight in weights]
    moments = [(np.zeros_like(w), np.zeros_like(w)) for w in expected]
    optimizer = script.keras.optimizers.Adam()
    optimizer.build(weights)
    update = tf.function(optimizer.apply)
    step = tf.function(script.train_step, jit_compile=True) if compiled else script.train_step
    rng = np.random.default_rng(0)
    for i in range(1, 6):
        images = rng.uniform(size=(8, 28, 28)).astype("float32")
        labels = rng.integers(0, 10, 8)
        loss = step(tf.constant(images), tf.constant(labels), weights, update)
        expected_loss, expected, moments = numpy_step(images, labels, expected, moments, i)
        assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
        # Adam divides a gradient by its own size: where it is all but zero, rounding shows
        for weight, value in zip(weights, expected):
            assert np.abs(weight.numpy() - value).max() < 2e-5 * i


def test_loss_by_hand():
    logits = tf.constant([[0.0] * 10, [100.0] + [0.0] * 9])
    labels = tf.one_hot([4, 0], 10)
    assert float(script.loss_fn(logits, labels)) == pytest.approx(np.log(10) / 2)


def test_initial_weights():
    script.keras.utils.set_random_seed(0)
    W1, b1, W2, b2 = script.build_model()
    assert [w.shape.as_list() for w in (W1, b1, W2, b2)] == [[784, 300], [300], [300, 10], [10]]
    assert np.std(W1.numpy()) == pytest.approx(0.03, rel=0.02)
    assert np.std(W2.numpy()) == pytest.approx(0.03, rel=0.1)
    assert np.std(b1.numpy()) == pytest.approx(1.0, rel=0.15)


def test_simple_graph_by_hand(tmp_path, capsys):
    assert float(script.simple_graph(tf.Variable(2.0), tf.Variable(1.0))) == 9.0
    script.show_simple_graph(tmp_path)
    numbers = capsys.readouterr().out.replace(".", "").split("\n")
    assert numbers[0].endswith(" 90")
    assert "[ 3  6  9 12 15 18 21 24 27 30]" in numbers[1]
    assert "[ 3 33  9 12 15 18 21 24 27 30]" in numbers[2]
    assert "[ 3 33  9 12 15 18 33 33 33 30]" in numbers[3]
    assert "[2 3 4]" in numbers[3]


def test_get_batch_draws_pairs_with_replacement():
    np.random.seed(0)
    x, y = np.arange(50.0).reshape(50, 1, 1), np.arange(50)
    batch_x, batch_y = script.get_batch(x, y, 2000)
    assert np.array_equal(batch_x[:, 0, 0], batch_y)
    assert np.bincount(batch_y, minlength=50).min() > 15
    # 60,000 draws from 60,000 leave exp(-1) of them out
    batch_y = script.get_batch(np.zeros(60000), np.arange(60000), 60000)[1]
    assert 1 - len(np.unique(batch_y)) / 60000 == pytest.approx(np.exp(-1), abs=0.01)


class Watch:
    """Record what training hands to the network: dtypes, kinds, and whether it runs eagerly."""

    def __init__(self, monkeypatch):
        self.seen = []
        nn_model = script.nn_model

        def watched(x_input, *weights):
            self.seen.append((type(x_input), x_input.dtype, tf.executing_eagerly(), x_input.shape))
            return nn_model(x_input, *weights)

        monkeypatch.setattr(script, "nn_model", watched)


FLAGS = ["--synthetic", "--epochs", "1", "--steps-per-epoch", "3"]


def test_differences_1_and_3_one_cast_and_constants(monkeypatch):
    watch, get_batch, drawn = Watch(monkeypatch), script.get_batch, []
    monkeypatch.setattr(script, "get_batch", lambda *a: drawn.append(get_batch(*a)) or drawn[-1])
    script.main(FLAGS)
    assert {batch_x.dtype for batch_x, _ in drawn} == {np.dtype("float32")}
    assert {dtype for _, dtype, _, _ in watch.seen} == {tf.float32}
    assert not any(issubclass(kind, tf.Variable) for kind, _, _, _ in watch.seen)


def test_differences_2_and_4_eager_network_compiled_update(monkeypatch):
    watch = Watch(monkeypatch)
    eager_updates = []
    adam = script.keras.optimizers.Adam
    apply = adam.apply

    def watched(self, gradients, trainable_variables=None):
        eager_updates.append(tf.executing_eagerly())
        return apply(self, gradients, trainable_variables)

    monkeypatch.setattr(adam, "apply", watched)
    script.main(FLAGS)
    assert [eager for _, _, eager, shape in watch.seen if shape[0] == 100] == [True] * 3
    assert eager_updates == [False]  # traced once, for all steps
    watch.seen.clear()
    script.main([*FLAGS, "--compile"])
    assert [eager for _, _, eager, shape in watch.seen if shape[0] == 100] == [False]


def test_weights_move_and_learn(smoke_run):
    run = smoke_run("mnist_eager_mlp")
    script.keras.utils.set_random_seed(0)
    saved = np.load(run.folder / "mlp.npz")
    for weight, name in zip(script.build_model(), ["W1", "b1", "W2", "b2"]):
        assert np.abs(saved[name] - weight.numpy()).max() > 1e-3
    history = run.results["arms"]["mlp"]["history"]
    assert history["accuracy"][-1] > 0.9  # ten classes
    assert history["loss"][1] < history["loss"][0]


def test_eager_and_compiled_runs_agree():
    flags = ["--synthetic", "--epochs", "1", "--steps-per-epoch", "20"]
    eager, compiled = script.main(flags), script.main([*flags, "--compile"])
    assert eager["loss"] == pytest.approx(compiled["loss"], abs=1e-3)


def test_no_epochs():
    assert script.main(["--synthetic", "--epochs", "0"])["parameters"] == 238510
