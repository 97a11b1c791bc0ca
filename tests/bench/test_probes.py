"""Probes learn labels that codes hold and none that they do not, padding changes nothing, missing things are named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtok.bench import probes
from mmtok.bench.contenders import Contender
from mmtok.bench.parts import Context
from mmtok.bench.probe_codes import LOG_MEL, PIXELS, Baseline, encoded, features_of, latents_of, log_mel, reading
from mmtok.bench.probe_heads import HEADS, Frames, Probe, accuracy_interval, predict, slots_of, train_probe
from mmtok.bench.probe_material import TEST, TRAIN, Family, Sizes, Task
from mmtok.bench.probe_retrieval import caption_hits, cosines, equal_codes, hits_at, view_hits
from mmtok.bench.scorers import NotRunError
from mmtok.metrics.retrieval import recall_at_k
from mmtok.tokens import Tokens, TokenSpec
from mmtok.wrappers.wrapped import WrappedAudio

CLASSES = 4


def planted(count: int, shuffled: bool, sizes: tuple[int, ...] = (16, 16), seed: int = 0) -> tuple[Frames, Tensor]:
    """Codes of level 1 that depend on the label, of level 0 that do not; ``shuffled`` labels tell nothing."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    rows = []
    for label in labels.tolist():
        T = int(torch.randint(4, 12, (1,), generator=generator))
        first = torch.randint(0, sizes[0], (T,), generator=generator)
        second = torch.randint(0, 4, (T,), generator=generator) + 4 * label
        rows.append(torch.stack([first, second], 1))
    if shuffled:
        labels = labels[torch.randperm(count, generator=generator)]
    return Frames(rows, sizes, "planted"), labels


@pytest.mark.parametrize("head", list(HEADS))
@pytest.mark.parametrize("shuffled", [False, True])
def test_planted_labels_are_learnt_and_shuffled_ones_stay_at_chance(head: str, shuffled: bool):
    frames, labels = planted(480, shuffled)
    train, test = torch.arange(160), torch.arange(160, 480)
    probe = train_probe(frames, labels, train, CLASSES, head, seed=0, steps=60)
    hits = predict(probe, frames, test) == labels[test]
    accuracy = float(hits.double().mean())
    assert abs(accuracy - 0.25) < 0.09 if shuffled else accuracy > 0.95
    low, high = accuracy_interval(hits[None])
    assert low <= accuracy <= high and (low <= 0.25 <= high) == shuffled


@pytest.mark.parametrize("head", list(HEADS))
@pytest.mark.parametrize("features", [False, True])
def test_padding_changes_nothing(head: str, features: bool):
    generator = torch.Generator().manual_seed(0)
    probe = Probe(() if features else (5, 7), 6, 3, head, positions=20).eval()
    nn.init.normal_(probe.places if probe.places is not None else torch.zeros(1), generator=generator)
    rows = [
        torch.randn(n, 6, generator=generator) if features else torch.randint(0, 5, (n, 2), generator=generator)
        for n in (3, 8, 1)
    ]
    frames = Frames(rows, () if features else (5, 7), "")
    x, mask = frames.padded(torch.arange(3))
    alone = torch.cat([probe(*frames.padded(torch.tensor([i]))) for i in range(3)])
    fill = torch.full((3, 9, *x.shape[2:]), 4, dtype=x.dtype)  # what stands in the padding must not matter
    more = probe(torch.cat([x, fill], 1), torch.cat([mask, torch.zeros(3, 9, dtype=torch.bool)], 1))
    assert torch.allclose(probe(x, mask), alone, atol=1e-5) and torch.allclose(more, alone, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1])


