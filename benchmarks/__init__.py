# SPDX-License-Identifier: Apache-2.0
"""What Tandem costs and what it gains, measured against vLLM itself on the same machine in the same run."""
