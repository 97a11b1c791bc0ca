"""SNAC through its package: parity, levels of different rates, its noise, its longer output, attention in windows."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch
from peers import networks
from peers.networks import noise

import mmtok.wrappers.snac as module
from mmtok.bench.laws import ABOUT, check
from mmtok.tokens import Tokens, TokensError
from mmtok.vocab import Vocab

pytestmark = pytest.mark.filterwarnings(r"ignore:`torch.jit.script` is deprecated:DeprecationWarning")

pytest.importorskip("einops")
if importlib.util.find_spec("snac") is None:  # importing it warns, see above
    pytest.skip("snac is not installed", allow_module_level=True)

RATE = 8000
PLAIN = networks.SNAC_LIKE_24KHZ
WINDOWS = PLAIN | {  # as those at 32 and 44.1 kHz, whose attention needs widths of multiples of 64
    "encoder_dim": 16,
    "encoder_rates": [4, 5],
    "decoder_dim": 64,
    "decoder_rates": [5, 4],
    "attn_window_size": 6,
    "vq_strides": [8, 4, 2, 1],
}
CONFIGS = {"plain": (PLAIN, 30, 4), "windows": (WINDOWS, 20, 24)}  # config, hop, frames of a group


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory):
    config, hop, group = CONFIGS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(networks.snac(config).state_dict(), folder / "pytorch_model.bin")
    return folder, hop, group


@pytest.fixture
def tok(saved):
    return module.FAMILY.open(str(saved[0]))


def seeded(run, seed=module.NOISE_SEED):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        return run()


@pytest.mark.parametrize("items", [1, 3])
def test_codes_and_sound_are_those_of_snac(tok, saved, items):
    _, hop, group = saved
    assert (tok.hop_length, tok.frame_group) == (hop, group)
    x = torch.stack([noise(2 * hop * group, s) for s in range(items)])
    tokens = tok.encode(x, RATE)
    with torch.no_grad():
        theirs = tok.network.encode(x)
    assert len(theirs) == tokens.codes.shape[1] and tokens.codes.shape[2] == 2 * group
    for q, (codes, stride) in enumerate(zip(theirs, tok.level_strides, strict=True)):
        assert torch.equal(tokens.codes[:, q, ::stride], codes)
        assert torch.equal(tokens.codes[:, q], codes.repeat_interleave(stride, 1))
    for i in range(items):
        sound = seeded(lambda i=i: tok.network.decode([c[i : i + 1] for c in theirs]))
        torch.testing.assert_close(tok.decode(tokens)[i], sound[0])
    whole = seeded(lambda: tok.network.decode(theirs), 5)
    torch.testing.assert_close(seeded(lambda: tok.raw().network_decode(tokens.codes), 5), whole)


def test_random_networks_use_several_codes(tok, saved):
    _, hop, group = saved
    used = tok.encode(noise(20 * hop * group, 7), RATE).codes[0]
    assert min(len(row.unique()) for row in used) >= 4


def test_every_law(tok):
    laws = [law for law in ABOUT if law != "delay"]  # a random network's output is too unlike its input to tell
    report = check(tok, only=laws, seconds=0.19)
    assert report.ok, report.table()
    assert {r.law for r in report.rows if r.status == "not applicable"} <= {"device"}, report.table()


def test_raw_breaks_padding_size_and_determinism(tok):
    laws = ("padding", "batch size", "exact size", "determinism")
    report = check(tok.raw(), only=laws, seconds=0.29)
    broken = {r.law: r.miss_rate for r in report.rows if r.status == "broken"}
    assert set(broken) == {"padding", "exact size", "determinism"}, report.table()
    assert broken["exact size"] == 1 and broken["determinism"] > 0.1 and 0 < broken["padding"] < 0.5, report.table()


def test_codes_of_a_padded_batch(tok, saved):
    """Upstream sees the zeros that a batch is padded with as sound: the last codes of the shorter clip are others."""
    _, hop, group = saved
    short, long = noise(2 * hop * group, 1), noise(5 * hop * group, 2)
    for variant, misses in ((tok.raw(), True), (tok, False)):
        batch, alone = variant.encode([short, long], RATE)[0], variant.encode(short, RATE)
        assert bool((batch.codes != alone.codes).any()) == misses


def test_the_output_is_longer(tok, saved):
    _, hop, group = saved
    x = noise(hop * group + 1)
    tokens = tok.encode(x, RATE)
    assert tokens.codes.shape[2] == 2 * group
    assert tok.raw().decode(tokens).shape[2] == 2 * group * hop and tok.decode(tokens).shape[2] == hop * group + 1


def test_noise_of_the_decoder(tok, saved):
    """Raw, the same codes give other sound each time; mitigated the same, in a batch as alone, whatever torch drew."""
    _, hop, group = saved
    clips = [noise(hop * group * n - 3, n) for n in (2, 1, 3)]
    tokens, raw = tok.encode(clips, RATE), tok.raw()
    one, two = raw.decode(tokens[0]), raw.decode(tokens[0])
    assert one.shape == two.shape and float((one - two).abs().max()) > 0.01
    before = torch.random.get_rng_state()
    sounds = tok.decode(tokens)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(1)
    for i in range(3):
        assert torch.equal(tok.decode(tokens[i])[0], sounds[i])
    stereo = tok.encode(clips[1].expand(2, -1), RATE)
    assert torch.equal(tok.decode(stereo)[0], sounds[1].expand(2, -1)), "channels share their noise"


def test_generator_draws_other_noise_repeatably(tok, saved):
    _, hop, group = saved
    tokens = tok.encode([noise(hop * group, s) for s in range(3)], RATE)
    usual = tok.decode(tokens)

    def drawn(part, generator):
        return tok.decode(part, generator=generator)

    before = torch.random.get_rng_state()
    first, again, other = (drawn(tokens, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    for a, b in ((first, usual), (first, other)):
        assert min(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) > 0.01
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(torch.cat([drawn(tokens[i], generator) for i in range(3)]), first), "item by item, in order"
    assert torch.equal(torch.random.get_rng_state(), before) and tok.generator is None
    assert torch.equal(tok.decode(tokens), usual)


def test_default_is_all_levels_and_prefixes_decode(tok, saved):
    _, hop, group = saved
    x = noise(3 * hop * group)
    full = tok.encode(x, RATE)
    Q = len(tok.level_strides)
    assert full.codes.shape[1] == Q and full.spec.level_strides == tok.level_strides
    sums = 0.0
    for k in range(1, Q + 1):
        assert torch.equal(tok.encode(x, RATE, num_codebooks=k).codes, full.codes[:, :k])
        level = tok.network.quantizer.quantizers[k - 1]
        sums = sums + level.out_proj(level.decode_code(full.codes[:, k - 1, :: level.stride])).repeat_interleave(
            level.stride, 2
        )
        torch.testing.assert_close(tok.decode(full.keep(k)), seeded(lambda z=sums: tok.network.decoder(z)))
    cut = full.keep(num_tokens=2 * group + 1)  # the last group is not whole
    assert tok.decode(cut).shape[2] == 2 * group * hop


def test_sound_in_pieces(tok, saved):
    """Cut and encoded apart, codes change near the cut; overlapping pieces of whole groups keep them all."""
    _, hop, group = saved
    x = noise(8 * hop * group, 3)
    whole = tok.encode(x, RATE)
    raw = tok.raw()
    half = 4 * hop * group
    naive = torch.cat([raw.encode(part, RATE).codes for part in (x[:, :half], x[:, half:])], 2)
    assert (naive != raw.encode(x, RATE).codes).any()
    for frames in (1, 2 * group + 1):
        tok.chunk_frames = frames
        assert torch.equal(tok.encode(x, RATE).codes, whole.codes)


def test_margin_is_what_the_encoder_reads(tok, saved):
    """Gradients of a group's latents reach as many frames as the margin says, and no further."""
    _, hop, group = saved
    groups = 2 * -(-tok.encode_margin // group) + 3
    x = noise(groups * group * hop)[None].double().requires_grad_()
    z = tok.network.double().encoder(x)
    middle = slice(groups // 2 * group, (groups // 2 + 1) * group)
    reached = torch.autograd.grad(z[..., middle].sum(), x)[0][0, 0].nonzero()[:, 0] // hop
    before, after = middle.start - int(reached.min()), int(reached.max()) - (middle.stop - 1)
    assert max(before, after) == tok.encode_margin


@pytest.mark.parametrize("channels", [1, 2])
def test_ids_of_a_language_model(tok, saved, channels):
    _, hop, group = saved
    x = torch.cat([noise(hop * group + 7, s) for s in range(channels)])
    tokens = tok.encode(x, RATE)
    assert tokens.codes.shape[2] == 2 * group * channels
    vocab = Vocab(100, audio=tok.spec)
    ids = vocab.pack([tokens])
    (part,) = vocab.unpack(ids)
    assert isinstance(part, Tokens) and part.spec == tokens.spec and torch.equal(part.codes, tokens.codes)
    assert torch.equal(tok.decode(part), tok.decode(tokens)) and tok.decode(part).shape == (1, *x.shape)
    written = sum(tokens.codes.shape[2] // s for s in tok.level_strides)
    assert len(vocab.pack([tokens], header=False)) == written + 2, "a slower level's code is written once"
    (bare,) = vocab.unpack(vocab.pack([tokens], header=False))
    assert torch.equal(bare.codes, tokens.codes)
    some = tokens.keep(2)
    (coarse,) = vocab.unpack(vocab.pack([some]))
    assert torch.equal(coarse.codes, some.codes) and torch.equal(tok.decode(coarse), tok.decode(some))


def test_any_length_rate_and_channels_a_file_and_training_mode(tok, saved, tmp_path):
    _, hop, group = saved
    clips = [noise(1), torch.cat([noise(1000, 1), noise(1000, 2)]), noise(hop * group + 1, 3)]
    for rate in (RATE, 11025):
        tokens = tok.encode(clips, rate)
        assert [tuple(y.shape) for y in tok.decode(tokens)] == [(1, 1), (2, 1000), (1, hop * group + 1)]
    tokens.save(tmp_path / "t.safetensors")
    back = Tokens.load(tmp_path / "t.safetensors")
    wanted = tok.decode(tokens)
    tok.train()
    assert torch.equal(tok.encode(clips, 11025).codes, tokens.codes)
    assert all(torch.equal(a, b) for a, b in zip(tok.decode(back), wanted, strict=True))


def test_without_noise_blocks_raw_is_deterministic():
    tok = module.SNACWrapper(networks.snac(PLAIN | {"noise": False}), "quiet")
    tokens = tok.encode(noise(600), RATE)
    assert torch.equal(tok.raw().decode(tokens), tok.raw().decode(tokens))
    torch.testing.assert_close(tok.decode(tokens), tok.raw().decode(tokens)[..., :600])


def test_strides_that_do_not_divide_each_other():
    """Groups hold whole codes of every level; upstream pads to the first stride only and fails on such clips."""
    tok = module.SNACWrapper(networks.snac(PLAIN | {"vq_strides": [4, 3, 1]}), "uneven")
    x = noise(30 * 13)
    with pytest.raises(RuntimeError), torch.no_grad():
        tok.network.encode(x[None])
    tokens = tok.encode(x, RATE)
    assert tok.frame_group == 12 and tokens.codes.shape == (1, 3, 24)
    assert tok.decode(tokens).shape == (1, 1, 30 * 13)


def test_fingerprint_safetensors_and_foreign_ids(tok, saved, tmp_path):
    from safetensors.torch import save_file

    folder = saved[0]
    config = (folder / "config.json").read_text()
    for name, seed in (("copy", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        state = networks.snac(json.loads(config), seed).state_dict()
        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / name / "model.safetensors")
    copy, other = (module.FAMILY.open(str(tmp_path / n)) for n in ("copy", "other"))
    assert copy.fingerprint == tok.fingerprint != other.fingerprint
    tokens = tok.encode(noise(500), RATE)
    assert torch.equal(copy.decode(tokens), tok.decode(tokens))
    for generator in (None, torch.Generator()):
        with pytest.raises(TokensError, match="not of 'snac:other'"):
            other.decode(tokens, generator=generator)


def test_spec_and_licences(tok, saved):
    _, hop, _ = saved
    assert tok.spec.frame_rate == RATE / hop and set(tok.spec.codebook_sizes) == {16}
    assert tok.timing()["receptive_field"] == {"encoder_frames": tok.encode_margin, "decoder_frames": "unbounded"}
    assert tok.licences["code"] == "MIT" and tok.licences["weights"].startswith("MIT (as published")
    json.dumps(tok.config)
    cells = module.FAMILY.taxonomy.cells()
    assert cells["quantization"] == "MSRVQ" and cells["streamable"] == "n"


def test_folders_that_are_no_snac(tmp_path, monkeypatch):
    def folder(name, config=PLAIN, weights=None):
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        if weights is not None:
            (path / "pytorch_model.bin").write_bytes(weights)
        return str(path)

    state = networks.snac(PLAIN).state_dict()
    torch.save(state, tmp_path / "good.bin")
    good = (tmp_path / "good.bin").read_bytes()
    assert module.FAMILY.open(folder("good", weights=good)).codebook_sizes == (16, 16, 16)
    (tmp_path / "empty").mkdir()
    torch.save([1, 2], tmp_path / "list.bin")
    cases = [
        (str(tmp_path / "absent"), "no folder at"),
        (str(tmp_path / "empty"), "has no config.json; expected a folder with the files of a SNAC repository"),
        (folder("no weights"), "has no weights; expected model.safetensors or pytorch_model.bin"),
        (folder("json", "{", good), "config.json is damaged"),
        (folder("mimi", {"model_type": "mimi"}, good), r"no config of SNAC: .* got also \['model_type'\]"),
        (folder("cut", weights=good[:500]), "cannot read"),
        (folder("list", weights=(tmp_path / "list.bin").read_bytes()), "expected a mapping of names to tensors"),
        (folder("wider", PLAIN | {"codebook_size": 32}, good), "make no SNAC .*size mismatch"),
        (folder("words", PLAIN | {"encoder_rates": "ab"}, good), "make no SNAC"),
    ]
    for source, message in cases:
        with pytest.raises(ValueError, match=message):
            module.FAMILY.open(source)
    for change, message in (
        ({"decoder_rates": [5, 3]}, "encoder and decoder rates of one product"),
        ({"encoder_rates": [2, 15, 1], "decoder_rates": [15, 2, 1]}, "rates of at least 2"),
        ({"latent_dim": 64}, "latent_dim 32, the width of the encoder"),
        ({"vq_strides": []}, "vq_strides of at least 1"),
        ({"attn_window_size": 0, "encoder_dim": 8, "decoder_dim": 64}, "an attention window of at least 1"),
        ({"attn_window_size": 8, "encoder_dim": 8, "decoder_dim": 32}, "widths that are multiples of 64"),
    ):
        from snac import SNAC

        with pytest.raises(ValueError, match=message):
            module.SNACWrapper(SNAC(**(PLAIN | change)), "odd")
    monkeypatch.setitem(sys.modules, "snac", None)
    with pytest.raises(ImportError, match=r"snac needs the package snac .*pip install 'mmtok\[codecs\]'"):
        module.FAMILY.open(str(tmp_path / "good"))
