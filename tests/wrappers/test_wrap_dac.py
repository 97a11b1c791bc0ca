"""transformers' DacModel through its wrapper: parity, the laws, its missing mask, and the 8 samples of odd strides."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from peers import networks
from peers.networks import noise

import mmtok.wrappers.dac as module
from mmtok.bench.laws import ABOUT, check
from mmtok.layers.receptive import pieces
from mmtok.tokens import Tokens, TokensError

pytest.importorskip("transformers")

RATE, STRIDES, LEVELS, HOP = 16000, (2, 4, 5, 8), 3, 320


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dac")
    networks.dac().save_pretrained(folder)
    return folder


@pytest.fixture
def tok(saved):
    return module.FAMILY.open(str(saved))


def upstream(tok, x, levels=LEVELS):
    with torch.no_grad():
        return tok.network.encode(x, n_quantizers=levels).audio_codes


def test_codes_and_sound_are_those_of_dacmodel(tok):
    one, batch = noise(12 * HOP), torch.stack([noise(9 * HOP, s) for s in range(3)])
    for x in (one[None], batch):
        tokens = tok.encode(x, RATE)
        assert torch.equal(tokens.codes, upstream(tok, x)) and tokens.codes.dtype == torch.int64
        with torch.no_grad():
            theirs = tok.network.decode(audio_codes=tokens.codes).audio_values
        assert theirs.shape == (len(x), x.shape[2] - 8), "their output lacks the channel and 8 samples"
        torch.testing.assert_close(tok.raw().decode(tokens), theirs[:, None])
        ours = tok.decode(tokens)
        torch.testing.assert_close(ours[..., 8:], theirs[:, None])
        assert ours.shape == x.shape and not ours[..., :8].any()
    used = [len(tok.encode(noise(60 * HOP, 7), RATE).codes[0, q].unique()) for q in range(LEVELS)]
    assert min(used) >= 4, used


def test_every_law(tok):
    laws = [law for law in ABOUT if law != "delay"]  # a random network's output is too unlike its input to tell
    report = check(tok, only=laws, seconds=0.25)
    assert report.ok, report.table()
    assert {r.law for r in report.rows if r.status == "not applicable"} <= {"device"}, report.table()


def test_raw_breaks_padding_size_and_delay(tok):
    laws = ("padding", "batch size", "exact size", "delay")
    report = check(tok.raw(), only=laws, seconds=0.25)
    broken = {r.law: r.miss_rate for r in report.rows if r.status == "broken"}
    assert set(broken) == {"padding", "exact size", "delay"}, report.table()
    assert 0 < broken["padding"] < 0.5 and broken["exact size"] == 1, report.table()


def test_missing_padding_mask(tok):
    """DacModel sees the zeros of a padded batch as sound: the last codes of the shorter clip are others."""
    short, long = noise(10 * HOP, 1), noise(25 * HOP, 2)
    for variant, misses in ((tok.raw(), True), (tok, False)):
        batch, alone = variant.encode([short, long], RATE)[0], variant.encode(short, RATE)
        assert bool((batch.codes != alone.codes).any()) == misses
        assert torch.equal(batch.codes[..., :4], alone.codes[..., :4]), "only the end is near the padding"


def test_n_quantizers_in_training_mode(tok):
    """DacModel gives all levels in training mode whatever it is asked; the wrapper's encode is always in evaluation."""
    x = noise(6 * HOP)
    wanted = tok.encode(x, RATE, num_codebooks=2)
    assert wanted.codes.shape[1] == 2
    tok.train()
    with torch.no_grad():
        assert tok.network.encode(x[None], n_quantizers=2).audio_codes.shape[1] == LEVELS
    for variant in (tok, tok.raw()):
        assert torch.equal(variant.encode(x, RATE, num_codebooks=2).codes, wanted.codes)
    assert torch.equal(tok.decode(wanted), tok.eval().decode(wanted)) and not tok.network.training


def test_default_is_all_levels_and_any_number_is_a_prefix(tok):
    x = noise(9 * HOP + 5)
    full = tok.encode(x, RATE)
    assert full.codes.shape == (1, LEVELS, 10) and int(full.side["num_samples"][0]) == 9 * HOP + 5
    for k in range(1, LEVELS + 1):
        assert torch.equal(tok.encode(x, RATE, num_codebooks=k).codes, full.codes[:, :k])
        assert tok.decode(full.keep(k)).shape == (1, 1, 9 * HOP + 5)
    assert tok.raw().encode(x, RATE).codes.shape[1] == LEVELS


