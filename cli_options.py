"""Every option of the `prune` command, declared once.  Names of formats, metrics and repairs come from registries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dropformer.eval.tasks.backends import BACKENDS
from dropformer.metrics.repair.registry import REPAIRS
from dropformer.metrics.search.registry import METRICS, SELECTIONS
from dropformer.metrics.search.strategy import QUALITIES
from dropformer.prune.errors import OutputError
from dropformer.prune.formats.registry import FORMATS
from dropformer.prune.version import __version__

Text = str | None
# Headings of `prune --help`
CHOICE, TEXT, REPORT = "Selection and repair", "Calibration", "Report"
FILES, MACHINE = "Export", "Device and precision"
TEXTS = (
    "builtin, c4, wikitext, self or self:FILE (what the model writes, to builtin or FILE's prompts), or a .txt, "
    ".jsonl (texts, prompts with completions, or messages) or .parquet file"
)
SPECS = "attn:8, mlp:25%, block:4, joint:12, attn=20,21, published:attn:8, or several by commas"
ANY = "A folder, a Hub id or id@revision, a .gguf file, or a recipe (see `prune recipes`)."


def _given_path(text: str) -> Path:
    """What --out names.  Raises OutputError for an empty name, which would silently be the folder at hand."""
    if not text.strip():
        raise OutputError("--out is empty; give the name of what is to be written, or leave it out")
    return Path(text)


def _folder(files: str) -> typer.models.OptionInfo:
    """--out for a command that writes these files."""
    return typer.Option("--out", help=f"Folder for {files}.", parser=_given_path, metavar="PATH")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dropformer {__version__}")
        raise typer.Exit


# --- which model, and where it computes ---

Model = Annotated[Text, typer.Option("--model", "-m", help=ANY)]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=ANY)]
Models = Annotated[list[str], typer.Argument(help="The dense model, then pruned ones: anything --model takes.")]
ConfigOf = Annotated[str, typer.Argument(metavar="MODEL", help="A recipe, folder or Hub id; only its config is read.")]
Checkpoints = Annotated[
    list[str],
    typer.Argument(
        help="Folders, Hub ids or id@revision, .gguf files, recipes, or the folder of a training run (checkpoint-N)."
    ),
]
Revision = Annotated[Text, typer.Option(help="Branch, tag or commit of a Hub model.")]
Revisions = Annotated[Text, typer.Option(help="Revisions of one Hub model, by commas: step1000,step10000.")]
Dtype = Annotated[
    Text,
    typer.Option(
        help="Computation: float32, bfloat16, float16, auto. The export never casts.", rich_help_panel=MACHINE
    ),
]
Device = Annotated[Text, typer.Option(help="cpu, cuda, cuda:1, ...", rich_help_panel=MACHINE)]
DeviceMap = Annotated[
    Text, typer.Option(help="Passed to accelerate, for models larger than one GPU: auto.", rich_help_panel=MACHINE)
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.", rich_help_panel=MACHINE)
]

# --- what to drop, and how it is chosen ---

Drop = Annotated[Text, typer.Option("--drop", "-d", help=f"What to drop: {SPECS}.", rich_help_panel=CHOICE)]
NeededDrop = Annotated[str, typer.Option("--drop", "-d", help=f"What to drop: {SPECS}.")]
DropRange = Annotated[
    str, typer.Option("--drop", "-d", help="A range of counts: attn:0..12, mlp:0..8..2, window:0..12@256+4.")
]
Keep = Annotated[str, typer.Option(help="Blocks to protect, such as 0,1,-1.", rich_help_panel=CHOICE)]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="A plan.json to follow instead of --drop.", rich_help_panel=CHOICE)
]
ScoresFile = Annotated[
    Path | None, typer.Option("--scores", help="A scores.json of this model to plan from.", rich_help_panel=CHOICE)
]
ScoresArgument = Annotated[Path, typer.Argument(metavar="SCORES", help="A scores.json that `prune analyze` wrote.")]
Quality = Annotated[
    Text,
    typer.Option(
        help=f"A named strategy of selection and repair: {', '.join(QUALITIES)}; default paper.",
        rich_help_panel=CHOICE,
    ),
]
Metric = Annotated[Text, typer.Option(help=f"What ranks: {', '.join(METRICS)}.", rich_help_panel=CHOICE)]
Select = Annotated[
    Text,
    typer.Option(help=f"{', '.join(SELECTIONS)}; greedy minimizes the KL to the dense model.", rich_help_panel=CHOICE),
]
Refine = Annotated[
    int | None,
    typer.Option(
        min=0, help="Rounds of swaps in the choice, or in a --plan, while one lowers the KL.", rich_help_panel=CHOICE
    ),
]
Budget = Annotated[
    Text,
    typer.Option(
        help="In place of --drop: kv:-25%, params:-20%, decode:1.3x (by bytes) or measured:1.3x (by the clock).",
        rich_help_panel=CHOICE,
    ),
]
Rungs = Annotated[
    Text,
    typer.Option(
        help="What a --budget may make of attention layers, or --draft of any: drop,window:512+4.",
        rich_help_panel=CHOICE,
    ),
]
BudgetContext = Annotated[
    int | None,
    typer.Option(
        "--context", min=64,
        help="Tokens at which a --budget counts the KV cache (8192 with --rungs, else 2048), or behind which to draft.",
        rich_help_panel=CHOICE,
    ),
]  # fmt: skip
RepairMethods = Annotated[
    Text, typer.Option("--repair", help=f"By commas: {', '.join(REPAIRS)}.", rich_help_panel=CHOICE)
]
Gate = Annotated[
    str, typer.Option(help="Validation text: a repair that does not help there is not kept.", rich_help_panel=CHOICE)
]
Packable = Annotated[
    bool,
    typer.Option(
        "--packable", help="Drop pairs of neighbours (joint:N) that leave a stock, shorter model; states the cost."
    ),
]

# --- drafting ---

DRAFT = "Drafting"
Draft = Annotated[
    bool,
    typer.Option(
        "--draft",
        help="In place of --drop: find what drafts best for the model itself, and write it where that pays.",
        rich_help_panel=DRAFT,
    ),
]
DraftBatch = Annotated[
    int, typer.Option("--batch", min=1, help="Sequences at once, for the estimate.", rich_help_panel=DRAFT)
]
MaxDrop = Annotated[
    int | None, typer.Option("--max-drop", min=0, help="Layers that may go at most.", rich_help_panel=DRAFT)
]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0, help="At which tokens are drawn; 0 is greedy.", rich_help_panel=DRAFT)
]
DraftHardware = Annotated[
    str,
    typer.Option("--hardware", help="cpu (this machine, timed) or a100-80g, ... by estimate.", rich_help_panel=DRAFT),
]
Anyway = Annotated[
    bool, typer.Option("--write-anyway", help="Write the draft even if it does not pay.", rich_help_panel=DRAFT)
]
DraftPlan = Annotated[
    Path | None, typer.Option("--draft", help="A plan.json whose draft decodes for the (one) model, measured.")
]
DraftEstimate = Annotated[
    bool, typer.Option("--draft", help="As the draft of the model itself: where it pays, acceptance against cost.")
]

# --- calibration ---

CalibrationText = Annotated[
    Text,
    typer.Option("--calibration", help=f"{TEXTS}; several by commas with --quality or --repair.", rich_help_panel=TEXT),
]
Samples = Annotated[int | None, typer.Option(min=1, help="Calibration windows.", rich_help_panel=TEXT)]
Length = Annotated[int | None, typer.Option(min=2, help="Tokens in a window.", rich_help_panel=TEXT)]
Seed = Annotated[int | None, typer.Option(help="Which windows are drawn.", rich_help_panel=TEXT)]
SkipFirst = Annotated[
    int | None,
    typer.Option(min=0, help="Leading tokens of a window that are run but not scored.", rich_help_panel=TEXT),
]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Windows run at once; by default what keeps the device busy.", rich_help_panel=TEXT),
]
UntilStable = Annotated[Text, typer.Option(help="A drop spec; stop once the layers that it drops are settled.")]
Memory = Annotated[Text, typer.Option(help="Read the weights block by block, in no more RAM than this: 2GiB.")]
Tokenizer = Annotated[Text, typer.Option(help="Tokenize with this one's tokenizer, not the first's.")]

# --- what is measured ---

ReportText = Annotated[
    str,
    typer.Option("--text", help="Text for perplexity and KL, as for --calibration.", rich_help_panel=REPORT),
]
TextSamples = Annotated[int, typer.Option("--samples", min=1, help="Windows of that text.", rich_help_panel=REPORT)]
TextLength = Annotated[int, typer.Option("--length", min=2, help="Tokens in a window.", rich_help_panel=REPORT)]
Seconds = Annotated[
    float, typer.Option(min=0, help="Time for the speed measurement; 0 leaves it out.", rich_help_panel=REPORT)
]
Measure = Annotated[
    bool | None,
    typer.Option(
        "--measure/--no-measure",
        help="Perplexity and speed, dense and pruned; default: unless a --plan is followed, which loads no model.",
        rich_help_panel=REPORT,
    ),
]
Tasks = Annotated[str, typer.Option(help="lm-eval tasks by commas: mmlu,hellaswag,...")]
Shots = Annotated[int | None, typer.Option(min=0, help="Few-shot examples; default: each task's own.")]
MmluData = Annotated[Path | None, typer.Option(help="MMLU's CSV files in the original layout, offline.")]
IncludePath = Annotated[
    Path | None, typer.Option("--include-path", help="Folder of further task files, as for lm-eval.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Questions per task, sampled in proportion.")]
QuestionSeed = Annotated[int, typer.Option("--seed", help="Which questions and windows are drawn.")]
Backend = Annotated[
    str, typer.Option(help="; ".join(f"{name}: {entry.summary}" for name, entry in BACKENDS.items()) + ".")
]
Probes = Annotated[bool, typer.Option(help="Small tests of what multiple choice hides: copying, sums, long context.")]
Speed = Annotated[bool, typer.Option("--speed", help="Measure prefill and decode speed, all models interleaved.")]
Batches = Annotated[
    str, typer.Option("--batch", help="Batch sizes by commas, or `paper`: 2048 in, 2048 out, largest batch.")
]
Contexts = Annotated[str, typer.Option("--context", help="Prompt lengths by commas.")]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens decoded after each prompt.")]
Repeats = Annotated[int, typer.Option(min=1, help="Runs of every model at every setting.")]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="Decode through torch.compile too; default: on a GPU."),
]
Stream = Annotated[int, typer.Option(min=0, help="Read this many tokens with attention sinks.")]
Window = Annotated[int | None, typer.Option(min=8, help="Tokens that attention sees while it streams; default 1024.")]
Long = Annotated[
    int,
    typer.Option(
        min=0, help="Perplexity by position, facts from five depths, KV cache and decode speed at so many tokens."
    ),
]
AnswerCache = Annotated[
    Path | None, typer.Option("--cache", help="Folder of answers, so that an interrupted run resumes.")
]
SweepFile = Annotated[Path | None, typer.Option("--sweep", help="A sweep.json of the dense model, for the page.")]
Hardware = Annotated[str, typer.Option(help="cpu (this machine, measured), a6000, a100-80g, h100-sxm, ...")]
TotalTokens = Annotated[int, typer.Option("--context", min=2, help="Tokens of prompt and answer together.")]
AnswerTokens = Annotated[
    int | None, typer.Option("--new-tokens", min=1, help="The last of them, generated; default half.")
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Sequences at once.")]

# --- what is written, and where ---

Out = Annotated[
    Path | None,
    typer.Option("--out", help="Where to write; must not exist or be empty.", parser=_given_path, metavar="PATH"),
]
ScoresOut = Annotated[Path | None, _folder("scores.json and similarity.png")]
PlanOut = Annotated[
    Path | None, typer.Option("--out", help="Where to write the plan, for --plan.", parser=_given_path, metavar="PATH")
]
ReportOut = Annotated[Path | None, _folder("report.json and report.html")]
SweepOut = Annotated[Path | None, _folder("sweep.json and sweep.png")]
CompareOut = Annotated[Path | None, _folder("compare.json, the pictures and the page")]
Format = Annotated[
    str,
    typer.Option(
        help="; ".join(f"{name} ({known.help})" if known.help else name for name, known in FORMATS.items()) + ".",
        rich_help_panel=FILES,
    ),
]
Link = Annotated[
    bool, typer.Option("--link", help="Hard-link the shards in which nothing changes.", rich_help_panel=FILES)
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Compare every byte with the source, not a sample.", rich_help_panel=FILES)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Stop at the plan and say what it would save.")]
KeepDownloads = Annotated[bool, typer.Option("--keep-downloads", help="Leave fetched weights on disk.")]
Pushed = Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint that dropformer wrote.")]
Loadable = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A folder that dropformer wrote, a plain model's, or a .gguf file.")
]
Full = Annotated[bool, typer.Option("--full", help="No table: each command on a line of its own, to copy.")]
Repository = Annotated[str, typer.Argument(metavar="REPO", help="The model repository on the Hub: user/name.")]
Private = Annotated[bool, typer.Option("--private", help="Make the repository a private one.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")]
