"""Is the redundancy of attention there from early training on?  Train a small Llama on this machine and look.

    python benchmarks/training.py [--quick] [--text FILE ...] [--minutes 6 | --steps N] [--seed 0]
                                   [--run FOLDER] [--out FOLDER]

A Llama of 8 blocks is trained from random weights with transformers' Trainer, on Python's documentation topics
and the files given, and saved at steps 0 (random), 2, 4, 8, ... and at the end.  Then `prune compare` scores
every checkpoint on documentation topics that were not trained on.  At the end it drops, from every checkpoint,
the attention layers that the last one finds most redundant, and as many that it finds least so, and measures
the loss.  `--run` keeps the checkpoints, and compares those that lie there already without training again.
`--quick` ends within a minute.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from dropformer import api
from dropformer.eval.compare.compare import CompareRequest, compare
from dropformer.eval.compare.comparison import Comparison
from dropformer.eval.compare.output import listed, write
from dropformer.metrics.calibration.settings import Calibration
from dropformer.metrics.calibration.text import documents
from dropformer.prune.loading.quiet import quiet_transformers
from dropformer.prune.loading.tokenizer import open_tokenizer

VOCABULARY = 2048
LENGTH = 128
BATCH = 8


@dataclass(frozen=True)
class Size:
    """How much there is to do; `minutes` of one core is an aim, from the speed of the first steps."""

    blocks: int
    width: int
    minutes: float
    windows: int
    held_out: int
    drop: str
    steps: int | None = None
    seed: int = 0


FULL = Size(blocks=8, width=192, minutes=6.0, windows=32, held_out=64, drop="attn:3")
QUICK = Size(blocks=6, width=64, minutes=0.2, windows=8, held_out=16, drop="attn:2")


class Windows(Dataset):
    """Texts laid end to end and cut into rows of LENGTH tokens; the labels are the tokens themselves."""

    def __init__(self, texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> None:
        ids = [i for text in texts for i in tokenizer(text + "\n\n", verbose=False)["input_ids"]]
        self.rows = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Geometric(TrainerCallback):
    """Save at steps 2, 4, 8, ... and the last; the first step only warms up, at a rate of zero."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        power_of_two = state.global_step > 1 and state.global_step & (state.global_step - 1) == 0
        if power_of_two or state.global_step == state.max_steps:
            control.should_save = True


def make_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the training text: any text can be written in it."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=special[0], pad_token=special[0])


def make_model(size: Size) -> LlamaForCausalLM:
    """Random weights, as transformers initialises a Llama."""
    torch.manual_seed(size.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=size.width * 8 // 3 // 8 * 8,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.width // 32,
        num_key_value_heads=size.width // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def train(run: Path, size: Size, texts: list[str]) -> None:
    """Fill `run` with checkpoints, and a file `trained` when it is done."""
    tokenizer = make_tokenizer(texts)
    model = make_model(size)
    data = Windows(texts, tokenizer)
    steps = size.steps or steps_in(model, data, size.minutes * 60)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data) * LENGTH:,} tokens, {steps} steps of "
          f"{BATCH * LENGTH} tokens", flush=True)  # fmt: skip
    with quiet_transformers():
        for save in (model, tokenizer):
            save.save_pretrained(run / "checkpoint-0")
        trainer = Trainer(model, arguments(run, steps, size.seed), None, data, None, tokenizer, callbacks=[Geometric()])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    (run / "trained").touch()


