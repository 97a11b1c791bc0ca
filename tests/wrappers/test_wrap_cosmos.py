"""Cosmos's TorchScript files through our door: tiny modules of their signature, traced and scripted on the spot."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmtok.bench.laws import OK, check
from mmtok.tokens import Tokens, TokensError
from mmtok.wrappers.cosmos import FAMILY, FILES, CosmosWrapper, open_cosmos

pytestmark = pytest.mark.filterwarnings(r"ignore:.torch\.jit\.(trace|script|save)\w*. is deprecated:DeprecationWarning")

LAWS = ("padding", "batch size", "batch shape", "levels", "prefix", "round trip", "range", "foreign ids")
LAWS += ("determinism", "input types", "exact size", "odd sizes", "extreme inputs")


class Encoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> ids (B, h, w) int32, vectors (B, D, h, w), a loss of 0: as NVIDIA's encoder.jit."""

    def __init__(self, factor: int, levels: tuple[int, ...], named: bool):
        super().__init__()
        self.conv = nn.Conv2d(3, len(levels), factor, stride=factor)
        nn.init.normal_(self.conv.weight, std=3 / factor)
        digits = torch.tensor(levels, dtype=torch.int32)
        self.register_buffer("_levels" if named else "sizes", digits, persistent=False)
        self.register_buffer("basis", torch.cumprod(torch.tensor([1, *levels[:-1]]), 0).int(), persistent=False)
        self.named = named

    def digits(self) -> Tensor:
        return self._levels if self.named else self.sizes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        levels = self.digits()
        z = self.conv(x).permute(0, 2, 3, 1).sigmoid() * (levels - 1)
        digits = z.round()
        ids = (digits * self.basis).sum(-1).to(torch.int32)
        return ids, (digits / levels).permute(0, 3, 1, 2), torch.zeros(1)


class Decoder(nn.Module):
    """Ids (B, h, w) -> pixels (B, 3, H, W), about [-1, 1]."""

    def __init__(self, factor: int, encoder: Encoder):
        super().__init__()
        self.conv = nn.ConvTranspose2d(len(encoder.digits()), 3, factor, stride=factor)
        nn.init.normal_(self.conv.weight, std=1.0)
        self.register_buffer("levels", encoder.digits())
        self.register_buffer("basis", encoder.basis)

    def forward(self, ids: Tensor) -> Tensor:
        digits = torch.div(ids[..., None], self.basis, rounding_mode="floor") % self.levels
        return self.conv((digits / self.levels).permute(0, 3, 1, 2).to(self.conv.weight.dtype)).tanh()


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def made(factor: int = 8, levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5), named: bool = True) -> tuple[Encoder, Decoder]:
    torch.manual_seed(0)
    encoder = Encoder(factor, levels, named).eval()
    return encoder, Decoder(factor, encoder).eval()


