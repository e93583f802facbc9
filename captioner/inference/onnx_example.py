"""Caption a photo with the ONNX models beside this file: python caption.py PHOTO.

Needs onnxruntime, numpy and pillow. Prints the caption, then each word with its probability and its
map: where in the photo the model looked for it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
CONFIG = json.loads((HERE / "config.json").read_text(encoding="utf-8"))
ENCODER, START, STEP = (
    onnxruntime.InferenceSession(HERE / f"{name}.onnx") for name in ("encoder", "start", "step")
)
BOS, EOS = CONFIG["bos"], CONFIG["eos"]


def preprocess(photo: str | Path) -> np.ndarray:
    """Return the whole photo, resized to a square and normalized, as float32 (1, 3, S, S)."""
    transform = CONFIG["transform"]
    image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
    resampling = Image.Resampling[transform["interpolation"].upper()]
    image = image.resize((transform["size"],) * 2, resampling, reducing_gap=3.0)
    pixels = np.asarray(image, np.float32) / 255
    pixels = (pixels - np.float32(transform["mean"])) / np.float32(transform["std"])
    return pixels.transpose(2, 0, 1)[None]


def banned(ids: list[int]) -> Any:
    """Return an index of what must not follow ``ids``: repetitions, bad ends, at last all words."""
    room = CONFIG["max_length"] - 1 - len(ids)
    if room == 0:
        return np.arange(len(CONFIG["vocabulary"])) != EOS
    bad = CONFIG["bad_endings"] if room == 1 else [EOS] if ids[-1] in CONFIG["bad_endings"] else []
    trigrams = [c for a, b, c in zip(ids, ids[1:], ids[2:]) if [a, b] == ids[-2:]]
    # Chinese and Japanese characters may be doubled.
    doubles = ids[-1] in CONFIG["may_double"] and ids[-2:-1] != ids[-1:]
    return [*CONFIG["never_written"], *([] if doubles else ids[-1:]), *trigrams, *bad]


def caption(
    photo: str | Path, beam_size: int = 3, length_penalty: float = 0.5
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the words of the best caption, their probabilities (T,) and their maps (T, 7, 7)."""
    (cells,) = ENCODER.run(None, {"images": preprocess(photo)})
    hidden, cell, *memory = START.run(None, {"cells": cells})
    names = [node.name for node in STEP.get_inputs()]
    beams: list[Any] = [(0.0, 0, [BOS], [])]  # score, parent, ids, probability and map of each
    finished: list[Any] = []
    for length in range(1, CONFIG["max_length"]):
        values = (np.array([[ids[-1] for _, _, ids, _ in beams]]), hidden, cell, *memory)
        log_probabilities, maps, hidden, cell = STEP.run(None, dict(zip(names, values)))
        longer = []
        for parent, (total, _, ids, words) in enumerate(beams):
            scores = log_probabilities[0, parent].copy()
            scores[banned(ids)] -= 1e4
            for index in np.argsort(-scores)[: 2 * beam_size].tolist():
                word = np.exp(log_probabilities[0, parent, index]), maps[0, parent]
                longer.append((total + scores[index], parent, [*ids, index], [*words, word]))
        longer = sorted(longer, key=lambda beam: -beam[0])[: 2 * beam_size]
        for total, _, ids, words in longer[:beam_size]:
            if ids[-1] == EOS:
                finished.append((total / length**length_penalty, ids, words))
        finished = sorted(finished, key=lambda beam: -beam[0])[:beam_size]
        beams = [beam for beam in longer if beam[2][-1] != EOS][:beam_size]
        if len(finished) == beam_size and beams[0][0] / length**length_penalty <= finished[-1][0]:
            break
        parents = [parent for _, parent, _, _ in beams]
        hidden, cell = hidden[:, parents], cell[:, parents]
    _, ids, words = finished[0]
    texts = [CONFIG["vocabulary"][index] for index in ids[1:-1]]
    probabilities, attention = zip(*words[:-1]) if texts else ([], [])
    return texts, np.array(probabilities), np.reshape(attention, (-1, *CONFIG["grid"]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python caption.py PHOTO")
    try:
        words, probabilities, maps = caption(sys.argv[1])
    except OSError as error:
        sys.exit(f"cannot open the photo: {error}")
    print(" ".join(words))
    for word, probability, attention in zip(words, probabilities, maps):
        print(f"\n{word} {probability:.0%}")
        for row in attention / attention.max():
            print("".join(" ░▒▓█"[round(4 * cell)] * 2 for cell in row))
