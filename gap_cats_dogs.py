"""Compare back ends for a small cats-and-dogs network: dense layers against average pooling.

Article: "An introduction to Global Average Pooling in convolutional neural networks" (Adventures
in Machine Learning).

Dense layers behind the convolutions hold nearly all of a network's weights, and learn its training
images by heart. Global average pooling (GAP) has none: it keeps the mean of each feature map.

    python gap_cats_dogs.py                          # four networks, 7 epochs each; fetches 800 MB
    python gap_cats_dogs.py --epochs 2 --synthetic   # a look, without a download

Measured, training / validation / test accuracy, seeds 0 to 2: fc 0.981 / 0.763 +- 0.043 / 0.780,
fc_dropout 0.915 / 0.787 +- 0.049 / 0.807, gap 0.809 / 0.687 +- 0.134 / 0.687 and
avgpool 0.878 / 0.765 +- 0.054 / 0.787 (it is transfer_resnet50.py's small network). fc overfits:
from the second epoch on its validation loss rises, from 0.46 to 0.62 and more. gap does not, but
is slow, and behind. Batch norm's averages lag, and move validation by 0.1 between two epochs.

Differences from the article:
1. Each network has its own head, all with the same first weights. The article's share one object:
   each goes on from where the one before has left it.
2. `gap` averages whole feature maps. The article's "GAP" averages 2x2 pixels, then flattens: that
   is `avgpool` here, with 25 times the weights.
3. Validation counts each image once, not ten batches of 1,000 out of a repeated 2,326.
4. The test images, which the article sets aside and forgets, are evaluated once, at the end.
5. Images are decoded and resized once, not in each epoch, and kept in memory as whole grey levels
   (unless `--no-cache`): rounding moves a pixel by 0.5 / 255 at most. The model divides by 255.
6. All training images are shuffled together, not within a window of 1,000.
7. Each network has its own folder of events.
Kept although unusual: an epoch is as many batches as all three sets would fill: 1.25 passes.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "tensorflow>=2.20,<3", "keras>=3.10,<4", "tensorboard>=2.20,<3",
#     "tensorflow-datasets>=4.9.8,<5", "importlib_resources>=6", "matplotlib>=3.9,<4",
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
import urllib.request

import keras
import matplotlib.pyplot as plt
import tensorflow as tf
import tensorflow_datasets as tfds
from keras import layers

# --- Constants ---

SCRIPT = "gap_cats_dogs"
PACKAGES = ("tensorflow", "keras", "numpy", "tensorflow-datasets")
ARTICLE = {  # after 7 epochs, as recorded by its author; its "GAP" is our `avgpool`
    "fc": {"val_accuracy": 0.8130},
    "fc_dropout": {"accuracy": 0.9211, "val_accuracy": 0.8272},
    "gap": {},
    "avgpool": {"accuracy": 0.8905, "val_accuracy": 0.8533},
}
SPLITS = ["train[:80%]", "train[80%:90%]", "train[90%:]"]
URL = "https://download.microsoft.com/download/3/E/1/3E1C3F21-ECDB-4869-8368-6DEBA77B919F/"
ARCHIVE = "kagglecatsanddogs_5340.zip"
IMAGE_SIZE = 100
VERBOSE = 1 if sys.stdout.isatty() or "ipykernel" in sys.modules else 2  # a bar, or plain lines

# --- Command line ---


def build_parser():
    """Return the parser of this script's flags."""
    style = argparse.ArgumentDefaultsHelpFormatter
    first_line = str(__doc__).partition("\n")[0]
    parser = OneLineParser(description=first_line, formatter_class=style, allow_abbrev=False)
    add = parser.add_argument
    add("--epochs", type=number(int, 0), default=7, help="epochs of each arm")
    add("--device", default="auto", help="auto, cpu, gpu, gpu:N or all")
    add("--logdir", default="log", help="where each run makes a folder of its own")
    add("--seed", type=number(int, 0), default=0, help="seed of all random numbers")
    add("--steps-per-epoch", type=number(int, 1), help="batches an epoch; None: all images' worth")
    add("--synthetic", action="store_true", help="use small made-up data: nothing is downloaded")
    add("--resume", metavar="RUN_DIR", help="go on with the run in this folder")
    add("--batch-size", type=number(int, 1), default=64, help="images a batch")
    add("--data-dir", help="folder where TFDS has prepared cats_vs_dogs; None: TFDS's own")
    add("--no-cache", action="store_true", help="decode every image in every epoch; saves memory")
    add("--arms", nargs="+", choices=list(ARTICLE), default=list(ARTICLE), help="networks to train")
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


# --- Resuming: the same text in every script that has --resume ---


