"""Which families' pruned checkpoints vLLM runs as torch does, with dropformer installed beside it.

    python benchmarks/engines.py --vllm PYTHON [--quick] [--full] [--drop SPEC] [--ranks N] [--resume FILE] [--write]
        [FAMILY ...]

For each family a tiny random model loses layers, is saved in the default format and run by vLLM on the CPU: the
log-probabilities of three prompts (at most 1e-4 from torch), six greedy tokens, and the layers that own KV cache.
One plan for each family takes the first block's attention, another block's MLP and a whole block; `--full` tries
attention, MLP, both, a block and the first block's attention, each alone; `--drop` a spec of its own.  `--write` renews
prune/engines/vllm_families.json, which `prune engines` reads, and the table in docs/engines.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import tiny_models
from families.tiny_models import SMALL, tiny_model
from transformers.utils import logging

from dropformer import api
from dropformer.prune.errors import DropformerError
from dropformer.prune.formats.export import reference

ROOT = Path(__file__).parents[1]
FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "mixtral", "gemma", "gemma2", "gemma3_text",
    "phi", "phi3", "olmo", "olmo2", "olmo3", "olmoe", "granite", "granitemoe", "cohere", "cohere2", "starcoder2",
    "falcon", "gpt_neox", "gpt2", "gptj", "opt", "bloom", "deepseek_v2", "deepseek_v3", "smollm3", "glm", "glm4",
    "exaone4", "ernie4_5", "seed_oss", "arcee", "nemotron", "phimoe", "stablelm", "gpt_oss", "nemotron_h",
]  # fmt: skip
ONE = {"first attention, an MLP, a block": "attn=0,mlp=1,block=2"}
EACH = {"attention": "attn=1,3", "MLP": "mlp=0,2", "both": "attn=1,mlp=2", "block": "block=1,attn=2", "first": "attn=0"}
SPECS = {  # in place of ONE, for families whose blocks differ
    "gpt_oss": "attn=0,mlp=3,block=1,2",  # vLLM tells its windows by block number
    "nemotron_h": "attn=3,mlp=2",
}
# The one width of heads that vLLM's attention over latents has on the CPU: DeepSeek's own.
MLA = {"kv_lora_rank": 512, "head_dim": 64, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
PINNED: dict[str, dict[str, Any]] = {  # what vLLM asks of a family's sizes
    "bloom": {"n_layer": 4, "hidden_size": 128},
    "falcon": {"ffn_hidden_size": 4 * 128},
    "deepseek_v2": {**MLA, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**MLA, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},  # as the published ones
    "phimoe": {"attention_bias": True, "lm_head_bias": True},  # as its class has
}
# vLLM's compiled rotary kernel for the CPU turns interleaved queries wrongly where heads are an axis of their own.
PLAIN_ROTARY: dict[str, Any] = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
SETTINGS = {"deepseek_v2": PLAIN_ROTARY, "deepseek_v3": PLAIN_ROTARY}  # vLLM's, in a process of the family's own
DEEPSEEK = "without vLLM's compiled rotary kernel for the CPU, which is wrong for the dense model too by 1e-3"
NOTES = {  # what to know of a family beside its figures
    "cohere2": "vLLM's windows hold one token more than transformers', in the dense model too; compared with that",
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "phimoe": "with the head's bias, which vLLM's own class leaves out; refused where the config has no biases",
    "gpt_oss": "where the dropped blocks leave every second one a window; refused elsewhere",
}
PROMPTS = [list(range(5, 17)), [40, 7, 7, 19], [63, 3]]
STEPS, TOLERANCE = 6, 1e-4
TOGETHER = 8  # families that share a process of vLLM
KINDS = ("right", "refused", "wrong")  # from best to worst
TABLE = ROOT / "prune/engines/vllm_families.json"
BEGIN, END = "<!-- vllm matrix -->", "<!-- end of the vllm matrix -->"


@dataclass
class Case:
    """One pruned checkpoint: what torch gives for it, and what vLLM gave."""

    family: str
    drop: str
    folder: Path
    expected: list[dict[str, Any]]
    attending: int
    found: dict[str, Any] | None = None

    @property
    def difference(self) -> float:
        """The largest difference of a log-probability; infinite where vLLM gave no number."""
        pairs = zip(self.expected, self.found["answers"], strict=True)  # type: ignore[index]
        both = [(a, b) for want, got in pairs for a, b in zip(want["logprobs"], got["logprobs"], strict=True)]
        return max(abs(a - b) if math.isfinite(b) else math.inf for a, b in both)

    def verdict(self) -> tuple[str, str]:
        """right, refused or wrong, and what there is to say."""
        if self.found is None:
            return "refused", "vLLM's process ended without a word"
        if "error" in self.found:
            return "refused", (self.found["error"].strip().splitlines() or ["no reason"])[0][:200]
        if self.difference > TOLERANCE:
            return "wrong", f"log-probabilities differ by {self.difference:.1e}"
        if [got["tokens"] for got in self.found["answers"]] != [want["tokens"] for want in self.expected]:
            return "wrong", "greedy tokens differ"
        if len(self.found.get("layers", range(self.attending))) != self.attending:  # unknown where several ranks run
            return "wrong", f"{len(self.found['layers'])} layers own KV cache, {self.attending} attend"
        return "right", f"{self.difference:.0e}"


def widen() -> None:
    """Heads of 32 values, which vLLM's attention on the CPU wants, and twice the width."""
    tiny_models.HEAD_DIM = 32
    SMALL.update({name: 32 for name, value in SMALL.items() if value == 16})
    for family, fields in PINNED.items():
        tiny_models.SPECIAL[family] = {**tiny_models.SPECIAL.get(family, {}), **fields}
    SMALL.update(dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "hidden_size_global"), 128))


