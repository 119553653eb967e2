"""Questions that the sample corpus (the Python manual's topics) answers, a few of them much asked.

Popularity follows Zipf's law, so documents repeat between askers as they do in real use: that is what a
shared cache lives on.
"""

from __future__ import annotations

import itertools
import random

# The order is the popularity: the first is asked most.
QUESTIONS = (
    "What does the with statement do when an exception is raised in its body?",
    "How does the for statement use its else clause?",
    "What is the difference between a list and a tuple?",
    "How do I format a number with a thousands separator in a format string?",
    "When is the finally clause of a try statement executed?",
    "Which values are considered false in a truth test?",
    "How do I set a breakpoint in the Python debugger?",
    "What happens when a name is declared global in a function?",
    "How does the import statement find a module?",
    "What does a lambda expression create?",
    "How are default parameter values of a function evaluated?",
    "What does the nonlocal statement do?",
    "How can a class make its instances callable?",
    "What does the split method of a string return?",
    "How are chained comparisons such as a < b < c evaluated?",
    "What does the del statement remove?",
    "What is the precedence of the not operator?",
    "How does the yield expression make a function a generator?",
    "When does the assert statement raise an error?",
    "What does dict.setdefault do with a missing key?",
    "How do I define the length of a custom container class?",
    "What does the break statement do in a loop with an else clause?",
    "What is an f-string and how are expressions evaluated in it?",
    "Which methods must a context manager define?",
    "What does slicing a sequence with a negative index give?",
    "How does the raise statement chain exceptions with from?",
    "When may the await expression be used?",
    "What is a mutable object?",
    "How are augmented assignments different from normal assignments?",
    "What does the power operator do with negative numbers?",
    "How does __getattr__ differ from __getattribute__?",
    "Which names begin and end with two underscores?",
    "How does a dictionary keep the order of its keys?",
    "What does the range type compute from start, stop and step?",
    "How do bitwise operators treat integers?",
    "What is a raw string literal?",
    "How does the match statement compare patterns?",
    "How do I remove whitespace from both ends of a string?",
)


class ZipfChoice:
    """Draws question `rank` (from 1) with weight `1 / rank ** exponent`; the same seed draws the same questions."""

    def __init__(self, seed: int, exponent: float = 1.1):
        self._random = random.Random(seed)
        self._weights = list(itertools.accumulate(1 / rank**exponent for rank in range(1, len(QUESTIONS) + 1)))

    def __call__(self) -> str:
        return self._random.choices(QUESTIONS, cum_weights=self._weights)[0]
