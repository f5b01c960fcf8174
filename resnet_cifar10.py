"""Train a ResNet on CIFAR-10, and a plain network without identity paths, and compare them.

Article: "Introduction to ResNet in TensorFlow 2" (Adventures in Machine Learning).

A deep network can do worse than a shallow one, even on the images it was trained on, because layers
do not easily learn to pass on their input unchanged. A residual block adds its input to its output,
so it only has to learn what should change. This script trains a network of ten such blocks, and one
of ten plain blocks, which add nothing.

    python resnet_cifar10.py                          # both networks, 30 epochs each
    python resnet_cifar10.py --epochs 1 --synthetic   # a quick look, without a download

Result (seeds 0 to 2): in training the ResNet ends at 0.742 +- 0.008, the plain network at 0.685 +-
0.011, so the article's lead of 5 to 6 points holds. Validation: 0.673 +- 0.040 and 0.648 +- 0.008.

Differences from the article:
1. Images are shuffled before they are batched. In the article the same 64 always stay together.
2. Each test image counts once. The article's three batches of 5,000 count half of them twice.
3. In Keras 3 `write_images` writes no images, so a callback here writes the first kernels.
4. Both networks start from the same seed, and each writes to a folder of its own.
"""

# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["tensorflow>=2.20,<3", "keras>=3.10,<4", "tf-keras>=2.20,<3",
#     "tensorboard>=2.20,<3", "numpy>=2,<3", "matplotlib>=3.9,<4"]
# ///

import argparse
import functools
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

os.environ["KERAS_BACKEND"] = "tensorflow"  # even where keras.json names another one
if "ipykernel" not in sys.modules:
    os.environ["MPLBACKEND"] = "agg"  # only a notebook shows figures
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

if "TF_CONFIG" in os.environ:  # Keras 3 cannot fit on several machines (keras issue 20585)
    import tf_keras as keras

    ARCHIVE = "cifar-10-batches-py.tar.gz"  # what it calls the downloaded cifar-10-python.tar.gz
else:
    import keras

    ARCHIVE = "cifar-10-batches-py-target_archive"

layers = keras.layers

SCRIPT = "resnet_cifar10"
MODULES = (tf, keras, np)  # results.json names their versions
ARTICLE = {
    "resnet": {"acc": 0.7446, "val_acc": 0.6445},
    "plain": {"acc": 0.6876, "val_acc": 0.6394},
}
NUM_RES_NET_BLOCKS = 10


# --- Data ---
# CIFAR-10 holds small photographs of ten kinds of animals and vehicles.
def load_data(synthetic):
    """Return (images, labels) to train and to test: (n, 32, 32, 3), uint8, and (n, 1)."""
    if synthetic:
        return synthetic_data(2000), synthetic_data(500)
    print(f"~/.keras/datasets/{ARCHIVE} is fetched once (170 MB); --synthetic needs no network")
    return keras.datasets.cifar10.load_data()