def as_vllm_computes(model: Any) -> Any:
    """The reference model.  vLLM's Cohere 2 attends to one token more than transformers', the dense one too."""
    if model.config.model_type == "cohere2":
        model.config.sliding_window += 1
    return model


def torch_gives(model: Any, ids: list[int]) -> dict[str, Any]:
    """Log-probability of each token after the first, and the greedy continuation, without a cache."""
    with torch.inference_mode():
        scores = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        tokens = list(ids)
        for _ in range(STEPS):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return {"logprobs": [float(scores[i, token]) for i, token in enumerate(ids[1:])], "tokens": tokens[len(ids) :]}


def cases(family: str, drops: dict[str, str], root: Path) -> Iterable[Case]:
    """A checkpoint for each drop.  Raises DropformerError for a family or a drop that dropformer refuses."""
    dense = root / family
    tiny_model(family).save_pretrained(dense)
    for number, (drop, spec) in enumerate(drops.items()):
        model: Any = tiny_model(family)
        loaded = api.LoadedModel(model, None, dense, reference(family, dense), None)
        pruned = api.drop(loaded, api.plan_unscored(loaded.ref, api.outline(model), spec, (), None))
        folder = root / f"{family}-{number}"
        api.save(pruned, folder)
        config = json.loads((folder / "config.json").read_text())
        blocks = len(json.loads((folder / "dropformer.json").read_text())["original_blocks"])
        attending = blocks - len(config.get("dropformer_no_cache", []))
        yield Case(family, drop, folder, [torch_gives(as_vllm_computes(pruned), ids) for ids in PROMPTS], attending)


def installed(python: str, root: Path) -> Path:
    """dropformer, its entry points included, in a folder of its own for vLLM's environment."""
    ignored = shutil.ignore_patterns(".*", "build", "dist", "demo", "__pycache__", "*.egg-info", "tests")
    shutil.copytree(ROOT, root / "source", ignore=ignored)
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*pip, str(root / "site"), str(root / "source")], check=True, capture_output=True)
    table = root / "site/dropformer/prune/engines/vllm_families.json"
    table.write_text(json.dumps(json.loads(table.read_text()) | {"wrong": {}}))  # so that the wrong ones run again
    return root / "site"


def in_vllm(python: str, site: Path, every: list[Case], ranks: int = 1) -> None:
    """Run cases in one process of vLLM, since importing it is most of the work.

    What fails there runs again with its family alone: vLLM's transformers backend refuses to follow its own classes.
    ranks: the tensor-parallel size; several are processes of their own.
    """
    shared = len({case.family for case in every}) > 1
    left = run_once(python, site, every, ranks)
    while left and not shared:  # it died at the first of them
        left = run_once(python, site, left[1:], ranks)
    failed = [case for case in every if case.found is None or "error" in case.found] if shared else []
    for family in dict.fromkeys(case.family for case in failed):
        in_vllm(python, site, [case for case in failed if case.family == family], ranks)
    for case in every:
        if case not in failed:
            print(f"{case.family:14}{case.drop:36}{'  '.join(case.verdict())}", flush=True)


