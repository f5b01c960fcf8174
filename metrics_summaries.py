"""Log metrics and summaries while training on MNIST: in a custom loop, then in Keras's fit.

Article: "Metrics and summaries in TensorFlow 2" (Adventures in Machine Learning).

A metric collects values, gives their mean, and can be reset. A summary writes such a number for
TensorBoard. Both are used in a training loop, then in `fit`, where a layer has a metric of its own.

    python metrics_summaries.py                   # all three parts
    python metrics_summaries.py --synthetic       # a quick look, without a download

Result (seeds 0 to 2): validation accuracy after five epochs of `fit` is 0.978 +- 0.003, where the
author's notebook ends at 0.0982, after 0.8921. Test accuracy after the loop is 0.981 +- 0.003.

Differences from the article:
1. Images are divided by 255 once, and get their channel once. The article does both twice.
2. Images are shuffled before they are batched. In the article the same 64 always stay together.
3. The loop says `training=True`; without it batch normalisation never learns its averages.
4. The loop's step is compiled. An epoch has 156 steps, not 158, and each of them is in a summary.
5. Validation counts each test image once. The article counts each of them two or three times.
6. `MetricLayer` owns its metric, a mean: Keras 3 has no `add_metric(..., aggregation="mean")`.
7. `fit` trains a fresh network, as the author's notebook does. The text goes on with the loop's.
8. The mean is written before it is reset: in the article's order TensorBoard would show 0.
9. `fit` writes no graph for TensorBoard: Keras cannot describe a layer that holds another one.
"""

# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["tensorflow>=2.20,<3", "keras>=3.10,<4", "tensorboard>=2.20,<3",
#     "numpy>=2,<3"]
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
import numpy as np
import tensorflow as tf

SCRIPT = "metrics_summaries"
MODULES = (tf, keras, np)  # results.json names their versions
ACCURACY = "sparse_categorical_accuracy"
KERNEL_STD = "std_of_conv2d_kernel"
ARTICLE = {"fit": {ACCURACY: 0.9692, f"val_{ACCURACY}": 0.0982, KERNEL_STD: 0.1806}}
BATCH_SIZE = 64


# %% Algorithm
# What a metric does, and how its value becomes a summary for TensorBoard.
def show_mean_metric(folder):
    """Print the mean of 2, 3 and 4, write it as the summary `mean`, and print it after a reset."""
    mean_metric = keras.metrics.Mean()
    mean_metric.update_state(2.0)
    mean_metric.update_state(3.0)
    mean_metric.update_state(4.0)
    print(f"The mean metric after 2, 3 and 4: {mean_metric.result().numpy()}")
    summary_writer = tf.summary.create_file_writer(str(folder / "mean_metric"))
    with summary_writer.as_default():
        tf.summary.scalar("mean", mean_metric.result(), step=1)  # after a reset it would be 0
    mean_metric.reset_state()
    print(f"The mean metric after its reset: {mean_metric.result().numpy()}")


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


def make_datasets(train_data, test_data, args):
    """Return the endless training set and the validation set: images (batch, 28, 28, 1), labels."""

    def scale(images, labels):
        return tf.expand_dims(tf.cast(images, tf.float32) / 255.0, -1), labels

    train_dataset = tf.data.Dataset.from_tensor_slices(train_data)
    train_dataset = train_dataset.shuffle(len(train_data[0]), seed=args.seed).repeat()
    train_dataset = train_dataset.batch(args.batch_size).map(scale).prefetch(tf.data.AUTOTUNE)
    valid_dataset = tf.data.Dataset.from_tensor_slices(test_data).batch(1000).map(scale)
    return train_dataset, valid_dataset


# %% Model
# A small convolutional network, which the loop and `fit` train in turn.
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


# %% Training
# First the loop by hand: it updates its metrics, writes them as summaries and resets them.
@tf.function
def train_step(images, labels, optimizer, loss_fn, model):
    """Update the weights once; return the loss and the logits (batch, 10) before that."""
    with tf.GradientTape() as tape:
        logits = model(images, training=True)
        loss_value = loss_fn(labels, logits)
    grads = tape.gradient(loss_value, model.trainable_variables)
    optimizer.apply_gradients(zip(grads, model.trainable_variables))
    return loss_value, logits


def train(ds_train, optimizer, loss_fn, model, num_batches, log_freq=10):
    """Train for an epoch; return the average loss and accuracy of its last summary."""
    avg_loss = keras.metrics.Mean()
    avg_acc = keras.metrics.SparseCategoricalAccuracy()
    for batch_idx, (images, labels) in enumerate(ds_train, start=1):
        loss_value, logits = train_step(images, labels, optimizer, loss_fn, model)
        avg_loss.update_state(loss_value)
        avg_acc.update_state(labels, logits)
        if batch_idx % log_freq == 0 or batch_idx == num_batches:
            loss = float(avg_loss.result())
            acc = float(avg_acc.result())
            print(f"Batch {batch_idx}, average loss is {loss:.4f}, average accuracy is {acc:.4f}")
            tf.summary.scalar("loss", loss, step=int(optimizer.iterations))
            tf.summary.scalar("acc", acc, step=int(optimizer.iterations))
            avg_loss.reset_state()
            avg_acc.reset_state()
        if batch_idx == num_batches:
            return loss, acc


