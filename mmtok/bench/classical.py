"""Classical image codecs at a number of bytes: the search for the best setting that stays within it.

What a learned tokenizer reconstructs means little without what ordinary codecs give for the same bytes.
Every byte of the file counts here, headers included, because that is what is stored or sent. The codecs themselves are
in `mmtok.wrappers`; `mmtok.bench.contenders` spells the search ``jpeg#bytes=512``.
"""

from __future__ import annotations

from torch import Tensor

from mmtok.wrappers.classical_images import encode_image, image_codec


def fit_image(image: Tensor, codec: str, target_bytes: int) -> tuple[int, bytes]:
    """Search the setting by bisection for the largest file of at most `target_bytes`.

    Args:
        image: (3,H,W) float in [0,1].
        codec: key of `mmtok.wrappers.classical_images.IMAGE_CODECS`.
        target_bytes: whole file, header included.

    Returns:
        setting (a quality, or JPEG 2000's compression ratio) and file. When even the lowest quality is above the
        target, that smallest file: compare its length.

    Raises:
        ValueError, ImportError: as `encode_image`, and a target below 1 byte.
    """
    if target_bytes < 1:
        raise ValueError(f"target_bytes: expected at least 1, got {target_bytes}")
    scale = image_codec(codec).settings
    scale = scale[::-1] if codec == "jpeg2000" else scale  # the smallest file first: its ratio is highest there
    low, high = 0, len(scale) - 1  # places on the scale
    tried = {low: encode_image(image, codec, scale[low])}
    if len(tried[low]) <= target_bytes:
        tried[high] = encode_image(image, codec, scale[high])
        while high - low > 1:
            middle = (low + high) // 2
            tried[middle] = encode_image(image, codec, scale[middle])
            if len(tried[middle]) <= target_bytes:
                low = middle
            else:
                high = middle
    # Sizes are not quite monotone in the quality, so the best of all tries is taken, not the last one.
    fitting = [(len(data), place) for place, data in tried.items() if len(data) <= target_bytes]
    best = max(fitting)[1] if fitting else min(tried, key=lambda place: len(tried[place]))
    return scale[best], tried[best]
