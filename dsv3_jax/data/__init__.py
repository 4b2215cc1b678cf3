"""Text to packed training sequences, resumable by a global example index.

`sources` streams documents, `tokenizer` turns text into ids, `packing` stores tokens and cuts
sequences, `pipeline` ties them together: start at `open_data`.
"""

from dsv3_jax.data.pipeline import TrainingData, open_data
from dsv3_jax.data.sources import CacheError, DataError
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer

__all__ = ["CacheError", "DataError", "Tokenizer", "TrainingData", "load_tokenizer", "open_data"]
