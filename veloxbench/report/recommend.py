"""Which cache to use: from records, the arms that nothing beats in bytes and quality, and the one that a wish leaves.

Bytes at another context than the measured one are extrapolated so that they are never too small: all stored bytes grow
with the tokens (fp16 sinks, which do not, included), and so does all working memory of the prefill.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from veloxbench.errors import UsageError
from veloxbench.records.arm import REFERENCE, Arm
from veloxbench.records.quality_words import WORDS, QualityWord, quality_word
from veloxbench.records.record import Estimate, Record
from veloxbench.records.selection import by_machine, table_rows

GOOD = WORDS[1]
"""What is wanted of the smallest cache where a wish bounds neither quality nor memory."""
NO_LOSS = Estimate(value=0.0, low=0.0, high=0.0, unit="nats/token")


@dataclass(frozen=True)
class Wish:
    """What the answer must keep.

    Attributes:
        context: tokens of one sequence.
        memory: bytes for weights, cache and working memory at the peak; None for no limit.
        max_kld: nats per token, for the upper end of the interval.
        verdict: the worst word that is accepted.
        speed: least decode speed as a share of fp16's, for the lower end of the interval.
    """

    context: int
    memory: int | None = None
    max_kld: float | None = None
    verdict: QualityWord | None = None
    speed: float | None = None

    @property
    def names_quality(self) -> bool:
        """Whether it bounds the loss, so that the smallest cache within it is wanted."""
        return self.max_kld is not None or self.verdict is not None


@dataclass(frozen=True)
class Footprint:
    """Bytes of an arm as a function of the context, from one memory record."""

    record: Record

    def _figure(self, name: str) -> float:
        return self.record.metrics[name].value

    @property
    def tokens(self) -> int:
        """Tokens at which the peak was measured."""
        return int(str(self.record.subject.settings["tokens"]))

    @property
    def weights(self) -> float:
        """Bytes of the weights as they were loaded for the measurement."""
        return self._figure("weight_bytes")

    @property
    def static(self) -> float:
        """Bytes of tables that do not grow."""
        return self._figure("static_bytes")

    def _grown(self, of_layer: Callable[[int], float], context: int) -> float:
        """A sum over layers at a context; a layer that held fewer tokens than were fed has a window of that many."""
        layers = self.record.engagement
        fed = max(layer.tokens for layer in layers)
        return sum(
            of_layer(i) / layer.tokens * min(context, layer.tokens if layer.tokens < fed else context)
            for i, layer in enumerate(layers)
            if layer.tokens
        )

    def values(self, context: int) -> float:
        """Cached keys' and values' elements at a context."""
        return self._grown(lambda i: self.record.engagement[i].n_values, context)

    def resident(self, context: int) -> float:
        """Bytes held for tokens."""
        return self._grown(lambda i: self.record.engagement[i].used_bytes, context)

    def all_in(self, context: int) -> float:
        """Bytes held for tokens, and tables."""
        return self.resident(context) + self.static

    def bits(self, context: int) -> float:
        """All-in bits per value."""
        return 8 * self.all_in(context) / self.values(context)

    def peak(self, context: int) -> float:
        """Bytes above the weights at the highest moment of prefill and decode."""
        highest = max(self._figure("prefill_peak_bytes"), self._figure("decode_peak_bytes"))
        working = max(0.0, highest - self._figure("cache_bytes") - self.static)
        return self.all_in(context) + working * max(1.0, context / self.tokens)

    def longest(self, memory: float, limit: int) -> int:
        """Tokens up to ``limit`` at whose peak everything fits into so many bytes; 0 if none does."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.weights + self.peak(middle) <= memory else (low, middle - 1)
        return low


