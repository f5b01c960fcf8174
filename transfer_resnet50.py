"""Tell cats from dogs with a pretrained ResNet50, and with a small network from scratch.

Article: "Transfer learning in TensorFlow 2 tutorial" (Adventures in Machine Learning).

A network trained on the photographs of ImageNet has learned features that help with other images
too. Here ResNet50 is frozen, and all that is trained is one neuron after global average pooling.

    python transfer_resnet50.py                          # both, 7 epochs each; fetches 900 MB
    python transfer_resnet50.py --epochs 2 --synthetic   # a quick look, without a download

Result (seeds 0 to 2, photographs stored at 104x104): the small network ends at 0.878 +- 0.001 in
training, 0.765 +- 0.054 in validation, 0.787 +- 0.062 in test. ResNet50's weights were not at hand.

Differences from the article:
1. Each validation image counts once, in batches of 240. The article's 10,000 are 2,326, repeated.
2. The test images, which the article never uses, are evaluated once, at the end.
3. Images are decoded once, and rounded to whole numbers from 0 to 255, which the networks take.
4. All training images are shuffled together, not within a window of 1,000.
5. ResNet50 gets pixels as in its own training: BGR minus ImageNet's mean, not RGB from 0 to 1.
6. ResNet50, which is frozen, sees each image once, not in each epoch (or: --no-cache-features).
"""

# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["tensorflow>=2.20,<3", "keras>=3.10,<4", "tensorboard>=2.20,<3", "numpy>=2,<3",
#     "tensorflow-datasets>=4.9.8,<5", "importlib_resources>=6", "matplotlib>=3.9,<4"]
# ///

import argparse
import contextlib
import json
import os
import pathlib
import sys
import time

os.environ["KERAS_BACKEND"] = "tensorflow"  # even where keras.json names another one
# Colab's tensorflow-metadata 1.21 refuses its protobuf 5.29. This line can go once it has 6.31.
os.environ["TEMPORARILY_DISABLE_PROTOBUF_VERSION_CHECK"] = "true"
if sys.version_info >= (3, 11):  # until TFDS itself installs importlib_resources (issue 11212)
    import importlib.resources.abc

    sys.modules.setdefault("importlib_resources", importlib.resources)
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from keras import layers
from keras.applications import resnet50
from tensorflow_datasets.core.download import downloader

SCRIPT = "transfer_resnet50"
MODULES = (tf, keras, np)  # results.json names their versions
ARTICLE = {  # after 7 epochs
    "cnn": {"accuracy": 0.89, "val_accuracy": 0.85},
    "resnet50": {"accuracy": 0.9012, "val_accuracy": 0.8875},
}
IMAGE_SIZE = 100
TRAIN_BATCH_SIZE = 64
SYNTHETIC_COUNTS = (160, 24, 16)  # images to train, to validate and to test
VERBOSE = 1 if os.isatty(1) or "ipykernel" in sys.modules else 2  # a bar, or a line an epoch


# %% Data
# The photographs have many sizes. They are labelled 0 for a cat and 1 for a dog.
def load_data(synthetic):
    """Return the sets to train, to validate and to test: images (height, width, 3) and labels."""
    if synthetic:
        return [synthetic_photographs(count) for count in SYNTHETIC_COUNTS]
    print("cats_vs_dogs (800 MB) is fetched once, by TFDS; --synthetic needs no network")
    downloader.MAX_RETRIES = 3  # its usual ten take three and a half minutes without a network
    splits = ["train[:80%]", "train[80%:90%]", "train[90%:]"]
    try:
        return tfds.load("cats_vs_dogs", split=splits, as_supervised=True)
    except Exception as error:  # TFDS has several kinds of its own
        raise SystemExit(f"error: no cats_vs_dogs: {type(error).__name__}: {error}") from None


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
    for axis, (image, label) in zip(axes, cat_train.take(2)):
        axis.imshow(image)
        axis.set(title="dog" if label else "cat", xlabel=run.results["data"])
    figure.savefig(run.folder / "samples.png")


def pre_process_image(image, label):
    """Resize an image to (100, 100, 3); uint8 needs a quarter of the memory of float32."""
    image = tf.image.resize(image, (IMAGE_SIZE, IMAGE_SIZE))  # float32
    return tf.cast(tf.round(image), tf.uint8), label