def test_the_same_seed_gives_the_same_probe_and_codes_are_left_as_they_were():
    frames, labels = planted(80, False)
    before = [r.clone() for r in frames.rows]
    a, b, other = (train_probe(frames, labels, torch.arange(80), CLASSES, "conv", s, 6) for s in (3, 3, 4))
    weights = [torch.cat([w.flatten() for w in p.parameters()]) for p in (a, b, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert all(torch.equal(x, y) for x, y in zip(frames.rows, before, strict=True))
    state = torch.random.get_rng_state()
    train_probe(frames, labels, torch.arange(80), CLASSES, "linear", 0, 2)
    assert torch.equal(state, torch.random.get_rng_state())


def test_scores_of_table_rows_are_those_of_the_frames():
    """The attention's short way (a score a row) and its plain way give the same."""
    probe = Probe((5, 7), 0, 3, "linear")
    codes = torch.randint(0, 5, (2, 30, 2))
    short = probe.embed(codes)
    plain = torch.cat([probe.embed(codes[:, t : t + 1]) for t in range(30)], 1)  # 4 codes < 12 rows
    assert torch.allclose(short, plain, atol=1e-6)


def tokens_of(codes: list[list[list[int]]], sizes: tuple[int, ...]) -> Tokens:
    """Items as (T, Q) lists."""
    rows = [torch.tensor(c) for c in codes]
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2).contiguous()
    return Tokens(padded, torch.tensor([len(r) for r in rows]), TokenSpec("t", "audio", sizes, frame_rate=50.0))


def test_large_levels_become_bits_or_are_hashed():
    tokens = tokens_of([[[3, 5, 6], [1, 2, 2**40 - 1]], [[0, 69999, 1]]], (4, 70000, 2**40))
    frames = slots_of(tokens)
    assert frames.sizes == (4, 65536, *[2] * 40)
    assert [tuple(r.shape) for r in frames.rows] == [(2, 42), (1, 42)]
    assert frames.rows[0][:, 0].tolist() == [3, 1]
    assert frames.rows[0][0, 2:].tolist() == [0, 1, 1, *[0] * 37] and bool((frames.rows[0][1, 2:] == 1).all())
    hashed = [int(r[0, 1]) for r in frames.rows]
    assert hashed[0] != hashed[1] and 0 <= min(hashed) <= max(hashed) < 65536
    assert frames.about == "1 levels as they are, 1 levels hashed to 65536 rows, 1 levels split into bits"
    small = slots_of(tokens_of([[[3, 2]]], (4, 8)), largest=4)
    assert small.sizes == (4, 2, 2, 2) and small.rows[0].tolist() == [[3, 0, 1, 0]]


def test_interval_covers_seeds_and_items():
    hits = torch.rand(3, 200, generator=torch.Generator().manual_seed(0)) < 0.7
    low, high = accuracy_interval(hits, seed=1)
    assert low < float(hits.double().mean()) < high and (low, high) == accuracy_interval(hits, seed=1)
    assert 0.02 < high - low < 0.2
    assert accuracy_interval(torch.ones(3, 10, dtype=torch.bool)) == (1.0, 1.0)
    apart = torch.stack([torch.ones(50), torch.zeros(50)]).bool()  # all of the spread is between the seeds
    assert accuracy_interval(apart) == (0.0, 1.0)


def test_log_mel_places_a_tone_in_time_and_in_its_band():
    x = torch.zeros(1, 16000)
    x[0, 8000:] = 0.5 * torch.sin(2 * torch.pi * 1000 * torch.arange(8000) / 16000)
    frames = log_mel(x, 16000)
    assert frames.shape == (100, 80)
    energy = frames.exp().sum(1)
    assert int((energy > energy.max() / 2).nonzero()[0]) in (49, 50) and float(energy[:48].max()) < 1e-4
    import torchaudio

    plain = torchaudio.transforms.MelSpectrogram(
        16000, 512, 400, 160, n_mels=80, f_max=8000.0, center=False, power=2.0
    )(torch.nn.functional.pad(x, (176, 512)))[0, :, :100]
    assert torch.allclose(frames, plain.T.clamp_min(1e-7).log(), atol=1e-4)


# ---- retrieval ----


def test_equal_codes_count_places_and_hits_are_recall():
    frames = slots_of(tokens_of([[[1, 2], [3, 0]], [[1, 2], [3, 3]], [[1, 2]]], (4, 4)))
    got = equal_codes(probe_codes_reading(frames))
    assert torch.allclose(got, torch.tensor([[1, 0.75, 0.5], [0.75, 1, 0.5], [0.5, 0.5, 1]]))
    similarity = torch.randint(0, 5, (30, 30), generator=torch.Generator().manual_seed(0)).float()
    for k in (1, 5, 10):
        assert float(hits_at(similarity, k).double().mean()) == recall_at_k(similarity, ks=(k,))[k]


def probe_codes_reading(frames: Frames) -> Any:
    from mmtok.bench.probe_codes import Reading

    return Reading(frames, torch.arange(len(frames.rows)), {}, None, None)


def test_view_hits_finds_the_original_of_each_view():
    keys = [f"{name}#{view}" for name in "abc" for view in ("original", "crop", "flip")]
    rows = [torch.eye(3)["abc".index(k[0])][None] + (0.1 if "crop" in k else 0.0) for k in keys]
    rows[keys.index("c#flip")] = torch.eye(3)[0][None]  # the mirror image of c looks like a
    task = Task("views", "image", [], keys, [0] * 9, ["x"] * 9, [None] * 9, [], None, {})
    kept = torch.tensor([i for i in range(9) if keys[i] != "b#crop"])
    similarity = cosines([rows[int(i)] for i in kept])
    assert view_hits(similarity, task, kept, "crop", 1).tolist() == [True, True]  # of a and c: b has no crop
    assert view_hits(similarity, task, kept, "flip", 1).tolist() == [True, True, False]
    assert view_hits(similarity, task, kept, "flip", 3).tolist() == [True, True, True]


def test_caption_map_is_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    y = torch.nn.functional.normalize(x @ torch.randn(4, 6, generator=generator, dtype=torch.float64), dim=1)
    train, test = torch.arange(40), torch.arange(40, 50)
    hits = caption_hits(x @ x.T, train, test, y, (1, 5))
    assert float(hits[1].double().mean()) >= 0.8 and bool((hits[5] >= hits[1]).all())
    # The primal form of the same regression gives the same ranks.
    weight = 1e-2 * float((x[train] @ x[train].T).diagonal().mean())
    eye = torch.eye(4, dtype=torch.float64)
    mean = y[train].mean(0)
    mapped = x[test] @ torch.linalg.solve(x[train].T @ x[train] + weight * eye, x[train].T @ (y[train] - mean))
    want = torch.nn.functional.normalize(y[test] - mean, dim=1) @ torch.nn.functional.normalize(mapped, dim=1).T
    assert torch.equal(hits[1], hits_at(want, 1))


# ---- the part ----


class Loudness(WrappedAudio):
    """One level: how loud each frame of 160 samples is."""

    sample_rate, hop_length, codebook_sizes = 16000, 160, (16,)
    encode_margin = decode_margin = 1
    chunk_frames = 100

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), {}, "loudness")

    def network_encode(self, x: Tensor, lengths: Tensor, num_codebooks: int | None) -> Tensor:
        loud = x[:, 0].unflatten(1, (-1, self.hop_length)).square().mean(2).sqrt()
        return (loud * 16).long().clamp(0, 15)[:, None]

    def network_decode(self, codes: Tensor) -> Tensor:
        return (codes.float() / 16).repeat_interleave(self.hop_length, 2)


