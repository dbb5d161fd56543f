#!/usr/bin/env bash
# One command for a bare machine with a GPU, from the repository's root:
#
#     bash benchmarks/gpu.sh [OUTPUT FOLDER] [further options of benchmarks/gpu.py]
#
# Expected there: Python with torch (CUDA), accelerate, safetensors, pytest and typer.  What else is needed is taken
# from wheels that travel along in build/gpu-wheels (about 40 MB), without a registry.  To fetch them beforehand, where there
# is one:
#
#     bash benchmarks/gpu.sh --wheels
#
# All output lines are in OUTPUT FOLDER/gpu.jsonl; it ends within 580 seconds.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
wheels=$root/build/gpu-wheels
begun=$SECONDS

if [ "${1:-}" = --wheels ]; then
    python=${2:-$(python3 -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')}
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$python" --platform manylinux2014_x86_64 \
        -d "$wheels" transformers==5.23.* pydantic pydantic-core annotated-types typing-inspection typing-extensions platformdirs \
        greenlet gguf matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil six pillow || exit
    du -sh "$wheels"
    exit
fi

out=$(realpath -m "${1:-${OUT:-gpu-results}}")
[ $# -gt 0 ] && shift
mkdir -p "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# The package is the repository under another name; the wheels go into a folder of their own.
if ls "$wheels"/*.whl > /dev/null 2>&1; then
    python3 -m pip install -q --no-deps --no-index --target "$scratch/site" "$wheels"/*.whl || exit 1
fi
mkdir -p "$scratch/site"
ln -s "$root" "$scratch/site/dropformer"
export PYTHONPATH=$scratch/site:${PYTHONPATH:-} DROPFORMER_CACHE=$scratch/cache
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
cd "$root"
{
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    python3 -c 'import sys, torch, transformers, accelerate
print(sys.version.split()[0], "torch", torch.__version__, "transformers", transformers.__version__, "accelerate", accelerate.__version__)'
} > "$out/machine.txt" 2>&1
cat "$out/machine.txt"
mkdir -p "$scratch/models"
python3 benchmarks/gpu.py --lines "$out/gpu.jsonl" --folder "$scratch/models" \
    --until $((570 - SECONDS + begun)) "$@"
status=$?
mkdir -p "$out/logs" && cp "$scratch"/models/*.log "$out/logs/" 2> /dev/null
exit $status
