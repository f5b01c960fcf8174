"""Train a network on MNIST with variables, a gradient tape and Adam, but without a Keras model.

Article: "Python TensorFlow Tutorial - Build a Neural Network" (Adventures in Machine Learning).

TensorFlow is first used as a calculator. Then four variables and a few such operations make a
network. A gradient tape records each forward pass, and Adam changes the weights by the gradients.

    python mnist_eager_mlp.py                 # the article's ten epochs, eagerly
    python mnist_eager_mlp.py --compile       # each training step as one compiled graph
    python mnist_eager_mlp.py --synthetic     # a quick look, without a download

Result (seeds 0 to 2, eager and compiled): 97.79 to 97.95 % of the test images; article 98.00 %.

Differences from the article:
1. Images are float32 constants. The article makes variables of float64, and casts each batch.
2. Adam's update is compiled. One by one its many small operations take longer than the network.
3. `--compile` is new. The article speaks of 5,000 validation images, but Keras's MNIST has none.
4. TensorBoard's graph and curves are written. The article shows them, but not their code.
"""

# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["tensorflow>=2.20,<3", "keras>=3.10,<4", "tensorboard>=2.20,<3",
#     "numpy>=2,<3", "matplotlib>=3.9,<4"]
# ///

import argparse
import contextlib
import json
import os
import pathlib
import sys
import time

os.environ["KERAS_BACKEND"] = "tensorflow"  # even where keras.json names another one
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

SCRIPT = "mnist_eager_mlp"
MODULES = (tf, keras, np)  # results.json names their versions
ARTICLE = {"mlp": {"loss": 0.022, "test_accuracy": 0.98}}  # after ten epochs


# %% Algorithm
# TensorFlow as a calculator: operations that form a graph, and variables that can be changed.
def simple_graph(b, c, const):
    """Return a = (b + c) * (c + const). TensorBoard shows the operations with these names."""
    d = tf.add(b, c, name="d")
    e = tf.add(c, const, name="e")
    return tf.multiply(d, e, name="a")


def show_simple_example(folder):
    """Print the article's small calculations, and write their graph for TensorBoard."""
    const = tf.Variable(2.0, name="const")
    b = tf.Variable(2.0, name="b")
    c = tf.Variable(1.0, name="c")
    print(const)  # its name, shape and type, and its value as a NumPy number
    print(f"Variable a is {simple_graph(b, c, const).numpy()}")
    d = b + c  # the same in shorthand
    e = c + 2
    a = d * e
    print(f"Variable a is {a.numpy()}")
    with tf.summary.create_file_writer(str(folder / "simple_graph")).as_default():
        tf.summary.graph(tf.function(simple_graph).get_concrete_function(b, c, const).graph)

    b = tf.Variable(np.arange(0, 10), name="b")
    print(b)
    print(f"Variable a is {simple_graph(tf.cast(b, tf.float32), c, const).numpy()}")
    b[1].assign(10)  # in NumPy b[1] = 10; then a is computed again
    print(f"Variable a is {simple_graph(tf.cast(b, tf.float32), c, const).numpy()}")
    b[6:9].assign([10, 10, 10])
    print(f"Variable a is {simple_graph(tf.cast(b, tf.float32), c, const).numpy()}")
    f = b[2:5]  # a new tensor
    print(f"The slice b[2:5] is {f.numpy()}")


# %% Data
# MNIST holds 70,000 handwritten digits, in grey, of 28 x 28 pixels.
def load_data(synthetic):
    """Return (images, labels) to train and to test: (n, 28, 28) and (n,), both uint8."""
    if not synthetic:
        folder = os.environ.get("KERAS_HOME", "~/.keras")
        print(f"MNIST (11 MB) is fetched once, to {folder}/datasets; --synthetic needs no network")
        return keras.datasets.mnist.load_data()
    rng = np.random.default_rng(0)  # each of ten classes is a pattern of 4 x 4 squares, plus noise
    patterns = rng.uniform(0, 128, (10, 4, 4)).repeat(7, axis=1).repeat(7, axis=2)
    labels = rng.integers(0, 10, 2500, "uint8")
    images = np.uint8(patterns[labels] + rng.uniform(0, 127, (2500, 28, 28)))
    return (images[:2000], labels[:2000]), (images[2000:], labels[2000:])


def get_batch(x_data, y_data, batch_size):
    """Draw images (batch_size, 28, 28) and labels, some twice: an epoch misses 37 %, exp(-1)."""
    idxs = np.random.randint(0, len(y_data), batch_size)
    return x_data[idxs], y_data[idxs]


# %% Model
# The network is a function of its input and of four variables. There is no Keras model.
def build_model():
    """Return the variables [W1, b1, W2, b2]; the biases are drawn with standard deviation 1."""
    W1 = tf.Variable(tf.random.normal([784, 300], stddev=0.03), name="W1")
    b1 = tf.Variable(tf.random.normal([300]), name="b1")
    W2 = tf.Variable(tf.random.normal([300, 10], stddev=0.03), name="W2")
    b2 = tf.Variable(tf.random.normal([10]), name="b2")
    return [W1, b1, W2, b2]