def loud_task(count: int = 24) -> Task:
    """Two classes of noise, soft and loud."""
    generator = torch.Generator().manual_seed(0)
    labels = [i % 2 for i in range(count)]
    arrays = [
        (torch.randn(1600 + 160 * i, generator=generator) * (1500 + 12000 * label)).clamp(-32767, 32767).to(torch.int16)
        for i, label in enumerate(labels)
    ]
    splits = [TRAIN if i < count * 2 // 3 else TEST for i in range(count)]
    keys = [f"noise/{i}" for i in range(count)]
    texts: list[str | None] = [None] * count
    return Task("loud", "audio", ["soft", "loud"], keys, labels, splits, texts, arrays, 16000, {"chance_percent": 50.0})


def context_of(out: Path, **changes: Any) -> Context:
    plain = Context(out, None, None, [], lambda _: [], progress=False)
    return dataclasses.replace(plain, **changes)


@pytest.fixture
def only_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    family = Family("audio", "how loud", lambda *_: loud_task(), (), Sizes(1, 1, 1))
    monkeypatch.setattr(probes, "TASKS", {"loud": family})


@pytest.mark.usefixtures("only_loud")
def test_a_part_gives_accuracies_with_their_protocol_and_a_baseline(tmp_path: Path):
    options = {"steps": 20, "seeds": 2, "tasks": ["loud"]}
    contender, context = Contender("loudness", Loudness()), context_of(tmp_path, options=options)
    found = {j.key: j for j in probes.jobs(contender, context)}
    assert list(found) == [
        "probes/loud/linear/loudness",
        "probes/loud/conv/loudness",
        f"probes/loud/linear/{LOG_MEL}",
        f"probes/loud/conv/{LOG_MEL}",
    ]
    (first,) = found["probes/loud/linear/loudness"].run()
    assert (first.contender, first.test_set, first.metric) == ("loudness", "loud", "accuracy[linear]")
    assert first.value == 100 and first.low == first.high == 100 and first.count == 8
    told = first.protocol
    assert told["steps"] == 20 and told["seeds"] == [0, 1] and told["accuracy_of_each_seed"] == [100, 100]
    assert told["chance_percent"] == 50 and told["unscored"] == {} and told["fingerprint"]
    assert told["codes"] == "1 levels as they are" and "smoke" not in told
    (baseline,) = found[f"probes/loud/linear/{LOG_MEL}"].run()
    assert baseline.contender == LOG_MEL and (baseline.value or 0) > 80
    # Again, from what the run's folder holds, and in a fresh one.
    assert list(found["probes/loud/linear/loudness"].run()) == [first]
    again = probes.jobs(contender, context_of(tmp_path / "other", options=options))[0].run()
    assert list(again) == [first]


@pytest.mark.usefixtures("only_loud")
def test_refused_items_are_counted_and_smoke_is_said(tmp_path: Path):
    class Choosy(Loudness):
        def encode(self, x: Any, *args: Any, **kwargs: Any) -> Tokens:
            if x.shape[-1] < 1900:
                raise ValueError("too short for me")
            return super().encode(x, *args, **kwargs)

    context = context_of(tmp_path, smoke=True, options={"tasks": ["loud"]})
    (result,) = probes.jobs(Contender("choosy", Choosy()), context)[0].run()
    assert result.protocol["unscored"] == {"too short for me": 2} and result.value is not None
    assert result.protocol["steps"] == 5 and "a few items" in result.protocol["smoke"]

    class Never(Loudness):
        def encode(self, x: Any, *args: Any, **kwargs: Any) -> Tokens:
            raise ValueError("not today")

    (none,) = probes.jobs(Contender("never", Never()), context)[0].run()
    assert none.value is None and "refused all 24 items of loud: not today" in str(none.not_run)


@pytest.mark.usefixtures("only_loud")
def test_codes_of_files_are_not_probed(tmp_path: Path):
    pytest.importorskip("av")
    import mmtok

    contender = Contender("opus", mmtok.load("opus:6000"))
    (result,) = probes.jobs(contender, context_of(tmp_path, options={"tasks": ["loud"]}))[0].run()
    assert result.value is None and "bytes of a compressed file" in str(result.not_run)


def test_missing_data_names_the_command(tmp_path: Path):
    contender = Contender("loudness", Loudness())
    jobs = probes.jobs(contender, context_of(tmp_path))
    assert len({j.key for j in jobs}) == len(jobs) == 2 * (4 * 2 + 1)
    for job in jobs:
        for result in job.run():
            assert result.value is None and "fetch_data.py --out data --only" in str(result.not_run), job.key
    results = {j.key: j.run() for j in jobs}
    assert [r.metric for r in results["probes/keyword/conv/loudness"]] == [
        "accuracy[conv]",
        "accuracy_other_voice[conv]",
    ]
    assert [r.metric for r in results["probes/phones/loudness"]] == [
        "abx_within[latents]",
        "abx_across[latents]",
        "abx_within[codes]",
        "abx_across[codes]",
    ]
    assert "--only sounds" in str(results["probes/sound/linear/loudness"][0].not_run)


def test_bad_options_are_refused(tmp_path: Path):
    contender = Contender("loudness", Loudness())
    for options, match in (
        ({"steps": 0}, "steps of 1 or more"),
        ({"seeds": "many"}, "seeds of 1 or more"),
        ({"tasks": ["taste"]}, "tasks of .*speaker"),
    ):
        with pytest.raises(ValueError, match=match):
            probes.jobs(contender, context_of(tmp_path, options=options))


def test_latents_are_the_quantizers_own(tmp_path: Path):
    from mmtok.audio.codec import AudioCodec

    torch.manual_seed(0)
    codec = AudioCodec(
        encoder_width=2, decoder_width=16, latent_dim=8, num_codebooks=3, codebook_size=16, dilations=(1,)
    ).eval()
    contender, task = Contender("tiny", codec, num_codebooks=2), loud_task(3)
    tokens, kept, unscored = encoded(contender, task, context_of(tmp_path))
    assert kept.tolist() == [0, 1, 2] and not unscored and tokens.codes.shape[1] == 2
    rows = latents_of(contender, tokens)
    for b in range(3):
        assert torch.equal(rows[b], codec.quantizer.decode(tokens[b].codes)[0])
    with pytest.raises(NotRunError, match="no vectors behind its codes"):
        latents_of(Contender("loudness", Loudness()), tokens)


def test_baseline_of_a_picture_is_its_small_copy():
    picture = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    task = Task("p", "image", ["a"], ["k"], [0], [TRAIN], [None], [picture], None, {})
    features = features_of(task, 0)
    assert features.shape == (64, 3) and features.mean() == pytest.approx(float(picture.float().mean()) / 255, abs=0.02)
    assert Baseline("image").label == PIXELS and reading(Baseline("image"), task, context_of(Path())).frame_rate is None
