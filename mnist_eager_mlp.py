"""Train a three-layer network on MNIST by hand: variables, a gradient tape and Adam, nothing else.

Article: "Python TensorFlow Tutorial - Build a Neural Network" (Adventures in Machine Learning).

TensorFlow first shows itself as a calculator whose formulas are graphs of operations. The same
operations then make a network of 784, 300 and 10 nodes, whose weights are four variables; a
gradient tape records each forward pass, and the gradients it returns move the weights.

    python mnist_eager_mlp.py                 # the article's ten epochs, eagerly
    python mnist_eager_mlp.py --compile       # the same step as one compiled graph
    python mnist_eager_mlp.py --synthetic     # no download

Measured, seeds 0, 1, 2, eager and compiled: 97.79 to 97.95 % of the test images; article: 98.00.

Differences from the article:
1. Images are scaled to float32 once. The article keeps them in float64, copies each batch into a
   new `tf.Variable` and casts it there.
2. Adam's update, a few dozen tiny operations a variable, runs as a compiled function: eagerly it
   costs more than the network. Forward pass, tape and gradient stay eager.
3. The test images are a constant: nothing ever assigns to the article's variable.
4. `--compile` is new: the article's whole step, traced once and compiled.
Kept although unusual: batches are drawn with replacement, so that an epoch of 60,000 // 100 batches
misses about a third of the images (exp(-1) = 37 %); biases start with a standard deviation of 1.
The article speaks of 5,000 validation images; MNIST has none, the accuracy is on its test images.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "tensorflow>=2.20,<3", "keras>=3.10,<4", "tensorboard>=2.20,<3",
#     "numpy>=2,<3", "matplotlib>=3.9,<4",
# ]
# ///

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import sys
import time

import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

# --- Constants ---

SCRIPT = "mnist_eager_mlp"
PACKAGES = ("tensorflow", "keras", "numpy")
ARTICLE = {"mlp": {"loss": 0.022, "test_accuracy": 0.98}}
NUM_CLASSES = 10
VERBOSE = 1 if sys.stdout.isatty() or "ipykernel" in sys.modules else 2  # a bar, or plain lines
HIDDEN_SIZE = 300
WEIGHT_STDDEV = 0.03

# --- Command line ---


def build_parser():
    """Return the parser of this script's flags."""
    style = argparse.ArgumentDefaultsHelpFormatter
    first_line = str(__doc__).partition("\n")[0]
    parser = OneLineParser(description=first_line, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--epochs", type=number(int, 0), default=10, help="how often to go through the data")
    add("--device", default="auto", help="auto, cpu, gpu or gpu:N")
    add("--logdir", default="log", help="where each run makes a folder of its own")
    add("--seed", type=number(int, 0), default=0, help="seed of all random numbers")
    add("--steps-per-epoch", type=number(int, 1), default=600, help="batches an epoch")
    add("--synthetic", action="store_true", help="use small made-up data: nothing is downloaded")
    add("--batch-size", type=number(int, 1), default=100, help="images a batch")
    add("--compile", action="store_true", help="run each training step as one compiled graph")
    return parser


def parse_args(argv):
    """Parse `argv` strictly; None stands for the command line, in a notebook cell for no flags."""
    if argv is None and "__file__" not in globals():
        argv = []  # there sys.argv belongs to the kernel
    return build_parser().parse_args(argv)


# --- Shared helpers: the same text in every script that has them ---


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports a bad flag in one line and exits with code 2."""

    def error(self, message):
        self.exit(2, f"error: {message}; see --help\n")


def number(kind, low, high=2**31 - 1):
    """Return an argparse type: an int or float (`kind`) from `low` to `high`, both included."""

    def number(text):  # argparse takes "invalid number value" from this name
        if not low <= kind(text) <= high:  # nan is refused too
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    return number


def select_device(device, several=False):
    """Let TensorFlow see only the device of --device ("all" if `several`); return its name."""
    gpus = tf.config.list_physical_devices("GPU")
    choices = {"auto": gpus[:1], "cpu": []} | {f"gpu:{i}": [gpu] for i, gpu in enumerate(gpus)}
    choices |= {"all": gpus} if several else {}
    chosen = choices.get("gpu:0" if device == "gpu" else device)
    if chosen is None:
        build_parser().error(f"argument --device: {device} is not one of {', '.join(choices)} here")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    try:
        tf.config.set_visible_devices(chosen, "GPU")
    except RuntimeError:  # TensorFlow has started in this process
        build_parser().error(f"argument --device: too late for {device}; restart Python first")
    return ", ".join(gpu.name.removeprefix("/physical_device:") for gpu in chosen) or "CPU"


def new_run_dir(args, data, device):
    """Make the folder of this run, <logdir>/<script>/<time>; return it and the results so far."""
    name = time.strftime("%Y%m%d-%H%M%S") + ("-synthetic" if data == "synthetic" else "")
    for count in itertools.count():  # two runs may start in the same second
        run_dir = pathlib.Path(args.logdir, SCRIPT, f"{name}-{count}" if count else name)
        with contextlib.suppress(FileExistsError):
            run_dir.mkdir(parents=True)
            break
    results = {"script": SCRIPT, "config": vars(args), "device": device, "data": data, "arms": {}}
    results["versions"] = {package: importlib.metadata.version(package) for package in PACKAGES}
    results |= {"article": {} if data == "synthetic" else ARTICLE, "complete": False}
    write_results(run_dir, results)
    print(f"{SCRIPT} on {data}, device {device}, writes to {run_dir}")
    return run_dir, results


def write_results(run_dir, results):
    """Replace results.json in one step; keep it, and raise FloatingPointError, for nan or inf."""
    try:
        text = json.dumps(results, indent=1, allow_nan=False)
    except ValueError:
        raise FloatingPointError("the loss is not finite; try another --seed") from None
    temporary = run_dir / "results.json.tmp"
    temporary.write_text(text)
    os.replace(temporary, run_dir / "results.json")


def save_figure(figure, path):
    """Save a figure as PNG; show it too where this runs in a notebook."""
    figure.savefig(path, dpi=100)
    if "inline" in plt.get_backend():
        plt.show()
    plt.close(figure)


def report(run_dir, results):
    """Print the final values beside the article's, the files, and how to see the events."""
    print(f"\n{SCRIPT} on {results['data']}, epochs: {results['config']['epochs']}")
    print(f"{'arm':<16}{'metric':<32}{'here':>12}{'article':>12}{'spread':>12}")
    for arm, record in results["arms"].items():
        final, article = record["final"], results["article"].get(arm, {})
        for metric in final | article:
            values = final.get(metric), article.get(metric), record.get("spread", {}).get(metric)
            cells = ("-" if value is None else f"{round(value, 4):,}" for value in values)
            print("{:<16}{:<32}{:>12}{:>12}{:>12}".format(arm, metric, *cells))
    print(*sorted(map(str, run_dir.glob("*.*"))), f"tensorboard --logdir {run_dir}", sep="\n")


def run_as_command(main):
    """Call `main`; a fault that can be foreseen ends in one line and an exit code."""
    try:
        return main()
    except (KeyboardInterrupt, SystemError):  # C code makes the second of the first
        code, message = 130, "interrupted: what had been finished is in the run's folder"
    except (OSError, FloatingPointError, tf.errors.ResourceExhaustedError) as error:
        reason = str(error).split("}} ")[-1].partition("\n")[0]  # TensorFlow's begin with {{...}}
        ours = not error.args[1:] and not hasattr(error, "op")
        code, message = 1, f"error: {reason}" + ("" if ours else "; see to that path and its disk")
    print(message, file=sys.stderr)
    if "__file__" in globals():  # a notebook's kernel stays usable
        sys.exit(code)


# --- Data ---


def synthetic_images(count, shape, seed):
    """Make images (count, *shape) and labels (count,), uint8: each class a pattern under noise."""
    patterns = np.random.default_rng(0).uniform(size=(NUM_CLASSES, 4, 4, *shape[2:]))
    patterns = patterns.repeat(shape[0] // 4, axis=1).repeat(shape[1] // 4, axis=2)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, NUM_CLASSES, count, dtype="uint8")
    images = 0.5 * patterns[labels] + 0.5 * rng.uniform(size=(count, *shape))
    return (255 * images).astype("uint8"), labels


def load_data(synthetic):
    """Return ((x_train, y_train), (x_test, y_test)): images (n, 28, 28) and labels (n,), uint8.

    Raises OSError where MNIST can be neither found nor fetched, or its file is damaged.
    """
    if synthetic:
        return synthetic_images(2000, (28, 28), seed=1), synthetic_images(500, (28, 28), seed=2)
    try:
        return keras.datasets.mnist.load_data()
    except Exception as error:  # Keras raises a plain Exception where a download fails
        reason = str(error).partition("\n")[0]
        advice = "put a good mnist.npz into ~/.keras/datasets, or use --synthetic"
        raise OSError(f"MNIST cannot be loaded ({reason}); {advice}") from None


def get_batch(x_data, y_data, batch_size):
    """Draw a batch at random, with replacement.

    Returns images (batch_size, 28, 28) and labels (batch_size,).
    """
    idxs = np.random.randint(0, len(y_data), batch_size)
    return x_data[idxs], y_data[idxs]


# --- Model ---


def build_model():
    """Return the variables [W1, b1, W2, b2] of the network, drawn as in the article."""
    W1 = tf.Variable(tf.random.normal([784, HIDDEN_SIZE], stddev=WEIGHT_STDDEV), name="W1")
    b1 = tf.Variable(tf.random.normal([HIDDEN_SIZE]), name="b1")
    W2 = tf.Variable(tf.random.normal([HIDDEN_SIZE, NUM_CLASSES], stddev=WEIGHT_STDDEV), name="W2")
    b2 = tf.Variable(tf.random.normal([NUM_CLASSES]), name="b2")
    return [W1, b1, W2, b2]


# --- Algorithm ---


def simple_graph(b, c):
    """Return a = (b + c) * (c + 2) for tensors or variables of one shape, or scalars."""
    d = tf.cast(b, tf.float32) + c  # TensorFlow never casts on its own
    e = c + 2
    return d * e


def show_simple_graph(run_dir):
    """Print the article's small calculations, and write their graph to TensorBoard."""
    b, c = tf.Variable(2.0, name="b"), tf.Variable(1.0, name="c")
    print(f"Variable a is {simple_graph(b, c).numpy()}")
    with tf.summary.create_file_writer(str(run_dir / "simple_graph")).as_default():
        tf.summary.graph(tf.function(simple_graph).get_concrete_function(b, c).graph)

    b = tf.Variable(np.arange(0, 10), name="b")
    print(f"Variable a is {simple_graph(b, c).numpy()}")
    b[1].assign(10)  # a tensor is constant, but a slice of a variable can be assigned to
    print(f"with b[1] = 10: {simple_graph(b, c).numpy()}")
    b[6:9].assign([10, 10, 10])
    print(f"with b[6:9] = 10: {simple_graph(b, c).numpy()}; the slice b[2:5] is {b[2:5].numpy()}")


def nn_model(x_input, W1, b1, W2, b2):
    """Return the logits (batch, 10) of float32 images (batch, 28, 28): relu(x W1 + b1) W2 + b2."""
    x_input = tf.reshape(x_input, (x_input.shape[0], -1))  # (batch, 784)
    x = tf.nn.relu(tf.matmul(x_input, W1) + b1)  # (batch, 300)
    return tf.matmul(x, W2) + b2


def loss_fn(logits, labels):
    """Return the mean cross-entropy, in nats, of logits (batch, 10) to one-hot labels."""
    return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(labels=labels, logits=logits))


def train_step(batch_x, batch_y, weights, apply_gradients):
    """Move the weights one step down the gradient; return the batch's loss before it.

    `batch_x`: (batch, 28, 28) float32; `batch_y`: (batch,) integers; article, section 3.1.
    """
    with tf.GradientTape() as tape:  # remembers the operations inside, for the gradient
        logits = nn_model(batch_x, *weights)
        loss = loss_fn(logits, tf.one_hot(batch_y, NUM_CLASSES))
    apply_gradients(tape.gradient(loss, weights))
    return loss


def test_set_accuracy(x_test, y_test, weights):
    """Return the share of images (n, 28, 28) whose largest logit is at their label (n,)."""
    max_idxs = tf.argmax(nn_model(x_test, *weights), axis=1)
    return float(np.mean(max_idxs.numpy() == y_test))


# --- Training ---


def train(args, data, run_dir, results):
    """Train the network, record every epoch, and save the weights as mlp.npz."""
    (x_train, y_train), (x_test, y_test) = data
    x_train, x_test = np.float32(x_train) / 255, tf.constant(np.float32(x_test) / 255)
    keras.utils.set_random_seed(args.seed)
    weights = build_model()
    optimizer = keras.optimizers.Adam()
    optimizer.build(weights)  # its moments must exist before a graph is traced
    apply_gradients = tf.function(optimizer.apply)
    step = tf.function(train_step, jit_compile=True) if args.compile else train_step
    history = {"loss": [], "accuracy": []}
    record = {"history": history, "final": {}, "seconds": 0.0}
    results["arms"]["mlp"] = record
    with tf.summary.create_file_writer(str(run_dir / "mlp")).as_default():
        for epoch in range(args.epochs):
            start = time.perf_counter()
            avg_loss = 0.0
            progress = keras.utils.Progbar(args.steps_per_epoch, verbose=VERBOSE % 2)
            for i in range(args.steps_per_epoch):
                batch_x, batch_y = get_batch(x_train, y_train, args.batch_size)
                loss = step(tf.constant(batch_x), tf.constant(batch_y), weights, apply_gradients)
                avg_loss += loss / args.steps_per_epoch
                progress.update(i + 1)
            history["loss"].append(float(avg_loss))
            history["accuracy"].append(test_set_accuracy(x_test, y_test, weights))
            record["seconds"] += time.perf_counter() - start
            write_results(run_dir, results)
            for tag, values in history.items():
                tf.summary.scalar(tag, values[-1], step=epoch + 1)
            accuracy = 100 * history["accuracy"][-1]
            print(f"Epoch: {epoch + 1}, loss={avg_loss:.3f}, test set accuracy={accuracy:.3f}%")
    record["final"] = {"loss": history["loss"][-1]} if history["loss"] else {}
    record["final"]["test_accuracy"] = test_set_accuracy(x_test, y_test, weights)
    record["final"]["parameters"] = sum(int(tf.size(weight)) for weight in weights)
    np.savez(
        run_dir / "mlp.npz", **{weight.name.split(":")[0]: weight.numpy() for weight in weights}
    )


# --- Plots ---


def plot(run_dir, results):
    """Draw the test accuracy over the epochs, as the article's TensorBoard picture does."""
    accuracy = results["arms"]["mlp"]["history"]["accuracy"]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(range(1, len(accuracy) + 1), [100 * value for value in accuracy], "o-")
    axes.set(xlabel="epoch", ylabel="test set accuracy (%)")
    axes.set_title(f"A network of 784-300-10 nodes on {results['data']}")
    axes.grid(alpha=0.3)
    save_figure(figure, run_dir / "accuracy.png")


# --- Main ---


def main(argv=None):
    """Run the script with the flags `argv`; return its final numbers."""
    args = parse_args(argv)
    device = select_device(args.device)
    run_dir, results = new_run_dir(args, "synthetic" if args.synthetic else "MNIST", device)
    data = load_data(args.synthetic)
    show_simple_graph(run_dir)
    train(args, data, run_dir, results)
    plot(run_dir, results)
    results["complete"] = True
    write_results(run_dir, results)
    report(run_dir, results)
    return results["arms"]["mlp"]["final"]


if __name__ == "__main__":
    run_as_command(main)
