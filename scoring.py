"""The scores of a model, cached or measured, by one process or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dropformer.eval.draft.options import DraftOptions
from dropformer.eval.quality.perplexity import HELD_OUT
from dropformer.metrics.analysis import distributed
from dropformer.metrics.analysis.measure import Measuring, measure
from dropformer.metrics.analysis.score_cache import keep, kept_scores, score_file
from dropformer.metrics.analysis.scores import Scores
from dropformer.metrics.analysis.stability import check_spec
from dropformer.metrics.calibration.batching import busy_tokens
from dropformer.metrics.calibration.data import CalibrationData, calibration_data, default_settings, text_windows
from dropformer.metrics.calibration.generated import Writer
from dropformer.metrics.calibration.images import PIXELS, Pictures
from dropformer.metrics.calibration.settings import Calibration, check_length, context_of
from dropformer.metrics.calibration.windows import Windows, computed_tokens
from dropformer.metrics.offload.process_memory import parse_bytes
from dropformer.metrics.search.budget import check_budget, parse_budget
from dropformer.progress import Progress
from dropformer.prune.choosing import check_possible
from dropformer.prune.discovery.summarize import summarize
from dropformer.prune.errors import CalibrationError, ModelError, PlanError
from dropformer.prune.files.config_json import read_config
from dropformer.prune.loading.load import usable_device
from dropformer.prune.samples.inputs import takes_pictures, writes_text
from dropformer.recipes.opening import LoadedModel, open_model, torch_dtype
from dropformer.request import CalibrationOptions, Request


def writer(opened: LoadedModel, progress: Progress) -> Writer:
    """The model as a generator of calibration text, cached by its weights."""
    return Writer(opened.model, opened.tokenizer, opened.ref.fingerprint, progress.say)


def open_to_score(request: Request, progress: Progress) -> LoadedModel:
    """Open a model for analysis, on this process's own device, without weights if they are streamed."""
    if request.scoring.until_stable:
        check_spec(request.scoring.until_stable)
    if request.scoring.memory is not None:
        parse_bytes(request.scoring.memory)
    place = request.placement
    if place.device_map and distributed.world() > 1:
        raise ModelError("--device-map spreads one model over the GPUs, but each launched process has its own; use one")
    place = replace(place, device=distributed.own_device(place.device)) if not place.device_map else place
    with progress.stage("opening the model"):
        weights = request.scoring.memory is None
        opened = open_model(request.model, request.revision, place, progress.say, weights)
    distributed.join(opened.model.device if weights else "cpu")
    return opened


def check_early(opened: LoadedModel, request: Request, specs: Sequence[str] = ()) -> None:
    """Raises PlanError where the model's anatomy alone says that a spec or a budget cannot be met, before a text is
    read; nothing for a model that is read in pieces."""
    if opened.model is None:
        return
    target, outline = request.target, summarize(opened.model, opened.architecture)
    published = opened.recipe.published if opened.recipe else None
    for spec in specs or filter(None, [target.spec, request.scoring.until_stable]):
        check_possible(outline, spec, target.keep, published)
    if target.budget and not target.rungs:
        check_budget(parse_budget(target.budget), outline, target.keep, target.context)


def get_scores(opened: LoadedModel, request: Request, progress: Progress, specs: Sequence[str] = ()) -> Scores:
    """The scores of a model: those of the same weights on the same tokens if any are kept, else new ones.

    `specs`: what they are for, where the request does not say.  Raises PlanError first for what no scores can meet.
    """
    check_early(opened, request, specs)
    if request.selection.scores:
        scores = Scores.read(request.selection.scores)
        if scores.model.fingerprint != opened.ref.fingerprint:
            raise PlanError(
                f"{request.selection.scores} was measured on other weights than {opened.ref.name}; analyze this model"
            )
        return scores.model_copy(update={"model": opened.ref})
    data = material(opened, request, progress)
    dtype = request.placement.computes_in(opened.path)
    kept = score_file(opened.ref.fingerprint or "", data.ref, dtype)
    if reused := _reused(kept, opened, data):
        progress.say(f"scores: reused, same weights and same tokens ({kept})")
        return reused
    scores = _measured(opened, data, request, kept.with_suffix(".rows.jsonl"), progress)
    if scores.settled is None and distributed.rank() == 0 and (refused := keep(scores, kept)):
        progress.say(refused)
    return scores


def material(opened: LoadedModel, request: Request, progress: Progress) -> CalibrationData:
    said = request.calibration
    settings = said.of(opened.recipe)
    free = default_settings(opened.model, settings)
    settings = replace(
        settings,
        name=settings.name if said.texts else free.name,
        length=settings.length if said.length else free.length,
    )
    if not takes_pictures(opened.model):
        check_length(read_config(opened.path), settings.length, opened.ref.name)
    data = calibration_data(opened.model, opened.tokenizer, opened.path, settings, opened.ref.fingerprint)
    warning = "warning: " if data.ref.name == PIXELS and not said.texts else ""
    progress.say(f"{warning}calibration: {wording(data, opened)} ({_origin(said, opened)})")
    return data


