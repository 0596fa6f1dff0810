"""Training data: sources, rows, and examples as tokens. Knows files, data sets and templates; nothing of models or steps.

`read_rows` reads a source; `tokenize` and `tokenize_pairs` turn its rows into tokens. The faults of bad rows go into `Faults`,
which counts them and either refuses the data or leaves the bad rows out.
"""

from training.data.example import Example, Item, Pair, tokenize, tokenize_pairs
from training.data.faults import DataError, Faults, OnBad
from training.data.row import Needs, Row
from training.data.source import Source, read_rows

__all__ = [
    "DataError",
    "Example",
    "Faults",
    "Item",
    "Needs",
    "OnBad",
    "Pair",
    "Row",
    "Source",
    "read_rows",
    "tokenize",
    "tokenize_pairs",
]
