# SPDX-License-Identifier: Apache-2.0
"""The study model goes on: five minutes more, most of them at 131,072 tokens.

30 steps at 128K left it answering a third to two thirds of what it does at 64K
(results/train_study_h100.jsonl), too little to tell patterns apart there.

Run:     python -m experiments.train_decoder
           --config=configs/train_decoder/study_long.py
           --workdir=out/study/train
         after study.py; STUDY=out/study scripts/study.sh does both.
Device:  one H200, 7 minutes: 137 steps at 128K (1.9 s a step).
Expect:  in 418 s of one H200 held-out loss 2.02 beyond 64K (2.10 before);
         at 128K needles 0.83 to 1 but 0.18 for several values of
         one key, chains of variables 0.38, questions 0.15 and 0.12, word counts
         (cwe, fwe) 0. The curve has two points in
         results/train_study_long_h200.jsonl.
"""

from configs.train_decoder import study


def get_config():
  config = study.get_config()
  config.initial = "out/study/first/train/model"
  # Shares of all tokens, hence of the time: 5, 15 and 80%.
  config.train.stages = (
    dict(seq_len=8192, batch_size=8, steps=200),
    dict(seq_len=32_768, batch_size=2, steps=600),
    dict(seq_len=131_072, batch_size=1, steps=1600),
  )
  config.train.learning_rate = 7e-4
  config.train.warmup_steps = 60
  config.train.decay_fraction = 0.6
  config.train.max_seconds = 400.0
  config.train.seed = config.data.seed = 1  # other rows
  config.data.answer_weights = (10.0, 20.0, 60.0)
  config.eval.task_lens = (32_768, 131_072)
  return config
