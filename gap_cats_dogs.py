"""Compare four cats-and-dogs networks, which end in dense layers or in average pooling.

Article: "An introduction to Global Average Pooling in convolutional neural networks".

Dense layers after the convolutions hold nearly all of a network's weights, and can memorise the
training images. Global average pooling (GAP) has no weights: of each feature map it keeps only the
mean. The four networks trained here differ in what follows the convolutions.

    python gap_cats_dogs.py                          # four networks, 7 epochs each; fetches 800 MB
    python gap_cats_dogs.py --epochs 2 --synthetic   # a quick look, without a download

Result, seeds 0 to 2, training / validation accuracy: fc 0.981 / 0.763 +- 0.043, fc_dropout 0.915 /
0.787 +- 0.049, gap 0.809 / 0.687 +- 0.134, avgpool 0.878 / 0.765 +- 0.054. So fc does overfit, but
pooling is not better. From one epoch to the next, validation can change by more than 0.1.

Differences from the article:
1. Each network trains its own head, from the same first weights. The article's networks share one.
2. `gap` averages whole feature maps. The article's "GAP" averages squares of 2x2: here `avgpool`.
3. Each validation image counts once; the article's ten batches of 1,000 repeat its 2,326 images.
4. The test images, which the article never uses, are evaluated once, at the end.
5. Images are decoded once, resized, and rounded to whole numbers. The network divides by 255.
6. All training images are shuffled together, not within a window of 1,000.
"""

# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["tensorflow>=2.20,<3", "keras>=3.10,<4", "tensorboard>=2.20,<3", "numpy>=2,<3",
#     "tensorflow-datasets>=4.9.8,<5", "importlib_resources>=6", "matplotlib>=3.9,<4"]
# ///

import argparse
import functools
import json
import os
import pathlib
import sys
import time

os.environ["KERAS_BACKEND"] = "tensorflow"  # even where keras.json names another one
# Colab's tensorflow-metadata 1.21 refuses Colab's protobuf 5.29, though both work together.
# This line can go once Colab has protobuf 6.31.
os.environ["TEMPORARILY_DISABLE_PROTOBUF_VERSION_CHECK"] = "true"
if "ipykernel" not in sys.modules:
    os.environ["MPLBACKEND"] = "agg"  # only a notebook shows figures
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from keras import layers

SCRIPT = "gap_cats_dogs"
MODULES = (tf, keras, np)  # results.json names their versions
ARTICLE = {  # after 7 epochs; after the 10 in its code fc has 0.9876, in validation 0.8420
    "fc": {"val_accuracy": 0.8130},
    "fc_dropout": {"accuracy": 0.9211, "val_accuracy": 0.8272},
    "gap": {},  # the article does not train this one
    "avgpool": {"accuracy": 0.8905, "val_accuracy": 0.8533},
}
IMAGE_SIZE = 100
SYNTHETIC_COUNTS = (800, 96, 104)  # images to train, to validate and to test
VERBOSE = 1 if sys.stdout.isatty() or "ipykernel" in sys.modules else 2  # a bar, or plain lines


# --- Data ---
# The photographs have many sizes. They are labelled 0 for a cat and 1 for a dog.
def load_data(args):
    """Return the sets to train, to validate and to test: images (height, width, 3) and labels."""
    if args.synthetic:
        return [synthetic_photographs(count) for count in SYNTHETIC_COUNTS]
    if not hasattr(tfds, "load"):  # an earlier cell imported it without the line for protobuf above
        advice = 'pip install "tensorflow-metadata<1.18" and restart Python'
        raise SystemExit(f"error: tensorflow_datasets was only half imported; {advice}")
    print("cats_vs_dogs is downloaded once (800 MB); --synthetic needs no network")
    split = ["train[:80%]", "train[80%:90%]", "train[90%:]"]
    try:
        return tfds.load("cats_vs_dogs", split=split, as_supervised=True, data_dir=args.data_dir)
    except Exception as error:  # TFDS raises many kinds of exceptions
        reason = f"{type(error).__name__}: {error}"
        raise SystemExit(f"error: no cats_vs_dogs ({reason}); use --synthetic") from None


def synthetic_photographs(count):
    """Return made-up images (height, width, 3), uint8: rows of colour (0) or columns (1)."""

    def draw(i):
        bands = tf.random.stateless_uniform([8, 1, 3], (count, i), 0.0, 255.0)
        image = tf.where(i % 2 == 0, bands, tf.image.transpose(bands))  # broadcast to (8, 8, 3)
        size = tf.random.stateless_uniform([2], (i, count), minval=80, maxval=160, dtype=tf.int32)
        return tf.cast(tf.image.resize(image, size), tf.uint8), i % 2

    return tf.data.Dataset.range(count).map(draw)


