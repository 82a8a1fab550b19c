# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from configs.vision_attention import default, smoke
from experiments import vision_attention
from experiments.vision import (
  vision_attention_config,
  vision_attention_data,
  vision_attention_model,
  vision_attention_report,
  vision_attention_run,
  vision_attention_train,
)
from tests import helpers
from unisparse_jax import attention, evaluation, records

VIDEO = vision_attention_data.VideoConfig(
  rows=3, columns=4, max_frames=16, group=4, stickers=2
)
MODEL = vision_attention_model.ModelConfig(
  embed_dim=16, mlp_dim=16, num_heads=2, num_layers=1
)


def draw(seed=0, batch=1, num_frames=8, num_questions=24):
  _, digits = vision_attention_data.split_digits()
  videos = vision_attention_data.draw(
    np.random.default_rng(seed),
    digits,
    VIDEO,
    batch=batch,
    num_frames=num_frames,
    num_questions=num_questions,
  )
  return digits, videos


def test_the_split_is_by_image():
  train, test = vision_attention_data.split_digits()
  assert len(train.labels) == 1347 and len(test.labels) == 450
  seen = {image.tobytes() for image in train.images}
  assert not seen & {image.tobytes() for image in test.images}
  assert set(test.labels.tolist()) == set(range(10))


@pytest.mark.parametrize("seed", range(2))
def test_answers_can_be_found_in_the_pixels_and_nowhere_near(seed):
  digits, videos = draw(seed)
  pixels, times = videos.pixels[0], videos.times[0]
  ink = digits.images.reshape(len(digits.labels), -1)
  textures = np.where(pixels > 0.2, np.float32(0.4), np.float32(0.0))
  is_empty = (pixels == textures).all(1)
  num_tiles = VIDEO.num_tiles

  def shows(token):
    """What a tile's ink shows: the only image that fits all of its pixels."""
    bright = np.isclose(pixels[token], ink + (1 - ink) * 0.4, atol=1e-5)
    bare = np.isclose(pixels[token], ink, atol=1e-5)
    return set(digits.labels[(bright | bare).all(1)].tolist())

  for q in range(len(videos.answers[0])):
    kind = vision_attention_data.KINDS[videos.kinds[0, q]]
    tile, answer = videos.asked_tiles[0, q], int(videos.answers[0, q])
    if kind == "scan":
      assert videos.asked_times[0, q] == VIDEO.max_frames
      # An empty tile of the frame, or none, has the wallpaper as a whole; the
      # others agree with it wherever no ink is.
      wallpaper = videos.examples[0, q]
      found = [
        f
        for f in range(len(times))
        if not is_empty[f * num_tiles + tile]
        and (pixels[f * num_tiles + tile] >= wallpaper - 1e-6).all()
        and answer in shows(f * num_tiles + tile)
      ]
      assert found
      continue
    assert not videos.examples[0, q].any()
    (frame,) = np.flatnonzero(times == videos.asked_times[0, q])
    token = frame * num_tiles + tile
    assert is_empty[token]
    source = videos.tile_sources[0, token]
    assert source // num_tiles != frame, "in another frame"
    assert (source % num_tiles == tile) or kind == "sticker"
    assert answer in shows(source)
    assert (pixels[source] >= pixels[token] - 1e-6).all(), "texture shines"
  # Every tile's own answer is what its source shows.
  for token in range(0, len(pixels), 5):
    source = videos.tile_sources[0, token]
    assert not is_empty[source]
    assert int(videos.tile_answers[0, token]) in shows(source)
  again = draw(seed)[1]
  np.testing.assert_array_equal(again.pixels, videos.pixels)


def test_bad_sizes_of_a_video_are_named():
  _, digits = vision_attention_data.split_digits()
  sizes = dict(batch=1, num_frames=8, num_questions=24)
  for change, message in (
    (dict(num_frames=6), "4 must divide num_frames"),
    (dict(num_frames=20), "num_frames must be between"),
    (dict(num_questions=6), "group must divide num_questions"),
  ):
    with pytest.raises(ValueError, match=message):
      vision_attention_data.draw(
        np.random.default_rng(0), digits, VIDEO, **sizes | change
      )
  with pytest.raises(ValueError, match="group must fit a frame"):
    dataclasses.replace(VIDEO, group=13)