def held_out_rows(run: Path, size: Size) -> torch.Tensor:
    """Rows of text that was not trained on, about `size.held_out` of them, evenly spread."""
    rows = Windows(documents("heldout"), open_tokenizer(run / "checkpoint-0")).rows
    return rows[:: max(1, len(rows) // size.held_out)]


def steps_in(model: LlamaForCausalLM, data: Windows, seconds: float) -> int:
    """How many steps fit, judged by a few on a copy that is thrown away; evaluation and saving take the rest."""
    copy = LlamaForCausalLM(model.config)
    rows = data.rows[:BATCH]
    optimizer = torch.optim.AdamW(copy.parameters(), fused=False)
    copy(input_ids=rows, labels=rows).loss.backward()
    start = time.process_time()  # other programs on the machine must not make the training shorter
    for _ in range(3):
        copy(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    each = (time.process_time() - start) / 3
    return max(16, round(0.75 * seconds / each))


def arguments(run: Path, steps: int, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(run),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        warmup_steps=max(4, steps // 20),
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        save_strategy="no",
        save_only_model=True,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=seed,
    )


def drop_losses(found: Comparison, rows: torch.Tensor) -> dict[int, dict[str, float]]:
    """Training step -> loss whole, without the last checkpoint's most redundant layers, without its least so."""
    last = found.checkpoints[-1]
    order = sorted((value, f"attn:{i}") for i, value in enumerate(last.similarity["attn"]) if value is not None)
    least = [layer for _, layer in order[: len(last.chosen or [])]]
    sets = {"most": last.chosen or [], "least": least}
    return {c.step or 0: _losses(Path(c.model.name), sets, rows) for c in found.checkpoints}


def _losses(folder: Path, sets: dict[str, list[str]], rows: torch.Tensor) -> dict[str, float]:
    opened = api.open_model(folder)
    outline = api.outline(opened.model)
    models = {"whole": opened.model}
    for name, layers in sets.items():
        spec = "attn=" + ",".join(layer.partition(":")[2] for layer in layers)
        models[name] = api.drop(opened, api.plan_unscored(opened.ref, outline, spec, (), None))
    return {name: _loss(model, rows) for name, model in models.items()}


@torch.inference_mode()
def _loss(model: torch.nn.Module, rows: torch.Tensor) -> float:
    """Mean cross entropy in nats per token.  rows: [N, LENGTH]"""
    return sum(float(model(input_ids=part, labels=part).loss) * len(part) for part in rows.split(BATCH)) / len(rows)


def summary(found: Comparison, losses: dict[int, dict[str, float]]) -> dict[str, Any]:
    """The figures for the last line."""
    last = found.checkpoints[-1]
    rows = {
        str(c.step): {
            "loss": {name: rounded(value) for name, value in losses[c.step or 0].items()},
            "mean": {kind: rounded(value) for kind, value in c.mean.items()},
            "spearman_to_final": {kind: rounded(found.spearman_to_last(kind)[i]) for kind in found.kinds},
            "overlap_with_final": rounded(found.overlap[i][-1]) if found.overlap else None,
            "chosen": c.chosen,
        }
        for i, c in enumerate(found.checkpoints)
    }
    return {
        "benchmark": "training",
        "steps": last.step,
        "loss": {"first": rounded(losses[0]["whole"]), "last": rounded(losses[last.step or 0]["whole"])},
        "drop": found.spec,
        "known_from": found.known_from.step if found.known_from else None,
        "overlap_by_chance": rounded(found.overlap_by_chance),
        "checkpoints": rows,
    }


def rounded(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model for some seconds")
    parser.add_argument("--text", action="append", default=[], type=Path, help="more text to train on")
    parser.add_argument("--minutes", type=float, help="how long to train")
    parser.add_argument("--steps", type=int, help="how many steps to train, whatever the time")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights and the order of the text")
    parser.add_argument("--run", type=Path, help="where the checkpoints go, or lie")
    parser.add_argument("--out", type=Path, help="where compare.json, the pictures and the page go")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    size = QUICK if options.quick else FULL
    size = replace(size, minutes=options.minutes or size.minutes, steps=options.steps, seed=options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        run = options.run or Path(scratch) / "run"
        if not (run / "trained").exists():
            train(run, size, [*documents("builtin"), *(path.read_text(encoding="utf-8") for path in options.text)])
        calibration = Calibration("heldout", samples=size.windows, length=LENGTH)
        found = compare(CompareRequest([str(run)], size.drop, calibration=calibration, batch_size=BATCH))
        losses = drop_losses(found, held_out_rows(run, size))
        report(found, losses, options.out)
    print(json.dumps(summary(found, losses)))


def report(found: Comparison, losses: dict[int, dict[str, float]], out: Path | None) -> None:
    """For people: a table, and the pictures where they are wanted."""
    kinds = "  ".join(f"{kind:>12}" for kind in found.kinds)
    print(f"{'step':>6} {'loss':>7} {'-most':>7} {'-least':>7}  {kinds}  overlap  {found.spec}")
    for i, c in enumerate(found.checkpoints):
        loss = " ".join(f"{value:7.3f}" for value in losses[c.step or 0].values())
        cells = "  ".join(f"{c.mean[kind]:.4f} {found.spearman_to_last(kind)[i] or 0:+.2f}" for kind in found.kinds)
        shared = f"{found.overlap[i][-1]:.2f}" if found.overlap else ""
        print(f"{c.step:>6} {loss}  {cells}  {shared:>7}  {listed(c.chosen or [])}")
    print(LEGEND)
    if out:
        write(found, out)


LEGEND = """loss in nats per token on text not trained on: whole, and without the attention layers that the last
checkpoint finds most and least redundant; of each kind of layer: mean similarity, rank correlation with the last"""


if __name__ == "__main__":
    main()
