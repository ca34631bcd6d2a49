# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine inside one Triton Python model, in any role, with its admin server."""
