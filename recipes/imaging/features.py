"""Features of the frozen vision encoder for captioned pictures, computed once and kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from imaging.pictures import Captioned, captioned_pictures, square
from imaging.scores import embeddings_of_text
from mmtok.data.packed import image_reader, pack
from mmtok.layers.vision import build_vision
from mmtok.metrics.retrieval import recall_at_k
from mmtok.tokens import write_atomic

VISION = {"type": "efficientnet_lite0", "image_size": 224}


@torch.no_grad()
def vision_features(captioned: Captioned, cache: Path) -> Tensor:
    """(2, N, patches, D) fp16 of every picture as a square at the encoder's size, and of its mirror image."""
    vision = build_vision(VISION)
    file = cache / "features.safetensors"
    shape = (2, len(captioned.paths), vision.num_patches, vision.dim)
    if file.is_file():
        found = load_file(file)["features"]
        if found.shape == shape:
            return found
    size = vision.image_size
    packed = pack(captioned.paths, cache / f"{size}px", image_reader(size))
    found = torch.zeros(shape, dtype=torch.float16)
    for start in tqdm(range(0, len(packed), 16), desc="vision features", mininterval=5):
        part = [square(packed[i], size) for i in range(start, min(start + 16, len(packed)))]
        x = torch.from_numpy(np.stack(part)).permute(0, 3, 1, 2).float() / 255
        for side, view in enumerate((x, x.flip(-1))):
            found[side, start : start + len(part)] = vision(view).half()
    write_atomic(file, save({"features": found}))
    return found


def semantic_material(data: Path, cache: Path, square_size: int) -> tuple[Captioned, Captioned, Tensor, Tensor]:
    """The captioned pictures, the same with mirror images, and features and caption embeddings of all of the latter."""
    plain = captioned_pictures(data, cache, square_size)
    features = vision_features(plain, cache).flatten(0, 1)
    encoder = {"type": "minilm", "source": str(data / "helpers" / "minilm"), "dim": 384, "max_tokens": 16}
    _, _, embeddings = embeddings_of_text(plain.captions(), encoder, cache)
    return plain, with_mirrors(plain), features, embeddings.repeat(2, 1)


def with_mirrors(captioned: Captioned) -> Captioned:
    """The pictures, then all of them mirrored: as the rows of `vision_features` flattened."""
    return Captioned(
        np.concatenate([captioned.pixels, captioned.pixels[:, :, ::-1]]),
        captioned.texts * 2,
        captioned.paths * 2,
        captioned.splits * 2,
        captioned.styles * 2,
    )


def first_of_each_caption(captioned: Captioned, rows: np.ndarray) -> np.ndarray:
    """The first picture of every caption: what retrieval by caption is asked for."""
    captions = captioned.captions()
    first: dict[str, int] = {}
    for i in rows:
        first.setdefault(captions[i], int(i))
    return np.array(sorted(first.values()))


def subjects(captioned: Captioned, smallest: int = 60) -> tuple[list[str], np.ndarray]:
    """Names of subjects, and each picture's (-1 = none): the folder that its package keeps it in, where that is large.

    Stamps, clip art and pictures of things come in folders such as ``animals`` and ``food``; emoji have none.
    """
    synonyms = {"transportation": "vehicles", "transport": "vehicles", "animals": "animals", "plants": "plants"}
    found = []
    for path in captioned.paths:
        parts = [p.lower() for p in path.parts[:-1]]
        known = [p for p in parts if p in SUBJECTS or p in synonyms]
        found.append(synonyms.get(known[0], known[0]) if known else "")
    names = sorted({f for f in found if f and found.count(f) >= smallest})
    return names, np.array([names.index(f) if f in names else -1 for f in found])


SUBJECTS = ("animals", "food", "people", "plants", "vehicles", "buildings", "tools", "electronics", "clothes", "sports")


class CodeModel(nn.Module):
    """A small causal transformer over a sequence of codes, for bits an image.

    Args:
        codebook_size: K. length: T. dim, depth, num_heads: of the blocks. dropout: on embeddings and outputs.
    """

    def __init__(
        self, codebook_size: int, length: int, dim: int = 96, depth: int = 3, num_heads: int = 4, dropout: float = 0.2
    ):
        super().__init__()
        from mmtok.layers.vit import ViTBlock

        self.embed = nn.Embedding(codebook_size, dim)
        self.start = nn.Parameter(torch.zeros(dim))
        self.positions = nn.Parameter(torch.randn(length, dim) * 0.02)
        self.blocks = nn.ModuleList(ViTBlock(dim, num_heads, 2.0, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(dim, codebook_size)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        """codes (B, T) -> nats (B, T) of each code given those before it."""
        x = self.embed(codes[:, :-1])
        x = torch.cat([self.start.expand(len(codes), 1, -1), x], 1) + self.positions
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.dropout(self.norm(x))).float()
        return nn.functional.cross_entropy(logits.transpose(1, 2), codes, reduction="none")


def bits_per_image(train: Tensor, val: Tensor, test: Tensor, codebook_size: int, seed: int, steps: int) -> list[float]:
    """Bits of each test sequence (n, T) under a `CodeModel` that learnt from ``train``; ``val`` says when to stop."""
    torch.manual_seed(seed)
    model = CodeModel(codebook_size, train.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    draw, best, best_bits = torch.Generator().manual_seed(seed), {}, float("inf")
    for step in tqdm(range(steps), desc="code model", mininterval=5):
        rows = torch.randint(len(train), (64,), generator=draw)
        model.train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(train[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, steps // 20) == 0:
            bits = float(sequence_bits(model, val).mean())
            if bits < best_bits:
                best_bits, best = bits, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best)
    return sequence_bits(model, test).tolist()


@torch.no_grad()
def sequence_bits(model: CodeModel, codes: Tensor) -> Tensor:
    """(n,) bits of each sequence."""
    model.eval()
    nats = torch.cat([model(part).sum(1) for part in codes.split(256)])
    return nats.double() / np.log(2)


def unigram_bits(train: Tensor, test: Tensor, codebook_size: int) -> list[float]:
    """Bits of each test sequence when every position has its own frequencies (add one half), and nothing else."""
    T = train.shape[1]
    total = torch.zeros(len(test), dtype=torch.float64)
    for t in range(T):
        counts = torch.bincount(train[:, t], minlength=codebook_size).double() + 0.5
        total -= (counts / counts.sum()).log2()[test[:, t]]
    return total.tolist()


def hits(similarity: Tensor, k: int = 5) -> list[float]:
    """100 for each query (row i asks for column i) whose partner is among the k most similar items, else 0."""
    k = min(k, len(similarity))
    return [100 * recall_at_k(row[None], torch.tensor([i]), (k,))[k] for i, row in enumerate(similarity)]


def ridge(x: Tensor, y: Tensor, weight: float = 1e-2) -> tuple[Tensor, Tensor, Tensor]:
    """(mean of x, mean of y, matrix) of the ridge regression y ~ x; weight is relative to the mean variance of x."""
    x, y = x.double(), y.double()
    mx, my = x.mean(0), y.mean(0)
    gram = (x - mx).T @ (x - mx)
    gram += weight * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return mx, my, torch.linalg.solve(gram, (x - mx).T @ (y - my))