def test_attention_is_a_value_in_flaxs_own_layers():
  _, videos = draw()
  model = vision_attention_model.make(MODEL, VIDEO)
  params = vision_attention_model.weights(model)
  sizes = (MODEL, VIDEO)

  def answer(fn):
    memory = vision_attention_run.encode(
      params, videos.pixels, videos.times, fn, sizes
    )
    return vision_attention_run.decode(
      params,
      memory,
      videos.examples,
      videos.asked_times,
      videos.asked_tiles,
      fn,
      sizes,
    )

  expected = answer(attention.DenseAttention(implementation="xla"))
  assert expected.shape == (1, 24, 10)
  blocks = dict(block_q=8, block_kv=16)
  everything = attention.SparseAttention(pattern=attention.Dense(**blocks))
  helpers.assert_same(answer(everything), expected, 1e-5)
  little = attention.SparseAttention(
    pattern=attention.RandomBlocks(density=0.2, **blocks)
  )
  assert helpers.relative_error(answer(little), expected) > 1e-2
  calls = vision_attention_run.capture(params, vars(videos), everything, sizes)
  shapes = {
    site: [[x.shape[1] for x in call] for call in found]
    for site, found in calls.items()
  }
  assert shapes == {"self": [[96, 96, 96]], "cross": [[24, 96, 96]]}


def test_training_goes_on_where_it_stopped(tmp_path):
  phase = dict(num_frames=4, batch=1, num_questions=12)
  config = dataclasses.replace(
    vision_attention_config.parse(smoke.get_config()),
    video=VIDEO,
    model=MODEL,
    num_frames=4,
    num_questions=12,
    train=vision_attention_config.TrainConfig(
      phases=(vision_attention_config.Phase(steps=4, **phase),),
      checkpoint_every=2,
      warmup_steps=1,
    ),
  )
  _, digits = vision_attention_data.split_digits()

  class Stop(Exception):
    pass

  drawn = []

  def run(workdir, stop_at=None):
    class Writer:
      def write(self, **measured):
        drawn.append(measured["steps_in_this_call"])

    def draw_or_stop(rng, *args, **kwargs):
      if stop_at is not None and calls[0] == stop_at:
        raise Stop
      calls[0] += 1
      return original(rng, *args, **kwargs)

    calls, original = [0], vision_attention_data.draw
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(vision_attention_data, "draw", draw_or_stop)
      return vision_attention_train.train(
        config, digits, workdir, Writer(), lambda line: None
      )

  whole = run(tmp_path / "whole")
  with pytest.raises(Stop):
    run(tmp_path / "cut", stop_at=3)
  resumed = run(tmp_path / "cut")
  assert drawn == [4, 2]  # two steps were taken from the checkpoint
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)
  # It moved at all.
  first = vision_attention_model.weights(
    vision_attention_model.make(MODEL, VIDEO)
  )
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole, first)
  assert max(jax.tree.leaves(moved)) > 1e-4


