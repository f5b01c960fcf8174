"""Train a network on MNIST with variables, a gradient tape and Adam, but without a Keras model.

Article: "Python TensorFlow Tutorial - Build a Neural Network" (Adventures in Machine Learning).

TensorFlow is first used as a calculator. Then four variables and a few such operations make a
network. A gradient tape records each forward pass, and Adam changes the weights by the gradients.

    python mnist_eager_mlp.py                 # the article's ten epochs, eagerly
    python mnist_eager_mlp.py --compile       # the same step as one compiled graph
    python mnist_eager_mlp.py --synthetic     # a quick look, without a download

Result (seeds 0 to 2, eager and compiled): 97.79 to 97.95 % of the test images; article 98.00 %.

Differences from the article:
1. Images become float32 once. The article makes each batch a variable and casts it: that is slow.
2. Adam's update always runs as a compiled function: eagerly it would take longer than the network.
3. The test images are a constant. The article makes them a variable, but never changes them.
4. `--compile` is new: it compiles the article's whole training step.
The article mentions 5,000 validation images. Keras's MNIST has none: the test images are used.
"""

# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["tensorflow>=2.20,<3", "keras>=3.10,<4", "tensorboard>=2.20,<3",
#     "numpy>=2,<3", "matplotlib>=3.9,<4"]
# ///

import argparse
import functools
import json
import os
import pathlib
import sys
import time

os.environ["KERAS_BACKEND"] = "tensorflow"  # even where keras.json names another one
if "ipykernel" not in sys.modules:
    os.environ["MPLBACKEND"] = "agg"  # only a notebook shows figures
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

SCRIPT = "mnist_eager_mlp"
MODULES = (tf, keras, np)  # results.json names their versions
FIRST = {"first_loss": 0.317, "first_test_accuracy": 0.9435}  # after one epoch
ARTICLE = {"mlp": FIRST | {"loss": 0.022, "test_accuracy": 0.98}}  # after ten


# --- Algorithm ---
# TensorFlow as a calculator: a graph of three operations, and variables that can be changed.
def simple_graph(b, c, const):
    """Return a = (b + c) * (c + const). The names appear in the graph that TensorBoard shows."""
    d = tf.add(b, c, name="d")
    e = tf.add(c, const, name="e")
    return tf.multiply(d, e, name="a")


def show_simple_example(folder):
    """Print the article's small calculations, and write their graph to TensorBoard."""
    const = tf.Variable(2.0, name="const")
    b = tf.Variable(2.0, name="b")
    c = tf.Variable(1.0, name="c")
    print(const)  # its name, shape and type, and its value as a NumPy number
    print(f"Variable a is {simple_graph(b, c, const).numpy()}")
    graph = tf.function(simple_graph).get_concrete_function(b, c, const).graph
    with tf.summary.create_file_writer(str(folder / "simple_graph")).as_default():
        tf.summary.graph(graph)

    b = tf.Variable(np.arange(0, 10), name="b")
    print(b)  # integers: TensorFlow adds them to the float c only after a cast
    print(f"Variable a is {simple_graph(tf.cast(b, tf.float32), c, const).numpy()}")
    b[1].assign(10)  # NumPy would say b[1] = 10
    print(f"Variable a is {simple_graph(tf.cast(b, tf.float32), c, const).numpy()}")
    b[6:9].assign([10, 10, 10])
    print(f"Variable a is {simple_graph(tf.cast(b, tf.float32), c, const).numpy()}")
    print(f"The slice b[2:5], a new tensor, is {b[2:5].numpy()}")
    print(f"The label 1 as a one-hot array is {tf.one_hot(1, 10).numpy()}")


# --- Data ---
# MNIST holds 70,000 handwritten digits, in grey, of 28 x 28 pixels.
def load_data(synthetic):
    """Return (images, labels) for training and for testing: (n, 28, 28) and (n,), both uint8."""
    if synthetic:
        return synthetic_data(2000, seed=1), synthetic_data(500, seed=2)
    print("~/.keras/datasets/mnist.npz is fetched once (11 MB); --synthetic needs no network")
    return keras.datasets.mnist.load_data()


def synthetic_data(count, seed):
    """Return made-up images. Each of the ten classes is a pattern of 4 x 4 squares, plus noise."""
    patterns = np.random.default_rng(0).uniform(size=(10, 4, 4)).repeat(7, 1).repeat(7, 2)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count, "uint8")
    images = 0.5 * patterns[labels] + 0.5 * rng.uniform(size=(count, 28, 28))
    return (255 * images).astype("uint8"), labels


def get_batch(x_data, y_data, batch_size):
    """Draw images (batch_size, 28, 28) and their labels (batch_size,), as the article does."""
    # An image may be drawn twice: 60,000 draws miss about 37 % of the 60,000 images, exp(-1).
    idxs = np.random.randint(0, len(y_data), batch_size)
    return x_data[idxs], y_data[idxs]


# --- Model ---
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
    return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(labels=labels, logits=logits))


