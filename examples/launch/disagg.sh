#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Disaggregated: one engine computes prompts, another one answers, and the KV blocks travel between them over NIXL. Long prompts then
# don't make running answers stutter.
# Needs: two GPUs (on one, see disagg_same_gpu.sh), or a CPU with about 10 GiB of memory.
set -Eeuo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

# The models `prefill` and `decode`, each on a GPU of its own, and the ensemble `disagg` that chains them: clients name only that.
./build.sh serve --detach --mode disagg --routers 0 "$@"

./build.sh tandem generate --url "${TANDEM_URL:-localhost:8001}" --model disagg "What is the capital of France?"
echo "Still serving; ./build.sh stop ends it." >&2