def synthetic_data(count):
    """Return made-up images. Each of the ten classes is a pattern of 4 x 4 squares, plus noise."""
    patterns = np.random.default_rng(0).uniform(0, 128, (10, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    rng = np.random.default_rng(count)
    labels = rng.integers(0, 10, (count, 1), "uint8")
    images = patterns[labels[:, 0]] + rng.uniform(0, 127, (count, 32, 32, 3))
    return images.astype("uint8"), labels


def make_datasets(train_data, test_data, batch_size, seed):
    """Return the training set, which repeats, and the validation set: images (batch, 24, 24, 3)."""

    def crop(images, labels):
        return tf.cast(tf.image.central_crop(images, 0.75), tf.float32) / 255.0, labels

    def crop_and_flip(images, labels):
        images, labels = crop(images, labels)
        return tf.image.random_flip_left_right(images), labels

    train_dataset = tf.data.Dataset.from_tensor_slices(train_data)
    train_dataset = train_dataset.shuffle(len(train_data[0]), seed=seed).repeat().batch(batch_size)
    train_dataset = train_dataset.map(crop_and_flip).prefetch(tf.data.AUTOTUNE)
    valid_dataset = tf.data.Dataset.from_tensor_slices(test_data).batch(1000)
    return train_dataset, valid_dataset.map(crop).prefetch(tf.data.AUTOTUNE)


# --- Model ---
# The residual block adds its input to its output: that line is what the article is about.
def res_net_block(input_data, filters, conv_size):
    """Return relu(F(x) + x) for x of shape (batch, h, w, filters); F is two convolutions."""
    x = layers.Conv2D(filters, conv_size, activation="relu", padding="same")(input_data)
    x = layers.BatchNormalization()(x)
    x = layers.Conv2D(filters, conv_size, activation=None, padding="same")(x)
    x = layers.BatchNormalization()(x)
    x = layers.Add()([x, input_data])  # the identity path
    return layers.Activation("relu")(x)


def non_res_block(input_data, filters, conv_size):
    """Return F(x) for x of shape (batch, h, w, filters); F is two convolutions, both with ReLU."""
    x = layers.Conv2D(filters, conv_size, activation="relu", padding="same")(input_data)
    x = layers.BatchNormalization()(x)
    x = layers.Conv2D(filters, conv_size, activation="relu", padding="same")(x)
    return layers.BatchNormalization()(x)


def build_model(arm):
    """Return the compiled network `arm`, which is "resnet" or "plain"."""
    block = res_net_block if arm == "resnet" else non_res_block
    inputs = keras.Input(shape=(24, 24, 3))
    x = layers.Conv2D(32, 3, activation="relu")(inputs)  # (22, 22, 32)
    x = layers.Conv2D(64, 3, activation="relu")(x)  # (20, 20, 64)
    x = layers.MaxPooling2D(3)(x)  # (6, 6, 64)
    for _ in range(NUM_RES_NET_BLOCKS):
        x = block(x, 64, 3)
    x = layers.Conv2D(64, 3, activation="relu")(x)  # (4, 4, 64)
    x = layers.GlobalAveragePooling2D()(x)  # (64,)
    x = layers.Dense(256, activation="relu")(x)
    x = layers.Dropout(0.5)(x)
    outputs = layers.Dense(10, activation="softmax")(x)
    model = keras.Model(inputs, outputs, name=arm)
    model.compile(keras.optimizers.Adam(), "sparse_categorical_crossentropy", metrics=["acc"])
    return model


# --- Training ---
# Both networks are trained alike. As in the article an epoch is 195 batches; all images fill 781.
def write_kernels(model, writer, epoch):
    """Write the 32 kernels of the first convolution to TensorBoard, as images of 3 x 3 pixels."""
    kernels = tf.transpose(model.layers[1].kernel, (3, 0, 1, 2))  # (32, 3, 3, 3)
    lowest, highest = tf.reduce_min(kernels), tf.reduce_max(kernels)
    with writer.as_default(step=epoch):
        tf.summary.image("kernels", (kernels - lowest) / (highest - lowest), max_outputs=32)


def train(arm, run, strategy, train_data, test_data):
    """Train a network, or go on after its last finished epoch, and record its final numbers."""
    args = run.args
    saver = SaveEpochs(run, arm)
    keras.utils.set_random_seed(args.seed)
    train_dataset, valid_dataset = make_datasets(train_data, test_data, args.batch_size, args.seed)
    with strategy.scope():
        model = keras.models.load_model(saver.path) if saver.path.exists() else build_model(arm)
    writer = tf.summary.create_file_writer(str(run.folder / arm))
    kernels = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: write_kernels(model, writer, epoch)
    )
    model.fit(
        train_dataset,
        epochs=args.epochs,
        initial_epoch=int(model.optimizer.iterations.numpy()) // args.steps_per_epoch,
        steps_per_epoch=args.steps_per_epoch,
        validation_data=valid_dataset,
        shuffle=False,  # the dataset is shuffled already
        verbose=1 if sys.stdout.isatty() or "ipykernel" in sys.modules else 2,
        callbacks=[keras.callbacks.TensorBoard(run.folder / arm), saver, kernels],
    )
    saver.record["final"]["parameters"] = model.count_params()


# --- Figures ---
# The article's two: accuracy in training and in validation.
def plot(run):
    """Draw the accuracy of both networks by epoch."""
    for metric, name in {"acc": "training", "val_acc": "validation"}.items():
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for arm, record in run.results["arms"].items():
            values = record["history"][metric]
            axes.plot(range(1, len(values) + 1), values, ".-", label=arm)
        axes.set(title=run.results["data"], xlabel="epoch", ylabel=f"{name} accuracy")
        axes.legend()
        figure.savefig(run.folder / f"{name}_accuracy.png")


# --- Command line ---
def make_strategy(run):
    """Return how batches are shared: over all devices, over TF_CONFIG's machines, or not at all."""
    if run.args.device == "all":
        return tf.distribute.MirroredStrategy()
    if "TF_CONFIG" not in os.environ:
        return tf.distribute.get_strategy()
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    if not strategy.extended.should_checkpoint:  # only the first machine keeps its files
        copy_or_move = shutil.copytree if run.args.resume else shutil.move
        run.folder = copy_or_move(run.folder, pathlib.Path(tempfile.mkdtemp(), "run"))
    return strategy


def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of each arm."""
    parser = make_parser("--epochs", default=30, several=True)
    add = parser.add_argument
    add("--steps-per-epoch", type=int, default=195, help="batches per epoch")
    add("--synthetic", action="store_true", help="use small made-up data: nothing is downloaded")
    add("--resume", metavar="RUN_DIR", help="go on with the run in this folder")
    add("--batch-size", type=int, default=64, help="images per batch")
    add("--arms", nargs="+", choices=ARTICLE, default=list(ARTICLE), help="networks to train")
    args, results = read_run(parser, argv)
    data = "synthetic" if args.synthetic else "CIFAR-10"
    with Run(args, data, results=results) as run:
        strategy = make_strategy(run)
        train_data, test_data = load_data(args.synthetic)
        for arm in dict.fromkeys(args.arms):  # each of them once
            train(arm, run, strategy, train_data, test_data)
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
