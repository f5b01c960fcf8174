"""Tell cats from dogs with a pretrained ResNet50, and with a small network from scratch.

Article: "Transfer learning in TensorFlow 2 tutorial" (Adventures in Machine Learning).

A network trained on the photographs of ImageNet has learned features that help with other images
too. Here ResNet50 is frozen. Its last layers are replaced by global average pooling and a single
neuron, and only this neuron is trained.

    python transfer_resnet50.py                  # both networks, 7 epochs each; fetches 900 MB
    python transfer_resnet50.py --synthetic --weights none --epochs 2   # without a download

Result, seeds 0 to 2: the small network ends at 0.878 +- 0.001 in training, 0.765 +- 0.054 in
validation and 0.787 +- 0.062 in test. ResNet50 was not measured: its weights were not available.

Differences from the article:
1. ResNet50 gets pixels as in its own training: blue, green, red, minus the mean colour of ImageNet.
   The article gives it RGB from 0 to 1 (`--preprocess article`).
2. The features of a frozen network never change, so they are computed once, and the last layer is
   trained on them (`--no-cache-features` computes them in each epoch, as in the article).
3. Each validation image counts once; the article's ten batches of 1,000 repeat its 2,326 images.
4. The test images, which the article never uses, are evaluated once, at the end.
5. Images are decoded once, resized, and rounded to whole numbers. The networks take 0 to 255.
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
from keras.applications import resnet50

SCRIPT = "transfer_resnet50"
MODULES = (tf, keras, np)  # results.json names their versions
ARTICLE = {  # after 7 epochs
    "cnn": {"accuracy": 0.89, "val_accuracy": 0.85},
    "resnet50": {"accuracy": 0.9012, "val_accuracy": 0.8875},
}
IMAGE_SIZE = 100
SYNTHETIC_COUNTS = (160, 24, 16)  # images to train, to validate and to test
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
# The small network learns all its weights from these photographs, the other one only 2,049.
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


def build_standard_model():
    """Return the small network. It turns pixels into the probability of a dog."""
    head = build_head()
    average_pool = keras.Sequential()
    average_pool.add(layers.AveragePooling2D((2, 2)))  # (5, 5, 64)
    average_pool.add(layers.Flatten())  # (1600,)
    average_pool.add(layers.Dense(1, activation="sigmoid"))
    return keras.Sequential([head, average_pool])


def build_res_net(weights, preprocess):
    """Return the frozen ResNet50 without its top. It turns pixels into maps (4, 4, 2048)."""
    pixels = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3))
    inputs = resnet50.preprocess_input(pixels) if preprocess == "imagenet" else pixels / 255.0
    weights = None if weights == "none" else weights
    try:
        res_net = resnet50.ResNet50(weights=weights, include_top=False, input_tensor=inputs)
    except Exception as error:  # Keras raises a plain Exception if a download fails
        advice = "put the named file into ~/.keras/models, or use --weights none"
        reason = f"{type(error).__name__}: {error}"
        raise SystemExit(f"error: no weights for ResNet50 ({reason}); {advice}") from None
    res_net.trainable = False
    return res_net


def build_tl_model(res_net):
    """Return the network for transfer learning. It turns pixels into the probability of a dog."""
    global_average_layer = layers.GlobalAveragePooling2D()
    output_layer = layers.Dense(1, activation="sigmoid")
    return keras.Sequential([res_net, global_average_layer, output_layer])


# --- Training ---
# As in the article, an epoch is 23262 // 64 batches: 1.25 times through the training images.
def compute_features(extractor, dataset):
    """Return a dataset of features (2048,) and labels, on which the output layer is trained."""
    features = extractor.predict(dataset.batch(64), verbose=VERBOSE)
    labels = [label for _, label in dataset.as_numpy_iterator()]
    return tf.data.Dataset.from_tensor_slices((features, labels))


def train(arm, run, sets, res_net):
    """Train a network, or go on after its last finished epoch, and record its final numbers."""
    saver = SaveEpochs(run, arm)  # made first, so that its time includes the features
    keras.utils.set_random_seed(run.args.seed)
    model = build_standard_model() if arm == "cnn" else build_tl_model(res_net)
    model.summary()
    network = model  # what is trained: the whole model, or only its output layer
    cached = arm == "resnet50" and not run.args.no_cache_features
    if cached:
        _, global_average_layer, output_layer = model.layers
        extractor = keras.Sequential([res_net, global_average_layer])
        sets = [compute_features(extractor, dataset) for dataset in sets]
        network = keras.Sequential([keras.Input((2048,)), output_layer])
        saver.path = run.folder / arm / "head.keras"  # from this file a resumed run goes on
    if saver.path.exists():
        network = keras.models.load_model(saver.path)
    else:
        network.compile(keras.optimizers.Adam(), "binary_crossentropy", metrics=["accuracy"])
    fit(arm, network, saver, sets)
    saver.record["final"]["parameters"] = model.count_params()
    if cached:
        output_layer.set_weights(network.get_weights())  # if resumed, the network is a copy
        model.save(run.folder / f"{arm}.keras")


def fit(arm, network, saver, sets):
    """Train a network up to epoch --epochs, then evaluate it on the test images."""
    args = saver.run.args
    events = saver.run.folder / arm
    if events.exists():  # a resumed run counts batches from 0 again: its curves get a new folder
        events = events / time.strftime("resumed-%Y%m%d-%H%M%S")
    cat_train, cat_valid, cat_test = make_datasets(sets, args.batch_size, len(sets[0]), args.seed)
    image_count = sum(len(dataset) for dataset in sets)  # 23262
    steps = args.steps_per_epoch or max(1, image_count // args.batch_size)
    network.fit(
        cat_train,
        steps_per_epoch=steps,
        epochs=args.epochs,
        initial_epoch=int(network.optimizer.iterations.numpy()) // steps,
        validation_data=cat_valid,
        shuffle=False,  # the dataset is shuffled already
        verbose=VERBOSE,
        callbacks=[keras.callbacks.TensorBoard(events, update_freq="batch"), saver],
    )
    saver.record["final"]["test_accuracy"] = network.evaluate(cat_test, verbose=VERBOSE)[1]


# --- Figures ---
# The article's two: accuracy in training and in validation.
def plot(run):
    """Draw the accuracy of both networks by epoch."""
    for metric, name in {"accuracy": "training", "val_accuracy": "validation"}.items():
        figure, axes = plt.subplots()
        for arm, record in run.results["arms"].items():
            values = record["history"][metric]
            axes.plot(range(1, len(values) + 1), values, ".-", label=arm)
        axes.set(title=run.results["data"], xlabel="epoch", ylabel=f"{name} accuracy")
        axes.legend()
        figure.savefig(run.folder / f"{name}_accuracy.png")


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
    add("--weights", default="imagenet", help="of ResNet50: imagenet, none (random) or a file")
    add("--preprocess", choices=["imagenet", "article"], default="imagenet", help="for ResNet50")
    add("--no-cache-features", action="store_true", help="run ResNet50 again in each epoch")
    add("--arms", nargs="+", choices=ARTICLE, default=list(ARTICLE), help="networks to train")
    args, results = read_run(parser, argv)
    data = "synthetic" if args.synthetic else "cats_vs_dogs"
    with Run(args, data, results=results) as run:
        mirrored = args.device == "all"  # each device then gets a part of every batch
        strategy = tf.distribute.MirroredStrategy() if mirrored else tf.distribute.get_strategy()
        with strategy.scope():
            keras.utils.set_random_seed(args.seed)
            res_net = None
            if "resnet50" in args.arms:  # before the data, as its weights may be missing
                res_net = build_res_net(args.weights, args.preprocess)
            sets = load_data(args)
            plot_samples(run, sets[0])
            sets = [dataset.map(pre_process_image, tf.data.AUTOTUNE).cache() for dataset in sets]
            for arm in dict.fromkeys(args.arms):  # each of them once
                train(arm, run, sets, res_net)
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
