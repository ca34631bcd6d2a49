#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Aggregated: one engine computes prompts and answers. The simplest server, and the one to compare others with.
# Needs: one GPU, or a CPU with about 5 GiB of memory. Arguments go to `serve`: agg.sh --model /models/Llama-3.1-8B
set -Eeuo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

# One model, `vllm`, and no router: with one engine there is nothing to choose.
./build.sh serve --detach --mode agg --routers 0 "$@"

./build.sh tandem generate --url "${TANDEM_URL:-localhost:8001}" --model vllm "What is the capital of France?"
echo "Still serving; ./build.sh stop ends it." >&2