def plot_samples(run, cat_train):
    """Draw two of the images; the axes show that each has a size of its own."""
    figure, axes = plt.subplots(1, 2)
    for axis, (image, _) in zip(axes, cat_train.take(2)):
        axis.imshow(image)
    figure.savefig(run.folder / "samples.png")


def pre_process_image(image, label):
    """Resize an image to (100, 100, 3); uint8 needs a quarter of the memory of float32."""
    image = tf.image.resize(image, (IMAGE_SIZE, IMAGE_SIZE))  # float32
    return tf.cast(tf.round(image), tf.uint8), label


def make_datasets(sets, batch_size, window, seed):
    """Return the training set, which repeats, and the others, each in batches."""
    cat_train, cat_valid, cat_test = sets
    cat_train = cat_train.shuffle(window, seed=seed).repeat().batch(batch_size)
    cat_train = cat_train.prefetch(tf.data.AUTOTUNE)
    return cat_train, cat_valid.batch(240), cat_test.batch(240)  # 1,000 images take gigabytes


# --- Model ---
# All networks begin with a head of the same kind. What follows it is what the article compares.
def build_head():
    """Return the convolutional head. It turns pixels (100, 100, 3) into maps (10, 10, 64)."""
    head = keras.Sequential([keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3))])
    head.add(layers.Rescaling(1 / 255))
    head.add(layers.Conv2D(32, (3, 3)))  # (98, 98, 32)
    head.add(layers.BatchNormalization())
    head.add(layers.Activation("relu"))
    head.add(layers.MaxPooling2D((2, 2)))  # (49, 49, 32)

    head.add(layers.Conv2D(32, (3, 3)))  # (47, 47, 32)
    head.add(layers.BatchNormalization())
    head.add(layers.Activation("relu"))
    head.add(layers.MaxPooling2D((2, 2)))  # (23, 23, 32)

    head.add(layers.Conv2D(64, (3, 3)))  # (21, 21, 64)
    head.add(layers.BatchNormalization())
    head.add(layers.Activation("relu"))
    head.add(layers.MaxPooling2D((2, 2)))  # (10, 10, 64)
    return head


def build_model(arm):
    """Return the compiled network `arm`. It turns pixels into the probability of a dog."""
    head = build_head()  # made first, so that one seed gives all arms the same head
    if arm in ("fc", "fc_dropout"):
        standard_classifier = keras.Sequential()
        standard_classifier.add(layers.Flatten())  # (6400,)
        standard_classifier.add(layers.BatchNormalization())
        standard_classifier.add(layers.Dense(100))
        standard_classifier.add(layers.Activation("relu"))
        if arm == "fc_dropout":  # the article's standard_classifier_with_do
            standard_classifier.add(layers.Dropout(0.5))
        standard_classifier.add(layers.BatchNormalization())
        standard_classifier.add(layers.Dense(100))
        standard_classifier.add(layers.Activation("relu"))
        standard_classifier.add(layers.Dense(1, activation="sigmoid"))
        model = keras.Sequential([head, standard_classifier])  # the article's standard_model
    else:
        average_pool = keras.Sequential()
        if arm == "gap":
            average_pool.add(layers.GlobalAveragePooling2D())  # (64,)
        else:
            average_pool.add(layers.AveragePooling2D((2, 2)))  # (5, 5, 64)
            average_pool.add(layers.Flatten())  # (1600,)
        average_pool.add(layers.Dense(1, activation="sigmoid"))
        model = keras.Sequential([head, average_pool])  # the article's pool_model
    model.compile(keras.optimizers.Adam(), "binary_crossentropy", metrics=["accuracy"])
    return model


