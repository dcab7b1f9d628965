"""Is the reference LM better than counting? Its held-out perplexity against an interpolated Kneser-Ney trigram's.

    python -m benchmarks.trigram --train shards/flickr_text shards/cc3m --heldout shards/pairs --scores ref_logprob

Both models see the same training captions (the trigram is counted on --train, which must be what the reference was
trained on) and are asked for the same held-out tokens, closing EOS included, BOS not. No GPU is used.

Kneser-Ney with one discount d = n_1 / (n_1 + 2 n_2) per order (Chen and Goodman, 1999, section 4.1.6):
    p(w|u,v) = max(c(uvw) - d, 0) / c(uv) + d N(uv.) / c(uv) * p(w|v)
with the lower orders counted by continuations and the unigram mixed with the uniform distribution over V.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path


class Trigram:
    """Interpolated Kneser-Ney over token ids; `bos` pads the left."""

    def __init__(self, captions: Iterable[list[int]], *, bos: int, vocabulary: int) -> None:
        self.bos, self.vocabulary = bos, vocabulary
        three: Counter[tuple[int, int, int]] = Counter()
        for ids in captions:
            row = [bos, bos, *ids]
            three.update(zip(row, row[1:], row[2:], strict=False))
        two = Counter((v, w) for _, v, w in three)
        one = Counter(w for _, w in two)
        self.orders = [_Order(three), _Order(two), _Order({(w,): n for w, n in one.items()})]

    def logprobs(self, ids: list[int]) -> Iterator[float]:
        """log p of each id given the two before it, natural logarithm."""
        row = [self.bos, self.bos, *ids]
        for u, v, w in zip(row, row[1:], row[2:], strict=False):
            p = 1 / self.vocabulary
            for order, context in zip(reversed(self.orders), ((), (v,), (u, v)), strict=True):
                p = order.interpolate(context, w, p)
            yield math.log(p)


class _Order:
    """Counts of one order: p(w | context) with what is discounted handed to the order below."""

    def __init__(self, counts: dict[tuple[int, ...], int]) -> None:
        self.counts = counts
        self.total: dict[tuple[int, ...], int] = defaultdict(int)
        self.kinds: dict[tuple[int, ...], int] = defaultdict(int)
        for gram, n in counts.items():
            self.total[gram[:-1]] += n
            self.kinds[gram[:-1]] += 1
        frequency = Counter(counts.values())
        once, twice = frequency[1], frequency[2]
        self.discount = once / (once + 2 * twice) if once and twice else 0.5

    def interpolate(self, context: tuple[int, ...], word: int, lower: float) -> float:
        total = self.total.get(context, 0)
        if not total:
            return lower
        kept = max(self.counts.get((*context, word), 0) - self.discount, 0.0)
        return (kept + self.discount * self.kinds[context] * lower) / total


def main() -> None:
    """Print both perplexities and, with --output, keep them as JSON."""
    from megaprior.data.shards import ShardSet

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--train", type=Path, nargs="+", required=True, help="shard folders the reference was trained on"
    )
    parser.add_argument("--heldout", type=Path, nargs="+", required=True, help="scored shard folders it has not seen")
    parser.add_argument("--scores", default="ref_logprob", help="name of the score stream")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()

    training = [ShardSet.open(path) for path in options.train]
    tokenizer = training[0].tokenizer()
    captions = (shards.tokens(i).tolist() for shards in training for i in range(len(shards)))
    trigram = Trigram(captions, bos=tokenizer.bos_id, vocabulary=tokenizer.vocab_size)
    results = {}
    for path in options.heldout:
        shards = ShardSet.open(path, scores=options.scores)
        counted = neural = tokens = 0.0
        for i in range(len(shards)):
            ids = shards.tokens(i).tolist()
            counted += sum(trigram.logprobs(ids))
            neural += float(shards.scores(i).astype("float64").sum())
            tokens += len(ids)
        results[path.name] = {
            "tokens": int(tokens),
            "trigram_perplexity": math.exp(-counted / tokens),
            "reference_perplexity": math.exp(-neural / tokens),
        }
        print(f"{path.name}: {int(tokens):,} held-out tokens, ", end="")
        print(
            ", ".join(f"{key.replace('_', ' ')} {results[path.name][key]:.2f}" for key in list(results[path.name])[1:])
        )
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
