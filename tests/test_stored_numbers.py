"""Numbers in the notebooks' prose that come from stored results: the sentence stands there, and the file agrees."""

from statistics import mean

import pytest
from test_notebooks import NOTEBOOKS, prose_of

import sae_helpers as sae

PATHS = {path.stem: path for path in NOTEBOOKS}


def of(file, part, label, column):
    """Mean over the seeds of a stored run."""
    return mean(run[column] for run in sae.stored_results(file)[part]["results"][label])


# notebook, words of its prose, what the stored file says, lowest and highest value for which they are true
NUMBERS = [
]  # fmt: skip


@pytest.mark.parametrize(("notebook", "words", "value", "low", "high"), NUMBERS)
def test_prose_says_what_the_stored_file_says(notebook, words, value, low, high):
    prose = " ".join(prose_of(PATHS[notebook]).split())
    assert words in prose
    assert low <= value() <= high, f"{words!r}: the file says {value()}"
