#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs benchmarks on a GPU host without network, in an environment that is installed there already.
# usage: OUT=FOLDER benchmarks/gpu/run.sh STAGE...
#   one       1 GPU:  SmolLM2-135M, all four targets, concurrency 1, 8, 32, 128
#   two       2 GPUs: SmolLM2-135M and an 8B shape, aggregated on one GPU against prefill on one and decode on the other
#   same-gpu  1 GPU:  prefill and decode on it, with UCX's default, with reads by CUDA IPC, and under MPS
#   kvbm      1 GPU:  benchmarks.kvbm, an 8B shape
#   sleep     1 GPU:  benchmarks.gpu.sleep, SmolLM2-135M: aggregated, prefill and decode sleep and wake
#   speculation  1 GPU: benchmarks.gpu.speculation, SmolLM2-135M: without, with n-grams, a draft model and a random Eagle3 head, aggregated and disaggregated
#   multimodal  1 or 2 GPUs: benchmarks.multimodal, an 8B shape with a 27-layer vision encoder: an engine alone and with an encode worker,
#               which share the GPU; with two GPUs they take both, and two engines are measured as well
#   planner-profile  1 GPU: `tandem profile` of an aggregated 8B shape; the profile is left in OUT/planner-profile, for bench planner
# TANDEM_GPU_VENV  the environment (default /opt/tandem)     BUDGET_S  seconds for everything (default 570)
# Each stage leaves three files in OUT: STAGE.jsonl (one report a line), STAGE.log (progress), STAGE.tar.gz (all logs).
# A benchmark that fails is noted and the stage goes on; the exit code is then 1.
set -Eeuo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."
venv="${TANDEM_GPU_VENV:-/opt/tandem}"
out="${OUT:-}"
work="$(mktemp -d)"
log_limit_bytes=$((24 << 20))
failed=0

_environment() {
  export PATH="$venv/bin:$PATH" TANDEM_ROOT="$PWD" TANDEM_RUN_DIR="$work/run" PYTHONUNBUFFERED=1
  export HF_HUB_OFFLINE=1 VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_NO_USAGE_STATS=1
  [ -x "$venv/bin/python" ] || { echo "run.sh: no environment in $venv: install one there, or set TANDEM_GPU_VENV" >&2; exit 2; }
  _link_tandem
}

# Puts the checkout on the environment's path, with its entry points: Triton's stub ignores PYTHONPATH, and there is no pip.
_link_tandem() {
  python - <<'EOF'
import pathlib, sysconfig, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())
site = pathlib.Path(sysconfig.get_path("purelib"))
folders = {str(pathlib.Path(folder).parent.resolve()) for folder in project["tool"]["setuptools"]["package-dir"].values()}
(site / "tandem.pth").write_text("\n".join(sorted(folders)) + "\n")
metadata = site / "tandem_serve-0.dist-info"
metadata.mkdir(exist_ok=True)
(metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tandem-serve\nVersion: 0\n")
groups = {"console_scripts": project["project"]["scripts"], **project["project"]["entry-points"]}
lines = [line for group, names in groups.items() for line in (f"[{group}]", *(f"{name} = {target}" for name, target in names.items()))]
(metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
EOF
}

_say() { printf '[%4d s] %s\n' "$SECONDS" "$*" | tee -a "$out/$stage.log"; }

# _bench MODULE NAME LIMIT_S ARGUMENTS...: one run of benchmarks.MODULE; its logs are packed at once, in case this script is cut short.
_bench() {
  local module="$1" name="$2" limit="$3" left=$((${BUDGET_S:-570} - SECONDS)) logs="$work/$stage/$2" code=0
  shift 3
  if [ "$left" -lt 60 ]; then _say "$name: left out, the time is used up"; failed=1; return; fi
  mkdir -p "$logs"
  _say "$name: begin"
  timeout -k 60 $((left < limit ? left : limit)) python -m "benchmarks.$module" --json --log-dir "$logs" "$@" \
    > "$logs/report.json" 2> >(tee -a "$out/$stage.log" > "$logs/progress.log") || code=$?
  if [ "$code" -ne 0 ]; then _say "$name: exit code $code"; failed=1; fi
  timeout 90 python -m tandem_cli.main stop >> "$logs/stop.log" 2>&1 || _say "$name: something could not be stopped, see stop.log"
  tail -n 1 "$logs/report.json" | sed "s/^{/{\"run\": \"$name\", /" | tee -a "$out/$stage.jsonl"
  grep -h '^vllm:nixl_' "$logs"/disagg-decode*-metrics.txt 2> /dev/null | grep -v _bucket >> "$out/$stage.log" || true
  _pack
}

# All logs of the stage so far in one archive; of an oversized log (UCX can be verbose) its first and last part.
_pack() {
  local file
  find "$work/$stage" -type f -size "+${log_limit_bytes}c" | while read -r file; do
    { head -c $((log_limit_bytes / 2)) "$file"; printf '\n[...]\n'; tail -c $((log_limit_bytes / 2 - 64)) "$file"; } > "$file.cut"
    mv "$file.cut" "$file"
  done
  tar -C "$work" -czf "$out/$stage.tar.gz" "$stage"
}

_stage_one() {
  _bench serving smollm2 540 --model "$small" --targets inproc,openai,triton,disagg --concurrency 1,8,32,128
}

_stage_two() {
  _bench serving smollm2 260 --model "$small" --targets inproc,triton,disagg --concurrency 1,32
  python -m benchmarks.shapes "$small" "$work/llama-8b-shape"
  _bench serving llama-8b-shape 330 --model "$work/llama-8b-shape" --targets triton,disagg --concurrency 1,16 --requests-per-level 16,128 \
    --input-words 2500 --output-tokens 128 --engine-arg load_format=dummy --engine-arg max_model_len=4096
}

_stage_same_gpu() {
  local load=(--model "$small" --targets disagg --concurrency 1,8,32 --requests-per-level 16,64,128)
  local -x CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
  _bench serving aggregated 120 "${load[@]}" --targets triton
  UCX_CUDA_IPC_ENABLE_GET_ZCOPY=auto _bench serving ucx-default 120 "${load[@]}"
  _bench serving cuda-ipc-get 120 "${load[@]}"
  _bench serving cuda-ipc-get-block-64 120 "${load[@]}" --engine-arg block_size=64
  _bench_under_mps "${load[@]}"
}

_stage_kvbm() {
  _bench kvbm llama-8b-shape 900
}

_stage_sleep() {
  CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" _bench gpu.sleep smollm2 240 --model "$small"
}

_stage_speculation() {
  CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}" _bench gpu.speculation smollm2 260 --model "$small"
}

