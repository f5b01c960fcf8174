"""Log metrics and summaries while training on MNIST: in a custom loop, then in Keras's fit.

Article: "Metrics and summaries in TensorFlow 2" (Adventures in Machine Learning).

A metric is an object with a memory: it takes in values, tells their mean, and is reset. A summary
writes such a number for TensorBoard. First the mean of three numbers; then a training loop by hand;
then `fit`, where a layer that changes nothing carries a metric of its own.

    python metrics_summaries.py                                  # all three parts
    python metrics_summaries.py --synthetic --fit-epochs 10      # no download

Measured (seeds 0 to 2): validation accuracy after five epochs of `fit` 0.978 +- 0.003, recorded for
the article 0.0982; test accuracy after the loop 0.981 +- 0.003; half a minute on two cores.

What made 0.0982: batch norm's averages had evidently stayed at 0 and 1. In validation it divides by
one then, not by a small deviation; pixels below 0.004 vanish, and every image gets one answer: 982
of the 10,000 are fours. Put back here, the text's pipeline alone gives 0.964; with the averages
held still as well (momentum=1) seeds 0 to 2 give 0.0982, 0.0893 and 0.0982.

Differences from the article:
1. Images are divided by 255 once and get their channel once: not twice, and in the loop thrice.
2. Images are shuffled, then batched. `batch().shuffle()` shuffles whole batches.
3. The loop says `training=True`. Without it batch norm neither uses the batch nor learns averages.
4. The loop's step is compiled; 156 make an epoch, not 158; ten make a summary, also the first.
5. Validation counts each test image once. Five batches of 5,000 out of 10,000 repeated some.
6. `MetricLayer` owns its metric. `add_metric` and `reset_states` are gone from Keras 3.
7. `fit` trains a fresh CNN; the text goes on with the one of the loop, and so shows no learning.
8. The mean is written before it is reset: in the article's order TensorBoard would get 0.
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
from keras import layers

# --- Constants ---

SCRIPT = "metrics_summaries"
PACKAGES = ("tensorflow", "keras", "numpy")
ACCURACY, KERNEL_STD = "sparse_categorical_accuracy", "std_of_conv2d_kernel"
ARTICLE = {"fit": {ACCURACY: 0.9692, f"val_{ACCURACY}": 0.0982, KERNEL_STD: 0.18}}
NUM_CLASSES = 10
VERBOSE = 1 if sys.stdout.isatty() or "ipykernel" in sys.modules else 2  # a bar, or plain lines

# --- Command line ---


def build_parser():
    """Return the parser of this script's flags."""
    style = argparse.ArgumentDefaultsHelpFormatter
    first_line = str(__doc__).partition("\n")[0]
    parser = OneLineParser(description=first_line, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--epochs", type=number(int, 0), default=10, help="epochs of the custom loop")
    add("--device", default="auto", help="auto, cpu, gpu, gpu:N or all")
    add("--logdir", default="log", help="where each run makes a folder of its own")
    add("--seed", type=number(int, 0), default=0, help="seed of all random numbers")
    add("--steps-per-epoch", type=number(int, 1), default=10000 // 64, help="batches an epoch")
    add("--synthetic", action="store_true", help="use small made-up data: nothing is downloaded")
    add("--fit-epochs", type=number(int, 0), default=5, help="epochs of fit")
    add("--batch-size", type=number(int, 1), default=64, help="images a batch")
    add("--log-freq", type=number(int, 1), default=10, help="batches of the loop a summary")
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


def mnist_datasets(data, batch_size, seed):
    """Return the endless training set and the validation set: images (batch, 28, 28, 1), labels."""

    def prepare(images, labels):
        return tf.expand_dims(tf.cast(images, tf.float32) / 255.0, -1), labels

    train_dataset = tf.data.Dataset.from_tensor_slices(data[0]).shuffle(len(data[0][0]), seed=seed)
    train_dataset = train_dataset.repeat().batch(batch_size).map(prepare)
    valid_dataset = tf.data.Dataset.from_tensor_slices(data[1]).batch(1000).map(prepare)
    return train_dataset.prefetch(tf.data.AUTOTUNE), valid_dataset.prefetch(tf.data.AUTOTUNE)


# --- Model ---


def build_model():
    """Return the article's CNN: images (28, 28, 1) to 10 logits."""
    model = keras.Sequential([keras.Input((28, 28, 1))])
    # Left to itself Keras would number the layers on from model to model, and so the tags.
    model.add(layers.Conv2D(32, 2, activation="relu", name="conv2d"))  # (27, 27, 32)
    model.add(layers.MaxPool2D(2))  # (13, 13, 32)
    model.add(layers.BatchNormalization())
    model.add(layers.Conv2D(32, 2, activation="relu", name="conv2d_1"))  # (12, 12, 32)
    model.add(layers.MaxPool2D(2))  # (6, 6, 32)
    model.add(layers.BatchNormalization())
    model.add(layers.Flatten())  # (1152,)
    model.add(layers.Dense(NUM_CLASSES))
    return model


class MetricLayer(layers.Layer):
    """Passes its input on, and owns a metric: the standard deviation of another layer's kernel."""

    def __init__(self, layer_to_log):
        super().__init__()
        self.layer_to_log = layer_to_log
        self.kernel_std = keras.metrics.Mean(name=f"std_of_{layer_to_log.name}_kernel")

    def call(self, inputs):
        self.kernel_std.update_state(keras.ops.std(self.layer_to_log.kernel))
        return inputs


# --- Algorithm ---


def show_mean_metric(run_dir):
    """Print the mean of 2, 3 and 4, write it as the summary `mean`, and print it after a reset."""
    mean_metric = keras.metrics.Mean()
    for value in (2.0, 3.0, 4.0):
        mean_metric.update_state(value)
    print(f"the mean metric after 2, 3 and 4: {float(mean_metric.result())}")
    with tf.summary.create_file_writer(str(run_dir / "mean_metric")).as_default():
        tf.summary.scalar("mean", mean_metric.result(), step=1)
    mean_metric.reset_state()
    print(f"the mean metric after its reset: {float(mean_metric.result())}")


# --- Training ---


def add_epoch(run_dir, results, arm, values, start):
    """Add an epoch's values to those of an arm begun at `start`; write results.json."""
    record = results["arms"][arm]
    for metric, value in values.items():
        record["history"].setdefault(metric, []).append(float(value))
        record["final"][metric] = float(value)
    record["seconds"] = time.perf_counter() - start
    write_results(run_dir, results)


def train(args, data, run_dir, results):
    """Train the CNN in the custom loop, on one device; return its rows (step, loss, accuracy)."""
    keras.utils.set_random_seed(args.seed)
    train_dataset, valid_dataset = mnist_datasets(data, args.batch_size, args.seed)
    model, optimizer = build_model(), keras.optimizers.Adam()
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Two of each, because a metric remembers since its last reset: for summaries and for epochs.
    avg_loss, epoch_loss = keras.metrics.Mean(), keras.metrics.Mean()
    avg_acc, epoch_acc = (keras.metrics.SparseCategoricalAccuracy() for _ in range(2))

    @tf.function
    def train_step(images, labels):
        with tf.GradientTape() as tape:
            # Without training=True batch normalisation takes its moving averages, and keeps them.
            logits = model(images, training=True)  # (batch, 10)
            loss_value = loss_fn(labels, logits)
        gradients = tape.gradient(loss_value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        for loss_metric, acc_metric in ((avg_loss, avg_acc), (epoch_loss, epoch_acc)):
            loss_metric.update_state(loss_value)
            acc_metric.update_state(labels, logits)

    final = {"parameters": model.count_params()}
    results["arms"]["loop"] = {"history": {}, "final": final, "seconds": 0.0}
    batches, rows, start = iter(train_dataset), [], time.perf_counter()
    with tf.summary.create_file_writer(str(run_dir / "loop")).as_default():
        for epoch in range(args.epochs):
            progress = keras.utils.Progbar(args.steps_per_epoch, verbose=VERBOSE % 2)
            for images, labels in itertools.islice(batches, args.steps_per_epoch):
                train_step(images, labels)
                step = int(optimizer.iterations.numpy())  # counts on from epoch to epoch
                if step % args.log_freq == 0:
                    rows.append((step, float(avg_loss.result()), float(avg_acc.result())))
                    tf.summary.scalar("loss", rows[-1][1], step=step)
                    tf.summary.scalar("acc", rows[-1][2], step=step)
                    avg_loss.reset_state()
                    avg_acc.reset_state()
                progress.add(1)
            loss, accuracy = float(epoch_loss.result()), float(epoch_acc.result())
            add_epoch(run_dir, results, "loop", {"loss": loss, ACCURACY: accuracy}, start)
            print(f"Epoch {epoch + 1} of {args.epochs}: loss {loss:.4f}, accuracy {accuracy:.4f}")
            epoch_loss.reset_state()
            epoch_acc.reset_state()
    for images, labels in valid_dataset:
        epoch_acc.update_state(labels, model(images, training=False))
    final["test_accuracy"] = float(epoch_acc.result())
    model.save(run_dir / "loop.keras")
    return rows


def train_with_fit(args, data, run_dir, results):
    """Train a fresh CNN with `fit`, wrapped so that it reports its first kernel; save fit.keras."""
    keras.utils.set_random_seed(args.seed)
    train_dataset, valid_dataset = mnist_datasets(data, args.batch_size, args.seed)
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    several = args.device == "all"  # each device then gets its share of every batch
    strategy = tf.distribute.MirroredStrategy(devices) if several else tf.distribute.get_strategy()
    with strategy.scope():
        model = build_model()
        metric_model = keras.Sequential([model, MetricLayer(model.layers[0])])
        loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        metric_model.compile(optimizer=keras.optimizers.Adam(), loss=loss_fn, metrics=[ACCURACY])
    final = {"parameters": model.count_params()}
    results["arms"]["fit"] = {"history": {}, "final": final, "seconds": 0.0}
    start = time.perf_counter()
    recorder = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: add_epoch(run_dir, results, "fit", logs, start)
    )
    # No graph: MetricLayer holds another layer, which cannot be written into its description.
    summaries = keras.callbacks.TensorBoard(run_dir / "fit", update_freq="batch", write_graph=False)
    metric_model.fit(
        train_dataset,
        epochs=args.fit_epochs,
        steps_per_epoch=args.steps_per_epoch,
        validation_data=valid_dataset,
        shuffle=False,  # the dataset has done it
        verbose=VERBOSE,
        callbacks=[summaries, recorder],
    )
    model.save(run_dir / "fit.keras")


# --- Plots ---


def plot(run_dir, results, rows):
    """Draw the article's curves: the loop's `rows` by batch, accuracy and deviation from `fit`."""
    rows, every = np.array(rows).reshape(-1, 3), f", every {results['config']['log_freq']} batches"
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axes, values, tag in zip(panels, rows[:, 1:].T, ("loss", "acc")):
        axes.plot(rows[:, 0], values)
        axes.set(xlabel="batch", ylabel=tag, title=f"custom loop on {results['data']}{every}")
    save_figure(figure, run_dir / "loop.png")

    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axes, metric in zip(panels, (ACCURACY, KERNEL_STD)):
        for name, label in {metric: "training", f"val_{metric}": "validation"}.items():
            values = results["arms"]["fit"]["history"].get(name, [])
            axes.plot(range(1, len(values) + 1), values, "o-", label=label)
        axes.set(xlabel="epoch", ylabel=metric, title=f"fit on {results['data']}")
        axes.legend()
    save_figure(figure, run_dir / "fit.png")


# --- Main ---


def main(argv=None):
    """Run the three parts with the flags `argv`; return the final numbers of both arms."""
    args = parse_args(argv)
    device = select_device(args.device, several=True)
    run_dir, results = new_run_dir(args, "synthetic" if args.synthetic else "MNIST", device)
    data = load_data(args.synthetic)
    show_mean_metric(run_dir)
    rows = train(args, data, run_dir, results)
    train_with_fit(args, data, run_dir, results)
    plot(run_dir, results, rows)
    results["complete"] = True
    write_results(run_dir, results)
    report(run_dir, results)
    return {arm: record["final"] for arm, record in results["arms"].items()}


if __name__ == "__main__":
    run_as_command(main)
