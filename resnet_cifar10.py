"""Train a ResNet on CIFAR-10, and a plain network without identity paths, and compare them.

Article: "Introduction to ResNet in TensorFlow 2" (Adventures in Machine Learning).

A deep network can do worse than a shallow one, even on the images it was trained on: its layers do
not easily learn to pass on what they get. A residual block adds its input to its output, so it only
has to learn what should change. Here ten such blocks are compared with ten plain ones.

    python resnet_cifar10.py                          # both networks, 30 epochs each
    python resnet_cifar10.py --epochs 1 --synthetic   # a quick look, without a download

Result (seeds 0 to 2): in training the ResNet ends at 0.742 +- 0.007, the plain network at 0.685 +-
0.011, so the article's lead of 5 to 6 points holds. Validation: 0.700 +- 0.007 and 0.648 +- 0.008.

Differences from the article:
1. Images are shuffled before they are batched. In the article the same 64 always stay together.
2. Each test image counts once. The article's three `validation_steps` count half of them twice.
3. Both networks start from the same seed, and each writes to a folder of its own.
"""

# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = ["tensorflow>=2.20,<3", "keras>=3.10,<4", "tf-keras>=2.20,<3",
#     "tensorboard>=2.20,<3", "numpy>=2,<3", "matplotlib>=3.9,<4"]
# ///

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time

os.environ["KERAS_BACKEND"] = "tensorflow"  # even where keras.json names another one
import keras
import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf
from keras import layers

SCRIPT = "resnet_cifar10"
MODULES = (tf, keras, np)  # results.json names their versions
ARTICLE = {
    "resnet": {"acc": 0.7446, "val_acc": 0.6445},
    "plain": {"acc": 0.6876, "val_acc": 0.6394},
}


# %% Data
# CIFAR-10 holds small photographs of ten kinds of animals and vehicles.
def load_data(synthetic):
    """Return (images, labels) to train and to test: (n, 32, 32, 3), uint8, and (n, 1)."""
    if synthetic:
        return synthetic_data(2000), synthetic_data(500)
    folder = os.environ.get("KERAS_HOME", "~/.keras")
    print(f"CIFAR-10 (170 MB) is fetched once, to {folder}/datasets; --synthetic needs no network")
    return keras.datasets.cifar10.load_data()