# --- Training ---
# A step is a forward pass on the tape, its gradients, and Adam's update. An epoch has 600 steps.
def train_step(batch_x, batch_y, weights, optimizer):
    """Update the weights once; return the loss from before. The labels (batch,) are integers."""
    batch_y = tf.one_hot(batch_y, 10)  # (batch, 10)
    with tf.GradientTape() as tape:  # remembers the operations that follow
        logits = nn_model(batch_x, *weights)
        loss = loss_fn(logits, batch_y)
    gradients = tape.gradient(loss, weights)
    optimizer.apply(gradients)  # to the weights that it was built for
    return loss


def train(run, data):
    """Train the network on what load_data returns, and record each epoch; return the weights."""
    args = run.args
    (x_train, y_train), (x_test, y_test) = data
    x_train = np.float32(x_train) / 255
    x_test = tf.constant(np.float32(x_test) / 255)
    keras.utils.set_random_seed(args.seed)
    weights = build_model()
    optimizer = keras.optimizers.Adam()
    optimizer.build(weights)  # Adam makes its variables here: a compiled function cannot
    optimizer.apply = tf.function(optimizer.apply)  # many small operations, slow one by one
    step = tf.function(train_step, jit_compile=True) if args.compile else train_step
    total_batch = args.steps_per_epoch or max(1, len(y_train) // args.batch_size)
    show_bar = sys.stdout.isatty() or "ipykernel" in sys.modules
    losses, accuracies = [], []
    start = time.perf_counter()
    for epoch in range(args.epochs):
        avg_loss = 0.0
        bar = keras.utils.Progbar(total_batch, verbose=int(show_bar))
        for i in range(total_batch):
            batch_x, batch_y = get_batch(x_train, y_train, args.batch_size)
            loss = step(tf.constant(batch_x), tf.constant(batch_y), weights, optimizer)
            avg_loss += loss / total_batch
            bar.update(i + 1)
        max_idxs = tf.argmax(nn_model(x_test, *weights), axis=1)  # the digits that it predicts
        test_acc = np.mean(max_idxs.numpy() == y_test)
        print(f"Epoch: {epoch + 1}, loss={avg_loss:.3f}, test set accuracy={100 * test_acc:.3f}%")
        losses.append(float(avg_loss))
        accuracies.append(float(test_acc))
        record_epoch(run, weights, losses, accuracies, time.perf_counter() - start)
    print("Training complete!")
    return weights


def record_epoch(run, weights, losses, accuracies, seconds):
    """Write all epochs so far to results.json, and the newest one to TensorBoard."""
    first = {"first_loss": losses[0], "first_test_accuracy": accuracies[0]}
    last = {"loss": losses[-1], "test_accuracy": accuracies[-1]}
    run.results["arms"]["mlp"] = {
        "history": {"loss": losses, "accuracy": accuracies},
        "final": first | last | {"parameters": sum(weight.numpy().size for weight in weights)},
        "seconds": seconds,
    }
    run.write()
    tf.summary.scalar("loss", losses[-1], step=len(losses))
    tf.summary.scalar("accuracy", accuracies[-1], step=len(losses))


# --- Figures ---
# The article's picture from TensorBoard: accuracy by epoch.
def plot(run):
    """Draw the accuracy on the test images by epoch."""
    accuracies = run.results["arms"]["mlp"]["history"]["accuracy"]
    figure, axes = plt.subplots(layout="constrained")
    axes.plot(range(1, len(accuracies) + 1), accuracies, "o-")
    axes.set(title=run.results["data"], xlabel="epoch", ylabel="test set accuracy")
    figure.savefig(run.folder / "accuracy.png")


# --- Command line ---
def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers."""
    parser = make_parser("--epochs", default=10)
    add = parser.add_argument
    add("--steps-per-epoch", type=int, help="batches per epoch; if not given, images // batch size")
    add("--synthetic", action="store_true", help="use small made-up data: nothing is downloaded")
    add("--batch-size", type=int, default=100, help="images per batch")
    add("--compile", action="store_true", help="run each training step as one compiled graph")
    args = parse_flags(parser, argv)
    with Run(args, "synthetic" if args.synthetic else "MNIST") as run:
        show_simple_example(run.folder)
        with tf.summary.create_file_writer(str(run.folder / "mlp")).as_default():
            W1, b1, W2, b2 = train(run, load_data(args.synthetic))
        np.savez(run.folder / "mlp.npz", W1=W1, b1=b1, W2=W2, b2=b2)
        plot(run)
        print(f'W1, b1, W2, b2 = np.load("{run.folder / "mlp.npz"}").values()')
        return run.report()


# --- Frame: flags, faults, folder and results; the same text in every script ---
def make_parser(*names, default, several=False):
    """Return a parser with the flags of every script; `names` are the names of the first flag."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0], allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    device = functools.partial(select_device, several=several)
    add = parser.add_argument
    add(*names, type=int, default=default, help=f"{names[-1][2:]} of each training")
    add("--device", type=device, default="auto", help="auto, cpu, gpu, gpu:N; all only for fit")
    add("--logdir", default="log", help="each run makes a folder of its own in this one")
    add("--seed", type=int, default=0, help="seed of all random numbers")
    return parser


def select_device(name, several):
    """Let TensorFlow see only the GPUs that --device names; return the name."""
    gpus = tf.config.list_physical_devices("GPU")
    choices = {"auto": gpus[:1], "cpu": []} | ({"all": gpus} if several else {})
    choices |= {f"gpu:{number}": [gpu] for number, gpu in enumerate(gpus)}
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
    try:
        tf.config.set_visible_devices(choices["gpu:0" if name == "gpu" else name], "GPU")
    except KeyError:
        raise argparse.ArgumentTypeError(f"{name} is not here; use {', '.join(choices)}") from None
    except RuntimeError:  # TensorFlow has already started in this process
        raise argparse.ArgumentTypeError(f"too late for {name}; restart Python first") from None
    return name


def parse_flags(parser, argv):
    """Return the flags `argv`; None means those of the command line, or no flags in a notebook."""
    if argv is None and sys.argv[0].endswith(("kernel_launcher.py", "ipykernel/__main__.py")):
        argv = []
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:
        raise SystemExit(end.code) from None  # Colab's IPython cannot show an error within an error
    for name, value in vars(args).items():
        if type(value) is int and value < (0 if name == "seed" else 1):
            parser.error(f"argument --{name.replace('_', '-')}: {value} is too small")
    if "://" in args.logdir:
        parser.error(f"argument --logdir: {args.logdir} is not a folder on this computer")
    return args


class Run:
    """One run: its flags in `args`, its `folder`, and the `results` that results.json keeps."""

    def __init__(self, args, data, results=None):
        """Make the folder of a new run on `data`, or go on with the `results` of --resume."""
        if hasattr(sys.stdout, "reconfigure"):  # a notebook's output has no such method
            sys.stdout.reconfigure(line_buffering=True)
        name = time.strftime("%Y%m%d-%H%M%S") + "-synthetic" * (data == "synthetic")
        self.args, self.folder = args, pathlib.Path(args.logdir).expanduser() / SCRIPT / name
        while self.folder.exists():  # two runs may start in one second
            self.folder = self.folder.with_name(f"{self.folder.name}-2")
        self.results = {"script": SCRIPT, "config": vars(args), "data": data, "arms": {}}
        if results:
            self.folder, self.results["arms"] = pathlib.Path(args.resume), results["arms"]
        self.results["versions"] = {module.__name__: module.__version__ for module in MODULES}
        gpus = [gpu.name for gpu in tf.config.get_visible_devices("GPU")]
        self.results["device"] = ", ".join(gpus) or "CPU"
        self.results["article"] = {} if data == "synthetic" else ARTICLE
        self.results["complete"] = False
        with self:  # its end writes results.json
            self.folder.mkdir(parents=True, exist_ok=True)
        print(f"{SCRIPT} on {data}, device {self.results['device']}, writes to {self.folder}")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        """Keep what was computed; end with one line after Ctrl-C or a fault of disk or network."""
        if isinstance(error, BrokenPipeError):
            sys.stdout = None  # its reader is gone, and Python would flush it at the end
        if isinstance(error, OSError) or kind is Exception:  # from Keras, if a download fails
            raise SystemExit(f"error: {kind.__name__}: {error}") from None
        if kind is not SystemExit:
            self.write()
        # NumPy may turn Ctrl-C into a SystemError; KeyboardInterrupt is then its cause.
        if KeyboardInterrupt in (kind, type(getattr(error, "__cause__", None))):
            print(f"interrupted; what was finished is in {self.folder}", file=sys.stderr)
            raise SystemExit(130) from None

    def write(self):
        """Write results.json beside the old one and rename it, so that it is never half written."""
        try:
            text = json.dumps(self.results, indent=1, allow_nan=False)
        except ValueError:
            raise SystemExit("error: a number is not finite; try another --seed") from None
        (self.folder / "results.json.tmp").write_text(text)
        os.replace(self.folder / "results.json.tmp", self.folder / "results.json")

    def report(self):
        """Print the results beside the article's and how to go on; return the final numbers."""
        self.results["complete"] = True
        self.write()
        print(f"\n{'arm':<16}{'metric':<34}{'here':>14}{'article':>14}")
        for arm, record in self.results["arms"].items():
            article = self.results["article"].get(arm, {})
            for metric, value in record["final"].items():
                print(f"{arm:<16}{metric:<34}{round(value, 4):>14,}{article.get(metric, '-'):>14}")
        for path in sorted(self.folder.glob("*.*")):
            print(f'model = keras.models.load_model("{path}")' if ".keras" in path.name else path)
        print(f'tensorboard --logdir "{self.folder}"')
        return {arm: record["final"] for arm, record in self.results["arms"].items()}


if __name__ == "__main__":
    main()