def train_by_hand(run, train_dataset, valid_dataset, num_batches):
    """Train a network epoch by epoch in the custom loop; test it and save it."""
    model = build_model()
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)  # compiled code cannot make its variables
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    ds_train = iter(train_dataset)  # an epoch goes on where the last one ended, as in `fit`
    summary_writer = tf.summary.create_file_writer(str(run.events / "loop"))
    num_epochs = run.args.epochs
    for i in range(num_epochs):
        print(f"Epoch {i + 1} of {num_epochs}")
        with summary_writer.as_default():
            loss, acc = train(ds_train, optimizer, loss_fn, model, num_batches, run.args.log_freq)
        run.record("loop", i + 1, {"loss": loss, ACCURACY: acc})
    print("The network is saved and tested, then fit compiles a new one: this takes a while ...")
    model.compile(optimizer, loss_fn, metrics=[ACCURACY])
    model.save(run.folder / "loop.keras")
    _, test_acc = model.evaluate(valid_dataset, verbose=0)
    run.conclude("loop", {"loss": loss, ACCURACY: acc, "test_accuracy": test_acc})
    run.conclude("loop", {"parameters": model.count_params()})


# Then `fit`, which updates, writes and resets all metrics by itself, also those of layers.
# The kernel's spread stays near its first value, on average 0.123: Keras draws it so. It grows from
# 0.136 to 0.181 in the author's notebook, whose pixels are divided by 255 twice: see docs/results.
class MetricLayer(keras.layers.Layer):
    """Passes its input on unchanged; its metric is the standard deviation of a layer's kernel."""

    def __init__(self, layer_to_log):
        super().__init__()
        self.layer_to_log = layer_to_log
        self.kernel_std = keras.metrics.Mean(name=f"std_of_{layer_to_log.name}_kernel")

    def call(self, inputs):
        self.kernel_std.update_state(keras.ops.std(self.layer_to_log.variables[0]))
        return inputs


def train_with_fit(run, train_dataset, valid_dataset, num_batches):
    """Train a network with `fit`, followed by the layer that reports its first kernel; save it."""
    model = build_model()
    metric_model = keras.Sequential([model, MetricLayer(model.layers[0])])
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    metrics = [keras.metrics.SparseCategoricalAccuracy()]
    metric_model.compile(optimizer=keras.optimizers.Adam(), loss=loss_fn, metrics=metrics)

    def on_epoch_end(epoch, logs):
        run.record("fit", epoch + 1, logs)
        run.conclude("fit", logs)

    board = keras.callbacks.TensorBoard(run.events / "fit", update_freq="batch", write_graph=False)
    callbacks = [board, keras.callbacks.LambdaCallback(on_epoch_end=on_epoch_end)]
    metric_model.fit(
        train_dataset,
        steps_per_epoch=num_batches,
        epochs=run.args.fit_epochs,
        validation_data=valid_dataset,
        callbacks=callbacks,
        shuffle=False,  # the dataset is shuffled already
        verbose=1 if os.isatty(1) or "ipykernel" in sys.modules else 2,  # a bar, or a line an epoch
    )
    run.conclude("fit", {"parameters": model.count_params()})
    model.compile(metric_model.optimizer, loss_fn, metrics=metrics)
    model.save(run.folder / "fit.keras")


# %% Command line
def main(argv=None):
    """Run the three parts with the flags `argv`; return the final numbers of both arms."""
    parser = make_parser("--epochs", default=10)
    add = parser.add_argument
    add("--steps-per-epoch", type=int, help="batches per epoch; if not given, 10000 // batch size")
    add("--synthetic", action="store_true", help="use small made-up data: nothing is downloaded")
    add("--fit-epochs", type=int, default=5, help="epochs of fit; --epochs is for the loop")
    add("--batch-size", type=int, default=BATCH_SIZE, help="images per batch")
    add("--log-freq", type=int, default=10, help="batches per summary of the loop")
    args = parse_flags(parser, argv)
    train_data, test_data = load_data(args.synthetic)
    run = Run(args, "synthetic" if args.synthetic else "MNIST")
    show_mean_metric(run.events)
    num_batches = args.steps_per_epoch or max(1, 10000 // args.batch_size)
    for train_arm in (train_by_hand, train_with_fit):
        keras.utils.set_random_seed(args.seed)
        train_dataset, valid_dataset = make_datasets(train_data, test_data, args)
        train_arm(run, train_dataset, valid_dataset, num_batches)
    return run.report()


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