def nn_model(x_input, W1, b1, W2, b2):
    """Return the logits (batch, 10) of images (batch, 28, 28), which must be float32."""
    x_input = tf.reshape(x_input, (x_input.shape[0], -1))  # (batch, 784)
    x = tf.add(tf.matmul(x_input, W1), b1)
    x = tf.nn.relu(x)  # (batch, 300)
    return tf.add(tf.matmul(x, W2), b2)


def loss_fn(logits, labels):
    """Return the mean cross-entropy of the softmax of logits (batch, 10) and one-hot labels."""
    cross_entropy = tf.nn.softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    return tf.reduce_mean(cross_entropy)


# %% Training
# A step is a forward pass on the tape, its gradients, and Adam's update. An epoch has 600 steps.
def train_step(batch_x, batch_y, weights, update):
    """Train on images (batch, 28, 28) and labels (batch,); return the loss before the update."""
    batch_y = tf.one_hot(batch_y, 10)  # label 1 becomes 0, 1, 0, 0, 0, 0, 0, 0, 0, 0
    with tf.GradientTape() as tape:  # remembers the operations that follow
        logits = nn_model(batch_x, *weights)
        loss = loss_fn(logits, batch_y)
    gradients = tape.gradient(loss, weights)
    update(gradients)
    return loss