def _origin(said: CalibrationOptions, opened: LoadedModel) -> str:
    """The origin of the calibration settings: recipe or defaults, and the options that changed them."""
    options = [f"--{name.replace('_', '-')}" for name, value in vars(said).items() if value not in (None, ())]
    base = "the recipe's" if opened.recipe else "the default"
    if said.texts:
        return "as given"
    return f"{base} text; {', '.join(options)} as given" if options else base


def wording(data: CalibrationData, opened: LoadedModel) -> str:
    """The calibration data in words, with the decoder's input for an encoder-decoder."""
    if isinstance(data, Pictures):
        random = "random pixels, no images: " if data.ref.name == PIXELS else ""
        return f"{random}{data.ref.name}, {len(data)} images"
    two = getattr(getattr(opened.model, "config", None), "is_encoder_decoder", False)
    shifted = "; the decoder reads the encoder's text, shifted right" if two else ""
    return f"{data.ref.name}, {len(data)} windows of {data.ref.length} tokens{shifted}"


def _reused(kept: Path, opened: LoadedModel, data: CalibrationData) -> Scores | None:
    """The scores in process 0's cache, in every process, so that all processes measure or none does."""
    found = ""
    if distributed.rank() == 0 and (scores := kept_scores(kept)) and scores.matches(opened.ref, data.ref):
        found = scores.to_json()
    found = distributed.first_says(found)
    return Scores.model_validate_json(found).model_copy(update={"model": opened.ref}) if found else None


def _measured(opened: LoadedModel, data: CalibrationData, request: Request, rows: Path, progress: Progress) -> Scores:
    if request.scoring.memory is not None:
        return _streamed(opened, data, request, progress)
    how = Measuring(
        request.scoring.batch_size, request.scoring.until_stable, tuple(request.target.keep), rows, opened.architecture
    )
    size = how.size(opened.model, data)
    needed, computed = sum(data.lengths()), computed_tokens(data.lengths(), size)
    if len(set(data.lengths())) > 1 and not request.scoring.until_stable:
        progress.say(f"tokens: {computed:,} computed for {needed:,} needed, {size} windows at a time")
    with progress.stage("scoring windows", len(data)) as tick:
        scores = measure(opened.model, data, opened.ref, how, tick)
    if request.scoring.until_stable:
        progress.say(
            str(scores.settled or f"{request.scoring.until_stable} was not settled: all {len(data)} windows were used")
        )
    return scores


def _streamed(opened: LoadedModel, data: CalibrationData, request: Request, progress: Progress) -> Scores:
    from dropformer.metrics.offload.streaming import open_streamed, stream_scores

    if request.scoring.until_stable:
        raise CalibrationError(
            "--until-stable stops between windows, but with --memory all windows pass each block together; use one"
        )
    place, memory = request.placement, request.scoring.memory or ""
    if place.device_map:
        raise ModelError("--memory brings the weights block by block itself; leave out --device-map, or --memory")
    dtype, device = torch_dtype(place.computes_in(opened.path)), usable_device(distributed.own_device(place.device))
    streamed = open_streamed(opened.path, dtype or "float32", place.trust_remote_code, device)
    size = request.scoring.batch_size or max(1, busy_tokens(device) // max(data.lengths()))
    with progress.stage("scoring windows, block by block", len(data)) as tick:
        return stream_scores(streamed, data, opened.ref, parse_bytes(memory), size, tick)


def held_out_windows(opened: LoadedModel, request: Request, progress: Progress) -> Windows | None:
    """Windows of the report's text, None if perplexity is not measured.  Raises CalibrationError if it is too short."""
    if not request.measures or opened.tokenizer is None or not writes_text(opened.model):
        return None
    length = min(HELD_OUT.length, context_of(opened.model.config) or HELD_OUT.length)
    try:
        return text_windows(replace(HELD_OUT, name=request.report.text, length=length), writer(opened, progress))
    except CalibrationError as error:
        raise CalibrationError(f"--text: {error}") from None


def draft_windows(
    opened: LoadedModel, said: CalibrationOptions, options: DraftOptions, progress: Progress
) -> list[Windows]:
    """Windows of the draft's context length from each text; two in all by default."""
    if opened.tokenizer is None:
        raise ModelError(f"{opened.ref.name} has no tokenizer, so acceptance cannot be measured on text")
    check_length(read_config(opened.path), options.context, opened.ref.name)
    names = said.of(opened.recipe).name.split(",")
    each, seed = max(1, (said.samples or 2) // len(names)), said.seed or 0
    texts = [Calibration(name, each, options.context, seed) for name in names]
    return [text_windows(text, writer(opened, progress)) for text in texts]