@dataclass(frozen=True)
class Candidate:
    """An arm with the records that speak of it at a context."""

    arm: Arm
    footprint: Footprint
    quality: Record | None
    speed: Record | None

    @property
    def is_reference(self) -> bool:
        """Whether it is the model's own fp16 cache."""
        return self.arm.name == REFERENCE.name

    @property
    def kld(self) -> Estimate:
        """Nats per token; the reference loses nothing."""
        return NO_LOSS if self.quality is None else self.quality.metrics["kld_mean"]

    @property
    def changed(self) -> Estimate:
        """Of a hundred next tokens, how many change."""
        if self.quality is None:
            return Estimate(value=0.0, low=0.0, high=0.0, unit="of 100 tokens")
        top1 = self.quality.metrics["top1_agreement"]
        ends = [None if end is None else min(100.0, max(0.0, 100 * (1 - end))) for end in (top1.high, top1.low)]
        return Estimate(value=100 * (1 - top1.value), low=ends[0], high=ends[1], unit="of 100 tokens")

    @cached_property
    def word(self) -> QualityWord:
        """The verdict's word."""
        word = WORDS[0] if self.quality is None else quality_word(self.quality.metrics)
        assert word is not None  # candidates without the figures are left out
        return word

    @property
    def speed_ratio(self) -> Estimate | None:
        """Decode speed as a share of fp16's."""
        if self.speed is None:
            return Estimate(value=1.0, low=1.0, high=1.0, unit="ratio") if self.is_reference else None
        return self.speed.metrics.get("decode_speed_ratio")

    def objections(self, wish: Wish) -> list[str]:
        """What of the wish it does not keep, in words."""
        broken = []
        needed = self.footprint.weights + self.footprint.peak(wish.context)
        if wish.memory is not None and not needed <= wish.memory:
            broken.append(f"needs {size(needed)} at the peak of {wish.context:,} tokens, above {size(wish.memory)}")
        worst = self.kld.value if self.kld.high is None else self.kld.high
        if wish.max_kld is not None and not worst <= wish.max_kld:
            broken.append(f"its KLD may be {worst:.2g}, above {wish.max_kld:g}")
        if wish.verdict is not None and WORDS.index(self.word) > WORDS.index(wish.verdict):
            broken.append(f"is {self.word.word}, not {wish.verdict.word}")
        if wish.speed is not None:
            ratio = self.speed_ratio
            if ratio is None:
                broken.append("its speed was not measured")
            elif not (least := ratio.value if ratio.low is None else ratio.low) >= wish.speed:
                broken.append(f"may decode at {least:.2g} of fp16's speed, below {wish.speed:g}")
        return broken


@dataclass(frozen=True)
class Answer:
    """What is recommended, beside what.

    Attributes:
        model: its name.
        limit: tokens that the model was made for.
        candidates: every arm with figures of quality and memory, the smallest first.
        choice: the arm; None where no candidate keeps the wish.
        without: arms that have records but no figure of quality or of memory, with what is missing.
        elsewhere: chips of other machines, whose records are left out: figures of two machines are not compared.
    """

    model: str
    wish: Wish
    limit: int
    candidates: tuple[Candidate, ...]
    choice: Candidate | None
    without: tuple[tuple[Arm, str], ...]
    elsewhere: tuple[str, ...] = ()

    @property
    def pareto(self) -> tuple[Candidate, ...]:
        """Candidates that no other beats in bytes without losing more, or the other way round."""
        return tuple(one for one in self.candidates if not any(self._beats(other, one) for other in self.candidates))

    def _beats(self, other: Candidate, one: Candidate) -> bool:
        ours, theirs = (c.footprint.all_in(self.wish.context) for c in (one, other))
        return (
            theirs <= ours and other.kld.value <= one.kld.value and (theirs, other.kld.value) != (ours, one.kld.value)
        )


