"""What several test files compare with: networks as text and in NumPy, scripted games, data."""

import helpers
import keras
import numpy as np
import pytest

SETTINGS = "scale filters units pool_size kernel_size strides padding momentum rate activation"
NORM = "BatchNormalization True 0.99"  # scale, momentum


# --- Weights and gradients ---
def assert_same(weights, others, atol=0.0):
    """Compare two lists of arrays, by default to the last bit."""
    for one, other in zip(weights, others, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7 if atol else 0, atol=atol)


def smallest_move(weights, others):
    """Return how far the least moved of two lists of arrays has moved."""
    return min(np.abs(one - other).max() for one, other in zip(weights, others, strict=True))


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def cross_entropy(probabilities, labels):
    """Return the mean loss of probabilities (n, classes) and labels (n,)."""
    return -np.log(probabilities[np.arange(len(labels)), labels]).mean()


# --- Networks ---
def layers_as_text(model):
    """Return a line for each layer: its type, its settings, a kernel's unusual initializer."""
    lines = []
    for layer in model.layers:
        config = layer.get_config()
        settings = [str(config[name]) for name in SETTINGS.split() if name in config]
        initializer = config.get("kernel_initializer", {}).get("class_name", "GlorotUniform")
        if initializer != "GlorotUniform":
            settings.append(initializer)
        lines.append(" ".join([type(layer).__name__, *settings]))
    return lines


def check_adam(optimizer, **settings):
    """It is Keras's Adam with these settings, and of the others with the usual ones."""
    expected = keras.optimizers.Adam(**settings).get_config()
    assert optimizer.get_config() == expected | {"name": optimizer.name}


def check_classifier(model, images):
    """It is compiled with the cross-entropy, here by hand, with the accuracy, and with Adam."""
    p = model(images).numpy()
    if p.shape[1] == 1:  # the probability of class 1
        p = np.hstack([1 - p, p])
    labels = np.arange(len(images)) % p.shape[1]
    expected = [cross_entropy(p, labels), np.mean(p.argmax(axis=1) == labels)]
    assert model.evaluate(images, labels[:, None], verbose=0) == pytest.approx(expected, rel=1e-4)
    check_adam(model.optimizer)


# --- Data ---
def labels_of(dataset, count=-1):
    """Return the labels of each of a dataset's first batches."""
    return [labels.numpy().ravel().tolist() for _, labels in dataset.take(count)]


def numbered(count, *shape):
    """Return images whose every pixel is their number, and the numbers as labels."""
    numbers = np.arange(count)
    pixels = numbers.astype("uint8").reshape(-1, *[1] * len(shape))
    return np.broadcast_to(pixels, (count, *shape)), numbers


def check_shuffle(make_train_dataset, size, batch_size):
    """Images 0 to size - 1 are shuffled, not batches, and by the seed; return two passes."""

    def two_passes(seed):
        keras.utils.set_random_seed(0)
        return labels_of(make_train_dataset(seed), 2 * size // batch_size)

    batches = two_passes(0)
    assert batches == two_passes(0) != two_passes(1)
    first, second = batches[: size // batch_size], batches[size // batch_size :]
    for one_pass in (first, second):  # each pass has each image once
        assert sorted(sum(one_pass, [])) == list(range(size))
    assert not set(map(frozenset, first)) & set(map(frozenset, second))  # batch().shuffle() does
    return first, second


def check_final_numbers(script):
    """The newest run's saved models take pixels, and give its numbers of 9 and of 10 new images."""
    folder, results = helpers.newest_results(".")
    sets = [script.synthetic_photographs(n).map(script.pre_process_image) for n in (9, 10)]
    for arm, record in results["arms"].items():
        model = keras.models.load_model(folder / f"{arm}.keras")
        valid, test = [model.evaluate(images.batch(10), verbose=0) for images in sets]
        found = [record["final"][name] for name in ("val_loss", "val_accuracy", "test_accuracy")]
        assert found == pytest.approx([*valid, test[1]], rel=1e-4)


# --- CartPole ---
class Scripted:
    """Episodes of the given lengths, then of 3 steps; the states are 1, 2, 3, ..."""

    def __init__(self, *lengths, falls=True):
        self.lengths, self.falls, self.left, self.actions = iter(lengths), falls, 0, []
        self.shown = 0

    def state(self):
        self.shown += 1
        return np.full(4, self.shown, "float32")

    def reset(self, seed=None):
        self.left = next(self.lengths, 3)
        return self.state(), {}

    def step(self, action):
        assert self.left > 0, "a step after the end"
        self.actions.append(action)
        self.left -= 1
        ended = self.left == 0
        return self.state(), 1.0, ended and self.falls, ended and not self.falls, {}


# --- Q learning ---
def check_dueling(network, states, x):
    """Both streams get x, and Q is V plus the advantage over its mean of the state's actions."""
    layer = network.get_layer
    v = layer("v_out")(layer("v_dense")(x)).numpy()
    adv = layer("adv_out")(layer("adv_dense")(x)).numpy()
    expected = v + adv - adv.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(network(states), expected, rtol=1e-4, atol=1e-3)
    assert np.ptp(adv.mean(axis=1)) > 1e-2  # or the batch's mean would do as well


def train_as_the_article(network, judge, batch, optimizer, loss, gamma):
    """Take a step the article's way, targets set in NumPy, then `train_on_batch`; return its loss.

    `judge` says what the best next actions are worth: the target network, or `network` itself.
    """
    states, actions, rewards, next_states, terminals = batch
    chooser, judged = network(next_states).numpy(), judge(next_states).numpy()
    if judge is not network:
        assert (chooser.argmax(axis=1) != judged.argmax(axis=1)).any(), "it has nothing to judge"
    target_q = network(states).numpy()
    for i in range(32):
        future = 0 if terminals[i] else gamma * judged[i, chooser[i].argmax()]
        target_q[i, actions[i]] = rewards[i] + future
    network.compile(optimizer, loss)
    return network.train_on_batch(states, target_q)