# --- Training ---
# As in the article, an epoch is 23262 // 64 batches: 1.25 times through the training images.
def train(arm, run, sets):
    """Train a network, or go on after its last finished epoch, and record its final numbers."""
    args = run.args
    saver = SaveEpochs(run, arm)
    keras.utils.set_random_seed(args.seed)
    window = 1000 if args.no_cache else len(sets[0])  # images in memory can all be shuffled
    cat_train, cat_valid, cat_test = make_datasets(sets, args.batch_size, window, args.seed)
    image_count = sum(len(dataset) for dataset in sets)  # 23262
    steps = args.steps_per_epoch or max(1, image_count // args.batch_size)
    model = keras.models.load_model(saver.path) if saver.path.exists() else build_model(arm)
    print(f"{arm}: {model.layers[-1].count_params():,} parameters after the head")
    model.fit(
        cat_train,
        steps_per_epoch=steps,
        epochs=args.epochs,
        initial_epoch=int(model.optimizer.iterations.numpy()) // steps,
        validation_data=cat_valid,
        shuffle=False,  # the dataset is shuffled already
        verbose=VERBOSE,
        callbacks=[keras.callbacks.TensorBoard(run.folder / arm), saver],
    )
    saver.record["final"]["test_accuracy"] = model.evaluate(cat_test, verbose=VERBOSE)[1]
    saver.record["final"]["parameters"] = model.count_params()


# --- Figures ---
# As in the article, a pair of curves for each network: training and validation.
def plot(run):
    """Draw accuracy and loss by epoch, the networks side by side."""
    arms = run.results["arms"]
    for metric in ("accuracy", "loss"):
        figure, axes = plt.subplots(1, len(arms), sharey=True, squeeze=False, figsize=(11, 5))
        figure.suptitle(f"{run.results['data']}: {metric}")
        for axis, (arm, record) in zip(axes[0], arms.items()):  # a row, even of one
            epochs = range(1, len(record["history"][metric]) + 1)
            axis.plot(epochs, record["history"][metric], "r.-", label="training")
            axis.plot(epochs, record["history"][f"val_{metric}"], "b.-", label="validation")
            axis.set(title=arm, xlabel="epoch")
        axis.legend()
        figure.savefig(run.folder / f"{metric}.png")


# --- Command line ---
def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of each arm."""
    parser = make_parser("--epochs", default=7, several=True)
    add = parser.add_argument
    add("--steps-per-epoch", type=int, help="batches per epoch; if not given, images // batch size")
    add("--synthetic", action="store_true", help="use small made-up data: nothing is downloaded")
    add("--resume", metavar="RUN_DIR", help="go on with the run in this folder")
    add("--batch-size", type=int, default=64, help="images per batch")
    add("--data-dir", help="folder of cats_vs_dogs; if not given, that of TFDS")
    add("--no-cache", action="store_true", help="decode all images in each epoch, to save memory")
    add("--arms", nargs="+", choices=ARTICLE, default=list(ARTICLE), help="networks to train")
    args, results = read_run(parser, argv)
    data = "synthetic" if args.synthetic else "cats_vs_dogs"
    with Run(args, data, results=results) as run:
        sets = load_data(args)
        plot_samples(run, sets[0])
        sets = [dataset.map(pre_process_image, tf.data.AUTOTUNE) for dataset in sets]
        if not args.no_cache:
            sets = [dataset.cache() for dataset in sets]  # 700 MB of memory
        print(f"The article's 500 nodes on (7, 7, 64) maps: {7 * 7 * 64 * 500:,} weights to learn")
        mirrored = args.device == "all"  # each device then gets a part of every batch
        strategy = tf.distribute.MirroredStrategy() if mirrored else tf.distribute.get_strategy()
        with strategy.scope():
            for arm in dict.fromkeys(args.arms):  # each of them once
                train(arm, run, sets)
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


# --- Frame, resume: the same text in every script that can go on after an interruption ---
def read_run(parser, argv):
    """Return the flags, and the results of the run that --resume names (else None).

    The flags are those of that run. Only --epochs, --max-steps and --device may change.
    """
    args = parse_flags(parser, argv)
    if args.resume is None:
        return args, None
    try:
        results = json.loads(pathlib.Path(args.resume, "results.json").read_text())
    except (OSError, ValueError) as error:
        parser.error(f"argument --resume: {error}")
    if results["script"] != SCRIPT:
        parser.error(f"argument --resume: {args.resume} is a run of {results['script']}.py")
    parser.set_defaults(**results["config"])
    args = parse_flags(parser, argv)
    for name in results["config"].keys() - {"epochs", "max_steps", "device", "resume"}:
        if getattr(args, name) != results["config"][name]:
            parser.error(f"argument --{name.replace('_', '-')}: must be as in the run to resume")
    return args, results


# --- Frame, fit: the same text in every script that calls fit and can go on ---
class SaveEpochs(keras.callbacks.Callback):
    """Writes each epoch to results.json, then saves the model; a kill never leaves half a file."""

    def __init__(self, run, arm):
        super().__init__()
        self.run = run
        self.path = run.folder / f"{arm}.keras"
        new = {"history": {}, "final": {}, "seconds": 0.0}
        self.record = run.results["arms"].setdefault(arm, new)
        self.start = time.perf_counter() - self.record["seconds"]

    def on_epoch_end(self, epoch, logs=None):
        for metric, value in logs.items():  # an epoch trained again replaces its earlier record
            self.record["history"].setdefault(metric, [])[epoch:] = [float(value)]
            self.record["final"][metric] = float(value)
        self.record["seconds"] = time.perf_counter() - self.start
        self.run.write()
        self.model.save(self.path.with_suffix(".tmp.keras"))
        os.replace(self.path.with_suffix(".tmp.keras"), self.path)


if __name__ == "__main__":
    main()