def synthetic_data(count):
    """Return made-up images. Each of the ten classes is a pattern of 4 x 4 squares, plus noise."""
    patterns = np.random.default_rng(0).uniform(0, 128, (10, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    rng = np.random.default_rng(count)
    labels = rng.integers(0, 10, (count, 1), "uint8")
    return np.uint8(patterns[labels[:, 0]] + rng.uniform(0, 127, (count, 32, 32, 3))), labels


def make_datasets(train_data, test_data, args, steps=0):
    """Return the training set, which repeats, and the validation set: images (batch, 24, 24, 3)."""

    def crop(images, labels):
        return tf.cast(tf.image.central_crop(images, 0.75), tf.float32) / 255.0, labels

    def crop_and_flip(images, labels):
        images, labels = crop(images, labels)
        return tf.image.random_flip_left_right(images), labels

    train_dataset = tf.data.Dataset.from_tensor_slices(train_data)
    train_dataset = train_dataset.shuffle(len(train_data[0]), seed=args.seed).repeat()
    train_dataset = train_dataset.skip(steps * args.batch_size)  # a resumed run has seen them
    train_dataset = train_dataset.batch(args.batch_size).map(crop_and_flip)
    valid_dataset = tf.data.Dataset.from_tensor_slices(test_data).batch(1000).map(crop)
    return train_dataset.prefetch(tf.data.AUTOTUNE), valid_dataset.prefetch(tf.data.AUTOTUNE)


# %% Model
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


def build_model(arm, num_res_net_blocks=10):
    """Return the compiled network `arm`, which is "resnet" or "plain"."""
    block = res_net_block if arm == "resnet" else non_res_block
    inputs = keras.Input(shape=(24, 24, 3))
    x = layers.Conv2D(32, 3, activation="relu")(inputs)  # (22, 22, 32)
    x = layers.Conv2D(64, 3, activation="relu")(x)  # (20, 20, 64)
    x = layers.MaxPooling2D(3)(x)  # (6, 6, 64)
    for _ in range(num_res_net_blocks):
        x = block(x, 64, 3)
    x = layers.Conv2D(64, 3, activation="relu")(x)  # (4, 4, 64)
    x = layers.GlobalAveragePooling2D()(x)  # (64,)
    x = layers.Dense(256, activation="relu")(x)
    x = layers.Dropout(0.5)(x)
    outputs = layers.Dense(10, activation="softmax")(x)
    model = keras.Model(inputs, outputs, name=arm)
    model.compile(keras.optimizers.Adam(), loss="sparse_categorical_crossentropy", metrics=["acc"])
    return model


# %% Training
# Both networks are trained alike. As in the article an epoch is 195 batches; all images fill 781.
def train(arm, run, train_data, test_data):
    """Train a network, or go on after its last finished epoch."""
    args = run.args
    keras.utils.set_random_seed(args.seed)
    path = run.folder / f"{arm}.keras"  # in a new run it is not there yet
    model = keras.models.load_model(path) if path.exists() else build_model(arm)
    steps = int(model.optimizer.iterations.numpy())
    train_dataset, valid_dataset = make_datasets(train_data, test_data, args, steps)
    # `write_images` writes none, as in the article: histogram_freq, which it needs, is 0.
    tensor_board = keras.callbacks.TensorBoard(log_dir=run.events / arm, write_images=True)
    epochs_done = steps // args.steps_per_epoch
    print(f"\n{arm}: {epochs_done} of {args.epochs} epochs are done")
    model.fit(
        train_dataset,
        epochs=args.epochs,
        initial_epoch=epochs_done,
        steps_per_epoch=args.steps_per_epoch,
        validation_data=valid_dataset,
        callbacks=[tensor_board, save_epochs(run, arm, model)],
        shuffle=False,  # the dataset is shuffled already
        verbose=1 if os.isatty(1) or "ipykernel" in sys.modules else 2,  # a bar, or a line an epoch
    )
    run.conclude(arm, {"parameters": model.count_params()})


# %% Figures
# The article's two: accuracy in training and in validation.
def plot(run):
    """Draw the accuracy of both networks by epoch."""
    for metric, name in {"acc": "training", "val_acc": "validation"}.items():
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for arm, record in run.results["arms"].items():
            values = record["history"][metric]
            axes.plot(range(1, len(values) + 1), values, ".-", label=arm)
        axes.set(title=run.results["data"], xlabel="epoch", ylabel=f"{name} accuracy")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
        figure.savefig(run.folder / f"{name}_accuracy.png")


# %% Command line
def main(argv=None):
    """Run the script with the flags `argv`; return the final numbers of each arm."""
    parser = make_parser("--epochs", default=30, devices=("auto", "cpu", "gpu", "all"))
    add = parser.add_argument
    add("--steps-per-epoch", type=int, default=195, help="batches per epoch")
    add("--synthetic", action="store_true", help="use small made-up data: nothing is downloaded")
    add("--resume", type=os.path.expanduser, metavar="RUN_DIR", help="go on with this run")
    add("--batch-size", type=int, default=64, help="images per batch")
    add("--arms", nargs="+", choices=ARTICLE, default=list(ARTICLE), help="networks to train")
    args, earlier = read_run(parser, argv)
    strategy = make_strategy(args)
    if earlier and keras.__name__ not in earlier["versions"]:
        parser.error("argument --resume: TF_CONFIG must be set, or not set, as in that run")
    train_data, test_data = load_data(args.synthetic)
    run = Run(args, "synthetic" if args.synthetic else "CIFAR-10", earlier)
    with strategy.scope():
        for arm in args.arms:
            train(arm, run, train_data, test_data)
    plot(run)
    return run.report()


# %% Several GPUs, several machines
def make_strategy(args):
    """Return what shares each batch: all GPUs, all machines in TF_CONFIG, or nothing."""
    if "TF_CONFIG" not in os.environ:
        all_gpus = args.device == "all"
        return tf.distribute.MirroredStrategy() if all_gpus else tf.distribute.get_strategy()
    global keras, layers, MODULES
    import tf_keras as keras  # Keras 3 cannot train on several machines (keras issue 20585)

    layers, MODULES = keras.layers, (tf, keras, np)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    if not strategy.extended.should_checkpoint:  # only the first machine keeps its files
        args.logdir = tempfile.mkdtemp()
        if args.resume:
            args.resume = shutil.copytree(args.resume, f"{args.logdir}/run")
    return strategy


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