def train(run, x_train, y_train, x_test, y_test):
    """Train the network, and test it after each epoch; return its weights."""
    args = run.args
    x_train = np.float32(x_train) / 255
    x_test = tf.constant(np.float32(x_test) / 255)
    keras.utils.set_random_seed(args.seed)
    weights = build_model()
    optimizer = keras.optimizers.Adam()
    optimizer.build(weights)  # compiled code cannot make its variables
    update = tf.function(lambda gradients: optimizer.apply_gradients(zip(gradients, weights)))
    step = tf.function(train_step, jit_compile=True) if args.compile else train_step
    writer = tf.summary.create_file_writer(str(run.events / "mlp"))
    total_batch = args.steps_per_epoch or max(1, len(y_train) // args.batch_size)
    for epoch in range(1, args.epochs + 1):
        avg_loss = 0.0
        for _ in range(total_batch):
            batch_x, batch_y = get_batch(x_train, y_train, args.batch_size)
            loss = step(tf.constant(batch_x), tf.constant(batch_y), weights, update)
            avg_loss += loss / total_batch
        test_logits = nn_model(x_test, *weights)
        max_idxs = tf.argmax(test_logits, axis=1)  # the digits that the network sees
        test_acc = np.mean(max_idxs.numpy() == y_test)
        print(f"Epoch: {epoch}, loss={avg_loss:.3f}, test set accuracy={100 * test_acc:.3f}%")
        run.record("mlp", epoch, {"loss": float(avg_loss), "accuracy": float(test_acc)})
        with writer.as_default(step=epoch):
            tf.summary.scalar("loss", avg_loss)
            tf.summary.scalar("accuracy", test_acc)
    print("Training complete!")
    run.conclude("mlp", {"loss": float(avg_loss), "test_accuracy": float(test_acc)})
    return weights


# %% Figures
# The article's picture from TensorBoard: accuracy by epoch.
def plot(run):
    """Draw the accuracy on the test images by epoch."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(range(1, run.args.epochs + 1), run.records["mlp"]["history"]["accuracy"], "o-")
    axes.set(title=run.results["data"], xlabel="epoch", ylabel="test set accuracy")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(run.folder / "accuracy.png")


# %% Command line
def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers."""
    parser = make_parser("--epochs", default=10)
    add = parser.add_argument
    add("--steps-per-epoch", type=int, help="batches per epoch; if not given, images // batch size")
    add("--synthetic", action="store_true", help="use small made-up data: nothing is downloaded")
    add("--batch-size", type=int, default=100, help="images per batch")
    add("--compile", action="store_true", help="run each training step as one compiled graph")
    args = parse_flags(parser, argv)
    (x_train, y_train), (x_test, y_test) = load_data(args.synthetic)
    run = Run(args, "synthetic" if args.synthetic else "MNIST")
    show_simple_example(run.events)
    W1, b1, W2, b2 = train(run, x_train, y_train, x_test, y_test)
    path = f"{run.folder.as_posix()}/mlp.npz"
    np.savez(path, W1=W1, b1=b1, W2=W2, b2=b2)
    plot(run)
    return run.report("import numpy as np", f'W1, b1, W2, b2 = np.load("{path}").values()')


# %% Frame: flags, run folder and results; the same text in every script
def make_parser(*names, default, devices=("auto", "cpu", "gpu")):
    """Return a parser with the flags of every script; `names` are the names of the first flag."""
    lines = str(__doc__).splitlines()
    parser = argparse.ArgumentParser(description=lines[0], allow_abbrev=False)
    parser.epilog = "; ".join(line.split("#")[0].strip() for line in lines if "   python" in line)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    add = parser.add_argument
    add(*names, type=int, default=default, help=f"{names[-1][2:]} of each training")
    add("--device", choices=devices, default="auto", help="auto is a GPU where there is one")
    add("--logdir", type=os.path.expanduser, default="log", help="each run makes a folder in it")
    add("--seed", type=int, default=0, help="seed of all random numbers")
    return parser


def parse_flags(parser, argv):
    """Return the flags `argv`; None means those of the command line, or no flags in a notebook."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - pythonw has none
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's output has no such method
        sys.stdout.reconfigure(line_buffering=True)
    if argv is None and sys.argv[0].endswith(("kernel_launcher.py", "ipykernel/__main__.py")):
        argv = []
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:
        raise SystemExit(end.code) from None  # Colab's IPython cannot show an error within an error
    for name, value in vars(args).items():
        least = 1 if type(value) is int and name != "seed" else 0
        if value == "" or (type(value) in (int, float) and not least <= value < 2**32):
            parser.error(f"argument --{name.replace('_', '-')}: {value!r} is not allowed")
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    gpus = [] if args.device == "cpu" else tf.config.list_physical_devices("GPU")
    if args.device == "gpu" and not gpus:
        parser.error("argument --device: TensorFlow finds no GPU; use auto or cpu")
    with contextlib.suppress(RuntimeError):  # TensorFlow has already started in this process
        tf.config.set_visible_devices(gpus, "GPU")
        return args
    parser.error(f"argument --device: too late for {args.device}; restart Python first")


class Run:
    """A run, new or going on with an `earlier` one: its flags, folder and results.json."""

    def __init__(self, args, data, earlier=None):
        name = time.strftime("%Y%m%d-%H%M%S") + "-synthetic" * (data == "synthetic")
        self.args = args
        self.folder = pathlib.Path(args.logdir, SCRIPT, name)
        while self.folder.exists():  # two runs may start in one second
            self.folder = self.folder.with_name(f"{self.folder.name}-2")
        if earlier:
            self.folder = pathlib.Path(args.resume)
        self.events = self.folder / f"resumed-{name}" if earlier else self.folder  # TensorBoard's
        device = ", ".join(gpu.name for gpu in tf.config.get_visible_devices("GPU")) or "CPU"
        self.results = {"script": SCRIPT, "config": vars(args), "device": device, "data": data}
        self.results["versions"] = {module.__name__: module.__version__ for module in MODULES}
        self.results["article"] = {} if data == "synthetic" else ARTICLE
        self.results["arms"] = earlier["arms"] if earlier else {}
        self.records = self.results["arms"]  # {arm: what record() and conclude() fill}
        self.clock = time.perf_counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write()
        print(f"{SCRIPT} on {data}, device {device}, writes to {self.folder.as_posix()}")

    def record(self, arm, epoch, metrics):
        """Keep the metrics of an epoch, counted from 1; a repeated one replaces its record."""
        record = self.records.setdefault(arm, {"history": {}, "final": {}, "seconds": 0.0})
        for metric, value in metrics.items():
            record["history"].setdefault(metric, [])[epoch - 1 :] = [value]
        record["seconds"] += time.perf_counter() - self.clock
        self.clock = time.perf_counter()
        if self.clock > self.written + 1:
            self.write()

    def conclude(self, arm, numbers):
        """Keep final numbers of an arm."""
        self.records[arm]["final"].update(numbers)
        self.write()

    def write(self, complete=False):
        """Write results.json beside the old one and rename it, so that it is never half written."""
        text = json.dumps(self.results | {"complete": complete}, indent=1)
        (self.folder / "results.tmp").write_text(text)
        os.replace(self.folder / "results.tmp", self.folder / "results.json")
        self.written = time.perf_counter()

    def report(self, *lines):
        """Print the final numbers, the figures, and lines to paste; return the final numbers."""
        self.write(complete=True)
        print(f"\n{'arm':<16}{'metric':<34}{'here':>14}{'article':>14}")
        for arm, record in self.results["arms"].items():
            article = self.results["article"].get(arm, {})
            for metric, value in record["final"].items():
                form = "," if isinstance(value, int) else ",.4g"
                here = "never" if value is None else format(value, form)
                print(f"{arm:<16}{metric:<34}{here:>14}{article.get(metric, '-'):>14}")
        print(*sorted(path.as_posix() for path in self.folder.glob("*.[gp]*")), "", sep="\n")
        name = keras.__name__
        for path in sorted(self.folder.glob("*.keras")):
            print(f'import {name}; model = {name}.models.load_model("{path.as_posix()}")')
        print(*lines, f'tensorboard --logdir "{self.folder.as_posix()}"', sep="\n")
        return {arm: record["final"] for arm, record in self.results["arms"].items()}


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if isinstance(error, OSError) or type(error) is Exception:  # Keras, if a download fails
            raise SystemExit(f"error: {type(error).__name__}: {error}") from None
        raise
