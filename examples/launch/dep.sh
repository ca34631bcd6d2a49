#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Data parallel with expert parallelism: one worker whose engine has several ranks, each with its own KV cache and its share of a
# mixture-of-experts model's experts. The router places on ranks, and the request carries its rank.
# Needs: four GPUs and a mixture-of-experts model, e.g. dep.sh --model Qwen/Qwen3-30B-A3B
set -Eeuo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../.."

./build.sh serve --detach --mode agg --routers 1 --data-parallel-size "${RANKS:-4}" --enable-expert-parallel "$@"

./build.sh tandem generate --url "${TANDEM_URL:-localhost:8001}" --model router "What is the capital of France?"
echo "Still serving; ./build.sh stop ends it." >&2
