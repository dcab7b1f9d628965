"""Tokenizers of four published file formats behind one small interface with one fingerprint.

    tokenizer = load_tokenizer("tokenizer.model")
    ids = tokenizer.encode(caption) + [tokenizer.eos_id]

Text only: `encode` adds no BOS or EOS and never parses control tokens, so a caption that spells `<|eot_id|>` stays text.
The libraries behind the formats are imported when a file of that format is loaded.
"""

from megaprior.tokenizer.base import VISION_ROLES, Tokenizer, compare_fingerprints
from megaprior.tokenizer.loading import load_model_tokenizer, load_tokenizer
from megaprior.tokenizer.training import train_sentencepiece

__all__ = [
    "VISION_ROLES",
    "Tokenizer",
    "compare_fingerprints",
    "load_model_tokenizer",
    "load_tokenizer",
    "train_sentencepiece",
]
