"""The judges of sounds, each against another way to the same number, and the items that they have no value for."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from musicnn_bundle import tagger_weights, write_bundle

import mmtok
from mmtok.bench import audio_scorers
from mmtok.bench.audio_judging import AT_16K
from mmtok.bench.audio_scorers import AudioDistance, AudioSignal, audio_signal, fad_whisper, pesq, stoi
from mmtok.bench.recognition import SphinxRecogniser
from mmtok.bench.records import Item
from mmtok.bench.scorers import NotRunError, Scorer, SetScorer, UnscoredError, open_scorer
from mmtok.bench.speaker_network import SpeakerEncoder, load_speaker_encoder, window_starts
from mmtok.bench.speech_scorers import Words, character_errors, distillmos, dnsmos, speaker, words_sphinx, words_whisper
from mmtok.data.audio import read_audio, resample

RATE = 16000
TEXT = "unless to be rather cold hearted and rather selfish is to be ill disposed"
HELPERS = Path(mmtok.__file__).parents[1] / "data" / "helpers"
NETWORKS = HELPERS / "musicnn" / ".index"


@pytest.fixture(scope="module")
def item() -> Item:
    x, rate = read_audio(Path(mmtok.__file__).parent / "assets" / "speech.flac")
    assert rate == RATE
    return Item("speech.flac", x[:1, :40000], RATE, text=TEXT, labels={"language": "en", "kind": "speech"})


def noise_like(x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def reasons(found: dict) -> set[str]:
    assert found and all(isinstance(v, UnscoredError) for v in found.values()), found
    return {str(v) for v in found.values()}


# Signal metrics


def test_signal_measures_equal_closed_forms(item: Item):
    x = item.x - item.x.mean()
    n = noise_like(x)
    n = n - n.mean()
    n = n - (n * x).sum() / x.square().sum() * x
    y = x + n * (x.norm() / n.norm()) * 10 ** (-10 / 20)
    found = audio_signal(None).scores(dataclasses.replace(item, x=x), y)
    assert found["si_sdr"] == pytest.approx(10, abs=0.01)
    assert found["si_sdr_aligned"] == found["si_sdr"] and found["delay"] == 0
    assert 10 < found["sdr"] < 10.3  # its 512 taps explain a little more than one gain
    louder = audio_signal(None).scores(item, 10 * item.x)
    # Ten times the amplitude is one decade and 20 dB wherever the magnitudes are above the floor.
    assert 0.9 * 7 < louder["mel_distance"] <= 7 + 1e-4 and 18 < louder["stft_distance"] <= 20 + 1e-3


def test_eight_samples_early_is_a_delay_and_not_a_distortion(item: Item):
    """What DAC does at 16 and 24 kHz."""
    early = torch.cat([item.x[:, 8:], torch.zeros(1, 8)], 1)
    late = torch.cat([torch.zeros(1, 8), item.x[:, :-8]], 1)
    scorer = audio_signal(None)
    e, lt = scorer.scores(item, early), scorer.scores(item, late)
    assert (e["delay"], lt["delay"]) == (-8, 8)
    assert e["si_sdr"] < 0 and lt["si_sdr"] < 0
    assert e["si_sdr_aligned"] > 60 and lt["si_sdr_aligned"] > 60
    assert e["sdr"] < 3 and lt["sdr"] > 35
    (delay,) = [m for m in scorer.measures if m.name == "delay"]
    assert (delay.summary, delay.direction, delay.unit) == ("median", "neither", "samples")


def test_signal_items_without_a_value(item: Item):
    scorer = audio_signal(None)
    assert reasons(scorer.scores(item, torch.zeros_like(item.x))) == {"a silent reconstruction"}
    assert reasons(scorer.scores(item, item.x * torch.nan)) == {"a reconstruction with NaN or infinity"}
    quiet = dataclasses.replace(item, x=torch.zeros_like(item.x))
    assert reasons(scorer.scores(quiet, item.x)) == {"a silent original"}
    short = dataclasses.replace(item, x=item.x[:, 2000:3000])
    found = scorer.scores(short, short.x + 0.01 * noise_like(short.x))
    assert isinstance(found["si_sdr"], float) and isinstance(found["sdr"], float)
    for name in ("mel_distance", "stft_distance", "delay", "si_sdr_aligned"):
        assert isinstance(found[name], UnscoredError) and "more than" in str(found[name])
        assert "1000" not in str(found[name]) and ";" not in str(found[name])  # one reason for items of any length
    with pytest.raises(ValueError, match="a reconstruction of the same shape"):
        scorer.scores(item, item.x[:, 1:])
    with pytest.raises(ValueError, match="with its rate"):
        scorer.scores(dataclasses.replace(item, sample_rate=None), item.x)


def test_channels_of_a_stereo_sound_are_averaged(item: Item):
    y = item.x + 0.01 * noise_like(item.x)
    stereo = dataclasses.replace(item, x=torch.cat([item.x, item.x.flip(1)]))
    both = audio_signal(None).scores(stereo, torch.cat([y, y.flip(1)]))
    one = audio_signal(None).scores(item, y)
    for name in ("si_sdr", "mel_distance", "stft_distance"):
        assert both[name] == pytest.approx(one[name], abs=0.05)


# PESQ and STOI


def test_pesq_and_stoi_equal_their_packages(item: Item):
    packages = [pytest.importorskip("pesq"), pytest.importorskip("pystoi")]
    wide = dataclasses.replace(item, x=resample(item.x, RATE, 24000), sample_rate=24000)
    y = wide.x + 0.01 * noise_like(wide.x)
    a, b = (resample(v, 24000, RATE)[0].numpy() for v in (wide.x, y))
    found = pesq(None).scores(wide, y)["pesq_wb"]
    assert found == pytest.approx(packages[0].pesq(RATE, a, b, "wb"), abs=1e-6)
    found = stoi(None).scores(wide, y)["stoi"]
    assert found == pytest.approx(packages[1].stoi(wide.x[0].numpy(), y[0].numpy(), 24000), abs=1e-6)


def test_what_pesq_and_stoi_cannot_judge_is_counted_and_not_1(item: Item, monkeypatch: pytest.MonkeyPatch):
    package = pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    short = dataclasses.replace(item, x=item.x[:, :3000])
    assert reasons(pesq(None).scores(short, short.x)) == {"shorter than 0.25 s"}
    assert reasons(stoi(None).scores(short, short.x)) == {"shorter than 0.4 s"}
    pause = dataclasses.replace(item, x=torch.zeros(1, RATE))
    pause.x[:, 8000:8010] = 0.01
    assert reasons(stoi(None).scores(pause, pause.x)) == {"no speech that pystoi finds"}
    assert reasons(pesq(None).scores(item, torch.zeros_like(item.x))) == {"a silent reconstruction"}
    music = dataclasses.replace(item, labels={"kind": "music"})
    assert reasons(stoi(None).scores(music, item.x)) == {"no speech: its kind is music"}

    def deaf(*_: object) -> float:
        raise package.NoUtterancesError(b"No utterances detected")

    monkeypatch.setattr(package, "pesq", deaf)
    assert reasons(pesq(None).scores(item, item.x)) == {"no speech that pesq finds"}


# Predicted opinions


@pytest.mark.parametrize("name", ["dnsmos", "distillmos"])
def test_opinions_fall_with_noise_and_are_the_same_twice(name: str, item: Item):
    pytest.importorskip("speechmos" if name == "dnsmos" else "distillmos")
    scorer = dnsmos(None) if name == "dnsmos" else distillmos(None)
    rows = [scorer.scores(item, item.x + level * noise_like(item.x)) for level in (0, 0.005, 0.05)]
    # What little noise does to the voice itself goes either way, and PLCMOS judges lost packets.
    falling = [m.name for m in scorer.measures if m.name not in ("plcmos", "dnsmos_sig")]
    for measure in falling:
        values = [row[measure] for row in rows]
        assert 5 > values[0] > values[1] > values[2] > 1, (measure, values)
    assert all(m.absolute and m.unit == "MOS" and m.direction == "higher" for m in scorer.measures)
    np.random.seed(7)
    expected = np.random.RandomState(7).standard_normal()
    assert scorer.scores(item, item.x) == rows[0]  # the original: an absolute measure has a value for it
    assert np.random.standard_normal() == expected  # nothing of the caller's random numbers was used up
    short = dataclasses.replace(item, x=item.x[:, :7999])
    assert reasons(scorer.scores(short, short.x)) == {"shorter than 0.5 s"}
    assert reasons(scorer.scores(item, torch.zeros_like(item.x))) == {"a silent reconstruction"}
    if name == "dnsmos":
        assert 1 < rows[0]["plcmos"] < 5
        lost = item.x.clone()
        for start in range(4000, 40000, 6400):  # every fourth packet of 100 ms
            lost[:, start : start + 1600] = 0
        assert scorer.scores(item, lost)["plcmos"] < rows[0]["plcmos"] - 0.5


# Recognised words


def fake(heard: str) -> Words:
    return Words(lambda x: heard, "", "a fake", "0", {})


def test_words_and_characters_are_counted_as_by_hand_and_by_jiwer(item: Item):
    jiwer = pytest.importorskip("jiwer")
    cat = dataclasses.replace(item, text="The cat sat on the mat.")
    found = fake("the bat sat on mat").scores(cat, cat.x)
    # cat -> bat and a word lost; c -> b, and "the " with its space lost, of 22 characters.
    assert found == {"wer": (2.0, 6.0), "cer": (5.0, 22.0)}
    pairs = [("the cat sat on the mat", "the bat sat on mat"), ("a b", "a b"), ("one", ""), ("so", "so it goes")]
    for reference, hypothesis in pairs:
        found = fake(hypothesis).scores(dataclasses.replace(item, text=reference), item.x)
        assert found["wer"][0] / found["wer"][1] == pytest.approx(jiwer.wer(reference, hypothesis))
        assert found["cer"][0] / found["cer"][1] == pytest.approx(jiwer.cer(reference, hypothesis))
        assert character_errors(reference, hypothesis) == found["cer"]
    assert all(m.summary == "ratio" and m.absolute for m in fake("").measures)
    with_numbers = dataclasses.replace(item, text="Twenty two dogs!")
    assert fake("22 dogs").scores(with_numbers, item.x)["wer"] == (0.0, 2.0)


def test_words_hear_mono_at_16_khz(item: Item):
    pytest.importorskip("jiwer")
    heard = []
    scorer = Words(lambda x: heard.append(x) or "", "_x", "a fake", "0", {})
    wide = dataclasses.replace(item, x=resample(item.x, RATE, 44100).repeat(2, 1), sample_rate=44100)
    found = scorer.scores(wide, 3 * wide.x)
    assert set(found) == {"wer_x", "cer_x"} and found["wer_x"] == (14.0, 14.0)
    assert heard[0].shape == item.x.shape and float(heard[0].abs().max()) <= 1
    assert {k: scorer.settings[k] for k in AT_16K} == AT_16K
    # Silence costs every word: a codec that says nothing must not be left out of the mean.
    assert scorer.scores(item, torch.zeros_like(item.x))["wer_x"] == (14.0, 14.0)


def test_items_that_no_recogniser_here_can_judge(item: Item):
    pytest.importorskip("jiwer")
    cases = {
        "no transcript": dataclasses.replace(item, text=None),
        "spoken in it, the recogniser is English": dataclasses.replace(item, labels={"language": "it"}),
        "a transcript without words": dataclasses.replace(item, text="..."),
        "no speech: its kind is music": dataclasses.replace(item, labels={"kind": "music"}),
    }
    for reason, case in cases.items():
        assert reasons(fake("x").scores(case, case.x)) == {reason}
    assert reasons(fake("x").scores(item, item.x * torch.inf)) == {"a reconstruction with NaN or infinity"}
    british = dataclasses.replace(item, labels={"language": "en_GB"})
    assert fake(TEXT).scores(british, item.x)["wer"] == (0.0, 14.0)


def test_sphinx_hears_the_same_whatever_it_heard_before(item: Item, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("pocketsphinx")
    pytest.importorskip("jiwer")
    states, hear = [], SphinxRecogniser.__call__

    def watched(recogniser: SphinxRecogniser, x: torch.Tensor) -> str:
        states.append(recogniser.decoder.get_cmn(False))
        heard = hear(recogniser, x)
        states.append(recogniser.decoder.get_cmn(False))
        return heard

    monkeypatch.setattr(SphinxRecogniser, "__call__", watched)
    scorer = words_sphinx(None)
    short = dataclasses.replace(item, x=item.x[:, :12000], text="unless to be")
    first = scorer.scores(short, short.x)
    assert first["wer_sphinx"][1] == 3 and isinstance(first["cer_sphinx"], tuple)
    assert scorer.scores(short, short.x) == first
    before, after, again, _ = states
    assert before != after  # what it heard moves its mean of the spectrum,
    assert before == again  # from which the next sound would start


@pytest.mark.slow
@pytest.mark.skipif(not (HELPERS / "whisper-base-1").is_dir(), reason="needs recipes/fetch_data.py --helpers")
def test_whisper_hears_the_packaged_sentence(item: Item):
    pytest.importorskip("faster_whisper")
    pytest.importorskip("jiwer")
    x, _ = read_audio(Path(mmtok.__file__).parent / "assets" / "speech.flac")
    whole = dataclasses.replace(item, x=x)
    scorer = words_whisper(HELPERS)
    found = scorer.scores(whole, x)
    assert found["wer"][1] == 14 and found["wer"][0] <= 2 and found["cer"][0] <= 8
    assert scorer.scores(whole, x + 0.3 * noise_like(x))["wer"][0] > found["wer"][0]
    assert len(scorer.settings["weights"]) == 16


# Speakers


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def d_vector(mel: np.ndarray, state: dict[str, np.ndarray], layers: int) -> np.ndarray:
    """The LSTM's equations (Hochreiter and Schmidhuber, with forget gates), step by step in float64."""
    sequence = mel
    for layer in range(layers):
        w, u, b, c0 = (state[f"lstm.{k}_l{layer}"] for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        h = cell = np.zeros(u.shape[1])
        outputs = []
        for x in sequence:
            i, f, g, o = np.split(w @ x + b + u @ h + c0, 4)
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(cell)
            outputs.append(h)
        sequence = np.stack(outputs)
    raw = np.maximum(state["linear.weight"] @ sequence[-1] + state["linear.bias"], 0)
    return raw / np.linalg.norm(raw)


def test_speaker_network_equals_its_equations():
    torch.manual_seed(0)
    network = SpeakerEncoder(bands=5, width=7, num_layers=3)
    with torch.no_grad():
        network.linear.bias += 0.5  # so that not everything is cut off by the ReLU
    mel = torch.rand(2, 12, 5) * 3
    state = {k: v.double().numpy() for k, v in network.state_dict().items()}
    want = np.stack([d_vector(m.double().numpy(), state, 3) for m in mel])
    np.testing.assert_allclose(network(mel).numpy(), want, atol=1e-6)


def test_speaker_frontend_equals_librosa_and_windows_follow_the_package(item: Item):
    librosa = pytest.importorskip("librosa")
    x = item.x[0, :20000]
    want = librosa.feature.melspectrogram(y=x.numpy(), sr=RATE, n_fft=400, hop_length=160, n_mels=40)
    np.testing.assert_allclose(SpeakerEncoder().mel(x).numpy(), want.T, rtol=1e-4, atol=1e-6)
    # 160 frames each, 77 apart; a last one of less than three quarters is left out, unless it is alone.
    assert window_starts(1) == window_starts(25599) == window_starts(26000) == [0]
    assert window_starts(77 * 160 + 19200) == [0, 77]
    assert window_starts(77 * 160 + 19199) == [0]
    assert window_starts(5 * RATE) == [0, 77, 154, 231, 308, 385][: len(window_starts(5 * RATE))]


def test_speaker_similarity_from_a_weights_file(item: Item, tmp_path: Path):
    torch.manual_seed(0)
    folder = tmp_path / "resemblyzer"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"pretrained\.pt is missing.*fetch_data\.py"):
        speaker(tmp_path)
    state = SpeakerEncoder().state_dict() | {"similarity_weight": torch.ones(1), "similarity_bias": torch.ones(1)}
    torch.save({"step": 1, "model_state": state}, folder / "pretrained.pt")
    scorer = speaker(tmp_path)
    assert scorer.scores(item, item.x)["speaker_similarity"] == pytest.approx(1, abs=1e-6)
    assert 0 < scorer.scores(item, noise_like(item.x) * 0.1)["speaker_similarity"] < 1
    quiet = dataclasses.replace(item, x=item.x * 0.01)  # quiet sounds are raised to one level
    assert scorer.scores(quiet, item.x * 0.001)["speaker_similarity"] > 0.99999
    assert reasons(scorer.scores(item, torch.zeros_like(item.x))) == {"a silent reconstruction"}
    short = dataclasses.replace(item, x=item.x[:, :7000])
    assert reasons(scorer.scores(short, short.x)) == {"shorter than 0.5 s"}
    (folder / "pretrained.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="damaged or another network"):
        speaker(tmp_path)


@pytest.mark.skipif(not (HELPERS / "resemblyzer").is_dir(), reason="needs recipes/fetch_data.py --helpers")
def test_real_speaker_network_tells_a_voice_from_noise(item: Item):
    embed = load_speaker_encoder(HELPERS / "resemblyzer").embed
    a, b, c = embed(item.x[:, :20000]), embed(item.x[:, 20000:]), embed(0.1 * noise_like(item.x))
    assert float(a.norm()) == pytest.approx(1, abs=1e-6) and a.shape == (256,)
    assert float(a @ b) > 0.7 > 0.6 > float(a @ c)


# Sets


def test_whisper_distance_needs_no_download_and_grows_with_noise(item: Item):
    scorer = fad_whisper(None)
    whole = torch.cat([item.x, item.x.flip(1)], 1)
    features = scorer.features(whole, RATE)
    assert features.shape == (5, 384)
    levels = [scorer.distance(features, scorer.features(whole + s * noise_like(whole), RATE)) for s in (0, 0.01, 0.1)]
    values = [v["fad[whisper-tiny]"] for v in levels]
    assert values[0] == pytest.approx(0, abs=1e-6) and values[0] < values[1] < values[2]
    assert len({v["fad_floor[whisper-tiny]"] for v in levels}) == 1  # of the originals alone
    assert scorer.features(item.x[:, :8000], RATE).shape == (1, 384)
    for bad, reason in ((item.x[:, :7999], "shorter than 0.5 s"), (item.x * torch.nan, "NaN or infinity")):
        with pytest.raises(UnscoredError, match=reason):
            scorer.features(bad, RATE)
    with pytest.raises(ValueError, match="with its sample rate"):
        scorer.features(item.x, None)


def test_distance_is_the_frechet_distance_of_the_features():
    scorer = AudioDistance("x", lambda x: x, "1 s", "a fake", "0", {})
    a = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = scorer.distance(a, a + torch.tensor([1.0, 2.0, -2.0]))
    assert moved["fad[x]"] == pytest.approx(9)  # equal covariances: the square of the distance of the means
    scaled = scorer.distance(a, 3 * (a - a.mean(0)) + a.mean(0))
    assert scaled["fad[x]"] == pytest.approx(4 * float(a.var(0).sum()))  # (3 - 1)^2 of every variance
    assert moved["fad_floor[x]"] == scaled["fad_floor[x]"] > 0
    with pytest.raises(UnscoredError, match="fewer than 4 windows"):
        scorer.distance(a[:3], a)


# All of them


@pytest.mark.parametrize("name", ["words_whisper", "speaker", "fad_musicnn"])
def test_without_networks_they_are_not_run_and_say_what_to_do(name: str, tmp_path: Path):
    pytest.importorskip("jiwer")
    for helpers in (None, tmp_path):
        with pytest.raises(NotRunError, match=r"recipes/fetch_data\.py --out \S+ --helpers"):
            open_scorer(name, helpers)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("pesq", "pesq", "audio-metrics"),
        ("stoi", "pystoi", "audio-metrics"),
        ("dnsmos", "speechmos", "judges"),
        ("distillmos", "distillmos", "judges"),
        ("words_sphinx", "pocketsphinx", "asr"),
    ],
)
def test_without_packages_they_are_not_run_and_name_the_extra(
    name: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
):
    for module in [package, *(m for m in sys.modules if m.startswith(package + "."))]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(NotRunError, match=rf"{package}.*pip install 'mmtok\[{extra}\]'"):
        open_scorer(name)


