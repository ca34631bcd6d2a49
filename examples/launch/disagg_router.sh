#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Disaggregated behind the router: it chooses a decode worker for each request, and a prefill worker if a remote prefill is worth it.
# Needs: four GPUs (fewer are shared), or a CPU with about 20 GiB of memory.
set -Eeuo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

./build.sh serve --detach --mode disagg --prefill 2 --decode 2 --routers 1 "$@"

./build.sh tandem generate --url "${TANDEM_URL:-localhost:8001}" --model router "What is the capital of France?"
echo "Still serving; ./build.sh stop ends it." >&2
