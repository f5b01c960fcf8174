"""A prepared cats_vs_dogs of a few made-up images, and ways to damage it."""

import pathlib

import numpy as np
import tensorflow_datasets as tfds

GREYS = range(0, 200, 5)  # 40 images, each of one grey level, and each of another shape
# what is done to the folder, and a word of the error line that tells it
DAMAGES = [
    "no such folder",
    "a file",
    "empty",
    "half",
    "cut off",
    "one byte",
    "no info",
    "bad info",
]


def prepare(data_dir):
    """Let TFDS write its cats_vs_dogs into `data_dir`, with images of our own."""
    builder = tfds.builder("cats_vs_dogs", data_dir=data_dir)

    def examples():
        for i, grey in enumerate(GREYS):
            image = np.full((30 + i, 60 - i, 3), grey, "uint8")
            yield i, {"image": image, "image/filename": f"{i}.jpg", "label": i % 2}

    builder._split_generators = lambda manager: {"train": examples()}
    builder.download_and_prepare()


def damage(data_dir, kind):
    """Do to the prepared folder what `kind` says; return the --data-dir to use."""
    (records,) = pathlib.Path(data_dir).glob("cats_vs_dogs/*/*.tfrecord*")
    info, content = records.parent / "dataset_info.json", records.read_bytes()
    if kind == "no such folder":
        return pathlib.Path(data_dir) / "nowhere"
    if kind == "a file":
        return records
    if kind == "empty":
        (records.parent.parent / "elsewhere").mkdir()
        return records.parent.parent / "elsewhere"
    if kind == "half":
        records.write_bytes(content[: len(content) // 2])
    if kind == "cut off":  # between two records: only their number tells
        length = int.from_bytes(content[:8], "little") + 16
        records.write_bytes(content[:length])
    if kind == "one byte":
        middle = len(content) // 2
        records.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    if kind == "no info":
        info.unlink()
    if kind == "bad info":
        info.write_text("{")
    return data_dir


# A script whose archive comes from a server here that stops after half of it.
HALF_A_DOWNLOAD = """
import http.server, importlib, os, sys, threading
os.environ["no_proxy"] = "127.0.0.1"
class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(b"PK" + bytes(500000))
    def log_message(self, *args):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
script = importlib.import_module(sys.argv[1])
from tensorflow_datasets.image_classification import cats_vs_dogs
script.URL = f"http://127.0.0.1:{server.server_port}/"
cats_vs_dogs._URL = script.URL + script.ARCHIVE
for _ in range(2):  # what the first try leaves, the second must not trust
    try:
        script.run_as_command(lambda: script.main(["--epochs", "1"]))
    except SystemExit as stop:
        print("exit", stop.code)
"""