def test_sound_that_is_cut(tok):
    """Cut and encoded apart, codes change near the cut; pieces that overlap by the receptive field keep all of them."""
    x = noise(40 * HOP, 3)
    whole, sound = tok.encode(x, RATE), tok.decode(tok.encode(x, RATE))
    raw = tok.raw()
    naive = torch.cat([raw.encode(part, RATE).codes for part in (x[:, : 20 * HOP], x[:, 20 * HOP :])], 2)
    misses = (naive != raw.encode(x, RATE).codes).any(1)[0]
    assert 0 < misses.sum() <= 2 * tok.encode_margin
    assert not misses[: 20 - tok.encode_margin].any() and not misses[20 + tok.encode_margin :].any()
    for frames in (2, 17):
        tok.chunk_frames = frames
        assert torch.equal(tok.encode(x, RATE).codes, whole.codes)
        torch.testing.assert_close(tok.decode(whole), sound, rtol=0, atol=1e-5)


def test_a_margin_that_is_one_smaller_is_not_enough(tok):
    """The margins are exact: latents and sound of pieces that overlap by one frame less are others."""
    x, z = noise(24 * HOP)[None], torch.randn(1, tok.network.config.hidden_size, 24)
    encode, decode = tok.encode_margin, tok.decode_margin
    with torch.no_grad():
        for run, full, step, out in (
            (tok.network.encoder, x, HOP, 1),
            (lambda z: tok._placed(tok.network.decoder(z), z.shape[2] * HOP), z, 1, HOP),
        ):
            margin = encode if out == 1 else decode
            whole = run(full)
            for overlap, same in ((margin, True), (margin - 1, False)):
                parts = []
                for start, stop, left, right in pieces(24, 1, overlap):
                    y = run(full[..., (start - left) * step : (stop + right) * step])
                    parts.append(y[..., left * out : (left + stop - start) * out])
                error = float((torch.cat(parts, -1) - whole).abs().max())
                assert (error < 1e-5) == same, (out, overlap, error)