_stage_multimodal() {
  _bench multimodal vision-8b-shape 540 --timeout 170  # a start takes up to 130 s, and with two GPUs there are three
}

# As many points as fit into BUDGET_S; it goes on where it was if OUT/planner-profile has a journal of an earlier run.
_stage_planner_profile() {
  local logs="$work/$stage" budget="${BUDGET_S:-570}" admin limit
  local -x CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
  python -m benchmarks.shapes "$small" "$work/llama-8b-shape"
  timeout -k 30 $((budget - SECONDS)) python -m tandem_cli.main serve --detach --mode agg --routers 0 --start-timeout $((budget - SECONDS - 45)) \
    --http-port 18300 --grpc-port 18301 --metrics-port 18302 --admin-port 18310 --kv-event-port 18320 --side-channel-port 18330 \
    --model "$work/llama-8b-shape" --load-format dummy --max-model-len 16384 --max-num-seqs 256 \
    > "$logs/serve.log" 2>&1 || { _say "planner-profile: the server did not start"; failed=1; _keep_server_log; return; }
  admin="$(python -c 'import json, sys; print(next(iter(json.load(open(sys.argv[1]))["admin_urls"].values())))' "$TANDEM_RUN_DIR/18300/state.json")"
  limit=$((budget - SECONDS - 40))
  _say "planner-profile: the server answers; $limit s for measuring"
  timeout -k 10 $((limit + 15)) python -m tandem_cli.main profile --json --url localhost:18301 --model vllm --admin "$admin" \
    --out "$out/planner-profile" --limit-s "$limit" --max-context 16000 --vocabulary 49000 \
    --prefill-points 10 --contexts 5 --loads 5 --decode-tokens 48 --ttft 300 --itl 10 --osl 300 \
    > "$logs/report.json" 2> >(tee -a "$out/$stage.log" >&2) || { _say "planner-profile: cut short; run it again to go on"; failed=1; }
  tail -n 1 "$logs/report.json" | tee -a "$out/$stage.jsonl"
  timeout 60 python -m tandem_cli.main stop --http-port 18300 --drain-timeout-s 0 >> "$logs/stop.log" 2>&1 || _say "something could not be stopped, see stop.log"
  _keep_server_log
}

# tritonserver's own log lies beside the folder of its run.
_keep_server_log() {
  cp "$TANDEM_RUN_DIR"/*.log "$work/$stage/" 2> /dev/null || true
  _pack
}

# Lets kernels of both engines run side by side instead of in turns. Only a daemon of ours: the GPU's compute mode stays as it is.
_bench_under_mps() {
  if ! command -v nvidia-cuda-mps-control > /dev/null; then _say "mps: left out, there is no nvidia-cuda-mps-control"; return; fi
  export CUDA_MPS_PIPE_DIRECTORY="$work/mps" CUDA_MPS_LOG_DIRECTORY="$work/$stage/mps-daemon"
  mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
  if timeout 30 nvidia-cuda-mps-control -d; then
    _bench serving mps 120 "$@"
    echo quit | timeout 30 nvidia-cuda-mps-control || _say "mps: the daemon did not quit"
  else
    _say "mps: left out, the daemon did not start"
  fi
  unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}

_main() {
  local stage small
  [ $# -gt 0 ] || { sed -n '3,16p' benchmarks/gpu/run.sh; exit 2; }
  [ -n "$out" ] || { echo "run.sh: set OUT to the folder for the results" >&2; exit 2; }
  for stage in "$@"; do
    case "$stage" in one | two | same-gpu | kvbm | sleep | speculation | multimodal | planner-profile) ;; *) echo "run.sh: unknown stage $stage: choose one, two, same-gpu, kvbm, sleep, speculation, multimodal or planner-profile" >&2; exit 2 ;; esac
  done
  _environment
  mkdir -p "$out"
  small="$(python -m tandem_cli.main model)"
  for stage in "$@"; do
    mkdir -p "$work/$stage"
    { nvidia-smi; nvidia-smi topo -m; } > "$work/$stage/nvidia-smi.txt" 2>&1 || true
    "_stage_${stage//-/_}"
    _say "stage $stage: end"
  done
  exit "$failed"
}

_main "$@"
