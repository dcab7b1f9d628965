"""The language of the generated scenes: web-like captions with the truth recorded per word, and plain text.

A caption is written with marks, `*` before an image-related word and `~` before a noise word, and `read_marks` turns it into
text and classes:

    "stock photo of a *red *circle, item ~A48"  ->  0 0 0 0 1 1 0 2

What varies with the scene is drawn uniformly and independently, so that no text predicts it. Boilerplate comes in a few
long phrases, predictable after their first word. Noise is rare, as its words are as unpredictable as those of the image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from megaprior.data_tools.scene_drawing import Scene

BOILERPLATE, RELATED, NOISE = 0, 1, 2
_CLASS_OF_MARK = {"": BOILERPLATE, "*": RELATED, "~": NOISE}
_WORD = re.compile(r"([*~]?)([^\s*~]*\w)(\S*)")  # mark, word, trailing punctuation (part of no word)
_ARTICLE = re.compile(r"\ba (\*[aeiou])")

# (weight, phrase): few and uneven, so that a language model soon knows what follows
_OPENINGS = (
    (10, ""),
    (6, "high quality stock photo of "),
    (2, "free vector illustration of "),
)
_CLOSINGS = (
    (12, "available now in our shop"),
    (4, "free download for your website"),
    (2, "best price and free shipping on all orders"),
)
_FIRST_NAMES = ("Anna", "Boris", "Carla", "David", "Elena", "Felix", "Greta", "Hugo", "Irina", "Jonas", "Karin", "Zoë")
_LAST_NAMES = ("Adler", "Baker", "Costa", "Dubois", "Ferrari", "Huang", "Ivanova", "Keller", "Müller", "Novak", "Silva")
_MONTHS = ("January", "March", "April", "June", "August", "October", "December")
_NUMBERS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A caption and its truth: `words` are (start, end, class), bytes of the UTF-8 text, one for every word in order."""

    text: str
    words: tuple[tuple[int, int, int], ...]


def read_marks(marked: str) -> Caption:
    """The caption that a marked text spells."""
    text, words = "", []
    position = 0
    for match in _WORD.finditer(marked):
        mark, word, trail = match.groups()
        text += marked[position : match.start()]
        start = len(text.encode())
        words.append((start, start + len(word.encode()), _CLASS_OF_MARK[mark]))
        text += word + trail
        position = match.end()
    return Caption(text=text + marked[position:], words=tuple(words))


def web_caption(scene: Scene, rng: Random) -> Caption:
    """A caption of `scene` as the web would have it: an opening, what is seen, noise in one of three, a closing."""
    noise = f"{_noise(rng)}, " if rng.random() < 0.4 else ""
    return read_marks(f"{_drawn(_OPENINGS, rng)}{_seen(scene, rng)}, {noise}{_drawn(_CLOSINGS, rng)}")


def statements(scene: Scene, other: Scene, rng: Random) -> tuple[str, str]:
    """The same sentence about two scenes, every attribute named: a caption's words, without noise and closing."""
    state = rng.getstate()
    pair = []
    for each in (scene, other):
        rng.setstate(state)
        pair.append(read_marks(_drawn(_OPENINGS, rng) + _seen(each, rng, all_named=True)).text)
    return pair[0], pair[1]


def plain_text(scenes: Sequence[Scene], rng: Random) -> str:
    """A line of running text about some scenes: the captions' vocabulary in other sentences."""
    frames = (
        "On this page you can see {}. It is {} and many people like it.",
        "The first picture shows {}. It was taken by {} and is now part of our collection.",
        "Once there was {}. It belonged to {} and nobody knew where it came from.",
        "We looked at {} for a long time, and {} said that it was the best of all.",
        "If you like {}, then click here, because {} has more pictures like this one.",
        "My favourite is {}. I found it when {} had a free download for every website.",
        "There is {} in our shop, and {} offers free shipping on all orders.",
    )
    lines = []
    for scene in scenes:
        name = f"{rng.choice(_FIRST_NAMES)} {rng.choice(_LAST_NAMES)}"
        lines.append(rng.choice(frames).format(read_marks(_seen(scene, rng)).text, name))
    return " ".join([*lines, _drawn(_CLOSINGS, rng).capitalize() + "."])


def _drawn(phrases: Sequence[tuple[int, str]], rng: Random) -> str:
    return rng.choices([phrase for _, phrase in phrases], [weight for weight, _ in phrases])[0]


def _seen(scene: Scene, rng: Random, *, all_named: bool = False) -> str:
    """What the image shows, the main object first. `all_named`: nothing is left out, as a probe needs it."""
    colour, shape = f"*{scene.colour}", f"*{scene.shape}"
    background = f"*{scene.pattern} *{scene.ground}"
    background = f"on a {background} *background" if rng.random() < 0.5 else f"on {background}"
    if scene.kind == "several":
        seen = f"*{_NUMBERS[scene.count]} {colour} {shape}s in a *{scene.place}"
    elif scene.kind == "two":
        seen = f"a {colour} {shape} *{scene.place} a *{scene.other_colour} *{scene.other_shape}"
    else:
        size = f"*{scene.size} " if all_named or rng.random() < 0.7 else ""
        seen = f"a {size}{colour} {shape} in the *{scene.place} part"
    seen = f"{seen} {background}" if all_named or rng.random() < 0.75 else seen
    return _ARTICLE.sub(r"an \1", seen)


def _noise(rng: Random) -> str:
    kind = rng.choice(("name", "price", "date", "code"))
    if kind == "name":
        return f"photo by ~{rng.choice(_FIRST_NAMES)} ~{rng.choice(_LAST_NAMES)}"
    if kind == "price":
        return f"now only ~{rng.randrange(2, 100)}.{rng.choice((49, 90, 95, 99))} EUR"
    if kind == "date":
        return f"posted on ~{rng.randrange(1, 29)} ~{rng.choice(_MONTHS)} ~{rng.randrange(2004, 2025)}"
    return f"item number ~{rng.choice('ABCDEFGHKLMNPRST')}{rng.randrange(10, 1000)}"