# %% Model
# The small network learns all its weights from these photographs, the other one only 2,049.
def build_standard_model():
    """Return the small network, compiled. It turns pixels into the probability of a dog."""
    head = keras.Sequential([keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3)), layers.Rescaling(1 / 255)])
    for filters in (32, 32, 64):  # to (49, 49, 32), (23, 23, 32), (10, 10, 64)
        head.add(layers.Conv2D(filters, (3, 3)))
        head.add(layers.BatchNormalization())
        head.add(layers.Activation("relu"))
        head.add(layers.MaxPooling2D((2, 2)))

    average_pool = keras.Sequential()
    average_pool.add(layers.AveragePooling2D((2, 2)))  # (5, 5, 64), which its text calls global
    average_pool.add(layers.Flatten())  # (1600,)
    average_pool.add(layers.Dense(1, activation="sigmoid"))
    standard_model = keras.Sequential([head, average_pool])
    standard_model.compile(optimizer="adam", loss="binary_crossentropy", metrics=["accuracy"])
    return standard_model


def build_tl_model(weights):
    """Return ResNet50, frozen and with a new end, compiled. It, too, tells cats from dogs."""
    IMG_SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)
    inputs = resnet50.preprocess_input(keras.Input(IMG_SHAPE))
    weights = None if weights == "none" else weights
    try:
        res_net = resnet50.ResNet50(weights=weights, include_top=False, input_tensor=inputs)
    except Exception as error:  # a plain one after a failed download, others for a wrong file
        raise SystemExit(f"error: no weights: {error}; use --weights FILE or --arms cnn") from None
    res_net.trainable = False
    global_average_layer = layers.GlobalAveragePooling2D()
    output_layer = layers.Dense(1, activation="sigmoid")
    tl_model = keras.Sequential([res_net, global_average_layer, output_layer])
    tl_model.compile(optimizer="adam", loss="binary_crossentropy", metrics=["accuracy"])
    return tl_model


# %% Training
# Both networks are trained alike. As in the article, an epoch is 1.25 times all training images.
def train_standard_model(run, sets):
    """Train the small network, or go on after its last finished epoch, and evaluate it."""
    path = run.folder / "cnn.keras"  # in a new run it is not there yet
    standard_model = keras.models.load_model(path) if path.exists() else build_standard_model()
    standard_model.summary()
    fit("cnn", run, standard_model, sets, saved=standard_model)
    accuracy = standard_model.evaluate(sets[2].batch(240), verbose=VERBOSE)[1]
    run.conclude("cnn", {"test_accuracy": accuracy, "parameters": standard_model.count_params()})


def train_tl_model(run, sets):
    """Train the last layer of tl_model, or go on after its last finished epoch, and evaluate it."""
    path = run.folder / "resnet50.keras"
    tl_model = keras.models.load_model(path) if path.exists() else build_tl_model(run.args.weights)
    tl_model.summary()
    trained_part, features = tl_model, sets
    if not run.args.no_cache_features:
        # Frozen layers return the same features in each epoch, so they are computed once. The last
        # layer is trained on them. It is still a layer of tl_model, with tl_model's optimizer.
        frozen_part = keras.Sequential(tl_model.layers[:-1])
        features = [compute_features(frozen_part, dataset) for dataset in sets[:2]]
        trained_part = keras.Sequential([keras.Input((2048,)), tl_model.layers[-1]])
        trained_part.compile(tl_model.optimizer, loss="binary_crossentropy", metrics=["accuracy"])
    fit("resnet50", run, trained_part, features, saved=tl_model)
    accuracy = tl_model.evaluate(sets[2].batch(240), verbose=VERBOSE)[1]
    run.conclude("resnet50", {"test_accuracy": accuracy, "parameters": tl_model.count_params()})


def compute_features(frozen_part, dataset):
    """Return a dataset of features (2048,) and labels in the place of images and labels."""
    features = frozen_part.predict(dataset.batch(64), verbose=VERBOSE)
    labels = [label for _, label in dataset.as_numpy_iterator()]
    return tf.data.Dataset.from_tensor_slices((features, labels))


def fit(arm, run, model, sets, saved):
    """Fit a model as the article does, up to epoch --epochs; after each, save the model `saved`."""
    args = run.args
    steps = int(model.optimizer.iterations.numpy())
    cat_train, cat_valid = sets[:2]
    cat_train = cat_train.shuffle(len(cat_train), seed=args.seed).repeat()
    cat_train = cat_train.skip(steps * args.batch_size)  # a resumed run has seen them
    tensor_board = keras.callbacks.TensorBoard(run.events / arm, update_freq="batch")
    epochs_done = steps // args.steps_per_epoch
    print(f"\n{arm}: {epochs_done} of {args.epochs} epochs are done")
    model.fit(
        cat_train.batch(args.batch_size).prefetch(tf.data.AUTOTUNE),
        steps_per_epoch=args.steps_per_epoch,
        epochs=args.epochs,
        initial_epoch=epochs_done,
        validation_data=cat_valid.batch(240),  # 1,000 images take gigabytes
        callbacks=[tensor_board, save_epochs(run, arm, saved)],
        shuffle=False,  # the dataset is shuffled already
        verbose=VERBOSE,
    )


