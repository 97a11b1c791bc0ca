"""Batches of items of like length: little padding, a bounded size, and the same ones on every machine."""

from __future__ import annotations

from collections.abc import Sequence


def batches(lengths: Sequence[int], limit: int, padding: float = 0.1, most: int | None = None) -> list[list[int]]:
    """Group items so that each batch, padded to its longest item, is small and nearly full.

    Longest first, so that the largest batch, and with it a lack of memory, comes at once. An item that is longer than
    ``limit`` is a batch of its own. Equal lengths (pictures of one size) give batches without padding.

    Args:
        lengths: of each item in any unit, e.g. samples or pixels, at least 1.
        limit: largest padded batch (items times longest) in that unit.
        padding: largest share of a padded batch that is padding, 0 <= padding < 1.
        most: items in a batch.

    Returns:
        Positions in ``lengths``, each exactly once, ascending inside a batch. A function of the arguments alone.

    Raises:
        ValueError: a length below 1, or an argument out of its range.
    """
    check_limits(limit, padding, most)
    if lengths and min(lengths) < 1:
        raise ValueError(f"lengths: expected at least 1 each, got {min(lengths)}; leave empty items out")
    found: list[list[int]] = []
    longest = filled = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        count = len(found[-1]) + 1 if found else 1
        padded = count * longest
        fits = count > 1 and padded <= limit and (most is None or count <= most)
        # What comes later is shorter still, so the first item that would be too much padding ends the batch.
        if fits and padded - filled - lengths[i] <= padding * padded:
            found[-1].append(i)
            filled += lengths[i]
        else:
            found.append([i])
            longest = filled = lengths[i]
    return [sorted(batch) for batch in found]


def check_limits(limit: int, padding: float, most: int | None = None) -> None:
    """Raise ValueError unless `batches` takes these."""
    if limit < 1:
        raise ValueError(f"limit: expected a padded batch of at least 1, got {limit}")
    if not 0 <= padding < 1:
        raise ValueError(f"padding: expected a share in 0 <= padding < 1, got {padding}; 0.1 is a good one")
    if most is not None and most < 1:
        raise ValueError(f"most: expected at least 1 item a batch, or None, got {most}")