def recommend(model: str, records: Sequence[Record], wish: Wish, limit: int, chip: str | None = None) -> Answer:
    """The answer that a model's records give to a wish.

    The smallest cache that keeps a bound on quality; without such a bound the best quality that fits the memory; and
    without either the smallest cache that is ``good``.

    Args:
        records: of this model alone, whole.
        limit: tokens that the model was made for.
        chip: whose records are wanted where there are those of several machines; otherwise of that which has most.

    Raises:
        UsageError: the context is beyond the model's, or no arm has figures of both quality and memory.
    """
    if not 1 <= wish.context <= limit:
        raise UsageError(
            f"context {wish.context:,} is not between 1 and the {limit:,} tokens that {model} was made for"
        )
    if not wish.names_quality and wish.memory is None:
        wish = replace(wish, verdict=GOOD)
    machines = {machine: _candidates(of_machine, wish.context) for machine, of_machine in by_machine(records).items()}
    taken = max(
        machines, key=lambda each: (bool(machines[each][0]) and each[0] == chip, len(machines[each][0])), default=None
    )
    candidates, without = machines.pop(taken) if taken is not None else ([], [])
    elsewhere = tuple(sorted({str(machine[0]) for machine, (found, _) in machines.items() if found}))
    if not candidates:
        raise UsageError(
            f"no records of {model} have figures of both quality and memory; --measure makes them (minutes to hours)"
        )
    kept = [candidate for candidate in candidates if not candidate.objections(wish)]
    smallest = wish.names_quality
    choice = min(kept, key=lambda c: _order(c, wish.context, smallest), default=None)
    return Answer(model, wish, limit, tuple(candidates), choice, tuple(without), elsewhere)


def _order(candidate: Candidate, context: int, smallest: bool) -> tuple[float, float]:
    figures = candidate.footprint.all_in(context), candidate.kld.value
    return figures if smallest else figures[::-1]


def _candidates(records: Sequence[Record], context: int) -> tuple[list[Candidate], list[tuple[Arm, str]]]:
    measured = [record for record in table_rows(records) if record.status == "measured"]
    by_arm: dict[str, list[Record]] = {}
    for record in measured:
        if record.subject.suite in ("perplexity", "memory", "throughput"):
            by_arm.setdefault(record.subject.method.label, []).append(record)
    fullest = fullest_group(measured)
    candidates, without = [], []
    for of_arm in by_arm.values():
        arm = of_arm[0].subject.method.alone
        memory = _nearest(of_arm, "memory", "tokens", context)
        quality = best_quality(of_arm, fullest)
        if memory is None or (quality is None and arm.name != REFERENCE.name):
            without.append((arm, "no memory record" if memory is None else "no record of quality"))
            continue
        candidates.append(Candidate(arm, Footprint(memory), quality, _nearest(of_arm, "throughput", "depth", context)))
    return sorted(candidates, key=lambda c: c.footprint.all_in(context)), without


def _nearest(records: Sequence[Record], suite: str, setting: str, context: int) -> Record | None:
    """The suite's record whose size is nearest to the context, as a ratio."""

    def distance(record: Record) -> float:
        return abs(math.log(float(str(record.subject.settings[setting])) / context))

    return min((r for r in records if r.subject.suite == suite), key=distance, default=None)


def _group(record: Record) -> tuple[str, str, str]:
    """Quality records that were measured on the same tokens in the same way."""
    subject = record.subject
    return subject.protocol, subject.text.tokens_sha256, repr(sorted(subject.settings.items()))


def _rank(record: Record) -> tuple[bool, bool, int]:
    """Evaluation text before calibration text, tokens one at a time before chunks, many sequences before few."""
    subject = record.subject
    sequences = len(record.samples.get("kld_mean", ()))
    return "calibration" not in subject.text.name, subject.protocol == "decode", sequences


def fullest_group(records: Iterable[Record]) -> tuple[str, str, str] | None:
    """Of the groups of the best rank the one with most arms; :func:`best_quality` takes it."""
    of_quality = [record for record in records if quality_word(record.metrics) is not None]
    arms = Counter(map(_group, of_quality))
    best = max(of_quality, key=lambda record: (*_rank(record), arms[_group(record)]), default=None)
    return None if best is None else _group(best)


def best_quality(records: Iterable[Record], fullest: tuple[str, str, str] | None = None) -> Record | None:
    """Of one arm's records the one to quote: of the group that is asked for, or else of the best rank."""
    of_quality = [record for record in records if quality_word(record.metrics) is not None]
    return max(of_quality, key=lambda record: (_group(record) == fullest, *_rank(record)), default=None)


def size(nbytes: float) -> str:
    """Bytes for readers: ``12.3 MB``, ``1.07 GB``."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.{max(0, 2 - len(str(int(nbytes / factor))) + 1)}f} {unit}"
    return f"{nbytes:.0f} bytes"
