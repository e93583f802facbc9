"""How the model works, in a few sentences with its real sizes."""

from __future__ import annotations

from typing import Any

from captioner.config import ModelConfig


def how_it_works(config: ModelConfig, encoder: dict[str, Any]) -> str:
    """Return Markdown.

    Args:
        config: the decoder's shape.
        encoder: the encoder's ``spec()``.
    """
    rows, columns = encoder["grid"]
    size = encoder["transform"]["size"]
    query = "what the LSTM remembers"
    if config.word_query:
        query += " and the word before"
    start = "the mean of the grid" if config.mean_start else "zeros"
    output = "the LSTM's state"
    if config.deep_output:
        output += ", the word before and the mean that was read"
    return "\n".join(
        [
            f"1. **See.** `{encoder['name']}`, trained on ImageNet and frozen, turns the whole "
            f"photo, resized to {size} x {size}, into a grid of {rows} x {columns} vectors of "
            f"{config.encoder_channels:,} numbers.",
            f"2. **Look.** Before each word, additive attention (width {config.attention_size}) "
            f"compares {query} with each of the {rows * columns} vectors and gives each cell a "
            "share; the shares sum to 1. They are the heat map.",
            f"3. **Write.** The mean of the vectors, weighted by those shares, goes into an LSTM "
            f"of {config.hidden_size} units (started from {start}) with the word before, as "
            f"{config.embedding_size} numbers. From {output} comes a probability for each of "
            f"{config.vocabulary_size:,} words.",
            "4. **Search.** Beam search keeps the few most likely captions at every step; greedy "
            "decoding (beam size 1) keeps one. Bans prevent stuttering: switch them off under "
            "*Search settings* to see what the model does without them.",
        ]
    )