def written(folder: Path, encoder: nn.Module, decoder: nn.Module, ids: Tensor | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.jit.trace(encoder, torch.zeros(1, 3, 32, 32)).save(str(folder / "encoder.jit"))
    ids = torch.zeros(1, 4, 4, dtype=torch.int32) if ids is None else ids
    torch.jit.trace(decoder, ids).save(str(folder / "decoder.jit"))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("factor", [8, 16])
def test_codes_and_decode_are_those_of_the_files(factor: int, tmp_path: Path):
    encoder, decoder = made(factor)
    tok = open_cosmos(str(written(tmp_path, encoder, decoder)))
    x = picture(3, 3, 2 * factor, 48)
    ids = encoder(x * 2 - 1)[0]
    tokens = tok.encode(x)
    assert tok.factor == factor and tokens.spec.codebook_sizes == (64000,) and tokens.spec.bits_per_position > 15.9
    assert torch.equal(tokens.codes[:, 0], ids.flatten(1).long()) and len(ids.unique()) >= 4
    assert torch.allclose(tok.decode(tokens), (decoder(ids) + 1) / 2, atol=1e-6)
    assert torch.equal(tok.encode(x[1]).codes[0], tokens.codes[1])
    assert torch.equal(tok.raw().encode(x).codes, tokens.codes)


def test_scripted_files_and_laws(tmp_path: Path):
    encoder, decoder = made(8, levels=(4, 4), named=True)
    torch.jit.script(decoder).save(str(tmp_path / "decoder.jit"))
    torch.jit.trace(encoder, torch.zeros(1, 3, 32, 32)).save(str(tmp_path / "encoder.jit"))
    tok = open_cosmos(str(tmp_path))
    assert tok.sizes == (16,) and tok.config["levels"] == [4, 4]
    report = check(tok, only=LAWS)
    assert all(row.status == OK for row in report.rows), report.table()
    codes = tok.encode(picture(3, 16, 16)).codes
    assert torch.equal(tok.train().encode(picture(3, 16, 16)).codes, codes)


def test_levels_that_the_file_does_not_name_are_the_published_ones(tmp_path: Path):
    tok = open_cosmos(str(written(tmp_path, *made(named=False))))
    assert tok.sizes == (64000,) and tok.config["levels"] == [8, 8, 8, 5, 5, 5]


@torch.no_grad()
def test_pictures_of_any_size_and_what_the_files_make_of_them(tmp_path: Path):
    encoder, decoder = made()
    tok = open_cosmos(str(written(tmp_path, encoder, decoder)))
    sizes = [(3, 13, 11), (1, 8, 8), (4, 21, 5), (3, 1, 1)]
    pictures = [picture(*s, seed=i) for i, s in enumerate(sizes)]
    tokens = tok.encode(pictures)
    assert [tuple(y.shape) for y in tok.decode(tokens)] == sizes
    assert all(torch.equal(tokens[i].codes, tok.encode(p).codes) for i, p in enumerate(pictures))
    assert tok.decode(tokens.keep(num_tokens=1))[0].shape == (3, 13, 11)
    raw, x = tok.raw(), picture(1, 3, 30, 21)
    cut = raw.encode(x)
    assert torch.equal(cut.codes[:, 0], encoder(x * 2 - 1)[0].flatten(1).long()) and cut.codes.shape[2] == 3 * 2
    assert raw.decode(cut).shape == (1, 3, 24, 16) and tok.decode(tok.encode(x)).shape == x.shape
    laws = ("exact size", "odd sizes")
    assert [row.miss_rate for row in check(tok, only=laws).rows] == [0.0, 0.0]
    assert [row.miss_rate for row in check(raw, only=laws).rows] == [pytest.approx(1 / 2), 1.0]


def test_weights_keep_the_type_of_the_file(tmp_path: Path):
    encoder, decoder = (m.bfloat16() for m in made())
    tok = CosmosWrapper(encoder, decoder, tmp_path)
    assert tok.dtype == torch.bfloat16
    y = tok.decode(tok.encode(picture(3, 16, 24)))
    assert y.dtype == torch.float32 and y.shape == (1, 3, 16, 24) and bool(y.isfinite().all())


def test_impossible_and_foreign_codes_are_refused(tmp_path: Path):
    tok = open_cosmos(str(written(tmp_path / "a", *made())))
    tokens = tok.encode(picture(3, 16, 16))
    bad = tokens.codes.clone()
    bad[0, 0, 1] = 64000
    with pytest.raises(TokensError, match=r"expected 0\.\.63999, got 64000"):
        tok.decode(Tokens(bad, tokens.lengths, tokens.spec, tokens.side))
    tokens.save(tmp_path / "t.safetensors")
    assert torch.equal(tok.decode(Tokens.load(tmp_path / "t.safetensors")), tok.decode(tokens))
    other = open_cosmos(str(written(tmp_path / "b", *made(levels=(8, 8, 8, 5, 5, 4)))))
    with pytest.raises(TokensError, match="decode them with the tokenizer that made them"):
        other.decode(tokens)
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    assert open_cosmos(str(tmp_path / "c")).fingerprint == tok.fingerprint  # of the files, not of their place


class Floats(nn.Module):
    """A continuous tokenizer's encoder."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 8, stride=8)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.conv(x),)


class Frames(nn.Module):
    """A video tokenizer's encoder."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 6, 8, stride=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).argmax(1)


class Rows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x[:, 0, ::8, ::16] > 0).int()


def test_wrong_folders_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no folder at"):
        open_cosmos(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"expected encoder\.jit and decoder\.jit, missing \['encoder\.jit', 'deco"):
        open_cosmos(str(tmp_path))
    folder = written(tmp_path / "whole", *made())
    shutil.copy(folder / "encoder.jit", folder / "other.jit")
    (folder / "decoder.jit").unlink()
    with pytest.raises(ValueError, match=r"missing \['decoder\.jit'\]"):
        open_cosmos(str(folder))
    (folder / "decoder.jit").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"decoder\.jit is no readable TorchScript file"):
        open_cosmos(str(folder))
    decoder = made()[1]
    with pytest.raises(ValueError, match=r"expected integers .* got torch\.float32 .*continuous"):
        open_cosmos(str(written(tmp_path / "floats", Floats(), decoder)))
    with pytest.raises(ValueError, match=r"the encoder fails on \(1, 3, 64, 64\)"):
        CosmosWrapper(torch.jit.trace(Frames(), torch.zeros(1, 3, 8, 16, 16)), decoder, "video")
    with pytest.raises(ValueError, match="expected a square grid of whole cells for 64 px, got 8 x 4"):
        CosmosWrapper(Rows(), decoder, "rows")


def test_the_family_is_described(tmp_path: Path):
    tok = open_cosmos(str(written(tmp_path, *made())))
    assert FAMILY.name == "cosmos" and FAMILY.open is open_cosmos and tok.type_name == "wrapper:cosmos"
    assert tok.licences["weights"].startswith("NVIDIA Open Model License") and FILES == ("encoder.jit", "decoder.jit")
    assert FAMILY.taxonomy.cells()["quantization"] == "FSQ" and tok.max_size == 1024
