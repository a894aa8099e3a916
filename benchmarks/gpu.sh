#!/usr/bin/env bash
# Tests and benchmarks on a GPU in one command, without a network, within nine minutes:
#
#     benchmarks/gpu.sh [--tiny] [OUT]
#
# runs the gpu tests, then output_layer.py, decoding.py, rl_step.py and pass_cost.py on random weights
# of 0.5 B and 1.5 B shapes, then decoding.py with compiled passes, and writes one text file each to
# OUT (default: a temporary folder). PYTHON names the interpreter (default: python3). --tiny takes a
# tiny model and few repeats, to try the command where there is no GPU. A part that takes too long is
# stopped, and the next one begins; the exit status is 1 if a part failed.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
sizes="0.5b 1.5b"
tiny=""
if [ "${1:-}" = --tiny ]; then tiny=1 sizes=tiny; shift; fi
out=${1:-$(mktemp -d)}
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels" HF_HUB_OFFLINE=1 TRITON_INTERPRET=0
began=$(date +%s) failed=0

packages="torch transformers triton lightning hydra-core safetensors rich numpy matplotlib tokenizers
pytest jaxtyping beartype hypothesis trl datasets"
"$python" - $packages <<'EOF' || exit 2
import importlib.metadata as metadata, platform, sys
missing = []
for name in sys.argv[1:]:
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        missing.append(name)
if missing:
    print(
        f"missing: {', '.join(missing)}. Bring wheels for Python {platform.python_version()} "
        f"({platform.machine()}), made where there is a network by\n"
        "  grep -vE '^(torch|triton|transformers)==' constraints.txt > others.txt\n"
        "  pip download -d wheels -c others.txt torch==2.11.* triton==3.6.* "
        f"transformers==5.17.* {' '.join(missing)}\n"
        "and install them by\n  pip install --no-index -f wheels "
        + " ".join(missing),
        file=sys.stderr,
    )
    sys.exit(1)
import torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: everything runs on the CPU")
EOF

# part NAME SECONDS COMMAND...: runs a command for at most SECONDS, and no longer than nine minutes in all
part() {
  name=$1 seconds=$2
  shift 2
  left=$((535 - $(date +%s) + began))
  if [ "$left" -lt "$seconds" ]; then seconds=$left; fi
  if [ "$seconds" -lt 5 ]; then echo "== $name: left out, nine minutes are over"; failed=1; return; fi
  echo "== $name"
  timeout "$seconds" "$@" 2>"$out/$name.err" | tee "$out/$name.txt"
  status=${PIPESTATUS[0]}
  if [ "$status" -eq 124 ]; then echo "$name: stopped after $seconds s"; failed=1
  elif [ "$status" -ne 0 ]; then echo "$name: failed with $status"; tail -5 "$out/$name.err"; failed=1; fi
}

for size in $sizes; do
  part "random_$size" 60 "$python" benchmarks/random_model.py "$size" "$out/$size"
done
part tests 150 "$python" -m pytest -q -W default -m gpu -p no:cacheprovider tests/kernels tests/modeling
if [ -n "$tiny" ]; then
  part output_layer 180 "$python" benchmarks/output_layer.py --dtype bf16 --op linear_logprob \
    --size 640,64,9000 --repeats 1
else
  part output_layer 90 "$python" benchmarks/output_layer.py --dtype bf16 --op linear_logprob \
    --op linear_loss --size 16384,4096,128256 --size 10240,896,151936 --repeats 5
fi
for size in $sizes; do
  if [ -n "$tiny" ]; then
    part "decoding_$size" 120 "$python" benchmarks/decoding.py --source "$out/$size" --batch 1 2 \
      --prompt-tokens 16 --new-tokens 12 --rounds 1 --modes slow fast
    part "rl_step_$size" 240 "$python" benchmarks/rl_step.py --experiment running_sum \
      --source "$out/$size" --rollouts 8 --tokens 12 --repeats 1
    part "pass_cost_$size" 120 "$python" benchmarks/pass_cost.py --source "$out/$size" --axis k --passes 1
  else
    part "decoding_$size" 60 "$python" benchmarks/decoding.py --source "$out/$size" --batch 1 64 \
      --prompt-tokens 128 --rounds 2 --modes slow fast
    part "rl_step_$size" 80 "$python" benchmarks/rl_step.py --experiment running_sum \
      --source "$out/$size" --rollouts 64 --tokens 128 --repeats 2
    part "pass_cost_$size" 30 "$python" benchmarks/pass_cost.py --source "$out/$size" --axis batch \
      --passes 8
  fi
done
# Compiling takes most of this part, so that it is the last one and of one size.
size=${sizes%% *}
if [ -n "$tiny" ]; then
  part "compiled_$size" 150 "$python" benchmarks/decoding.py --source "$out/$size" --batch 1 \
    --prompt-tokens 16 --new-tokens 12 --rounds 1 --modes slow fast --compile
else
  part "compiled_$size" 120 "$python" benchmarks/decoding.py --source "$out/$size" --batch 1 \
    --prompt-tokens 128 --rounds 2 --modes slow fast --compile
fi
echo "== targets: fast mode 0.8 (k + 1) times generate at batch 1 and 64; the output layer at 60 % of"
echo "   the ceiling in bf16; TRL / mtp above 1"
echo "results in $out; $(($(date +%s) - began)) s"
exit "$failed"
