"""Try every causal language model of transformers, or with --others its encoders, encoder-decoders and vision models.

    python benchmarks/architectures.py [--others] [--quick] [--write docs/architectures.md] [FAMILY ...]

For each family a tiny random model is built from its config and taken through everything by `trial.py`: analyze,
drop attention, cross-attention, MLP and block of each stack, generate, export, reload.
A family is `works`, `partly` (some kind of layer is refused, with the reason), `refused` or `wrong`; one
that transformers cannot build here is left out and named.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import transformers
from families.page import Verdict, count, decoder_only, write
from families.tiny_models import tiny_model
from families.trial import Partly, Wrong, through
from transformers.models.auto import modeling_auto

from dropformer.prune.errors import DropformerError

SETTLED = {"rwkv": "with rescale_every 0", "albert": "with as many groups as layers"}
QUICK = ["llama", "qwen3_moe", "gemma2", "phi", "gpt2", "opt", "bloom", "deepseek_v3", "minimax", "jamba", "bert"]
CAUSAL = "AutoModelForCausalLM"
# What is no causal language model, by the Auto class of its usual head.
OTHERS = {
    "AutoModelForMaskedLM": "bert roberta distilbert electra deberta deberta-v2 albert longformer big_bird reformer "
    "funnel modernbert mpnet camembert xlm-roberta convbert nystromformer fnet mobilebert yoso ernie layoutlm "
    "megatron-bert mra rembert roformer squeezebert flaubert xlm data2vec-text ibert tapas",
    "AutoModelForSequenceClassification": "xlnet bert distilbert deberta-v2 longformer funnel",
    "AutoModelForPreTraining": "electra bert",
    "AutoModelForTokenClassification": "bert",
    "AutoModelForQuestionAnswering": "bert",
    "AutoModel": "bert t5 vit",
    "AutoModelForSeq2SeqLM": "t5 bart marian mt5 umt5 longt5 switch_transformers mbart pegasus pegasus_x "
    "bigbird_pegasus led blenderbot blenderbot-small m2m_100 nllb-moe prophetnet fsmt mvp plbart t5gemma",
    "AutoModelForImageClassification": "vit swin swinv2 beit dinov2 dinov2_with_registers vit_msn ijepa "
    "data2vec-vision pvt segformer hiera clip siglip",
    "AutoModelForImageTextToText": "llava gemma3 paligemma idefics3 qwen2_vl",
}


def judge(family: str, auto: str = CAUSAL) -> Verdict:
    """Take one family, built by an Auto class, through everything."""
    try:
        model = tiny_model(family, getattr(transformers, auto))
    except Exception as error:  # whatever transformers raises for a config that it cannot build
        return Verdict(family, "unbuildable", _line(error))
    name, folder = type(model).__name__, Path(tempfile.mkdtemp(prefix="architectures-"))
    try:
        said = through(model, folder, auto)
        said = f"{said}; {SETTLED[family]}, refused otherwise" if family in SETTLED else said
        return Verdict(family, "works", said, name)
    except DropformerError as error:
        return Verdict(family, "refused", _line(error), name)
    except Partly as error:
        return Verdict(family, "partly", _line(error), name)
    except Wrong as error:
        return Verdict(family, "wrong", _line(error), name)
    except Exception as error:  # a crash is wrong too
        return Verdict(family, "wrong", f"{type(error).__name__}: {_line(error)}", name)
    finally:
        shutil.rmtree(folder)


def cases(families: list[str], others: bool, quick: bool) -> list[tuple[str, str]]:
    """(Auto class, family) of all that is to be tried."""
    if not others:
        known = list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        return [(CAUSAL, family) for family in families or (QUICK if quick else known)]
    every = [(auto, family) for auto, names in OTHERS.items() for family in names.split()]
    if families:
        return [(auto, family) for auto, family in every if family in families]
    return [(auto, names.split()[0]) for auto, names in OTHERS.items()] if quick else every


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:240]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="model types; default: all")
    parser.add_argument("--others", action="store_true", help="what is no causal language model")
    parser.add_argument("--quick", action="store_true", help="a representative handful")
    parser.add_argument("--write", type=Path, help="write the table to this file, the other table there kept")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    verdicts = []
    for auto, family in cases(options.families, options.others, options.quick):
        start = time.perf_counter()
        verdicts.append(judge(family, auto))
        seconds = time.perf_counter() - start
        print(f"{family:26}{verdicts[-1].result:12}{seconds:5.1f} s  {verdicts[-1].said}", flush=True)
    if options.write:
        write(options.write, verdicts, options.others)
    decoders = count([v for v in verdicts if decoder_only(v.family)])
    figures = {"decoder_only": decoders["families"], "decoder_only_works": decoders["works"]}
    print(json.dumps({"benchmark": "architectures", **count(verdicts), **({} if options.others else figures)}))


if __name__ == "__main__":
    main()
