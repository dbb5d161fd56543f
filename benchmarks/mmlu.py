"""The fast backend against lm-eval's own `hf` model on the same questions, interleaved in one run.

    python benchmarks/mmlu.py [--quick] [--data shared/data/mmlu] [--subject anatomy ...]

1. MMLU, 5-shot, whole subjects, each answered by both backends in turn. hf gets the fastest of several batch
   sizes. On a CPU `speedup` is the ratio of CPU time, which other programs on the machine disturb least: the
   wall's own ratio once read 30 on a crowded one.
2. Zero-shot questions of all lengths: packed rows against padded batches, tokens computed against tokens needed
   (the measure of ByteTransformer, arXiv 2210.03052).

`--quick` takes a few questions of one subject.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dropformer.eval.tasks.backend import FastLM
from dropformer.eval.tasks.mmlu import mmlu_group
from dropformer.eval.tasks.packing import Limits
from dropformer.eval.tasks.scorer import Scorer, ScoreRequest, Stats

Answers = list[tuple[float, bool]]


@dataclass
class Took:
    """Seconds, on the wall and of all this process's threads, and what came of them."""

    wall: float = 0.0
    cpu: float = 0.0
    answers: Answers = field(default_factory=list)
    slices: list[float] = field(default_factory=list)

    def time(self, call: Callable[[], Answers]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.answers += call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.slices.append(time.perf_counter() - wall)
        self.wall += self.slices[-1]
        self.cpu += time.process_time() - cpu


@dataclass
class Run:
    """Both backends over the same requests."""

    slow: Took = field(default_factory=Took)
    fast: Took = field(default_factory=Took)

    @property
    def speedup(self) -> float:
        return self.wall_speedup if torch.cuda.is_available() else self.slow.cpu / self.fast.cpu

    @property
    def wall_speedup(self) -> float:
        return self.slow.wall / self.fast.wall

    @property
    def by_slice(self) -> list[float]:
        return [round(s / f, 2) for s, f in zip(self.slow.slices, self.fast.slices, strict=True)]

    @property
    def max_logprob_diff(self) -> float:
        return max(abs(one[0] - two[0]) for one, two in zip(self.slow.answers, self.fast.answers, strict=True))

    def equal_answers(self, choices: int = 4) -> bool:
        """The same choice for every question, and the same greedy flags."""
        same = [a[1] == b[1] for a, b in zip(self.slow.answers, self.fast.answers, strict=True)]
        return all(same) and picks(self.slow.answers, choices) == picks(self.fast.answers, choices)


def picks(answers: Answers, choices: int) -> list[int]:
    """Index of the likeliest choice of each question, whose answers are adjacent."""
    rows = [answers[i : i + choices] for i in range(0, len(answers), choices)]
    return [max(range(choices), key=lambda c: row[c][0]) for row in rows]


def main() -> None:
    args = arguments()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    threads = int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))
    torch.set_num_threads(threads)
    model, tokenizer = load(args.model)
    asked = {name: requests(args.data, name, args.shots)[: 4 * args.questions] for name in args.subject}
    batch, timings = (4, {}) if args.quick else best_batch(model, tokenizer, asked[args.subject[0]][:32], [1, 4, 16])
    slow = HFLM(model, backend="causal", tokenizer=tokenizer, batch_size=batch)
    fast = FastLM(model, tokenizer)
    run = interleave(slow, fast, list(asked.values()))
    stats = fast.stats
    questions, tried = len(run.fast.answers) // 4, f", fastest of {timings}" if timings else ""
    print(f"{args.shots}-shot MMLU, {', '.join(args.subject)}: {questions} questions, {threads} threads")
    print(f"  hf    {run.slow.wall:8.1f} s ({run.slow.cpu:.1f} s of CPU), batch {batch}{tried}")
    print(f"  fast  {run.fast.wall:8.1f} s ({run.fast.cpu:.1f} s of CPU): {run.speedup:.2f} times faster")
    print(f"  tokens computed {stats.computed}, needed {stats.needed}; logits at {stats.logits} positions")
    print(f"  same answers: {run.equal_answers()}; largest difference {run.max_logprob_diff:.2g} nats")
    packing = zero_shot(model, tokenizer, args)
    print(f"zero-shot, all lengths mixed: {packing['questions']} questions, {packing['needed']} tokens needed")
    for name in ("packed", "padded_sorted", "padded_arrival"):
        row = packing[name]
        print(f"  {name:15} {row['wall']:7.1f} s ({row['cpu']:.1f} s of CPU), {row['computed']} tokens computed")
    print(json.dumps(report(args, batch, run, fast, packing)))


def arguments() -> argparse.Namespace:
    here = Path(__file__).resolve().parents[1]
    data = Path(os.environ.get("DROPFORMER_DATA", here.parent / "shared" / "data")) / "mmlu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few questions: within a minute")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--subject", nargs="+", default=["us_foreign_policy", "machine_learning"])
    parser.add_argument("--questions", type=int, default=None, help="of each subject; all by default")
    parser.add_argument("--shots", type=int, default=5)
    args = parser.parse_args()
    if args.quick:
        args.subject, args.questions = args.subject[:1], args.questions or 6
    args.questions = args.questions or 10**6
    return args


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from dropformer.recipes import open_source

    folder = open_source(name).path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(folder)