def centroids(tok, tilt: int = 0):
    """What the decoder leaves out, and the centre of the decoded response to an impulse, less the impulse's place, as
    the mean over the places within a frame: raw and mitigated.

    All kernels are constant and Snake is the identity, so the network (without its quantizer) is linear, and gradients
    of sums over its output give all responses at once. ``tilt`` moves the kernels of the decoder's odd strides to the
    left by that many of their positions.
    """
    network, T = tok.network.double(), 2 * (tok.encode_margin + tok.decode_margin) + 4
    for name, p in network.named_parameters():
        if name.endswith("alpha") or name.endswith("bias"):
            p.zero_()
        elif p.ndim == 3 and "quantizer" not in name:
            p.fill_(1 / (p.shape[1] * p.shape[2]))
    for block, stride in zip(network.decoder.block, network.config.upsampling_ratios, strict=True):
        if stride % 2:
            kernel = block.conv_t1.weight
            kernel[..., 0] = kernel[..., -1] = 0  # still symmetric
            kernel.copy_(kernel.roll(-tilt, dims=2))
    network.decoder.tanh = torch.nn.Identity()
    hop = tok.hop_length
    frame = slice(T // 2 * hop, (T // 2 + 1) * hop)
    x = torch.zeros(1, 1, T * hop, dtype=torch.float64, requires_grad=True)
    y = network.decoder(network.encoder(x))
    found = []
    for sound in (y, tok._placed(y, T * hop)):
        places = torch.arange(sound.shape[2], dtype=torch.float64)
        moment, mass = (torch.autograd.grad((w * sound).sum(), x, retain_graph=True)[0][0, 0] for w in (places, 1.0))
        found.append(float((moment / mass - torch.arange(T * hop))[frame].mean()))
    return y.shape[2] - T * hop, *found


@pytest.mark.parametrize(("strides", "shift"), [((2, 4, 5, 8), 8), ((2, 4, 8, 8), 0), ((4, 5, 2), 4), ((3, 5), 4)])
def test_what_odd_strides_leave_out(strides, shift):
    """The output is shorter by ``shift``, and the released weights are that early: as here with kernels one position
    to the left. Geometry alone shifts nothing: encoder and decoder are half a position off each, to opposite sides."""
    straight = module.DACWrapper(networks.dac(strides), "straight")
    assert straight.delay_samples == -shift
    lacking, raw, _ = centroids(straight)
    assert lacking == -shift and raw == pytest.approx(0, abs=1e-2)
    if shift and sum(s % 2 for s in strides) == 1:
        lacking, raw, mitigated = centroids(module.DACWrapper(networks.dac(strides), "early"), tilt=1)
        assert lacking == -shift
        assert raw == pytest.approx(-shift, abs=1e-2) and mitigated == pytest.approx(0, abs=1e-2)


def test_another_delay_can_be_set(tok):
    x = noise(30 * HOP)
    tok.delay_samples = 0
    tokens = tok.encode(x, RATE)
    y = tok.decode(tokens)
    torch.testing.assert_close(y[..., :-8], tok.raw().decode(tokens))
    assert not y[..., -8:].any()
    tok.chunk_frames = 2
    torch.testing.assert_close(tok.decode(tokens), y, rtol=0, atol=1e-5)


def test_even_strides_have_no_delay():
    tok = module.DACWrapper(networks.dac((2, 4), rate=44100), "even")
    x = noise(50)
    tokens = tok.encode(x, 44100)
    assert tok.delay_samples == 0 and tokens.codes.shape == (1, LEVELS, 7)
    assert tok.raw().decode(tokens).shape == (1, 1, 56) and tok.decode(tokens).shape == (1, 1, 50)
    torch.testing.assert_close(tok.decode(tokens), tok.raw().decode(tokens)[..., :50])


def test_any_length_rate_and_channels_and_a_file(tok, tmp_path):
    clips = [noise(1), torch.cat([noise(1000, 1), noise(1000, 2)]), noise(HOP + 1, 3)]
    for rate in (RATE, 11025):
        tokens = tok.encode(clips, rate)
        assert [tuple(y.shape) for y in tok.decode(tokens)] == [(1, 1), (2, 1000), (1, HOP + 1)]
    tokens.save(tmp_path / "t.safetensors")
    back = Tokens.load(tmp_path / "t.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(tok.decode(back), tok.decode(tokens), strict=True))


def test_fingerprint_follows_weights_not_folder(tok, saved, tmp_path):
    networks.dac().save_pretrained(tmp_path / "copy")
    networks.dac(seed=1).save_pretrained(tmp_path / "other")
    copy, other = (module.FAMILY.open(str(tmp_path / n)) for n in ("copy", "other"))
    assert copy.fingerprint == tok.fingerprint != other.fingerprint
    tokens = tok.encode(noise(3 * HOP), RATE)
    assert torch.equal(copy.decode(tokens), tok.decode(tokens))
    with pytest.raises(TokensError, match="not of 'dac:other'"):
        other.decode(tokens)


def test_spec_timing_and_licences(saved, tok):
    assert tok.spec.codebook_sizes == (16,) * LEVELS and tok.spec.frame_rate == 50 and tok.type_name == "wrapper:dac"
    timing = tok.timing()
    assert timing["network_delay_samples"] == -8
    assert timing["receptive_field"] == {"encoder_frames": tok.encode_margin, "decoder_frames": tok.decode_margin}
    assert tok.licences["code"] == "Apache-2.0" and tok.licences["weights"].startswith("MIT (as published")
    json.dumps(tok.config)
    cells = module.FAMILY.taxonomy.cells()
    assert cells["quantization"] == "RVQ" and cells["streamable"] == "n"


def test_folders_that_are_no_dac(saved, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no folder at"):
        module.FAMILY.open(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"has no config.json; expected a folder that transformers' DacModel"):
        module.FAMILY.open(str(tmp_path))
    config = json.loads((saved / "config.json").read_text())
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in saved.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 2000 if file.suffix == ".safetensors" else None])
    with pytest.raises(ValueError, match="no readable folder of transformers' DacModel"):
        module.FAMILY.open(str(broken))
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "mimi"}))
    with pytest.raises(ValueError, match="broken"):
        module.FAMILY.open(str(broken))
    for down, up in ([2, 4, 5, 8], [8, 5, 4, 4]), ([2, 4, 5, 1], [1, 5, 4, 2]):
        network = networks.dac()
        network.config.downsampling_ratios, network.config.upsampling_ratios = down, up
        with pytest.raises(ValueError, match="expected strides of at least 2 with one product"):
            module.DACWrapper(network, "odd")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"dac needs the package transformers .*pip install 'mmtok\[codecs\]'"):
        module.FAMILY.open(str(saved))