def test_writes_records_and_a_report(monkeypatch, tmp_path, in_process):
  config = smoke.get_config()
  with config.unlocked():
    config.model = dataclasses.asdict(MODEL)
    config.video = dataclasses.asdict(VIDEO)
    config.self_blocks, config.cross_blocks = (16, 16), (4, 16)
    config.train.phases = (
      dict(num_frames=4, steps=1, batch=1, num_questions=12),
    )
    config.num_questions = 12
    config.sweeps = (
      dict(
        label="unisparse",
        method="unisparse",
        budget="top_p",
        values=(0.5,),
        window_kv=4,
        window_q=4,
      ),
      dict(label="random", method="random_blocks", sites=("self",)),
      dict(label="minference", method="minference"),
    )
    config.mask_label = "unisparse 0.5"
  workdir = tmp_path / "run"
  timed = []

  def time_attention(fn, q, k, v, *, causal, repeats):
    timed.append((fn, q.shape[1], k.shape[1], causal))
    times = dict(select_ms=1.0, attend_ms=2.0, total_ms=3.0 + len(timed))
    return evaluation.AttentionTime(**times, peak_bytes=9, compile_s=1.0)

  monkeypatch.setattr(evaluation, "time_attention", time_attention)

  def run():
    for name, value in (("_CONFIG", config), ("_WORKDIR", str(workdir))):
      holder = types.SimpleNamespace(value=value)
      monkeypatch.setattr(vision_attention, name, holder)
    vision_attention.main(["vision_attention"])
    return records.read(workdir / "records.jsonl")

  found = run()
  by_key = {vision_attention_run.key(r): r for r in found if "item" in r}
  for where in vision_attention_config.WHERES:
    sparse = by_key["answers", "unisparse 0.5", where]
    assert sparse["kl"] > 1e-7
    assert sparse["num_questions"] == 12
  assert by_key["answers", "dense", "both"]["kl"] == 0.0
  for site in vision_attention_config.SITES:
    half = by_key["layers", "unisparse 0.5", site]
    assert half["cra"] <= half["recall_p1"] <= half["recall"] < 1.0
    assert 0.0 < half["density"] < 1.0
    reason = by_key["refused", "minference", site]["reason"]
    assert "causal must be True for minference" in reason
    assert ("attention_time", "dense", site) in by_key
  assert ("answers", "random", "self") in by_key
  assert ("answers", "random", "cross") not in by_key
  assert {t[1:] for t in timed} == {(96, 96, False), (12, 96, False)}
  assert all(
    t[0].pattern.top_p == 0.5
    for t in timed
    if t[1] == 12 and isinstance(t[0], attention.SparseAttention)
  )
  assert ("answers", "minference", "self") not in by_key

  settings = vision_attention_config.parse(config)
  rows = vision_attention_report.summarise(settings, found)
  both = {r["pattern"]: r for r in rows if r["where"] == "both"}
  weights = np.array([96 * 96, 12 * 96])  # one layer of each
  parts = [
    by_key["layers", "unisparse 0.5", site]["nominal_density"]
    for site in vision_attention_config.SITES
  ]
  assert both["unisparse 0.5"]["nominal_density"] == pytest.approx(
    weights @ parts / weights.sum()
  )
  matched = json.loads((workdir / "matched.json").read_text())
  assert len(matched) == 2 * len(vision_attention_config.WHERES)
  text = (workdir / "report.html").read_text()
  assert text.count("src='data:image/png;base64,") == 5
  for phrase in ("unisparse 0.5", "causal must be True", "A video, and what"):
    assert phrase in text
  assert len(run()) == len(found)  # nothing is measured again


@pytest.mark.parametrize("module", [default, smoke])
def test_configs_are_valid(module):
  config = vision_attention_config.parse(module.get_config())
  assert len(config.points) == sum(len(s.points) for s in config.all_sweeps)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(num_frames=10), r"4 must divide num_frames"),
    (dict(num_frames=100), r"num_frames must not exceed max_frames"),
    (dict(num_questions=20), r"group must divide num_questions"),
    (dict(num_quality_videos=9), r"num_quality_videos must not exceed"),
    (dict(measures=("speed",)), r"measures must be a known name"),
    (dict(mask_label="none"), r"mask_label must be a known name"),
    (dict(matched_share=2.0), r"matched_share must be in"),
    (dict(sweeps=(dict(label="dense", method="dense"),)), r"one label each"),
    (
      dict(sweeps=(dict(label="a", method="dense", sites=("here",)),)),
      r"sites must be a known name",
    ),
    (
      dict(sweeps=(dict(label="a", method="xattention", stride=5),)),
      r"stride must divide",
    ),
    (dict(sweeps=(1,)), r"sweeps\[0\] must be a mapping"),
    (dict(depth=1), r"unknown \['depth'\]"),
    (dict(train=dict(phases=())), r"phases must not be empty"),
  ],
)
def test_bad_settings_are_named(change, message):
  values = smoke.get_config().to_dict() | dict(mask_label="") | change
  with pytest.raises(ValueError, match=message):
    vision_attention_config.parse(values)