def test_every_scorer_states_its_protocol(item: Item, tmp_path: Path):
    for needed in ("pesq", "pystoi", "speechmos", "distillmos", "pocketsphinx", "jiwer"):
        pytest.importorskip(needed)
    (tmp_path / "musicnn").mkdir()
    (tmp_path / "resemblyzer").mkdir()
    write_bundle(f"{tmp_path}/musicnn/", tagger_weights())
    torch.save({"model_state": SpeakerEncoder().state_dict()}, tmp_path / "resemblyzer" / "pretrained.pt")
    seen: set[str] = set()
    for name in audio_scorers.__all__:
        if name == "words_whisper":  # needs the real model
            continue
        scorer = getattr(audio_scorers, name)(tmp_path)
        assert isinstance(scorer, Scorer | SetScorer) and scorer.name == name and scorer.modality == "audio"
        assert scorer.backend and scorer.version and {"sample_rate", "resampler", "channels"} <= set(scorer.settings)
        json.dumps(dict(scorer.settings), allow_nan=False)
        names = {m.name for m in scorer.measures}
        assert names and not names & seen
        seen |= names
        assert all(m.about and m.direction in ("higher", "lower", "neither") for m in scorer.measures)
    assert {"si_sdr", "si_sdr_aligned", "delay", "sdr", "mel_distance", "stft_distance", "pesq_wb", "stoi"} < seen
    assert {"dnsmos_ovrl", "dnsmos_p808", "plcmos", "distillmos", "speaker_similarity", "wer_sphinx"} < seen
    assert isinstance(audio_signal(None), AudioSignal)