def run_once(python: str, site: Path, every: list[Case], ranks: int) -> list[Case]:
    """Fill in what a process of vLLM found for cases; returns those that it did not come to."""
    if not every:
        return []
    env = dict(os.environ, PYTHONPATH=str(site), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", VLLM_NO_USAGE_STATS="1")
    several = {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp"} if ranks > 1 else {}
    env |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if several else "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    left = {case.folder.name: case for case in every}
    work: dict[str, Any] = {"folders": [str(case.folder) for case in every], "prompts": PROMPTS, "steps": STEPS}
    work["settings"] = several | SETTINGS.get(every[0].family, {})
    command = [python, str(ROOT / "benchmarks/families/vllm_run.py"), json.dumps(work)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
    assert process.stdout
    for line in process.stdout:
        if line.startswith("FOUND "):
            found = json.loads(line.removeprefix("FOUND "))
            left.pop(found["name"]).found = found
    process.wait()
    return list(left.values())


def together(families: list[str]) -> list[list[str]]:
    """Families that share a process of vLLM: TOGETHER of them, those with settings of their own alone."""
    shared = [family for family in families if family not in SETTINGS]
    batches = [shared[i : i + TOGETHER] for i in range(0, len(shared), TOGETHER)]
    return batches + [[family] for family in families if family in SETTINGS]


def rows_of(families: list[str], options: argparse.Namespace, root: Path, site: Path) -> list[dict[str, str]]:
    """The rows of families that share a process of vLLM."""
    refused, every = {}, {}
    for family in families:
        one = {", ".join(ONE): SPECS[family]} if family in SPECS else ONE
        drops = {options.drop: options.drop} if options.drop else EACH if options.full else one
        try:
            every[family] = list(cases(family, drops, root))
        except (DropformerError, ValueError, KeyError) as error:
            refused[family] = f"not built or pruned here: {str(error).splitlines()[0][:160]}"
    in_vllm(options.vllm, site, [case for some in every.values() for case in some], options.ranks)
    rows = [{"family": family, "kind": "refused", "said": said, "class": ""} for family, said in refused.items()]
    return rows + [row_of(some) for some in every.values()]


def row_of(every: list[Case]) -> dict[str, str]:
    """One family's row: the worst verdict of its drops, what there is to say, and vLLM's class."""
    kind, said = max((case.verdict() for case in every), key=lambda verdict: KINDS.index(verdict[0]))
    names = [case.found["class"] for case in every if case.found and "class" in case.found]
    return {"family": every[0].family, "kind": kind, "said": said, "class": (names or [""])[0]}


def write(rows: list[dict[str, str]], version: str) -> None:
    """vllm_families.json, and the table of docs/engines.md."""
    for row in rows:
        if note := NOTES.get(row["family"]):
            row["said"] = f"{row['said']} ({note})" if row["kind"] == "right" else note
    rows = sorted(rows, key=lambda row: (KINDS.index(row["kind"]), row["family"]))
    found = {kind: {row["family"]: row["said"] for row in rows if row["kind"] == kind} for kind in KINDS}
    TABLE.write_text(json.dumps({"version": version, **found}, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"| `{row['family']}` | {row['class']} | {row['kind']}{', ' if row['kind'] == 'right' else ': '}{row['said']} |"
        for row in rows
    ]
    table = "\n".join(["| family | vLLM's class | largest difference to torch |", "|---|---|---|", *lines])
    page = ROOT / "docs/engines.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def vllm_version(python: str) -> str:
    look = "from importlib.metadata import version; print(version('vllm-cpu'))"
    return subprocess.run([python, "-c", look], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="model types; default: all")
    parser.add_argument("--vllm", default=os.environ.get("DROPFORMER_VLLM_PYTHON"), help="an interpreter with vLLM")
    parser.add_argument("--quick", action="store_true", help="one family")
    parser.add_argument("--full", action="store_true", help="each kind of drop alone")
    parser.add_argument("--drop", help="this plan alone, such as attn=3,window=0,1@5")
    parser.add_argument("--ranks", type=int, default=1, help="tensor-parallel size, in as many processes")
    parser.add_argument("--resume", type=Path, help="a file of rows, a line each; families in it are not run again")
    parser.add_argument("--write", action="store_true", help="renew the table that `prune engines` and the docs have")
    options = parser.parse_args()
    if options.write and options.drop:
        parser.error("--write renews the table of the usual plans; leave out --drop")
    if not options.vllm:
        parser.error("--vllm names no interpreter; `make build/vllm` builds an environment")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    widen()
    saved = options.resume.read_text().splitlines() if options.resume and options.resume.exists() else []
    rows = {row["family"]: row for row in map(json.loads, saved)}
    families = options.families or (["llama"] if options.quick else FAMILIES)
    with tempfile.TemporaryDirectory(prefix="engines-") as name:
        root = Path(name)
        site = installed(options.vllm, root)
        for some in together([family for family in families if family not in rows]):
            for row in rows_of(some, options, root, site):
                rows[row["family"]] = row
                if options.resume:
                    with options.resume.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    version = vllm_version(options.vllm)
    missing = [family for family in FAMILIES if family not in rows]
    if options.write and missing:
        parser.error(f"--write renews the whole table, and there is no row of {', '.join(missing)}; use --resume")
    if options.write:
        write(list(rows.values()), version)
    counts = {kind: sum(row["kind"] == kind for row in rows.values()) for kind in KINDS}
    print(json.dumps({"benchmark": "engines", "engine": f"vLLM {version}", "families": len(rows), **counts}))


if __name__ == "__main__":
    sys.exit(main())
