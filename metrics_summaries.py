"""Log metrics and summaries while training on MNIST: in a custom loop, then in Keras's fit.

Article: "Metrics and summaries in TensorFlow 2" (Adventures in Machine Learning).

A metric is an object that collects values, gives their mean, and can be reset. A summary writes
such a number for TensorBoard. First comes the mean of three numbers, then a training loop written
by hand, then `fit`, where a layer that leaves its input unchanged adds a metric of its own.

    python metrics_summaries.py                                  # all three parts
    python metrics_summaries.py --synthetic --fit-epochs 10      # a quick look, without a download

Result (seeds 0 to 2): validation accuracy after five epochs of `fit` is 0.978 +- 0.003, where the
author's notebook ends at 0.0982, after 0.8921. Test accuracy after the loop is 0.981 +- 0.003.

Differences from the article:
1. Images are divided by 255 once, and get their channel once. The article does both twice.
2. Images are shuffled before they are batched. In the article the same 64 always stay together.
3. The loop says `training=True`; without it batch normalisation never learns its averages.
4. The loop's step is compiled. An epoch has 156 steps, not 158, and the next one goes on where it
   ended in the data, as in `fit`. Each summary is of ten batches; the article's first is of one.
5. Validation counts each test image once. The article counts each of them two or three times.
6. `MetricLayer` owns its metric: `add_metric` and `reset_states` are gone from Keras 3.
7. `fit` trains a fresh network, as the author's notebook does. The text goes on with the loop's.
8. The mean is written before it is reset: in the article's order TensorBoard would show 0.
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

SCRIPT = "metrics_summaries"
MODULES = (tf, keras, np)  # results.json names their versions
ACCURACY = "sparse_categorical_accuracy"
KERNEL_STD = "std_of_conv2d_kernel"
ARTICLE = {"fit": {ACCURACY: 0.9692, f"val_{ACCURACY}": 0.0982, KERNEL_STD: 0.18}}


# --- Algorithm ---
# What a metric does, and how its value becomes a summary.
def show_mean_metric(folder):
    """Print the mean of 2, 3 and 4, write it as the summary `mean`, and print it after a reset."""
    mean_metric = keras.metrics.Mean()
    mean_metric.update_state(2.0)
    mean_metric.update_state(3.0)
    mean_metric.update_state(4.0)
    print(f"the mean metric after 2, 3 and 4: {mean_metric.result().numpy()}")
    with tf.summary.create_file_writer(str(folder / "mean_metric")).as_default():
        tf.summary.scalar("mean", mean_metric.result(), step=1)  # after a reset it would be 0
    mean_metric.reset_state()
    print(f"the mean metric after its reset: {mean_metric.result().numpy()}")


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


def make_datasets(train_data, test_data, batch_size, seed):
    """Return the endless training set and the validation set: images (batch, 28, 28, 1), labels."""

    def prepare(images, labels):
        return tf.expand_dims(tf.cast(images, tf.float32) / 255.0, -1), labels

    train_dataset = tf.data.Dataset.from_tensor_slices(train_data)
    train_dataset = train_dataset.shuffle(len(train_data[0]), seed=seed).repeat().batch(batch_size)
    valid_dataset = tf.data.Dataset.from_tensor_slices(test_data).batch(1000)
    return train_dataset.map(prepare).prefetch(tf.data.AUTOTUNE), valid_dataset.map(prepare)


# --- Model ---
# The article's network, and the layer that will watch one of its kernels.
def build_model():
    """Return the network: images (28, 28, 1) to 10 logits."""
    model = keras.Sequential([keras.Input((28, 28, 1))])
    # Keras numbers unnamed layers on from model to model, and the metric's name would change.
    model.add(keras.layers.Conv2D(32, 2, activation="relu", name="conv2d"))  # (27, 27, 32)
    model.add(keras.layers.MaxPool2D(2))  # (13, 13, 32)
    model.add(keras.layers.BatchNormalization())  # its averages need hundreds of steps to settle
    model.add(keras.layers.Conv2D(32, 2, activation="relu", name="conv2d_1"))  # (12, 12, 32)
    model.add(keras.layers.MaxPool2D(2))  # (6, 6, 32)
    model.add(keras.layers.BatchNormalization())
    model.add(keras.layers.Flatten())  # (1152,)
    model.add(keras.layers.Dense(10))
    return model


class MetricLayer(keras.layers.Layer):
    """Passes its input on unchanged, and owns a metric: the spread of another layer's kernel."""

    def __init__(self, layer_to_log):
        super().__init__()
        self.layer_to_log = layer_to_log
        self.kernel_std = keras.metrics.Mean(name=f"std_of_{layer_to_log.name}_kernel")

    def call(self, inputs):
        self.kernel_std.update_state(keras.ops.std(self.layer_to_log.kernel))
        return inputs