def resume_run(args, argv):
    """Return (args, run_dir, results) of the run in --resume: only --epochs and --device change."""
    parser, run_dir, results = build_parser(), pathlib.Path(args.resume), {}
    with contextlib.suppress(OSError, ValueError):
        results = json.loads((run_dir / "results.json").read_text())
    if results.get("script") != SCRIPT:
        parser.error(f"argument --resume: {run_dir} holds no run of {SCRIPT}.py that can be read")
    args = parser.parse_args(argv, argparse.Namespace(**results["config"]))
    for name in results["config"].keys() - {"epochs", "device", "resume"}:
        if getattr(args, name) != results["config"][name]:
            parser.error(f"argument --{name.replace('_', '-')}: not as in the run to resume")
    results |= {"config": vars(args), "complete": False}
    old = [f"{p} {v}" for p, v in results["versions"].items() if importlib.metadata.version(p) != v]
    print(f"{SCRIPT} goes on in {run_dir}" + (f"; warning: it was begun with {old}" if old else ""))
    return args, run_dir, results


class Recorder(keras.callbacks.Callback):
    """Restores the last checkpoint; after each epoch writes results.json, then a checkpoint."""

    def __init__(self, model, run_dir, results, arm):
        super().__init__()
        self.run_dir, self.results, self.start = run_dir, results, time.perf_counter()
        self.record = results["arms"].setdefault(arm, {"history": {}, "final": {}, "seconds": 0.0})
        self.epochs_done = tf.Variable(0, dtype=tf.int64)
        model.optimizer.build(model.trainable_variables)  # else its moments have no place yet
        state = {"model": model, "optimizer": model.optimizer, "epochs_done": self.epochs_done}
        folder = str(run_dir / "checkpoint" / arm)
        self.manager = tf.train.CheckpointManager(tf.train.Checkpoint(**state), folder, 1)
        try:
            self.manager.restore_or_initialize()
        except Exception as error:  # half a file raises whatever its bytes lead to
            raise OSError(f"{folder} is damaged; delete it to train {arm} anew") from error

    def on_epoch_end(self, epoch, logs=None):
        now = time.perf_counter()
        self.record["seconds"] += now - self.start
        self.start = now
        for metric, value in logs.items():  # a repeated epoch takes the place of its first try
            self.record["history"].setdefault(metric, [])[epoch:] = [float(value)]
        write_results(self.run_dir, self.results)
        self.epochs_done.assign(epoch + 1)
        self.manager.save()


# --- Data ---


def synthetic_photographs(count):
    """Return a dataset of made-up images (h, w, 3), uint8: bands that lie (0) or stand (1)."""

    def draw(i):
        bands = tf.random.stateless_uniform([8, 1, 3], (count, i), 0.0, 255.0)
        image = tf.where(i % 2 == 0, bands, tf.transpose(bands, (1, 0, 2)))  # (8, 8, 3)
        size = tf.random.stateless_uniform([2], (i, count), 80, 160, tf.int32)
        return tf.cast(tf.image.resize(image, size), tf.uint8), i % 2

    return tf.data.Dataset.range(count).map(draw)


def pre_process_image(image, label):
    """Resize an image (height, width, 3) to (100, 100, 3), rounded to uint8; pass the label on."""
    image = tf.image.resize(image, (IMAGE_SIZE, IMAGE_SIZE))  # bilinear, float32
    return tf.cast(tf.round(image), tf.uint8), label


def load_data(args):
    """Return two sample images in their own sizes, and the training, validation and test sets.

    The sets yield images (100, 100, 3), uint8, and labels; all are read once, into their caches.
    Raises OSError where images can be neither found nor fetched, or are damaged.
    """
    folder = args.data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    advice = f"delete it if damaged, put {ARCHIVE} in {folder}/downloads/manual, or use --synthetic"
    try:
        if args.synthetic:
            sets = [synthetic_photographs(count) for count in (800, 96, 104)]
        else:
            builder = tfds.builder("cats_vs_dogs", data_dir=args.data_dir)
            by_hand = builder.data_path.parents[1] / "downloads" / "manual" / ARCHIVE
            if not (args.data_dir or builder.data_path.exists() or by_hand.exists()):
                urllib.request.urlopen(URL + ARCHIVE, timeout=20).close()  # TFDS tries for minutes
            where = {"data_dir": args.data_dir, "download": not args.data_dir or by_hand.exists()}
            sets = tfds.load("cats_vs_dogs", split=SPLITS, as_supervised=True, **where)
        samples = [image.numpy() for image, _ in sets[0].take(2)]
        sets = [dataset.map(pre_process_image, tf.data.AUTOTUNE) for dataset in sets]
        bar = keras.utils.Progbar(sum(map(len, sets)), verbose=VERBOSE, unit_name="image")
        print(f"{bar.target} images, {bar.target * IMAGE_SIZE**2 * 3e-6:.0f} MB unless --no-cache")
        sets = sets if args.no_cache else [dataset.cache() for dataset in sets]
        for _ in itertools.chain(*sets):
            bar.add(1)
        return samples, sets
    except Exception as error:  # damaged files raise whatever their bytes lead to
        reason = str(error).split("}} ")[-1].partition("\n")[0]  # TensorFlow's begin with {{...}}
        raise OSError(f"{folder}/cats_vs_dogs cannot be loaded ({reason}); {advice}") from None


def batch_sets(sets, window, args):
    """Return the sets in batches, the first shuffled within a window of images, and endless."""
    train_dataset = sets[0].shuffle(window, seed=args.seed).repeat().batch(args.batch_size)
    datasets = [train_dataset, *(dataset.batch(240) for dataset in sets[1:])]
    return [dataset.prefetch(tf.data.AUTOTUNE) for dataset in datasets]


