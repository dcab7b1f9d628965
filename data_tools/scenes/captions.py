"""The language of the generated scenes: web-like captions with the truth recorded per word, and running text.

A caption is written with marks, `*` before an image-related word and `~` before a noise word; `read_marks` turns it into
text and classes:

    "stock photo of a *red *circle, item ~A48"    classes 0 0 0 0 1 1 0 2

What varies with the scene is drawn uniformly and independently, so that no text predicts it; a few of its words follow from
others ("an" gives orange away, "background" ends its phrase), as in real captions. Boilerplate comes in few long phrases,
predictable after their first word. Noise is rare, because nobody can predict its words either.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from megaprior.data_tools.scenes.drawing import Scene

CLASS_NAMES = ("boilerplate", "image-related", "noise")
_MARKS = ("", "*", "~")  # by class
_WORD = re.compile(r"([*~]?)([^\s*~]*\w)(\S*)")  # mark, word, punctuation after it (part of no word)
_VOWEL_NEXT = re.compile(r"\ba (?=\*?[aeiou])")

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
_SENTENCES = (
    "On this page you can see {seen}, and many people like it.",
    "The first picture shows {seen}, a high quality stock photo that {name} sold for the best price.",
    "Once there was {seen}, and nobody but {name} knew where it came from.",
    "We looked at {seen} for a long time; {name} said that this free vector illustration was the best of all.",
    "If you like {seen}, then there are more pictures like this one, all by {name}.",
    "My favourite is {seen}, which {name} found as a free download for your website.",
    "Now in our shop: {seen}, available with free shipping on all orders, {noise}.",
    "{name} drew {seen} and wrote below it: {noise}.",
)
# Two thirds of running text are captions behind their keywords in any order: from them a language model learns captions,
# and to take up what stood before, as any large one does. Frozen, it can then use what an H-LVLM's MLP puts before a caption.
_TAGGED_SHARE = 2 / 3
_FIRST_NAMES = ("Anna", "Boris", "Carla", "David", "Elena", "Felix", "Greta", "Hugo", "Irina", "Jonas", "Karin", "Zoë")
_LAST_NAMES = ("Adler", "Baker", "Costa", "Dubois", "Ferrari", "Huang", "Ivanova", "Keller", "Müller", "Novak", "Silva")
_MONTHS = ("January", "March", "April", "June", "August", "October", "December")
_NUMBERS = {2: "two", 3: "three", 4: "four"}


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A caption and its truth: every word in order as (start, end, class), bytes of the UTF-8 text."""

    text: str
    words: tuple[tuple[int, int, int], ...]


def read_marks(marked: str) -> Caption:
    """The caption that a marked text spells."""
    text, words, position = "", [], 0
    for match in _WORD.finditer(marked):
        mark, word, punctuation = match.groups()
        text += marked[position : match.start()]
        start = len(text.encode())
        words.append((start, start + len(word.encode()), _MARKS.index(mark)))
        text += word + punctuation
        position = match.end()
    return Caption(text=text + marked[position:], words=tuple(words))


def web_caption(scene: Scene, rng: Random) -> Caption:
    """A caption as the web would have it: an opening, what is seen, noise in two of five, a closing."""
    return read_marks(_marked_caption(_seen(scene, rng), rng))


def _marked_caption(seen: str, rng: Random) -> str:
    opening, closing = _drawn(_OPENINGS, rng), _drawn(_CLOSINGS, rng)
    noise = f"{_noise(rng)}, " if rng.random() < 0.4 else ""
    return f"{opening}{seen}, {noise}{closing}"


def statements(scenes: tuple[Scene, Scene], rng: Random) -> tuple[str, str]:
    """The same caption for two scenes of one kind, with every attribute named and no noise: it differs where they do."""
    opening, closing = _drawn(_OPENINGS, rng), _drawn(_CLOSINGS, rng)
    state, captions = rng.getstate(), []
    for scene in scenes:
        rng.setstate(state)
        captions.append(read_marks(f"{opening}{_seen(scene, rng, complete=True)}, {closing}").text)
    return captions[0], captions[1]


def running_text(scenes: Sequence[Scene], rng: Random) -> str:
    """Something on each scene, in one line: a sentence, or keywords and a caption that uses them."""
    return " ".join(read_marks(_passage(scene, rng)).text for scene in scenes)


def _passage(scene: Scene, rng: Random) -> str:
    seen = _seen(scene, rng)
    if rng.random() < _TAGGED_SHARE:
        tags = [word for mark, word, _ in _WORD.findall(seen) if mark == "*"]
        rng.shuffle(tags)
        return f"{' '.join(tags)}: {_marked_caption(seen, rng)}."
    return rng.choice(_SENTENCES).format(seen=seen, name=_name(rng), noise=_noise(rng))


def _seen(scene: Scene, rng: Random, *, complete: bool = False) -> str:
    """What the image shows, the main object first. `complete`: no attribute is left out."""
    sized = complete or rng.random() < 0.7
    grounded = complete or rng.random() < 0.75
    whole_phrase = rng.random() < 0.5
    main = f"*{scene.colour} *{scene.shape}"
    if scene.kind == "several":
        plural = "es" if scene.shape.endswith("s") else "s"
        seen = f"*{_NUMBERS[scene.count]} {main}{plural} in a *{scene.position}"
    elif scene.kind == "two":
        seen = f"a {main} *{scene.position} a *{scene.other_colour} *{scene.other_shape}"
    else:
        size = f"*{scene.size} " if sized else ""
        seen = f"a {size}{main} in the *{scene.position} part"
    if grounded:
        ground = f"*{scene.pattern} *{scene.ground}"
        seen += f" on a {ground} *background" if whole_phrase else f" on {ground}"
    return _VOWEL_NEXT.sub("an ", seen)


def _noise(rng: Random) -> str:
    kind = rng.choice(("name", "price", "date", "code"))
    if kind == "name":
        return f"photo by {_name(rng)}"
    if kind == "price":
        return f"now only ~{rng.randrange(2, 100)}.{rng.choice((49, 90, 95, 99))} EUR"
    if kind == "date":
        return f"posted on ~{rng.randrange(1, 29)} ~{rng.choice(_MONTHS)} ~{rng.randrange(2004, 2025)}"
    return f"item number ~{rng.choice('ABCDEFGHKLMNPRST')}{rng.randrange(10, 1000)}"


def _name(rng: Random) -> str:
    return f"~{rng.choice(_FIRST_NAMES)} ~{rng.choice(_LAST_NAMES)}"


def _drawn(phrases: Sequence[tuple[int, str]], rng: Random) -> str:
    return rng.choices([phrase for _, phrase in phrases], [weight for weight, _ in phrases])[0]