# --- Training ---
# First the custom loop, on one device; then fit, which updates and writes its metrics by itself.
def train(run, train_dataset, valid_dataset, num_batches):
    """Train in the custom loop; every --log-freq batches, write their averages as summaries."""
    model = build_model()
    optimizer = keras.optimizers.Adam()
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    avg_loss = keras.metrics.Mean()  # of the batches since the last summary
    avg_acc = keras.metrics.SparseCategoricalAccuracy()
    epoch_loss = keras.metrics.Mean()  # of the epoch's batches
    epoch_acc = keras.metrics.SparseCategoricalAccuracy()

    @tf.function
    def train_step(images, labels):
        with tf.GradientTape() as tape:
            logits = model(images, training=True)  # (batch, 10)
            loss_value = loss_fn(labels, logits)
        gradients = tape.gradient(loss_value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        avg_loss.update_state(loss_value)
        avg_acc.update_state(labels, logits)
        epoch_loss.update_state(loss_value)
        epoch_acc.update_state(labels, logits)

    writer = tf.summary.create_file_writer(str(run.folder / "loop"))
    start = time.perf_counter()
    batches = iter(train_dataset)
    for epoch in range(run.args.epochs):
        print(f"Epoch {epoch + 1} of {run.args.epochs}")
        for _ in range(num_batches):
            images, labels = next(batches)
            train_step(images, labels)
            step = int(optimizer.iterations)
            if step % run.args.log_freq == 0:
                loss, accuracy = avg_loss.result(), avg_acc.result()
                print(f"Batch {step}, average loss {loss:.4f}, average accuracy {accuracy:.4f}")
                with writer.as_default():
                    tf.summary.scalar("loss", loss, step=step)
                    tf.summary.scalar("acc", accuracy, step=step)
                avg_loss.reset_state()
                avg_acc.reset_state()
        logs = {"loss": epoch_loss.result(), ACCURACY: epoch_acc.result()}
        record_epoch(run, "loop", logs, start)
        epoch_loss.reset_state()
        epoch_acc.reset_state()
    test_acc = keras.metrics.SparseCategoricalAccuracy()
    for images, labels in valid_dataset:
        test_acc.update_state(labels, model(images, training=False))
    final = {"test_accuracy": float(test_acc.result()), "parameters": model.count_params()}
    run.results["arms"]["loop"]["final"] |= final
    model.save(run.folder / "loop.keras")


def train_with_fit(run, train_dataset, valid_dataset, num_batches):
    """Train a fresh network with `fit`, followed by a layer that reports its first kernel."""
    several = run.args.device == "all"  # each device then gets its share of every batch
    strategy = tf.distribute.MirroredStrategy() if several else tf.distribute.get_strategy()
    with strategy.scope():
        model = build_model()
        metric_model = keras.Sequential([model, MetricLayer(model.layers[0])])
        loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        metric_model.compile(optimizer=keras.optimizers.Adam(), loss=loss_fn, metrics=[ACCURACY])
    start = time.perf_counter()
    record = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: record_epoch(run, "fit", logs, start)
    )
    # Without a graph: Keras cannot describe a layer that holds another one.
    board = keras.callbacks.TensorBoard(run.folder / "fit", update_freq="batch", write_graph=False)
    metric_model.fit(
        train_dataset,
        epochs=run.args.fit_epochs,
        steps_per_epoch=num_batches,
        validation_data=valid_dataset,
        shuffle=False,  # the dataset is shuffled already
        verbose=1 if sys.stdout.isatty() or "ipykernel" in sys.modules else 2,
        callbacks=[board, record],
    )
    run.results["arms"]["fit"]["final"]["parameters"] = model.count_params()
    model.save(run.folder / "fit.keras")


def record_epoch(run, arm, logs, start):
    """Add an epoch's metrics to results.json; `start` is the time when the training began."""
    record = run.results["arms"].setdefault(arm, {"history": {}, "final": {}})
    for metric, value in logs.items():
        record["history"].setdefault(metric, []).append(float(value))
        record["final"][metric] = float(value)
    record["seconds"] = time.perf_counter() - start
    run.write()


# --- Figures ---
# One figure for the loop and one for fit, by epoch. TensorBoard has the summaries by batch.
def plot(run):
    """Draw two metrics of each arm; those of `fit` in training and in validation."""
    for arm, second_metric in {"loop": "loss", "fit": KERNEL_STD}.items():
        figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
        for axes, metric in zip(panels, (ACCURACY, second_metric)):
            for name, values in run.results["arms"][arm]["history"].items():
                if name.endswith(metric):  # in validation the name has val_ before it
                    axes.plot(range(1, len(values) + 1), values, "o-", label=name)
            axes.set(title=f"{arm} on {run.results['data']}", xlabel="epoch")
            axes.legend()
        figure.savefig(run.folder / f"{arm}.png")


# --- Command line ---
def main(argv=None):
    """Run the three parts with the flags `argv`; return the final numbers of both arms."""
    parser = make_parser("--epochs", default=10, several=True)
    add = parser.add_argument
    add("--steps-per-epoch", type=int, help="batches per epoch; if not given, 10000 // batch size")
    add("--synthetic", action="store_true", help="use small made-up data: nothing is downloaded")
    add("--fit-epochs", type=int, default=5, help="epochs of fit; --epochs is for the loop")
    add("--batch-size", type=int, default=64, help="images per batch")
    add("--log-freq", type=int, default=10, help="batches per summary of the loop")
    args = parse_flags(parser, argv)
    num_batches = args.steps_per_epoch or max(1, 10000 // args.batch_size)
    with Run(args, "synthetic" if args.synthetic else "MNIST") as run:
        show_mean_metric(run.folder)
        train_data, test_data = load_data(args.synthetic)
        for train_arm in (train, train_with_fit):
            keras.utils.set_random_seed(args.seed)
            datasets = make_datasets(train_data, test_data, args.batch_size, args.seed)
            train_arm(run, *datasets, num_batches)
        plot(run)
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