def requests(folder: Path, subject: str, shots: int) -> list[Instance]:
    """lm-eval's requests of one subject: four a question, together."""
    task = next(t for t in mmlu_group(folder).get_all_tasks() if t.task_name == f"mmlu_{subject}")
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(1234)
    task.build_all_requests(rank=0, world_size=1)
    return list(task.instances)


def best_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, some: list[Instance], sizes: Sequence[int]
) -> tuple[int, dict[int, float]]:
    """hf's fastest batch size on some requests, and the seconds of each."""
    timings = {}
    for size in sizes:
        lm, took = HFLM(model, backend="causal", tokenizer=tokenizer, batch_size=size), Took()
        took.time(lambda lm=lm: lm.loglikelihood(some, disable_tqdm=True))
        timings[size] = round(took.cpu if model.device.type == "cpu" else took.wall, 2)
    return min(timings, key=timings.__getitem__), timings


def interleave(slow: HFLM, fast: FastLM, slices: Sequence[list[Instance]]) -> Run:
    """Answers each slice by one and then by the other, each first in turn."""
    run = Run()
    for n, part in enumerate(slices):
        pairs = [(run.slow, slow), (run.fast, fast)]
        for took, lm in pairs if n % 2 == 0 else pairs[::-1]:
            took.time(lambda lm=lm, part=part: lm.loglikelihood(part, disable_tqdm=True))
        ratio = run.slow.slices[-1] / run.fast.slices[-1]
        print(f"{part[0].task_name}: {len(part) // 4} questions, {ratio:.2f} times faster", file=sys.stderr)
    return run


def zero_shot(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> dict[str, Any]:
    """Packed rows against batches of 8 (2 if quick) padded to their longest, both with logits only where they are read.

    Bare questions from every subject share next to nothing, so packing is all that differs. Batches are made
    in the order of arrival, as a server meets them, and sorted by length, which hides most of the padding.
    """
    count, size = (16, 2) if args.quick else (114, 8)
    wants = mixed(args.data, tokenizer, count)
    batches = {"padded_arrival": wants, "padded_sorted": sorted(wants, key=lambda want: len(want.tokens))}
    packed, padded = Scorer(model), Scorer(model, Limits(tokens=10**9), pack=False)
    took = {name: Took() for name in ("packed", *batches)}
    computed = dict.fromkeys(took, 0)
    for half in (slice(0, None, 2), slice(1, None, 2)):
        for name, rows in {"packed": wants, **batches}.items():
            scorer = packed if name == "packed" else padded
            scorer.stats = Stats()
            some, step = rows[half], len(rows) if name == "packed" else size
            took[name].time(
                lambda scorer=scorer, some=some, step=step: [
                    (score.logprob, score.greedy)
                    for at in range(0, len(some), step)
                    for score in scorer.score(some[at : at + step])
                ]
            )
            computed[name] += scorer.stats.computed
    found = {n: {"wall": t.wall, "cpu": t.cpu, "computed": computed[n]} for n, t in took.items()}
    return {"questions": len(wants), "needed": sum(len(w.tokens) for w in wants), **found}


def mixed(folder: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> list[ScoreRequest]:
    """Bare questions in turn from every subject, each to be answered " A"."""
    letter = tuple(tokenizer(" A", add_special_tokens=False)["input_ids"])
    texts = []
    for task in mmlu_group(folder).get_all_tasks():
        for doc in list(task.eval_docs)[:8]:
            choices = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", doc["choices"], strict=True))
            texts.append(f"{doc['question'].strip()}\n{choices}\nAnswer:")
    random.Random(0).shuffle(texts)
    ids = [tuple(tokenizer(text)["input_ids"]) for text in texts[:count]]
    return [ScoreRequest(tokens + letter[:-1], letter) for tokens in ids]


def report(args: argparse.Namespace, batch: int, run: Run, fast: FastLM, packing: dict[str, Any]) -> dict[str, Any]:
    stats = fast.stats
    return {
        "benchmark": "mmlu",
        "speedup": round(run.speedup, 2),
        "answers_equal": run.equal_answers(),
        "max_logprob_diff": run.max_logprob_diff,
        "speedup_wall": round(run.wall_speedup, 2),
        "speedup_wall_by_subject": run.by_slice,
        "questions": len(run.fast.answers) // 4,
        "subjects": args.subject,
        "shots": args.shots,
        "hf_batch": batch,
        "tokens_needed": stats.needed,
        "tokens_computed": stats.computed,
        "packing": {
            "questions": packing["questions"],
            "needed": packing["needed"],
            "computed": {name: packing[name]["computed"] for name in ("packed", "padded_sorted", "padded_arrival")},
            "speedup_over_arrival": round(packing["padded_arrival"]["cpu"] / packing["packed"]["cpu"], 2),
            "speedup_over_sorted": round(packing["padded_sorted"]["cpu"] / packing["packed"]["cpu"], 2),
        },
        "threads": torch.get_num_threads(),
        "device": str(fast.device),
    }


if __name__ == "__main__":
    main()