# --- Model ---


def build_head():
    """Return the convolutional head: pixels (100, 100, 3), 0..255, to feature maps (10, 10, 64)."""
    blocks = [keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3)), layers.Rescaling(1 / 255)]
    for filters in (32, 32, 64):  # (49, 49, 32), (23, 23, 32), (10, 10, 64)
        blocks += [layers.Conv2D(filters, 3), layers.BatchNormalization()]
        blocks += [layers.Activation("relu"), layers.MaxPooling2D(2)]
    return keras.Sequential(blocks, name="head")


def build_model(arm):
    """Return the network of an arm: pixels (100, 100, 3), 0..255, to the probability of a dog."""
    head = build_head()  # made first, so that one seed gives every arm the same head
    if arm == "gap":
        back_end = [layers.GlobalAveragePooling2D()]  # (64,)
    elif arm == "avgpool":
        back_end = [layers.AveragePooling2D(2), layers.Flatten()]  # (1600,)
    else:
        back_end = [layers.Flatten(), layers.BatchNormalization(), layers.Dense(100, "relu")]
        back_end += [layers.Dropout(0.5)] if arm == "fc_dropout" else []  # (100,)
        back_end += [layers.BatchNormalization(), layers.Dense(100, "relu")]
    back_end = keras.Sequential([*back_end, layers.Dense(1, "sigmoid")], name=arm)
    return keras.Sequential([head, back_end])


# --- Training ---


def train(arm, args, sets, run_dir, results):
    """Train one arm to args.epochs, from its checkpoint if it has one; test and save it."""
    keras.utils.set_random_seed(args.seed)
    window = 1000 if args.no_cache else len(sets[0])  # of cached images a window costs nothing
    cat_train, cat_valid, cat_test = batch_sets(sets, window, args)
    steps = args.steps_per_epoch or max(1, sum(map(len, sets)) // args.batch_size)
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    several = args.device == "all"  # each device then gets its share of every batch
    strategy = tf.distribute.MirroredStrategy(devices) if several else tf.distribute.get_strategy()
    with strategy.scope():
        model = build_model(arm)
        model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
        recorder = Recorder(model, run_dir, results, arm)
    print(f"{arm}: {model.get_layer(arm).count_params():,} parameters; {steps} batches an epoch")
    model.fit(
        cat_train,
        epochs=args.epochs,
        initial_epoch=int(recorder.epochs_done.numpy()),
        steps_per_epoch=steps,
        validation_data=cat_valid,
        shuffle=False,  # the dataset has done it
        verbose=VERBOSE,
        callbacks=[keras.callbacks.TensorBoard(run_dir / arm), recorder],
    )
    model.save(run_dir / f"{arm}.keras")
    final = {metric: values[-1] for metric, values in recorder.record["history"].items()}
    final["test_accuracy"] = model.evaluate(cat_test, verbose=VERBOSE)[1]
    recorder.record["final"] = final | {"parameters": model.count_params()}


# --- Plots ---


def plot(run_dir, results, samples):
    """Draw two photographs, and accuracy and loss of all arms in training and validation."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
    for axis, image in zip(axes, samples):
        axis.imshow(image)
        axis.set(title=f"{image.shape[1]} x {image.shape[0]} pixels")
    save_figure(figure, run_dir / "samples.png")
    labels = {"fc": "FC", "fc_dropout": "FC with dropout", "gap": "GAP", "avgpool": "2x2 pooling"}
    for metric in ("accuracy", "loss"):
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for i, (arm, record) in enumerate(results["arms"].items()):
            for prefix, line in (("", ":"), ("val_", "-")):
                values = record["history"].get(prefix + metric, [])
                label = f"{labels[arm]} {'validation' if prefix else 'training'}"
                axes.plot(range(1, len(values) + 1), values, f"C{i}{line}", label=label)
        axes.set(title=f"Back ends: {metric} on {results['data']}", xlabel="epoch", ylabel=metric)
        figure.legend(loc="outside lower center", ncols=len(results["arms"]), fontsize="small")
        save_figure(figure, run_dir / f"{metric}.png")


# --- Main ---


def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of each arm."""
    args = parse_args(argv)
    if args.resume:
        args, run_dir, results = resume_run(args, argv)
    device = select_device(args.device, several=True)
    if not args.resume:
        data = "synthetic" if args.synthetic else "cats_vs_dogs"
        run_dir, results = new_run_dir(args, data, device)
    samples, sets = load_data(args)
    for arm in args.arms:
        record = results["arms"].get(arm, {"history": {}, "final": {}})
        if not record["final"] or len(record["history"].get("accuracy", [])) < args.epochs:
            train(arm, args, sets, run_dir, results)
    plot(run_dir, results, samples)
    results["complete"] = True
    write_results(run_dir, results)
    report(run_dir, results)
    return {arm: record["final"] for arm, record in results["arms"].items()}


if __name__ == "__main__":
    run_as_command(main)