# %% Figures
# The article's two: accuracy in training and in validation.
def plot(run):
    """Draw the accuracy of both networks by epoch."""
    for metric, name in {"accuracy": "training", "val_accuracy": "validation"}.items():
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for arm, record in run.records.items():
            values = record["history"][metric]
            axes.plot(range(1, len(values) + 1), values, ".-", label=arm)
        axes.set(title=run.results["data"], xlabel="epoch", ylabel=f"{name} accuracy")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
        figure.savefig(run.folder / f"{name}_accuracy.png")


# %% Command line
def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of each arm."""
    parser = make_parser("--epochs", default=7)
    add = parser.add_argument
    add("--steps-per-epoch", type=int, help="batches per epoch; if not given, images // batch size")
    add("--synthetic", action="store_true", help="use small made-up data: nothing is downloaded")
    add("--resume", type=os.path.expanduser, metavar="RUN_DIR", help="go on with this run")
    add("--batch-size", type=int, default=TRAIN_BATCH_SIZE, help="images per batch")
    add("--weights", type=os.path.expanduser, help="imagenet (none if --synthetic), none or a file")
    add("--no-cache-features", action="store_true", help="run ResNet50 again in each epoch")
    add("--arms", nargs="+", choices=ARTICLE, default=list(ARTICLE), help="networks to train")
    args, earlier = read_run(parser, argv)
    args.weights = args.weights or ("none" if args.synthetic else "imagenet")
    if args.weights not in ("none", "imagenet") and not os.path.exists(args.weights):
        parser.error(f"argument --weights: there is no file {args.weights}")
    if earlier and "resnet50" in earlier["arms"] and args.weights != earlier["config"]["weights"]:
        parser.error("argument --weights: must be as in the run to resume")
    if args.arms[0] == "resnet50" and not earlier:
        build_tl_model(args.weights)  # a run that cannot start ends here, and leaves no folder
    sets = load_data(args.synthetic)
    if args.steps_per_epoch is None:
        args.steps_per_epoch = max(1, sum(map(len, sets)) // args.batch_size)  # 23262 // 64
    run = Run(args, "synthetic" if args.synthetic else "cats_vs_dogs", earlier)
    plot_samples(run, sets[0])
    sets = [dataset.map(pre_process_image, tf.data.AUTOTUNE).cache() for dataset in sets]  # 700 MB
    for arm in args.arms:
        keras.utils.set_random_seed(args.seed)
        train = train_standard_model if arm == "cnn" else train_tl_model
        train(run, sets)
    plot(run)
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


# %% Frame, resume: the same text in every script that can go on after an interruption
def read_run(parser, argv):
    """Return the flags, and the results of the run that --resume names, whose flags they are."""
    args = parse_flags(parser, argv)
    if args.resume is None:
        return args, None
    earlier = json.loads(pathlib.Path(args.resume, "results.json").read_text())
    if earlier["script"] != SCRIPT:
        parser.error(f"argument --resume: {args.resume} is a run of {earlier['script']}.py")
    parser.set_defaults(**earlier["config"])
    args = parse_flags(parser, argv)
    for name in earlier["config"].keys() - {"epochs", "max_steps", "device", "resume", "weights"}:
        if getattr(args, name) != earlier["config"][name]:
            parser.error(f"argument --{name.replace('_', '-')}: must be as in the run to resume")
    return args, earlier


# %% Frame, fit: the same text in every script that calls fit and can go on
def save_epochs(run, arm, model):
    """Return a callback that records each epoch, then saves `model`; a kill leaves no half file."""
    path = run.folder / f"{arm}.keras"

    def on_epoch_end(epoch, logs):
        run.record(arm, epoch + 1, logs)
        run.conclude(arm, logs)  # writes results.json, which so has every epoch of the model
        model.save(path.with_suffix(".tmp.keras"))
        os.replace(path.with_suffix(".tmp.keras"), path)

    return keras.callbacks.LambdaCallback(on_epoch_end=on_epoch_end)


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
